"""A policy that learns from judgements themselves prefers what people preferred."""

import math
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.policy import encode_exchange, load_policy, load_tokenizer
from rlhf_ray.training.direct import ChoiceLoss, Ratios, VerdictLoss, choices, make_direct_policy, verdicts
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.types import Exchange
from tests.models.tiny import make_policy_folder, make_prompt
from tests.training.fakes import loss_and_terms

GOOD, BAD = "we send a new one today", "sorry"
FAST = [
    "direct.learning_rate=3e-3", "direct.max_epochs=12", "direct.eval_every=20", "direct.batch_size=4",
    "direct.beta=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("base") / "policy", context=64)


def config(method: str, *overrides: str) -> Config:
    return load_config(None, [f"method={method}", "run.id=t", "model.context=64", "rollout.max_tokens=16", *overrides])


def about(number: int, *texts: str, **judgement: object) -> Feedback:
    prompt = make_prompt(f"my lamp {number} arrived broken", id=f"p{number}", group=f"p{number}")
    answers = tuple(Answer(text=text, sampler="base") for text in texts)
    told = {"messages": prompt.messages, "prompt_id": prompt.id, "group": prompt.group, "annotator": "ann"}
    return Feedback(**told, answers=answers, **judgement)


def ranking(number: int, *texts: str) -> Feedback:
    return about(number, *texts, ranking=Ranking(ranks=tuple(range(1, len(texts) + 1))))


def rating(number: int, text: str, value: float, scale: str = "stars") -> Feedback:
    return about(number, text, rating=Rating(value=value, scale=scale))


def log_ratio(policy: Path, base: Path, text: str) -> float:
    """How much likelier an answer to a new prompt has become."""
    tokenizer = load_tokenizer(base)
    ids, prompt = encode_exchange(tokenizer, Exchange(make_prompt("my lamp 99 arrived broken"), text))
    found = []
    for folder in (policy, base):
        with torch.no_grad():
            logprobs = load_policy(folder)(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        found.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[prompt - 1 :].sum().item())
    return found[0] - found[1]


def judged(method: str) -> list[Feedback]:
    if method == "kto":
        thumbs = [(GOOD, 1), (BAD, 0)]
        return [rating(n, text, value, "thumb") for n in range(30) for text, value in thumbs]
    return [ranking(n, GOOD, BAD) for n in range(30)]


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto"])
def test_good_answers_become_likelier_than_bad_ones(base: Path, tmp_path: Path, method: str) -> None:
    with FeedbackStore(tmp_path / "f.db") as store:
        store.add(judged(method))
        snapshot = store.freeze()
    record = make_direct_policy(
        config(method, *FAST), base, tmp_path / "policy", store=str(tmp_path / "f.db"), snapshot=snapshot.id
    )
    assert record["method"] == method
    assert record["judgements"] > 20
    assert record["validation_loss"] <= record["curve"][0]["val_loss"]
    assert log_ratio(tmp_path / "policy", base, GOOD) > log_ratio(tmp_path / "policy", base, BAD) + 1.0


def test_what_the_policy_will_be_measured_on_is_not_learnt_from(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = config("dpo", "direct.max_epochs=1", "data.prompts=40", "data.held_out=8")
    groups = {prompt.group for prompt in make_recipe(wanted).held_out_prompts}
    measured = [ranking(40, GOOD, BAD).model_copy(update={"id": group, "group": group}) for group in groups]
    with FeedbackStore(tmp_path / "f.db") as store:
        store.add([*judged("dpo"), *measured])
        snapshot = store.freeze()
    make_direct_policy(wanted, base, tmp_path / "policy", store=str(tmp_path / "f.db"), snapshot=snapshot.id)
    assert "8 of 38 rows of feedback are left out" in capsys.readouterr().out


def test_before_anything_is_learnt_the_losses_are_those_of_indifference(base: Path) -> None:
    tokenizer, policy = load_tokenizer(base), load_policy(base)
    ratios = Ratios(load_policy(base), int(tokenizer.pad_token_id))
    for squared, wanted in ((False, math.log(2)), (True, 1.0)):  # 1 / (2 beta) squared, at beta 0.5
        objective = ChoiceLoss(ratios, config("dpo").direct, squared=squared)
        batch = objective.collate(choices([ranking(1, GOOD, BAD), ranking(2, BAD, GOOD)], tokenizer, config("dpo")))
        total, count = loss_and_terms(objective, policy, batch)
        assert (total.item() / count, count) == (pytest.approx(wanted, abs=1e-4), 2)
    kto = VerdictLoss(ratios, config("kto", "direct.weight_bad=2").direct)
    batch = kto.collate(verdicts([rating(1, GOOD, 5), rating(2, BAD, 1)], tokenizer, config("kto")))
    total, count = loss_and_terms(kto, policy, batch)
    assert (total.item(), count) == (pytest.approx(0.5 + 2 * 0.5, abs=1e-4), 2)


def test_some_choices_of_each_prompt_are_drawn_by_the_seed(base: Path) -> None:
    tokenizer, feedback = load_tokenizer(base), [ranking(n, "a", "b", "c", "d") for n in range(5)]
    few = choices(feedback, tokenizer, config("dpo", "direct.pairs=2"))
    assert len(few) == 10
    assert few == choices(list(reversed(feedback)), tokenizer, config("dpo", "direct.pairs=2"))
    assert few != choices(feedback, tokenizer, config("dpo", "direct.pairs=2", "seed=1"))
    assert len(choices(feedback, tokenizer, config("dpo", "direct.pairs=99"))) == 30


def test_thumbs_stars_and_choices_all_say_what_is_good(base: Path) -> None:
    tokenizer = load_tokenizer(base)

    def said(*feedback: Feedback) -> list[bool]:
        return [verdict.good for verdict in verdicts(feedback, tokenizer, config("kto"))]

    assert said(rating(1, GOOD, 1, "thumb"), rating(1, BAD, 0, "thumb")) == [True, False]
    assert said(rating(1, GOOD, 4), rating(1, BAD, 3.5)) == [True, False]
    assert said(ranking(1, GOOD, BAD)) == [True, False]


def test_feedback_of_the_wrong_kind_is_refused_with_the_way_out(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    with pytest.raises(DataError, match="kto takes ratings"):
        choices([rating(1, GOOD, 5)], tokenizer, config("dpo"))
    with pytest.raises(DataError, match=r"direct\.good_from"):
        verdicts([rating(1, GOOD, 5), rating(2, BAD, 4)], tokenizer, config("kto"))
    with pytest.raises(ConfigError, match="method"):
        config("ppo")
