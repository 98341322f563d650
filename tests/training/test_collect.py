"""Feedback into the store: from simulated annotators and from people's files."""

from pathlib import Path

import pytest

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import DataError
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.recipes.dialogue import DialogueRecipe
from rlhf_ray.recipes.preferences import PreferencesRecipe
from rlhf_ray.training.collect import bring_over, collect_again, collect_from_annotators, collect_from_people
from rlhf_ray.types import Exchange, GenerationRequest, Rollout, Sampling
from tests.recipes.test_preferences import make_pair
from tests.training.fakes import Roles, Tokenizer


class Wide(Tokenizer):
    model_max_length = 1000


class Mute(Roles):
    """Every second answer is empty."""

    def generate(self, requests: list[GenerationRequest], _: Sampling) -> list[Rollout]:
        rollouts = super().generate(requests, _)
        return [
            r if i % 2 else Rollout(r.id, r.prompt_id, r.prompt_ids, (0,), (-1.0,), 0, "stop")
            for i, r in enumerate(rollouts)
        ]


def config() -> Config:
    return load_config(None, ["run.id=t", "feedback.prompts=5", "data.prompts=40", "data.held_out=8"])


def collect(path: Path, roles: Roles) -> tuple[dict, list]:
    recipe = DialogueRecipe(config().data, seed=0)
    with FeedbackStore(path / "s.db") as store:
        record = collect_from_annotators(store, recipe, roles, tokenizer=Wide(), config=config(), say=lambda _: None)  # type: ignore[arg-type]
        return record, list(store.read(record["snapshot"]))


def test_each_prompt_is_ranked_rated_and_commented_on(tmp_path: Path) -> None:
    record, rows = collect(tmp_path, Roles())
    assert record["unjudged"] == 0
    assert record["rows"] == len(rows) == 5 * (1 + config().feedback.answers + 1)
    assert {answer.sampler for row in rows for answer in row.answers} == {"base-policy"}
    assert all(row.display_order for row in rows if row.ranking)


def test_the_wrong_share_is_told(tmp_path: Path) -> None:
    assert 0 <= collect(tmp_path, Roles())[0]["flipped_share"] <= 1


def test_nobody_judges_an_empty_answer(tmp_path: Path) -> None:
    record, rows = collect(tmp_path, Mute())
    assert rows
    judged = sum(row.kind == "rating" for row in rows)
    assert record["unjudged"] == 5 * config().feedback.answers - judged > 0
    assert all(answer.text.strip() for row in rows for answer in row.answers)


def test_more_prompts_than_there_are_is_an_error_with_both_figures(tmp_path: Path) -> None:
    wanted = load_config(None, ["run.id=t", "feedback.prompts=99", "data.prompts=40", "data.held_out=8"])
    recipe = DialogueRecipe(wanted.data, seed=0)
    with FeedbackStore(tmp_path / "s.db") as store, pytest.raises(DataError, match=r"99 are more than the 32"):
        collect_from_annotators(store, recipe, Roles(), tokenizer=Wide(), config=wanted, say=print)  # type: ignore[arg-type]


def test_only_the_training_side_of_peoples_choices_is_stored(tmp_path: Path) -> None:
    pairs = [make_pair(i, f"yes {i}", f"no {i}") for i in range(4)]
    recipe = PreferencesRecipe(pairs[:3], pairs[3:], described="4 pairs")
    with FeedbackStore(tmp_path / "s.db") as store:
        record = collect_from_people(store, recipe, load_config(), say=lambda _: None)
        rows = list(store.read(record["snapshot"]))
    assert {row.group for row in rows} == {"g0", "g1", "g2"}
    chosen = {
        Exchange(row.prompt, row.answers[row.ranking.ranks.index(1)].text).response for row in rows if row.ranking
    }
    assert chosen == {"yes 0", "yes 1", "yes 2"}


def test_what_people_have_said_since_is_frozen_and_where_that_is_nothing_it_is_an_error(tmp_path: Path) -> None:
    recipe = PreferencesRecipe([make_pair(1)], [make_pair(2)], described="two pairs")
    with FeedbackStore(tmp_path / "s.db") as store:
        before = collect_from_people(store, recipe, config(), say=lambda _: None)
        known = store.members(before["snapshot"])
        with pytest.raises(DataError, match="have people judge its policy's answers"):
            collect_again(store, known=known, say=lambda _: None)
        store.add([make_pair(3)])
        assert collect_again(store, known=known, say=lambda _: None)["rows"] == 2


def test_what_another_run_has_and_does_not_exclude_is_brought_over_once(tmp_path: Path) -> None:
    learnt, since, excluded = make_pair(1), make_pair(2), make_pair(3)
    with FeedbackStore(tmp_path / "old.db") as older:
        older.add([learnt])
        snapshot = older.freeze().id
        older.add([since, excluded])
        older.flag("feedback", [excluded.id], reason="a slip", by="us")
    with FeedbackStore(tmp_path / "new.db") as store:
        for _ in range(2):
            assert bring_over(store, older=str(tmp_path / "old.db"), snapshot=snapshot) == {learnt.id}
        assert list(store.iter()) == [learnt, since]


def test_a_store_that_both_runs_share_is_left_as_it_is(tmp_path: Path) -> None:
    with FeedbackStore(tmp_path / "s.db") as store:
        store.add([first := make_pair(1)])
        snapshot = store.freeze().id
        assert bring_over(store, older=str(tmp_path / "s.db"), snapshot=snapshot) == {first.id}
        assert store.count() == 1
