"""The base policy: from text to a model that answers, by self-supervised and then supervised training."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config import Config
from rlhf_ray.data.splits import split_by_group
from rlhf_ray.errors import DataError
from rlhf_ray.models.policy import (
    encode_exchange,
    encode_text,
    load_policy,
    load_tokenizer,
    new_policy,
    save_policy,
    train_tokenizer,
)
from rlhf_ray.recipes.base import Recipe
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.sft import fit_language_model
from rlhf_ray.types import Exchange

VALIDATION_SHARE = 0.05
Say = Callable[[str], None]


def make_base_policy(
    config: Config, folder: Path, *, pretrained: Path | None = None, fits: Path | None = None, say: Say = print
) -> dict[str, Any]:
    """Trains the base policy of a config into `folder`, a plain Hugging Face folder; returns `base.json`'s content.

    Broken-off fits go on from their checkpoints in `fits`. A new model that imitates answers which people judged is
    saved in `pretrained` before it does.

    Without `model.path` tokenizer and model are new, and learn the recipe's corpus first; with it they are the
    user's, and only the demonstrations are learnt. `sft.max_epochs: 0` takes a model as it is.
    """
    recipe = make_recipe(config)
    done: dict[str, Any] = {}
    common: dict[str, Any] = {"config": config, "fits": fits, "say": say}
    if config.model.path is None:
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(
            texts_of(recipe), vocabulary=config.model.vocabulary, context=config.model.context
        )
        model: PreTrainedModel = new_policy(config.model, tokenizer, seed=config.seed)
    else:
        tokenizer = load_tokenizer(config.model.path, context=config.model.context)
        model = load_policy(config.model.path)
    say(f"base policy: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    if config.model.path is None and config.pretrain.max_epochs > 0:
        texts = [(encode_text(tokenizer, text), 0) for text in recipe.corpus()]
        random.Random(config.seed).shuffle(texts)
        held = max(1, round(VALIDATION_SHARE * len(texts)))
        done["pretrain"] = _fit(model, tokenizer, texts[held:], texts[:held], stage="pretrain", **common)
    if pretrained is not None and config.imitates_judged_answers and config.model.path is None:
        save_policy(pretrained, model, tokenizer)
    if config.sft.max_epochs > 0:
        demonstrations, dropped = fitting(recipe.demonstrations(), tokenizer, config=config)
        for reason, count in dropped.items():
            say(f"sft: {count} demonstrations skipped: {reason}")
        train, validation = split_by_group(
            demonstrations, group=lambda item: item[0].prompt.group, held_out=VALIDATION_SHARE, seed=config.seed
        )
        tokens = [[ids for _, ids in part] for part in (train, validation)]
        done["sft"] = _fit(model, tokenizer, *tokens, stage="sft", **common)
    save_policy(folder, model, tokenizer)
    return {
        **{stage: fit["curve"] for stage, fit in done.items()},
        "fits": {stage: {key: value for key, value in fit.items() if key != "curve"} for stage, fit in done.items()},
    }


def texts_of(recipe: Recipe) -> Iterator[str]:
    """All text of the training side, for a tokenizer to learn from."""
    yield from recipe.corpus()
    for exchange in recipe.demonstrations():
        yield from (message.content for message in exchange.prompt.messages)
        yield exchange.response


def fitting(
    exchanges: Sequence[Exchange], tokenizer: PreTrainedTokenizerBase, *, config: Config
) -> tuple[list[tuple[Exchange, tuple[list[int], int]]], Counter[str]]:
    """Each exchange with its (token ids, prompt length); those beyond the context raise or are counted."""
    kept, dropped = [], Counter[str]()
    for exchange in exchanges:
        try:
            kept.append((exchange, encode_exchange(tokenizer, exchange)))
        except DataError:
            if config.data.on_bad_row == "error":
                raise
            dropped["longer than the context"] += 1
    if not kept:
        raise DataError("no demonstration fits into the context; raise model.context")
    return kept, dropped


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[tuple[list[int], int]],
    validation: list[tuple[list[int], int]],
    *,
    config: Config,
    stage: str,
    fits: Path | None,
    say: Say,
) -> dict[str, Any]:
    result = fit_language_model(
        model,
        tokenizer,
        train,
        validation=validation,
        fit=config.pretrain if stage == "pretrain" else config.sft,
        seed=config.seed,
        stage=stage,
        progress=say,
        folder=fits and fits / stage,
    )
    say(f"{stage}: validation loss {result.validation_loss:.3f} after {result.seconds:.0f} s, flat: {result.flat}")
    return asdict(result)
