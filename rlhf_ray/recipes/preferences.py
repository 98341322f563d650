"""`preferences`: people's own choices from a file; nobody knows the gold score.

The base policy imitates the answers that people preferred, the reward model learns from the choices, and PPO writes
to the prompts.
"""

from collections.abc import Sequence

from rlhf_ray.feedback.schema import Feedback
from rlhf_ray.types import Exchange, Prompt


class PreferencesRecipe:
    """Rankings that are already split; prompts of one group lie on one side."""

    def __init__(self, train: Sequence[Feedback], held_out: Sequence[Feedback], *, described: str) -> None:
        self.train, self.held_out, self.described = train, held_out, described
        self.train_prompts: Sequence[Prompt] = list({item.prompt_id: item.prompt for item in train}.values())
        self.held_out_prompts: Sequence[Prompt] = list({item.prompt_id: item.prompt for item in held_out}.values())

    def corpus(self) -> list[str]:
        """Every turn of the training side once, liked or not: language to learn from."""
        texts = [
            text
            for item in self.train
            for text in (*(message.content for message in item.messages), *(answer.text for answer in item.answers))
        ]
        return list(dict.fromkeys(texts))

    def demonstrations(self) -> list[Exchange]:
        """The answers that people preferred to another."""
        return [
            Exchange(item.prompt, text)
            for item in self.train
            for text in dict.fromkeys(better.text for better, _ in item.preferences)
        ]

    def gold(self, prompt: Prompt, response: str) -> None:
        """Unknown."""
        return
