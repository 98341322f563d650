"""`rlhf feedback stats --html`: a store's feedback drawn on one page, with the report's look and without its run."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_ray.feedback.quality import Agreement, Quality
from rlhf_ray.feedback.schema import Feedback, Kind
from rlhf_ray.feedback.summary import StoreStats
from rlhf_ray.training import charts
from rlhf_ray.training.charts import Row, Series
from rlhf_ray.training.panels import Panel
from rlhf_ray.training.report import TEMPLATES

MOST_ROWS = 20
KINDS: tuple[Kind, ...] = ("rating", "ranking", "comment")


@dataclass
class Times:
    """When feedback came, and which ratings; fed as the rows go by."""

    days: Counter[tuple[date, Kind]] = field(default_factory=Counter)
    stars: Counter[float] = field(default_factory=Counter)

    def watching(self, items: Iterable[Feedback]) -> Iterable[Feedback]:
        """The same rows, counted on their way."""
        for item in items:
            self.days[item.created_at.date(), item.kind] += 1
            if item.rating and item.rating.scale == "stars":
                self.stars[round(item.rating.value)] += 1
            yield item


def feedback_page(
    name: str, stats: StoreStats, quality: Quality, times: Times, *, gold: Mapping[str, tuple[int, int]]
) -> str:
    """The page: how much came when and from whom, how good the answers were held to be, and how far people agree."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    people = [person for person in quality.people if person.remarks]
    return environment.get_template("feedback.html").render(
        title=name,
        facts=[("rows", f"{stats.rows:,}"), *((f"{kind}s", f"{n:,}") for kind, n in stats.by_kind.items())],
        panels=[panel for panel in _panels(stats, times) if panel is not None],
        agreement=[_agreement(found) for found in quality.agreement],
        remarks=[(person.name, "; ".join(person.remarks)) for person in people],
        gold=[(who, f"{right} of {asked} right") for who, (right, asked) in sorted(gold.items())],
    )


def _panels(stats: StoreStats, times: Times) -> list[Panel | None]:
    samplers = [Row(tally.name, tally.mean) for tally in stats.by_sampler if tally.mean is not None]
    return [
        _over_time(times),
        _bars("Judgements by annotator", [Row(tally.name, tally.n) for tally in stats.by_annotator]),
        _bars("Answers judged by sampler", [Row(tally.name, tally.n) for tally in stats.by_sampler]),
        _bars(f"Mean rating by sampler ({stats.scale})", samplers),
        _bars("Ratings in stars", [Row(f"{stars:g}", n) for stars, n in sorted(times.stars.items())], ordered=True),
    ]


def _over_time(times: Times) -> Panel | None:
    days = sorted({day for day, _ in times.days})
    if len(days) < 2:
        return None
    kinds = [kind for kind in KINDS if any(times.days[day, kind] for day in days)]
    series = []
    for kind in kinds:
        total, points = 0, list[tuple[float, float | None]]()
        for day in days:
            total += times.days[day, kind]
            points.append(((day - days[0]).days, total))
        series.append(Series(kind, points))
    chart = charts.line_chart(series, label="Judgements so far", x_label=f"days since {days[0]}", from_zero=True)
    assert chart is not None
    return Panel("Judgements so far", chart, legend=tuple(f"{kind}s" for kind in kinds))


def _bars(title: str, rows: list[Row], *, ordered: bool = False) -> Panel | None:
    shown = rows if ordered else sorted(rows, key=lambda row: -row.value)[:MOST_ROWS]
    chart = charts.bar_rows(shown, label=title)
    left_out = len(rows) - len(shown)
    return None if chart is None else Panel(title, chart, value=f"{left_out} more" if left_out else "")


def _agreement(found: Agreement) -> tuple[str, str]:
    if found.alpha is None or found.ci95 is None:
        return found.what, f"nothing varies in {found.things} things"
    low, high = found.ci95
    return found.what, f"alpha {found.alpha:.3f} [{low:.3f}, {high:.3f}], {found.level}, {found.things} things"
