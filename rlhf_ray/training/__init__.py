"""The loops: supervised fits, the reward model's fit, PPO, and what is written down about them."""
