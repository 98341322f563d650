"""Things that hold weights: policies, reward models, checkpoints of a run."""
