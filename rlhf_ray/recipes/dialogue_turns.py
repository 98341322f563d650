"""A dialogue of several turns in the invented shop: a customer who has more than one thing to complain about.

    rollout.environment=rlhf_ray.recipes.dialogue_turns:Customer

An answer pleases this customer where it names the thing that their last turn was about, and no other: so what was said
in earlier turns has to be read past. Their pleasure, averaged over the turns, is what a dialogue earns.
"""

import random
import re
from collections.abc import Sequence

from rlhf_ray.recipes.dialogue_phrases import COLOURS, ITEMS, PROBLEMS
from rlhf_ray.types import Message, Prompt

THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(ITEMS)})\b")
THANKS = ("Thank you.", "I see.", "Good.")


class Customer:
    """An `Environment`: opens with the prompt, and after each answer comes up with something else."""

    def __init__(self, prompt: Prompt, seed: int) -> None:
        self._draw = random.Random(seed)
        self._next: Sequence[Message] = prompt.messages
        self._thing = _things(prompt.messages[-1].content)
        self._pleased: list[float] = []

    def observe(self) -> Sequence[Message]:
        """What they say now."""
        return self._next

    def act(self, response: str) -> bool:
        """Weighs the answer; there is always something else."""
        self._pleased.append(float(_things(response) == self._thing))
        thing = f"{self._draw.choice(COLOURS)} {self._draw.choice(ITEMS)}"
        complaint = self._draw.choice(self._draw.choice(PROBLEMS).complaints).format(thing=thing)
        self._next = (Message("user", f"{self._draw.choice(THANKS)} {complaint}"),)
        self._thing = {thing}
        return True

    def reward(self) -> float:
        """Share of the turns that pleased them."""
        return sum(self._pleased) / len(self._pleased)


def _things(text: str) -> set[str]:
    return {" ".join(found) for found in THING.findall(text)}
