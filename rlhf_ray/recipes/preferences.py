"""`preferences`: people's own choices from a file; nobody knows the gold score.

The base policy imitates the answers that people preferred, the reward model learns from the choices, and PPO writes
to the prompts.
"""

from collections.abc import Sequence

from rlhf_ray.feedback.formats import Pair
from rlhf_ray.types import Exchange, Prompt


class PreferencesRecipe:
    """Pairs that are already split; prompts of one group lie on one side."""

    def __init__(self, train: Sequence[Pair], held_out: Sequence[Pair], *, described: str) -> None:
        self.train_pairs, self.held_out_pairs, self.described = train, held_out, described
        self.train_prompts: Sequence[Prompt] = list({pair.prompt.id: pair.prompt for pair in train}.values())
        self.held_out_prompts: Sequence[Prompt] = list({pair.prompt.id: pair.prompt for pair in held_out}.values())

    def corpus(self) -> list[str]:
        """Every turn of the training side once, liked or not: language to learn from."""
        texts = [
            text
            for pair in self.train_pairs
            for text in (*(message.content for message in pair.prompt.messages), pair.chosen, pair.rejected)
        ]
        return list(dict.fromkeys(texts))

    def demonstrations(self) -> list[Exchange]:
        """The answers that people preferred."""
        return [Exchange(pair.prompt, pair.chosen) for pair in self.train_pairs]

    def gold(self, prompt: Prompt, response: str) -> None:
        """Unknown."""
        return
