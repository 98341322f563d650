"""What every recipe offers to the loops."""

from collections.abc import Sequence
from typing import Protocol

from rlhf_ray.types import Exchange, Prompt


class Recipe(Protocol):
    """A task: prompts on both sides of the split, and the text that a base policy is made from.

    `gold` serves measurement alone. No training step, no selection and no reward model may see it.
    """

    train_prompts: Sequence[Prompt]
    held_out_prompts: Sequence[Prompt]

    def corpus(self) -> list[str]:
        """Plain texts for self-supervised training, none from a held-out prompt."""
        ...

    def demonstrations(self) -> list[Exchange]:
        """Answers to learn from by imitation, of whatever quality people gave them."""
        ...

    def gold(self, prompt: Prompt, response: str) -> float | None:
        """The true quality in [0, 1], or None where nobody knows it."""
        ...
