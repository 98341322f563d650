"""What a run learns to do: its prompts, its texts, its demonstrations and, in invented worlds, its gold score."""
