"""The service: one door for HTTP, and behind it policy, reward model, records and versions."""
