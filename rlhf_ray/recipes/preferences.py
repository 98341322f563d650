"""`preferences`: what people said, from a file: choices, ratings, thumbs, comments; nobody knows the gold score.

The base policy imitates the answers that people liked, the reward model learns from all that they said, and PPO writes
to the prompts.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

from rlhf_ray.feedback.schema import Feedback
from rlhf_ray.types import Exchange, Prompt


class PreferencesRecipe:
    """Judgements that are already split; prompts of one group lie on one side."""

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
        """The answers that people preferred to another, or rated better than most."""
        given: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        for item in self.train:
            if item.rating is not None:
                given[item.rating.scale, item.rating.aspect].append(item.rating.value)
        means = {scale: statistics.fmean(values) for scale, values in given.items()}

        def liked(item: Feedback) -> Iterator[str]:
            yield from dict.fromkeys(better.text for better, _ in item.preferences)
            rating = item.rating
            if rating is not None and rating.value > means[rating.scale, rating.aspect]:
                yield item.answers[0].text

        found = ((item.prompt, text) for item in self.train for text in liked(item))
        return [Exchange(prompt, text) for prompt, text in found]

    def gold(self, prompt: Prompt, response: str) -> None:
        """Unknown."""
        return
