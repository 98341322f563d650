"""The report's charts: which figures of a run are drawn, beside which lines they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlhf_ray.training import charts, verdict
from rlhf_ray.training.charts import Bar, Interval, Rule, Series, short
from rlhf_ray.training.verdict import figure

PHASES = ("rollout", "score", "prepare", "learn", "sync")

WAIT = "wait"
"""In a profile's lanes."""
MOST_EXPLAINED = 12
"""Annotators in a chart."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Panel:
    """A chart in its card: what it shows, its last figure, its legend."""

    title: str
    chart: Markup
    value: str = ""
    legend: tuple[str, ...] = ()


def curve_panels(rows: Rows, summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[Panel]:
    """What PPO did, over its steps."""
    limit = figure(summary, "kl_limit") or figure(config, "ppo", "kl", "limit")
    before, best = figure(summary, "gold", "before"), figure(summary, "gold", "best_of_n", "gold")
    gold_rules = [] if before is None else [Rule("base, held out", before)]
    gold_rules += [] if best is None else [Rule(f"best of {short(figure(summary, 'gold', 'best_of_n', 'n'))}", best)]
    panels = [
        _lines(rows, "Gold", {"gold/mean": "gold"}, rules=gold_rules, y_range=(0.0, 1.0)),
        _lines(
            rows, "Reward", {"objective/scores": "reward model's score", "objective/rlhf_reward": "less the KL penalty"}
        ),
        _lines(
            rows,
            "Held-out answers",
            {"held_out/reward": "reward model", "held_out/judge": "judge", "held_out/gold": "gold"},
        ),
        _lines(
            rows,
            "KL to the reference, nats a response",
            {"objective/kl": "KL"},
            from_zero=True,
            rules=[] if limit is None else [Rule(f"limit {limit:g}", limit)],
        ),
        _along_kl(rows, summary, config, "Gold along KL", "gold/mean", "gold"),
        _along_kl(rows, summary, config, "Reward along KL", "objective/scores", "reward"),
        _lines(rows, "Entropy, nats a token", {"objective/entropy": "entropy"}, from_zero=True),
        _lines(rows, "Policy loss", {"loss/policy_avg": "policy"}),
        _lines(rows, "Value loss", {"loss/value_avg": "value"}, from_zero=True),
        _lines(rows, "Clip fraction", {"policy/clipfrac_avg": "clipped"}, from_zero=True),
        _lines(rows, "KL of an update, nats a token", {"policy/approxkl_avg": "approximate KL"}, from_zero=True),
        _lines(rows, "Ratio to the sampling policy", {"val/ratio": "ratio"}, rules=[Rule("", 1.0)]),
        _lines(rows, "Response length, tokens", {"rollout/length_mean": "length"}, from_zero=True),
        _seconds(rows),
        _lines(rows, "Rollout speed, tokens a second", {"rollout/tokens_per_s": "tokens a second"}, from_zero=True),
        _lines(
            rows,
            "Engine against learner, nats",
            {"mismatch/max_abs": "largest difference"},
            from_zero=True,
            rules=[Rule(f"limit {verdict.MISMATCH_LIMIT:.0e}", verdict.MISMATCH_LIMIT)],
        ),
    ]
    return [panel for panel in panels if panel]


def _lines(rows: Rows, title: str, names: Mapping[str, str], **options: Any) -> Panel | None:
    lines = [
        Series(label, points)
        for name, label in names.items()
        if (
            points := [
                (float(row["step"]), figure(row, name))
                for row in rows
                if name in row and figure(row, "step") is not None
            ]
        )
    ]
    values = [y for line in lines[:1] for _, y in line.points if y is not None]
    value = short(values[-1]) if values else ""
    chart = charts.line_chart(lines, label=f"{title}: {value} at the end", **options)
    legend = tuple(line.label for line in lines) if len(lines) > 1 else ()
    return Panel(title, chart, value, legend) if chart else None


def _along_kl(
    rows: Rows, summary: Mapping[str, Any], config: Mapping[str, Any], title: str, name: str, of_n: str
) -> Panel | None:
    """PPO's steps and the best of n from the base policy, each where its KL to the base policy has taken it."""
    if figure(config, "ppo", "kl", "refresh_every"):
        return None  # KL is to another reference then
    ppo = [
        (kl, y)
        for row in rows
        if (kl := figure(row, "objective/kl")) is not None and (y := figure(row, name)) is not None
    ]
    best = [
        (kl, y)
        for row in items(summary.get("best_of_n_by_reward"))
        if (kl := figure(row, "kl")) is not None and (y := figure(row, of_n)) is not None
    ]
    if len(ppo) < 2 or len(best) < 2:
        return None
    lines = [Series("PPO, training prompts", sorted(ppo)), Series("best of n by the reward model, held out", best)]
    chart = charts.line_chart(lines, label=title, x_label="KL to the base policy, nats a response")
    return Panel(title, chart, legend=tuple(line.label for line in lines)) if chart else None


def _seconds(rows: Rows) -> Panel | None:
    phases = [phase for phase in PHASES if any(figure(row, f"time/{phase}_s") for row in rows)]
    layers = [(phase, [figure(row, f"time/{phase}_s") or 0.0 for row in rows]) for phase in phases]
    chart = charts.stacked_bars([float(row["step"]) for row in rows], layers, label="Seconds a step by phase")
    if not chart:
        return None
    means = [(phase, sum(heights) / len(heights)) for phase, heights in layers]
    legend = tuple(f"{phase} {mean:.2f} s" for phase, mean in means)
    return Panel("Seconds a step", chart, f"{sum(mean for _, mean in means):.2f}", legend)


def base_panels(base: Mapping[str, Any]) -> list[Panel]:
    """How the base policy was fitted."""
    titles = {"pretrain": "Self-supervised", "sft": "Supervised, on demonstrations"}
    panels = [_fit(base.get(key), title) for key, title in titles.items()]
    return [panel for panel in panels if panel]


def _fit(curve: Any, title: str) -> Panel | None:
    rows = [row for row in curve if isinstance(row, dict)] if isinstance(curve, list) else []
    return _lines(rows, f"{title}: loss", {"val_loss": "validation", "train_loss": "training"})


def reward_model_panels(metrics: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Panel]:
    """How well the reward model orders pairs, and how far its probabilities can be believed."""
    bins = [
        (predicted, observed, int(n))
        for row in items(mapping(metrics.get("calibration")).get("bins"))
        if (n := figure(row, "n"))
        and (predicted := figure(row, "predicted")) is not None
        and (observed := figure(row, "observed")) is not None
    ]
    ece = figure(metrics, "calibration", "ece")
    plot = charts.interval_plot(
        _accuracies(metrics, summary),
        label="Reward-model accuracy",
        x_label="share of pairs put in the right order",
        chance=0.5,
    )
    diagram = charts.reliability_diagram(bins, label="Reliability of the reward model's probabilities")
    panels = [
        Panel("Accuracy on held-out pairs", plot) if plot else None,
        Panel("Reliability", diagram, "" if ece is None else f"ECE {ece:.3f}") if diagram else None,
        _fit(metrics.get("curve"), "Fit"),
    ]
    return [panel for panel in panels if panel]


def explained_panels(explained: Mapping[str, Any]) -> list[Panel]:
    """Whose feedback the reward model owes what it knows, and of which kind."""
    titles = {"by_kind": "What each kind of feedback is worth", "by_annotator": "What each annotator's is worth"}
    panels = []
    for key, title in titles.items():
        rows = [
            charts.Row(str(row.get("name")), helps)
            for row in items(explained.get(key))
            if isinstance(row, dict) and (helps := figure(row, "helps")) is not None
        ]
        shown = sorted(rows, key=lambda row: -abs(row.value))[:MOST_EXPLAINED]
        chart = charts.bar_rows(shown, label=title)
        if chart:
            left_out = len(rows) - len(shown)
            panels.append(Panel(title, chart, f"{left_out} more" if left_out else ""))
    return panels


def _accuracies(metrics: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Interval]:
    folds = figure(metrics, "cross_validation", "folds")
    across = f"{short(folds)} folds"
    ordering = mapping(summary.get("ordering"))
    kinds = [(f"on people's {kind}", ("by_kind", kind, "accuracy")) for kind in mapping(metrics.get("by_kind"))]
    places: list[tuple[str, tuple[str, ...]]] = [
        ("this reward model", ("accuracy",)),
        *kinds,
        ("the base policy's answers, by gold", ("before", "accuracy")),
        ("the trained policy's answers, by gold", ("after", "accuracy")),
        ("longer answer wins", ("baselines", "longer")),
        ("shorter answer wins", ("baselines", "shorter")),
        (f"reward models of {across}", ("cross_validation", "accuracy")),
        (f"longer answer wins, {across}", ("cross_validation", "longer")),
        (f"shorter answer wins, {across}", ("cross_validation", "shorter")),
    ]
    rows = []
    for label, keys in places:
        source = ordering if keys[0] in ("before", "after") else metrics
        value = figure(source, *keys)
        interval = (*keys[:-1], "accuracy_ci95") if keys[-1] == "accuracy" else ()
        low, high = (figure(source, *interval, end) if interval else None for end in (0, 1))
        if value is not None:
            rows.append(Interval(label, value, (low, high) if low is not None and high is not None else None))
    return rows


def profile_panel(profile: Mapping[str, Any]) -> Panel | None:
    """Who worked when, in the steps that `rlhf profile` watched."""
    lanes = {
        str(name): [Bar(str(kind), start, end) for kind, start, end in pieces if kind != WAIT]
        for name, pieces in mapping(profile.get("lanes")).items()
    }
    kinds = tuple(dict.fromkeys(bar.kind for bars in lanes.values() for bar in bars))
    chart = charts.timeline(lanes, kinds=kinds, label="Who worked when")
    steps = len(items(profile.get("steps")))
    return Panel(f"{steps} steps", chart, legend=kinds) if chart else None


def waits(profile: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each role's share of the time without work."""
    shares = {name: figure(profile, "shares", name, WAIT) or 0.0 for name in mapping(profile.get("shares"))}
    nobody = figure(profile, "nobody")
    return [(name, f"idle {share:.0%}") for name, share in shares.items()] + (
        [] if nobody is None else [("nobody at work", f"{nobody:.1%}")]
    )


def mapping(tree: Any) -> dict[str, Any]:
    """`tree` where it is one, else an empty mapping."""
    return tree if isinstance(tree, dict) else {}


def items(tree: Any) -> Sequence[Any]:
    """`tree` where it is a list, else none."""
    return tree if isinstance(tree, list) else []
