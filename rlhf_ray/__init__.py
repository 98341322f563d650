"""rlhf-ray: people's feedback on a language model's answers, turned into a better model, in one closed loop on Ray."""

__version__ = "0.1.0"
