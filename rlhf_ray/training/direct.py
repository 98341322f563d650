"""Direct learning from feedback: DPO and IPO from choices, KTO from what people called good or bad."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.algo.direct import dpo_loss, ipo_loss, kto_loss
from rlhf_ray.algo.logprobs import token_logprobs
from rlhf_ray.config import Config, DirectConfig
from rlhf_ray.data.splits import split_by_group
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.schema import Feedback, Scale
from rlhf_ray.models.policy import encode_exchange, load_policy, load_tokenizer, save_policy
from rlhf_ray.training.fit import Batch, fit
from rlhf_ray.training.frozen import read_frozen
from rlhf_ray.training.sft import IGNORED, NextToken, Tokens
from rlhf_ray.types import Exchange, Prompt

VALIDATION_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Choice:
    """Two responses to one prompt in tokens, of which the first was preferred."""

    group: str
    better: Tokens
    worse: Tokens


@dataclass(frozen=True, slots=True)
class Verdict:
    """A response in tokens, and whether it was called good."""

    group: str
    response: Tokens
    good: bool


class Ratios:
    """How much likelier responses are to the policy than to the reference, which is fixed."""

    def __init__(self, reference: PreTrainedModel, pad_id: int) -> None:
        self._reference = reference.requires_grad_(False).eval()
        self.collate = NextToken(pad_id).collate

    def of(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """(B) log-ratios in nats."""
        with torch.no_grad():
            reference = _logprobs(self._reference, batch)
        return _logprobs(model, batch) - reference


class ChoiceLoss:
    """DPO or IPO."""

    def __init__(self, ratios: Ratios, config: DirectConfig, *, squared: bool) -> None:
        self._ratios, self._beta, self._loss = ratios, config.beta, ipo_loss if squared else dpo_loss

    def length(self, item: Choice) -> int:
        """Tokens of both, once padded."""
        return 2 * max(len(item.better[0]), len(item.worse[0]))

    def collate(self, items: Sequence[Choice]) -> Batch:
        """The better responses' rows, then the worse ones'."""
        return self._ratios.collate([*(item.better for item in items), *(item.worse for item in items)])

    def terms(self, batch: Batch) -> int:
        """Choices."""
        return len(batch["input_ids"]) // 2

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Summed over the choices."""
        better, worse = self._ratios.of(model, batch).chunk(2)
        return self._loss(better, worse, beta=self._beta).sum()


class VerdictLoss:
    """KTO. Each prompt of a batch with the next one's response shows how far the policy has moved at all."""

    def __init__(self, ratios: Ratios, config: DirectConfig) -> None:
        self._ratios, self._config = ratios, config

    def length(self, item: Verdict) -> int:
        """Tokens of the response with its prompt, and of another in its place."""
        return 2 * len(item.response[0])

    def collate(self, items: Sequence[Verdict]) -> Batch:
        """The responses' rows, then the mismatched ones'; `good` (N)."""
        own = [item.response for item in items]
        others = [*own[1:], *own[:1]]
        swapped = [
            (ids[:prompt] + other[start:], prompt) for (ids, prompt), (other, start) in zip(own, others, strict=True)
        ]
        good = torch.tensor([item.good for item in items])
        return {**self._ratios.collate([*own, *swapped]), "good": good}

    def terms(self, batch: Batch) -> int:
        """Judged responses."""
        return len(batch["good"])

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Summed over the responses."""
        good, config = batch["good"], self._config
        rows = {name: tensor.chunk(2) for name, tensor in batch.items() if name != "good"}
        own, swapped = ({name: halves[half] for name, halves in rows.items()} for half in (0, 1))
        with torch.no_grad():
            drift = self._ratios.of(model, swapped)
        losses = kto_loss(
            self._ratios.of(model, own),
            good,
            drift,
            beta=config.beta,
            weight_good=config.weight_good,
            weight_bad=config.weight_bad,
        )
        return losses.sum()


def make_direct_policy(
    config: Config, base: Path, folder: Path, *, store: str, snapshot: str, fits: Path | None = None
) -> dict[str, Any]:
    """Trains the base policy on a snapshot, saves it into `folder`, and returns `direct.json`'s content.

    A broken-off fit goes on from its checkpoints in `fits`.
    """
    feedback = read_frozen(store, snapshot, config=config, say=print)
    tokenizer, policy = load_tokenizer(base, context=config.model.context), load_policy(base)
    ratios = Ratios(load_policy(base), int(tokenizer.pad_token_id))
    objective: VerdictLoss | ChoiceLoss
    items: Sequence[Any]
    if config.method == "kto":
        objective, items = VerdictLoss(ratios, config.direct), verdicts(feedback, tokenizer, config)
    else:
        objective = ChoiceLoss(ratios, config.direct, squared=config.method == "ipo")
        items = choices(feedback, tokenizer, config)
    result, count = _fit(policy, objective, items, config, fits)
    save_policy(folder, policy, tokenizer)
    return {"method": config.method, "judgements": count, **result}


def choices(feedback: Sequence[Feedback], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Choice]:
    """Pairs that people told apart, `direct.pairs` a prompt at most, drawn by the seed; `DataError` where none is."""
    found = []
    preferred = ((item.prompt, answers) for item in feedback for answers in item.preferences)
    for prompt_id, group in groupby(sorted(preferred, key=lambda one: one[0].id), key=lambda one: one[0].id):
        pairs = list(group)
        for prompt, answers in random.Random(f"{config.seed}/{prompt_id}").sample(
            pairs, min(config.direct.pairs, len(pairs))
        ):
            better, worse = (_encoded(tokenizer, prompt, answer.text, config) for answer in answers)
            if better and worse:
                found.append(Choice(prompt.group, better, worse))
    if not found:
        raise DataError(
            f"the feedback holds no choice between two answers for method={config.method}; kto takes ratings"
        )
    return found


def verdicts(feedback: Sequence[Feedback], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Verdict]:
    """Responses called good or bad: by a thumb, by stars, or by who was preferred; `DataError` where one kind lacks.

    Of stars `direct.good_from` and more are good. Of a choice the preferred one is good and the other bad, in as many
    pairs a prompt as `choices` takes.
    """
    found: list[Verdict] = []
    enough: dict[Scale, float] = {"thumb": 1.0, "stars": config.direct.good_from}
    for scale, least in enough.items():
        for item in feedback:
            if item.rating is None or item.rating.scale != scale or item.rating.aspect != "overall":
                continue
            response = _encoded(tokenizer, item.prompt, item.answers[0].text, config)
            if response:
                found.append(Verdict(item.group, response, item.rating.value >= least))
    if not found:
        pairs = choices(feedback, tokenizer, config)
        found = [Verdict(pair.group, *said) for pair in pairs for said in ((pair.better, True), (pair.worse, False))]
    if len({verdict.good for verdict in found}) < 2:
        raise DataError(f"all {len(found)} answers are called the same; set direct.good_from, or give more feedback")
    return found


def _fit(
    policy: PreTrainedModel, objective: Any, items: Sequence[Any], config: Config, fits: Path | None
) -> tuple[dict[str, Any], int]:
    train, validation = split_by_group(
        items, group=lambda item: item.group, held_out=VALIDATION_SHARE, seed=config.seed
    )
    result = fit(
        policy,
        objective,
        train,
        validation=validation,
        config=config.direct,
        seed=config.seed,
        stage=config.method,
        progress=print,
        folder=fits and fits / config.method,
    )
    return asdict(result), len(train)


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, config: Config) -> Tokens | None:
    try:
        return encode_exchange(tokenizer, Exchange(prompt, text))
    except DataError:
        if config.data.on_bad_row == "error":
            raise
        return None


def _logprobs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B) log-probs of the responses, whose tokens alone have labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]  # (B, T - 1)
    learned = labels != IGNORED
    return token_logprobs(logits[:, :-1], labels.masked_fill(~learned, 0)).masked_fill(~learned, 0.0).sum(1)
