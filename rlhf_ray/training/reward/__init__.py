"""Reward models: what is learnt from, how, and what the result is worth."""
