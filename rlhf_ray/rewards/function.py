"""A Python function of the user's as a source of rewards."""

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.plugins import load_plugin
from rlhf_ray.rewards.source import Given, as_reward
from rlhf_ray.types import Exchange


class FunctionSource:
    """Calls `function(prompts=, completions=)`, lists of messages as TRL gives them to its reward functions.

    What the function raises is the run's error. A completion for which it returns None, NaN or no number has no reward;
    so have all of a batch for which it returns too few or too many.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def score(self, exchanges: Sequence[Exchange]) -> Given:
        """See `Source.score`."""
        returned = self.function(
            prompts=[
                [{"role": turn.role, "content": turn.content} for turn in exchange.prompt.messages]
                for exchange in exchanges
            ],
            completions=[[{"role": "assistant", "content": exchange.response}] for exchange in exchanges],
        )
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        values = list(returned)
        if len(values) != len(exchanges):
            return Given([None] * len(exchanges), counts=Counter(malformed=1))
        return Given([as_reward(_plain(value)) for value in values])


def load_function(of: str) -> FunctionSource:
    """`package.module:function`; `ConfigError` where there is none."""
    return FunctionSource(load_plugin(of, key="rewards.sources"))


def _plain(value: Any) -> Any:
    """A number of numpy's or torch's as Python's."""
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError) as error:
        raise InputError(f"a reward function returned an array for one completion: {error}") from error
