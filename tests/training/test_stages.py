"""The stages of a run, each with something in the place of Ray."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import ConfigError, DataError, InfrastructureError, InputError
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.recipes.preferences import PreferencesRecipe
from rlhf_ray.training import stages
from rlhf_ray.training.beginning import take_over
from rlhf_ray.training.run_folder import RunFolder
from rlhf_ray.training.stages import Run, run_stages
from tests.recipes.test_preferences import make_pair


def config(old: Path, *overrides: str) -> Config:
    return load_config(None, [f"run.root={old.parent}", "run.id=new", f"run.from={old}", *overrides])


def test_a_run_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set run\.id"):
        run_stages(load_config(), until="ppo", say=print)


class Task(NamedTuple):
    """Stands for Ray: runs a stage's task here and now, or ends as a killed one would."""

    doing: list[str]
    dies: str = ""
    started_as: list[Path] | None = None

    def run_task(self, function: Callable[..., Any], config: Config, *folders: Path, doing: str, **_: Any) -> Any:
        self.doing.append(doing)
        if self.started_as is not None:
            self.started_as.append(folders[0])
        if doing == self.dies:
            raise InfrastructureError(doing)
        for folder in folders[1:]:
            folder.mkdir()
        found = {"accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "pairs": 40, "folds": 2}
        return {**found, "cross_validation": None, "half": _.get("half")}


def reward_stage(folder: RunFolder, placement: Task, *overrides: str) -> None:
    settings = load_config(None, ["run.id=r", "reward_model.cross_validation=2", *overrides])
    run = Run(settings, folder, recipe=None, stopping=None, say=lambda _: None, stack=ExitStack())  # type: ignore[arg-type]
    run._placement = placement  # type: ignore[assignment]
    run.reward_model()


def test_a_reward_model_outlives_a_cross_validation_that_dies(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("feedback.json", {"snapshot": "s"})
    with pytest.raises(InfrastructureError):
        reward_stage(folder, Task([], dies="cross-validating"))
    assert folder.reward_model.exists()
    assert folder.read_json("reward_model.json")["accuracy"] == 0.7
    again = Task([])
    reward_stage(folder, again)
    assert again.doing == ["cross-validating"]
    assert folder.read_json("reward_model.json")["cross_validation"]
    reward_stage(folder, done := Task([]))
    assert done.doing == []


@pytest.mark.parametrize(
    ("settings", "body"),
    [
        (["recipe=preferences", "data.path=x.jsonl"], "pretrained"),
        (["recipe=preferences", "data.path=x.jsonl", "model.path=theirs"], "theirs"),
        (["recipe=preferences", "data.path=x.jsonl", "sft.max_epochs=0"], "base_policy"),
        ([], "base_policy"),  # whose demonstrations nobody judges
    ],
)
def test_no_reward_model_starts_as_one_that_imitated_what_it_is_measured_on(
    tmp_path: Path, settings: list[str], body: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("feedback.json", {"snapshot": "s"})
    folder.pretrained.mkdir()
    reward_stage(folder, placement := Task([], started_as=[]), *settings)
    assert [path.name for path in placement.started_as or ()] == [body, body]  # cross-validated, too


def test_a_base_policy_of_an_older_version_makes_no_reward_model_from_what_it_imitated(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("feedback.json", {"snapshot": "s"})
    with pytest.raises(InputError, match="begin a new run"):
        reward_stage(folder, Task([]), "recipe=preferences", "data.path=x.jsonl")


def test_a_judge_learns_from_the_other_half_of_the_annotators(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("feedback.json", {"snapshot": "s"})
    reward_stage(folder, task := Task([]), "reward_model.judge=true", "reward_model.cross_validation=0")
    assert task.doing == ["training the reward model", "training the judge"]
    assert folder.judge.exists()
    reward_stage(folder, done := Task([]), "reward_model.judge=true", "reward_model.cross_validation=0")
    assert done.doing == []


def test_a_judge_beside_a_reward_model_that_has_seen_everything_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("feedback.json", {"snapshot": "s"})
    reward_stage(folder, Task([]), "reward_model.cross_validation=0")
    folder.write_json("reward_model.json", {**folder.read_json("reward_model.json"), "half": None})
    with pytest.raises(ConfigError, match=r"run\.take=feedback"):
        reward_stage(folder, Task([]), "reward_model.judge=true")


def test_a_reward_model_given_as_a_folder_is_neither_fitted_nor_validated(tmp_path: Path) -> None:
    given, folder = tmp_path / "given", RunFolder(tmp_path / "run")
    given.mkdir()
    folder.path.mkdir()
    reward_stage(folder, task := Task([]), f"reward_model.path={given}")
    assert folder.reward_model.exists()
    assert task.doing == []


class Engines:
    """Stands for Ray where engines are started: notes on which policy, and that they are let go of."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def start_generators(self, model: Path, **_: Any) -> str:
        self.events.append(model)
        return "engines"

    def wait_ready(self, **_: Any) -> None:
        self.events.append("ready")

    def stop(self, group: str) -> None:
        self.events.append(f"{group} stopped")


def refreshing(old: Path, *overrides: str, recipe: Any = None) -> tuple[Run, Engines]:
    """A run about to refresh what it has taken over, and what stands for its engines."""
    told = config(old, "run.take=feedback", "reward_model.refresh=true", *overrides)
    folder = RunFolder.open(told)
    take_over(told, folder, say=lambda _: None)
    run = Run(told, folder, recipe=recipe, stopping=None, say=lambda _: None, stack=ExitStack())  # type: ignore[arg-type]
    run._placement = engines = Engines()  # type: ignore[assignment]
    run._tokenizer = "tokenizer"
    return run, engines


@pytest.fixture
def judged(old: Path) -> Path:
    """The folder of a run that has learnt from two judgements, s, and trained a policy."""
    (old / "policy").mkdir()
    with FeedbackStore(old / "feedback.db") as store:
        store.add([make_pair(1), make_pair(2)])
        store.freeze("s")
    RunFolder(old).write_json("feedback.json", {"snapshot": "s", "rows": 2})
    return old


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose answers annotators were asked about; the first time makes snapshot s2, the next s3."""
    asked: list[str] = []

    def collect(*_: Any, sampler: str, **__: Any) -> dict[str, Any]:
        asked.append(sampler)
        return {"snapshot": f"s{len(asked) + 1}", "rows": 7}

    monkeypatch.setattr(stages, "collect_from_annotators", collect)
    return asked


def test_a_newer_policys_answers_are_judged_once_and_learnt_from_besides(judged: Path, asked: list[str]) -> None:
    run, engines = refreshing(judged)
    for _ in range(2):
        run._refresh_feedback()
    assert asked == ["current-policy"]
    assert engines.events == [judged / "policy", "ready", "engines stopped"]
    assert run.folder.read_json("feedback.json") == {"snapshot": "s2", "rows": 7, "refreshed_from": "s"}
    run.folder.close()


def test_what_a_run_has_refreshed_the_next_one_refreshes_again(judged: Path, asked: list[str]) -> None:
    second, _ = refreshing(judged, "run.id=second")
    second._refresh_feedback()
    second.folder.policy.mkdir()
    second.folder.close()
    third, engines = refreshing(second.folder.path, "run.id=third")
    for _ in range(2):
        third._refresh_feedback()
    third.folder.close()
    assert len(asked) == 2
    assert engines.events == [second.folder.policy, "ready", "engines stopped"]
    assert third.folder.read_json("feedback.json")["refreshed_from"] == "s2"


@pytest.mark.parametrize("own_store", [True, False])
@pytest.mark.parametrize("simulated", [True, False])
def test_a_refresh_learns_from_what_the_older_run_learnt_from_too_wherever_it_lies(
    judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_store: bool, simulated: bool
) -> None:
    def annotators(store: FeedbackStore, *_: Any, **__: Any) -> dict[str, Any]:
        store.add([make_pair(4)])
        return {"snapshot": store.freeze().id}

    monkeypatch.setattr(stages, "collect_from_annotators", annotators)
    other = tmp_path / ("new/feedback.db" if own_store else "service.db")
    people = PreferencesRecipe([make_pair(1)], [make_pair(9)], described="")
    run, _ = refreshing(
        judged, *([] if own_store else [f"feedback.store={other}"]), recipe=None if simulated else people
    )
    with FeedbackStore(other) as store:
        store.add([make_pair(3)])  # fewer than the older run has
    run._refresh_feedback()
    run.folder.close()
    with FeedbackStore(other, read_only=True) as store:
        prompts = {item.prompt_id for item in store.read(run.folder.read_json("feedback.json")["snapshot"])}
    assert prompts == {"p1", "p2", "p3", *(["p4"] if simulated else [])}


def test_a_refresh_without_news_succeeds_once_people_have_judged_into_the_older_runs_store(judged: Path) -> None:
    people = PreferencesRecipe([make_pair(1)], [make_pair(9)], described="")
    run, _ = refreshing(judged, recipe=people)
    with pytest.raises(DataError, match="run the same command again"):
        run._refresh_feedback()
    run.folder.close()
    with FeedbackStore(judged / "feedback.db") as store:
        store.add([make_pair(3)])
    again, _ = refreshing(judged, recipe=people)
    again._refresh_feedback()
    again.folder.close()
    assert again.folder.read_json("feedback.json")["rows"] == 3


def test_a_refresh_needs_no_feedback_of_the_older_run(judged: Path) -> None:
    for name in ("feedback.db", "feedback.json"):
        (judged / name).unlink()
    people = PreferencesRecipe([make_pair(1)], [make_pair(9)], described="")
    run, _ = refreshing(judged, recipe=people)
    run._collect_feedback()
    with FeedbackStore(run.folder.feedback_db) as store:
        store.add([make_pair(2)])
    run._refresh_feedback()
    run.folder.close()
    assert run.folder.read_json("feedback.json")["rows"] == 2


def test_a_run_without_a_policy_has_nothing_newer(old: Path) -> None:
    run, _ = refreshing(old)
    with pytest.raises(InputError, match="has trained no policy yet"):
        run._refresh_feedback()
    run.folder.close()


@pytest.mark.parametrize("overrides", [["reward_model.refresh=true"], ["reward_model.refresh=true", "run.from=x"]])
def test_a_refresh_says_what_it_needs(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"set run.from, and run.take=feedback"):
        load_config(None, overrides)


@pytest.mark.parametrize(("settings", "fits"), [([], True), (["reward_model.ensemble.heads=0"], False)])
def test_a_penalty_for_doubt_needs_a_reward_model_that_has_some(settings: list[str], fits: bool) -> None:
    told = ["rewards.sources.own={kind: model, uncertainty: 0.5}", *settings]
    if fits:
        assert load_config(None, told).rewards.own_model
    else:
        with pytest.raises(ConfigError, match="is that of an ensemble"):
            load_config(None, told)
