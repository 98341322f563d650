"""The report: complete from a whole folder, honest from a partial one, safe from hostile text."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.errors import InputError
from rlhf_ray.training.report import write_report

FORBIDDEN_TAGS = {"script", "img", "iframe", "object", "embed", "form", "base", "video", "audio", "image", "use"}


class Page(HTMLParser):
    """Collects the tags, the attributes and the visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def make_samples(n: int = 12, **overrides: Any) -> list[dict[str, Any]]:
    sample = {"prompt": [{"role": "user", "content": "Where is my lamp?"}], "before": "lamp", "after": "Dear friend"}
    figures = {"gold_before": 0.4, "gold_after": 0.9, "reward_before": -1.0, "reward_after": 2.0}
    return [{**sample, **figures, **overrides} for _ in range(n)]


def make_run(folder: Path, **overrides: Any) -> Path:
    summary = {
        "run_id": "laptop",
        "gold": {"before": 0.55, "after": 0.91, "gain_ci95": [0.34, 0.38], "best_of_n": {"n": 16, "gold": 0.87}},
        "kl": 13.6,
        "kl_limit": 25.0,
        "versions": {"torch": "2.13.0"},
        "seconds_by_stage": {"ppo": 198.0},
    }
    reward_model = {
        "accuracy": 0.91,
        "accuracy_ci95": [0.89, 0.93],
        "calibration": {"ece": 0.031, "bins": [{"lo": 0.5, "hi": 1.0, "n": 9, "predicted": 0.8, "observed": 0.7}]},
        "baselines": {"longer": 0.61, "shorter": 0.39},
        "cross_validation": None,
    }
    curve = [{"step": 50, "train_loss": 2.0, "val_loss": 2.1}, {"step": 100, "train_loss": 1.0, "val_loss": 1.2}]
    files = {"summary": summary, "reward_model": reward_model, "base": {"pretrain": curve, "sft": curve}}
    for name, content in {**files, "samples": make_samples(), **overrides}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    rows = [
        {"step": step, "objective/kl": step / 5, "gold/mean": 0.6, "time/learn_s": 1.5, "sync/verified": True}
        for step in range(1, 61)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "config.yaml").write_text("recipe: dialogue\nppo: {steps: 60}\n")
    return folder


def test_a_finished_run_is_told_whole(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    wanted = [
        "The policy learned. Gold rose from 0.55 to 0.91",
        "13.60 nats a response, 12.00 at its highest step: under its limit of 25",
        "best of 16 from the base: 0.87",
        "60 of 60 weight hand-overs were verified",
        "ECE 0.031",
        "longer answer wins",
        "the first 10 of 12",
        "Self-supervised: loss",
        "3m18s",
        "2.13.0",
        "recipe: dialogue",
    ]
    assert [phrase for phrase in wanted if phrase not in page.text] == []
    assert "Not run." not in page.text
    assert page.text.count("Where is my lamp?") == 10


def test_an_empty_folder_says_what_was_not_run(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "This run has not finished: no step of PPO yet." in page.text
    assert page.text.count("Not run.") == 5
    assert "svg" not in page.tags


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    (make_run(tmp_path) / "summary.json").unlink()
    page = Page(write_report(tmp_path))
    assert "This run has not finished: 60 of 60 steps of PPO." in page.text
    assert "svg" in page.tags


HOSTILE = "</p><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\"'{{ 7*7 }}"


def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    samples = make_samples(1, prompt=[{"role": HOSTILE, "content": HOSTILE}], before=HOSTILE, after=HOSTILE)
    summary = {"run_id": HOSTILE, "recipe": HOSTILE, "versions": {HOSTILE: HOSTILE}, "seconds_by_stage": {HOSTILE: 1}}
    make_run(tmp_path, samples=samples, summary=summary)
    (tmp_path / "config.yaml").write_text(json.dumps({"recipe": HOSTILE}))
    page = Page(write_report(tmp_path))
    assert FORBIDDEN_TAGS.isdisjoint(page.tags)
    assert page.text.count(HOSTILE) >= 9


def test_the_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    assert FORBIDDEN_TAGS.isdisjoint(page.tags)
    links = [value for name, value in page.attributes if name in {"src", "href", "srcset", "action", "xlink:href"}]
    assert links == ["data:,"]
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert any("default-src 'none'" in value for _, value in page.attributes)


def test_no_script_can_run_from_an_attribute(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)))
    assert [name for name, _ in page.attributes if name.startswith("on")] == []


@pytest.mark.parametrize("name", ["summary", "base", "reward_model", "samples"])
@pytest.mark.parametrize("content", ["{torn", "3", "null"])
def test_a_file_that_cannot_be_read_is_named_and_left_out(tmp_path: Path, name: str, content: str) -> None:
    (make_run(tmp_path) / f"{name}.json").write_text(content)
    assert f"Cannot be read, and so is left out: {name}.json." in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("junk", [None, "text", 3, [], {}, [None], {"bins": 3}])
def test_fields_of_the_wrong_shape_leave_a_gap_and_not_a_crash(tmp_path: Path, junk: Any) -> None:
    keys = ("gold", "reward", "kl", "reward_model", "versions", "seconds_by_stage", "distinct_2", "run_id")
    make_run(
        tmp_path,
        summary=dict.fromkeys(keys, junk),
        reward_model=dict.fromkeys(("accuracy", "calibration", "curve", "baselines", "cross_validation"), junk),
        base={"pretrain": junk, "sft": [junk]},
        samples=[junk, {"prompt": junk, "before": junk}],
    )
    assert "</html>" in Page(write_report(tmp_path)).html


def test_a_database_password_does_not_reach_the_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "feedback: {store: 'postgresql://ann:s3cr@t@db/f'}\nother: 'pg://db/f?user=a&password=sw0rdfish'\n"
    )
    html = Page(write_report(tmp_path)).html
    assert "postgresql://ann:***@db/f" in html
    assert not any(secret in html for secret in ("s3cr", "sw0rdfish"))


def test_half_a_surrogate_pair_in_an_answer_is_no_obstacle(tmp_path: Path) -> None:
    make_run(tmp_path, samples=make_samples(1, after="broken \ud83d emoji"))
    assert "broken ? emoji" in Page(write_report(tmp_path)).text


def test_a_long_answer_is_cut_and_the_cut_is_told(tmp_path: Path) -> None:
    make_run(tmp_path, samples=make_samples(1, after="x" * 3100))
    assert "(100 more characters)" in Page(write_report(tmp_path)).text


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    first = write_report(make_run(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_a_missing_run_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give the folder"):
        write_report(tmp_path / "nowhere")


def test_gold_and_reward_are_drawn_along_kl_beside_the_best_of_n(tmp_path: Path) -> None:
    best = [{"n": n, "kl": kl, "reward": n / 2, "gold": 0.5 + n / 20} for n, kl in ((1, 0.0), (2, 0.19), (3, 0.43))]
    ordering = {
        "before": {"pairs": 90, "accuracy": 0.9, "accuracy_ci95": [0.85, 0.95], "ece": 0.02},
        "after": {"pairs": 30, "accuracy": 0.612, "accuracy_ci95": [0.55, 0.67], "ece": 0.2},
    }
    run = make_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "best_of_n_by_reward": best, "ordering": ordering}))
    page = Page(write_report(run))
    assert "Gold along KL" in page.text
    assert "best of n by the reward model, held out" in page.text
    assert "Reward along KL" not in page.text  # this run's metrics hold no reward
    assert "the trained policy's answers, by gold" in page.text
    assert "0.612" in page.text
    (run / "config.yaml").write_text("ppo: {kl: {refresh_every: 5}}\n")
    assert "Gold along KL" not in Page(write_report(run)).text


def test_who_worked_when_is_drawn_where_it_was_watched(tmp_path: Path) -> None:
    lanes = {"generator-0": [["generate", 0.0, 4.0], ["wait", 4.0, 10.0]], "learner": [["learn", 4.0, 9.0]]}
    profile = {
        "settings": ["rollout.max_staleness=1", "feedback.store=postgresql://me:secret@db/x"],
        "steps": [[0.0, 5.0], [5.0, 10.0]],
        "lanes": lanes,
        "shares": {"generator-0": {"generate": 0.4, "wait": 0.6}, "learner": {"learn": 0.5, "wait": 0.5}},
        "nobody": 0.1,
    }
    page = Page(write_report(make_run(tmp_path, profile=profile)))
    for text in ("Who worked when", "with rollout.max_staleness=1", "idle 60%", "idle 50%", "10.0%"):
        assert text in page.text
    assert "generator-0, generate: 4.00 s" in page.text
    assert "secret" not in page.html


def test_a_run_that_nobody_watched_has_no_such_section(tmp_path: Path) -> None:
    assert "Who worked when" not in Page(write_report(make_run(tmp_path))).text
