"""A reward model behind HTTP: this project's own service, or any that speaks OpenRLHF's `/get_reward`."""

from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any, Literal

from rlhf_ray.models.policy import prompt_text
from rlhf_ray.rewards.service import Body, Service
from rlhf_ray.rewards.source import Given, as_reward
from rlhf_ray.types import Exchange, Message

Shape = Literal["openrlhf", "rewards"]


class RemoteSource:
    """Asks in batches. An answer with the wrong number of rewards is none; one with a NaN in it lacks that reward."""

    def __init__(self, service: Service, *, shape: Shape, batch: int) -> None:
        self.service, self.shape, self.batch = service, shape, batch

    def score(self, exchanges: Sequence[Exchange]) -> Given:
        """See `Source.score`."""
        batches = list(self._batches(exchanges))
        make_body = _openrlhf if self.shape == "openrlhf" else _own
        answers, counts = self.service.ask([make_body(batch) for batch in batches], _rewards)
        rewards: list[float | None] = []
        for batch, answer in zip(batches, answers, strict=True):
            rewards += answer if answer is not None else [None] * len(batch)
        return Given(rewards, counts=counts)

    def _batches(self, exchanges: Sequence[Exchange]) -> "chain[Sequence[Exchange]]":
        """At most `batch` each; for `/v1/rewards` also of one prompt each."""
        alike = [list(exchanges)]
        if self.shape == "rewards":
            alike = [list(group) for _, group in groupby(exchanges, key=lambda exchange: exchange.prompt.messages)]
        return chain.from_iterable(
            [group[start : start + self.batch] for start in range(0, len(group), self.batch)] for group in alike
        )


def _openrlhf(batch: Sequence[Exchange]) -> dict[str, Any]:
    """Plain text, a line a turn: the service's own template is not known here."""
    return {
        "query": [prompt_text([*e.prompt.messages, Message("assistant", e.response)]) for e in batch],
        "prompts": [prompt_text(e.prompt.messages) for e in batch],
        "labels": ["" for _ in batch],
    }


def _own(batch: Sequence[Exchange]) -> dict[str, Any]:
    turns = [{"role": turn.role, "content": turn.content} for turn in batch[0].prompt.messages]
    return {"messages": turns, "completions": [exchange.response for exchange in batch]}


def _rewards(body: Body, answer: Mapping[str, Any]) -> list[float | None]:
    rewards, wanted = answer["rewards"], len(body.get("query") or body["completions"])
    if not isinstance(rewards, list) or len(rewards) != wanted:
        raise ValueError(f"no list of {wanted} rewards")
    return [as_reward(reward) for reward in rewards]
