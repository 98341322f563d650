"""What feedback is worth, against the model learnt anew without it."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import RewardModelConfig, load_config
from rlhf_ray.data.judgements import Judgement, Ordered, comparisons
from rlhf_ray.errors import InputError
from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.registry import Registry
from rlhf_ray.models.reward import RewardModel, new_reward_model
from rlhf_ray.training.beginning import take_over
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.report import write_report
from rlhf_ray.training.reward.explain import Question, explain, mistakes, table
from rlhf_ray.training.reward.stage import make_reward_model
from rlhf_ray.training.run_folder import RunFolder
from rlhf_ray.types import Message
from tests.models.tiny import make_policy_folder, make_prompt

WORDS = ["lamp", "chair", "today", "new", "broken", "pay", "back"]


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    base = make_policy_folder(tmp_path_factory.mktemp("base") / "base")
    return new_reward_model(base, "encoder", texts=[*WORDS, "sorry"] * 3)


def choices(n: int, *, seed: int) -> list[Judgement]:
    """Four people of whom the last prefers what the others do not."""
    rng, made = random.Random(seed), []
    for number in range(n):
        who = ("ann", "bob", "cat", "foe")[number % 4]
        answers = [f"{rng.choice(WORDS)} sorry", f"{rng.choice(WORDS)} {rng.choice(WORDS)}"]
        likes_sorry = (rng.random() < 0.9) != (who == "foe")
        ranks = (1, 2) if likes_sorry else (2, 1)
        made.append(Ordered(make_prompt(f"{rng.choice(WORDS)} {number}"), tuple(answers), ranks, annotator=who))
    return [*made]


@pytest.fixture(scope="module")
def asked(reward_model: RewardModel) -> tuple[Question, list[Judgement], list[Judgement], RewardModelConfig]:
    told = RewardModelConfig(feedback="pairs", ties="davidson")
    train = choices(400, seed=0)
    held_out = [replace(item, annotator="") for item in choices(800, seed=1) if item.annotator != "foe"]
    return Question(reward_model, train, comparisons(held_out), told), train, held_out, told


def test_who_does_harm_is_found(asked: tuple[Question, list[Judgement], list[Judgement], RewardModelConfig]) -> None:
    influences = {part.name: part for part in asked[0].ask(lambda item: item.annotator)}
    assert {name: part.judgements for name, part in influences.items()} == dict.fromkeys(
        ("ann", "bob", "cat", "foe"), 100
    )
    assert influences["foe"].helps < 0 < min(influences[name].helps for name in ("ann", "bob", "cat"))
    assert list(influences)[-1] == "foe"


def test_the_estimate_says_what_leaving_some_out_really_does(
    asked: tuple[Question, list[Judgement], list[Judgement], RewardModelConfig],
) -> None:
    """Twenty judgements at a time."""
    question, train, _, _ = asked
    parts = [train[start : start + 20] for start in range(0, 240, 20)]
    said, done = (
        torch.tensor([worth(part) for part in parts]) for worth in (question.estimated_worth_of, question.worth_of)
    )
    assert float(torch.corrcoef(torch.stack([said, done]))[0, 1]) > 0.9
    assert float((said - done).abs().max()) < 0.5 * float(done.abs().max())


def test_without_all_of_it_nothing_is_known(
    asked: tuple[Question, list[Judgement], list[Judgement], RewardModelConfig],
) -> None:
    question, train, _, _ = asked
    [everything] = question.ask(lambda item: item.kind)
    assert everything.judgements == len(train)
    assert everything.helps + question.loss == pytest.approx(math.log(2), abs=1e-3)


def test_the_worst_mistakes_come_first_and_once_a_prompt(reward_model: RewardModel) -> None:
    pairs = comparisons(choices(60, seed=2))
    found = mistakes(reward_model, [*pairs, *pairs], worst=5, logit_scale=2.0)
    margins = [mistake["margin"] for _, mistake in found]
    assert len(found) == 5 == len({pair.prompt.id for pair, _ in found})
    assert margins == sorted(margins)
    assert margins[-1] <= 0
    assert found[0][1]["probability"] == pytest.approx(1 / (1 + 2.718281828 ** (-2 * margins[0])))


def make_run(tmp_path: Path, feedback: Sequence[Feedback] | None = None, *more: str) -> Path:
    """A run whose reward model, an ensemble of two, has learnt from its own store, less what measures the policy."""
    settings = [
        f"run.root={tmp_path}",
        "run.id=mine",
        "recipe=preferences",
        "data.format=preference",
        "data.held_out=1",
    ]
    settings += [f"data.path={tmp_path / 'choices.jsonl'}", "reward_model.fit.max_epochs=2"]
    settings += ["reward_model.ensemble.members=2", *more]
    config = load_config(None, settings)
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps({**row, "prompt": p}) + "\n" for p in "ab"))
    folder = RunFolder.open(config)
    if feedback is None:
        feedback = [as_feedback(item) for item in choices(120, seed=0) if isinstance(item, Ordered)]
    with FeedbackStore(folder.feedback_db) as store:
        [measured] = make_recipe(config).held_out_prompts
        store.add([*feedback, feedback[0].model_copy(update={"id": "measured", "group": measured.group})])
        snapshot = store.freeze()
    folder.write_json("feedback.json", {"snapshot": snapshot.id, "sha256": snapshot.sha256, "rows": snapshot.rows})
    make_policy_folder(folder.base_policy)
    record = make_reward_model(
        config, folder.base_policy, folder.reward_model, store=str(folder.feedback_db), snapshot=snapshot.id
    )
    folder.write_json("reward_model.json", record)
    folder.close()
    return folder.path


def as_feedback(item: Ordered) -> Feedback:
    return Feedback(
        messages=(Message("user", item.prompt.messages[0].content),),
        prompt_id=item.prompt.id,
        group=item.prompt.id,
        annotator=item.annotator,
        answers=tuple(Answer(text=text, sampler="base") for text in item.answers),
        ranking=Ranking(ranks=item.ranks),
    )


def test_a_run_is_explained_and_its_report_and_card_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    card = (run / "reward_model" / "README.md").read_text()
    assert "Reward model of the run mine" in card
    assert "- 108 pairs" in card
    assert "against what people chose" in card
    assert "one of 2 models whose mean was measured" in card
    told = explain(run, worst=3, say=lambda line: None)
    assert json.loads((run / "explained.json").read_text()) == told
    assert [row["name"] for row in told["by_kind"]] == ["pairs"]
    assert {row["name"] for row in told["by_annotator"]} == {"ann", "bob", "cat", "foe"}
    lines = table(told)
    assert lines[0].startswith(f"loss {told['loss']:.4f} nats on 12 held-out choices")
    page = write_report(run).read_text()
    for wanted in ("Why it says what it says", "Its worst mistakes", "on people&#39;s pairs", "108", "surely better"):
        assert wanted in page


def test_what_was_held_out_is_that_of_the_run_that_trained_it(tmp_path: Path) -> None:
    """With a seed of its own, a run that takes the model over would hold out what the model has learnt from."""
    run = make_run(tmp_path)
    settings = [f"run.root={tmp_path}", "run.id=later", f"run.from={run}", "run.take=reward_model", "seed=5"]
    settings += ["recipe=preferences", "data.format=preference", f"data.path={tmp_path / 'choices.jsonl'}"]
    config = load_config(None, [*settings, "data.held_out=1", "reward_model.held_out=0.3"])
    folder = RunFolder.open(config)
    take_over(config, folder, say=lambda line: None)
    folder.close()
    first, later = (explain(path, worst=3, say=lambda line: None) for path in (run, folder.path))
    assert later["held_out"] == 12
    assert later["loss"] == first["loss"]
    assert later["mistakes"] == first["mistakes"]


def test_a_model_of_answers_that_stand_alone_says_on_its_card_that_nothing_was_compared(tmp_path: Path) -> None:
    thumbs = [
        as_feedback(item).model_copy(
            update={
                "answers": (Answer(text=item.answers[number % 2], sampler="base"),),
                "ranking": None,
                "rating": Rating(value=float(number % 2 == 0), scale="thumb"),
            }
        )
        for number, item in enumerate(choices(120, seed=0))
        if isinstance(item, Ordered)
    ]
    run = make_run(tmp_path, thumbs, "reward_model.feedback=thumbs")
    card = " ".join((run / "reward_model" / "README.md").read_text().split())
    assert "how often it is right is not known" in card
    assert "of 12 held-out answers one with a thumb up is scored above" in card
    assert "Reward model" in write_report(run).read_text()
    with pytest.raises(InputError, match=r"none of the 12 judgements that .* holds out compare two answers"):
        explain(run, worst=3, say=print)
    lineage = {"gate": json.loads((run / "reward_model.json").read_text())["gate"]}
    model = Registry(tmp_path / "registry").publish("reward_model", run / "reward_model", lineage=lineage)
    assert "nothing shows that it beats no model" in model.not_good_enough


def test_a_run_without_a_reward_model_of_its_own_cannot_be_explained(tmp_path: Path) -> None:
    RunFolder.open(load_config(None, [f"run.root={tmp_path}", "run.id=none"])).close()
    with pytest.raises(InputError, match="has trained no reward model"):
        explain(tmp_path / "none", worst=3, say=print)
