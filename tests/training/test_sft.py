import random
from typing import Any

import pytest
import torch

from rlhf_ray.config import FitConfig
from rlhf_ray.training.fit import FitResult, mean_loss
from rlhf_ray.training.sft import IGNORED, NextToken, fit_language_model
from tests.models.tiny import make_policy, make_tokenizer
from tests.training.fakes import loss_and_terms


def copies(n: int, *, seed: int) -> list[tuple[list[int], int]]:
    """Two random tokens, then the first of them and the end: the prompt is noise, the response can be known."""
    rng = random.Random(seed)
    pairs = [(rng.randrange(6, 20), rng.randrange(20, 40)) for _ in range(n)]
    return [([first, second, first, 2], 2) for first, second in pairs]


def test_only_tokens_after_the_prompt_are_learned() -> None:
    batch = NextToken(pad_id=0).collate([([7, 8, 9, 2], 2), ([7, 9], 0)])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 2], [7, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 9, 2], [7, 9, IGNORED, IGNORED]]


def test_the_loss_is_the_nats_of_each_response_token_given_those_before_it() -> None:
    model, objective = make_policy(make_tokenizer()), NextToken(pad_id=0)
    total, terms = loss_and_terms(objective, model, objective.collate([([7, 8, 9, 2], 2)]))
    logprobs = model(torch.tensor([[7, 8, 9, 2]])).logits.log_softmax(-1)
    assert terms == 2
    assert total.item() == pytest.approx(-(logprobs[0, 1, 9] + logprobs[0, 2, 2]).item(), rel=1e-5)


def test_the_loss_does_not_depend_on_padding() -> None:
    model, objective = make_policy(make_tokenizer()), NextToken(pad_id=0)
    items = [([7, 8, 9, 2], 2), ([7, 9], 0), ([7] * 20, 3)]
    total, terms = loss_and_terms(objective, model, objective.collate(items))
    alone = [loss_and_terms(objective, model, objective.collate([item])) for item in items]
    assert terms == sum(count for _, count in alone)
    assert total.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-5)


def test_a_first_token_is_never_learned_for_nothing_precedes_it() -> None:
    model, objective = make_policy(make_tokenizer()), NextToken(pad_id=0)
    assert loss_and_terms(objective, model, objective.collate([([7, 9], 0)]))[1] == 1


def test_validation_weighs_tokens_and_not_batches() -> None:
    model, objective = make_policy(make_tokenizer()), NextToken(pad_id=0)
    items = [([7, 8], 0), ([9] * 40, 0)]
    total, terms = loss_and_terms(objective, model, objective.collate(items))
    assert mean_loss(model, objective, items) == pytest.approx(total.item() / terms, rel=1e-5)


def fit_copies(*, seed: int = 0, **overrides: Any) -> tuple[FitResult, dict[str, torch.Tensor]]:
    fields = {"learning_rate": 1e-2, "batch_size": 16, "max_epochs": 8, "eval_every": 20, **overrides}
    tokenizer = make_tokenizer()
    model = make_policy(tokenizer)
    result = fit_language_model(
        model,
        tokenizer,
        copies(256, seed=1),
        validation=copies(64, seed=2),
        fit=FitConfig(**fields),
        seed=seed,
        stage="sft",
        progress=lambda line: None,
    )
    return result, model.state_dict()


def test_a_policy_learns_to_answer_from_its_prompt() -> None:
    result, _ = fit_copies()
    assert result.curve[0]["val_loss"] > 0.5  # of a copied and an end token, a mean of two
    assert result.validation_loss < 0.15
    assert result.tokens_per_s > 0


def test_fits_of_one_seed_end_in_the_same_bits_and_of_two_do_not() -> None:
    first, again, other = (fit_copies(seed=seed, max_epochs=1)[1] for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
