"""`report.html`: a run on one page that needs nothing else, made from the files in its folder only.

A missing file is a section that says so. Every text is escaped: an answer may hold whatever a model can write.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_ray.errors import InputError
from rlhf_ray.training import verdict
from rlhf_ray.training.charts import short
from rlhf_ray.training.diagnosis import diagnose
from rlhf_ray.training.metrics import duration, read_metrics
from rlhf_ray.training.panels import (
    Rows,
    base_panels,
    curve_panels,
    explained_panels,
    items,
    mapping,
    profile_panel,
    reward_model_panels,
    waits,
)
from rlhf_ray.training.verdict import Check, figure

TEMPLATES = Path(__file__).parent / "report_template"
SAMPLES_SHOWN = 10
LONGEST_TEXT = 3000
"""Characters of one message that the page shows."""


@dataclass(frozen=True)
class RunFiles:
    """What lies in a run folder; empty where a file is missing or cannot be read."""

    folder: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: Rows = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    reward_model: dict[str, Any] = field(default_factory=dict)
    samples: list[Any] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    explained: dict[str, Any] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()


def write_report(run_folder: Path) -> Path:
    """Write the run folder's `report.html` from its other files, and return its path.

    Works on unfinished runs. Raises `InputError` where the folder is missing, `DataError` where `metrics.jsonl`
    holds a line that no run wrote.
    """
    if not run_folder.is_dir():
        raise InputError(
            f"run folder {run_folder} does not exist; give the folder that a run made, such as runs/laptop"
        )
    page = render(read_run(run_folder))
    path = run_folder / "report.html"
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(page, encoding="utf-8", errors="replace")  # half of a surrogate pair is legal JSON
    os.replace(unfinished, path)
    return path


def read_run(folder: Path) -> RunFiles:
    """The run's files, decoded."""
    unreadable: list[str] = []
    text = _text(folder / "config.yaml")
    config = _load_yaml(text)
    if config is None:
        unreadable.append("config.yaml")
    loaded = {
        name: _load_json(folder / f"{name}.json", kind, unreadable)
        for name, kind in (
            ("summary", dict),
            ("base", dict),
            ("reward_model", dict),
            ("samples", list),
            ("profile", dict),
            ("explained", dict),
        )
    }
    return RunFiles(
        folder=folder,
        config_text=_without_passwords(text),
        config=config or {},
        metrics=read_metrics(folder),
        unreadable=tuple(unreadable),
        **loaded,
    )


def render(run: RunFiles) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    headline, checks = _headline(run)
    return environment.get_template("report.html").render(
        title=str(run.summary.get("run_id") or run.folder.resolve().name),
        facts=_facts(run),
        headline=headline,
        checks=checks,
        tiles=_tiles(run.summary),
        curves=curve_panels(run.metrics, run.summary, run.config),
        hand_over=_hand_over(run.metrics),
        findings=diagnose(run.metrics, run.config),
        base=base_panels(run.base),
        reward_model=reward_model_panels(run.reward_model, run.summary),
        reward_model_facts=_reward_model_facts(run.reward_model),
        explained=explained_panels(run.explained),
        mistakes=[_mistake(item) for item in items(run.explained.get("mistakes")) if isinstance(item, dict)],
        samples=[_sample(item) for item in run.samples[:SAMPLES_SHOWN] if isinstance(item, dict)],
        more_samples=max(0, len(run.samples) - SAMPLES_SHOWN),
        profile=profile_panel(run.profile),
        waits=waits(run.profile),
        profiled_with=[_without_passwords(str(setting)) for setting in items(run.profile.get("settings"))],
        stages=_stages(run.summary),
        config=run.config_text,
        versions=mapping(run.summary.get("versions")),
        unreadable=run.unreadable,
    )


def _headline(run: RunFiles) -> tuple[Check, list[Check]]:
    if not run.summary:
        total = figure(run.config, "ppo", "steps")
        so_far = (
            f"{run.metrics[-1]['step']}{f' of {total:g}' if total else ''} steps of PPO"
            if run.metrics
            else "no step of PPO yet"
        )
        return Check(verdict.LEARNED, None, f"This run has not finished: {so_far}."), []
    kls = [kl for row in run.metrics if (kl := figure(row, "objective/kl")) is not None]
    checks = [
        verdict.within_kl(run.summary, max(kls, default=None)),
        verdict.engine_agrees(run.summary),
        verdict.stays_varied(run.summary),
        *([check] if (check := verdict.not_exploited(run.summary)) else []),
    ]
    return verdict.learned(run.summary), checks


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    summary = run.summary
    wall = figure(summary, "wall_s")
    facts = [
        ("recipe", summary.get("recipe") or run.config.get("recipe")),
        ("seed", summary.get("seed", run.config.get("seed"))),
        ("steps", short(figure(summary, "steps"))),
        ("rollouts", short(figure(summary, "rollouts"))),
        ("wall time", duration(wall) if wall is not None else None),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    def change(key: str, digits: int) -> str:
        before, after = figure(summary, key, "before"), figure(summary, key, "after")
        return "" if before is None or after is None else f"{before:.{digits}f} \u2192 {after:.{digits}f}"

    n, best = figure(summary, "gold", "best_of_n", "n"), figure(summary, "gold", "best_of_n", "gold")
    accuracy, kl, gap = (
        figure(summary, *keys) for keys in (("reward_model", "accuracy"), ("kl",), ("mismatch_max_abs",))
    )
    low, high = (figure(summary, "reward_model", "accuracy_ci95", end) for end in (0, 1))
    limit, share = figure(summary, "kl_limit"), figure(summary, "top_answer_share", "after")
    tiles = [
        ("Gold, held out", change("gold", 2), "" if best is None else f"best of {short(n)} from the base: {best:.2f}"),
        ("Reward, held out", change("reward", 2), "the reward model's score"),
        ("KL to the reference", short(kl), "nats a response" + (f", limit {limit:g}" if limit is not None else "")),
        (
            "Reward-model accuracy",
            "" if accuracy is None else f"{accuracy:.3f}",
            "" if low is None or high is None else f"95% interval {low:.3f} to {high:.3f}",
        ),
        ("Distinct bigrams", change("distinct_2", 3), "" if share is None else f"most frequent answer {share:.1%}"),
        ("Engine against learner", "" if gap is None else f"{gap:.1e}", "largest difference, nats a token"),
    ]
    return [tile for tile in tiles if tile[1]]


def _hand_over(rows: Rows) -> str:
    verified = [row["sync/verified"] for row in rows if "sync/verified" in row]
    if not verified:
        return ""
    sizes = [size for row in rows if (size := figure(row, "sync/bytes")) is not None]
    volume = f" of {sizes[-1] / 1e6:.1f} MB" if sizes else ""
    lags = [lag for row in rows if (lag := figure(row, "rollout/staleness_max")) is not None]
    stale = ""
    if lags:
        worst = max(lags)
        stale = f" No rollout was more than {worst:g} weights steps behind." if worst else " No rollout was stale."
    passed = sum(map(bool, verified))
    return f"{passed} of {len(verified)} weight hand-overs{volume} were verified by hash and probe.{stale}"


def _reward_model_facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    learnt = {f"{kind} to learn from": n for kind, n in mapping(metrics.get("learnt_from")).items()}
    names = {"n_held_out": "choices held out", "margin": "mean margin", "temperature": "temperature"}
    told = {**learnt, **{name: metrics.get(key) for key, name in names.items()}}
    told["rank correlation with length"] = mapping(metrics.get("length")).get("correlation")
    told["rank correlation with held-out ratings"] = figure(metrics, "ratings", "overall", "spearman")
    told["area under the ROC curve of held-out thumbs"] = figure(metrics, "thumbs", "auc")
    facts = [(name, short(value)) for name in told if (value := figure(told, name)) is not None]
    gate = mapping(metrics.get("gate"))
    if gate and gate.get("better_by") is None:
        facts.append(("beside no model", "not known: nothing that was held out compares two answers"))
    if (better := figure(gate, "better_by")) is not None:
        surely = "surely better" if gate.get("passed") else "not surely better"
        facts.append(("beside no model", f"{surely} than {gate.get('baseline')} ({better:+.3f})"))
    return facts


def _mistake(item: Mapping[str, Any]) -> dict[str, Any]:
    gold = [float(known) if isinstance(known, int | float) else None for known in items(item.get("gold"))]
    better, other = [*gold, None, None][:2]
    chance = figure(item, "probability")
    said = [("gold", _two_decimals(better)), ("its probability", "" if chance is None else f"{chance:.3f}")]
    return {
        **_turns(item),
        "answers": [
            ("after", "preferred", said, shorten(item.get("preferred"))),
            ("before", "other", [("gold", _two_decimals(other))], shorten(item.get("other"))),
        ],
    }


def _sample(item: Mapping[str, Any]) -> dict[str, Any]:
    def figures(side: str) -> list[tuple[str, str]]:
        return [(name, _two_decimals(figure(item, f"{name}_{side}"))) for name in ("gold", "reward")]

    return {
        **_turns(item),
        "answers": [(side, side, figures(side), shorten(item.get(side))) for side in ("before", "after")],
    }


def _turns(item: Mapping[str, Any]) -> dict[str, Any]:
    turns = [turn for turn in items(item.get("prompt")) if isinstance(turn, dict)]
    return {"turns": [(str(turn.get("role", "")), shorten(turn.get("content"))) for turn in turns]}


def _stages(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    seconds = {
        name: s
        for name in mapping(summary.get("seconds_by_stage"))
        if (s := figure(summary, "seconds_by_stage", name)) is not None
    }
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(name, duration(s), round(100 * s / longest, 1)) for name, s in seconds.items()]


def _two_decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def shorten(text: Any) -> str:
    """A message's text, cut where it is too long for the page, with a note of how much is missing."""
    said = text if isinstance(text, str) else ""
    cut = len(said) - LONGEST_TEXT
    return said if cut <= 0 else f"{said[:LONGEST_TEXT]} \u2026 ({cut} more characters)"


def _without_passwords(text: str) -> str:
    text = re.sub(r"(://[^:/@\s]*:)[^/\s]+@", r"\1***@", text)
    return re.sub(r"([?&]passw(?:or)?d=)[^&\s'\"]+", r"\1***", text)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _load_yaml(text: str) -> dict[str, Any] | None:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return tree if isinstance(tree, dict) else {} if tree is None else None


def _load_json(path: Path, kind: type, unreadable: list[str]) -> Any:
    if not path.is_file():
        return kind()
    try:
        tree = json.loads(path.read_bytes())
    except ValueError:
        tree = None
    if isinstance(tree, kind):
        return tree
    unreadable.append(path.name)
    return kind()
