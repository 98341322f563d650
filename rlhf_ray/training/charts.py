"""Charts as inline SVG: no script, no font, no file beside the page. Colours come from the page's style sheet.

Every text passes through `element`, which escapes it; what the functions return is safe to put into a page.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 14, 34
RELIABILITY_HEIGHT = 260
LANE, LANE_NAMES = 26, 84
"""Height of a timeline's lane, and room for their names."""
ROW, ROW_NAMES, ROW_FIGURES, MOST_NAME = 22, 128, 56, 18
"""Height of a row of `bar_rows`, room for names and figures, and the longest name in full."""
MOST_POINTS = 400
"""A longer series is drawn by its buckets' extremes, so that a spike of one step stays visible."""

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """A line: x ascending; y None where the figure was not finite, which breaks the line."""

    label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Rule:
    """A horizontal line that values are read against, such as a limit."""

    label: str
    y: float


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval, as a row of `interval_plot`."""

    label: str
    value: float
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A named figure as a bar of `bar_rows`; what is below 0 has another colour."""

    label: str
    value: float


@dataclass(frozen=True)
class Bar:
    """A stretch of time in a lane of `timeline`."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Frame:
    """Maps data to the drawing, and draws the axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int = HEIGHT
    left: int = LEFT

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a data point lies in the drawing."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        inner_width, inner_height = WIDTH - self.left - RIGHT, self.height - TOP - BOTTOM
        return round(self.left + across * inner_width, 1), round(TOP + (1 - up) * inner_height, 1)

    def axes(self, x_label: str, *, whole_x: bool = True, grid: bool = True) -> Markup:
        """Grid lines, ticks and the label under the x axis."""
        parts = []
        for y in ticks(*self.y) if grid else ():
            x0, at_y = self.at(self.x[0], y)
            parts.append(element("line", cls="grid", x1=x0, x2=WIDTH - RIGHT, y1=at_y, y2=at_y))
            parts.append(element("text", tick(y), cls="tick end", x=x0 - 6, y=at_y + 4))
        for x in ticks(*self.x, whole=whole_x):
            at_x, y0 = self.at(x, self.y[0])
            parts.append(element("line", cls="axis", x1=at_x, x2=at_x, y1=y0, y2=y0 + 4))
            parts.append(element("text", tick(x), cls="tick middle", x=at_x, y=y0 + 16))
        y0 = self.at(self.x[0], self.y[0])[1]
        parts.append(element("line", cls="axis", x1=self.left, x2=WIDTH - RIGHT, y1=y0, y2=y0))
        parts.append(element("text", x_label, cls="tick end", x=WIDTH - RIGHT, y=self.height - 4))
        return Markup("").join(parts)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    rules: Sequence[Rule] = (),
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
) -> Markup | None:
    """Lines over steps; None where no series holds a finite value."""
    drawn = [Series(line.label, thin(line.points)) for line in series]
    values = [y for line in drawn for _, y in line.points if y is not None]
    if not values:
        return None
    steps = [x for line in drawn for x, _ in line.points]
    low, high = y_range or _spread(min([*values, 0.0] if from_zero else values), max(values))
    reachable = [rule for rule in rules if low - 2 * (high - low) <= rule.y <= low + 3 * (high - low)]
    if not y_range:
        room = 0.05 * (high - low)
        low, high = low if from_zero and low == 0 else low - room, high + room
    if not y_range and reachable:
        low, high = min([low, *(r.y for r in reachable)]), max([high, *(r.y * 1.02 for r in reachable)])
    frame = Frame(_spread(min(steps), max(steps)), (low, high))
    leading = next(ys for line in drawn if (ys := [y for _, y in line.points if y is not None]))
    parts = [frame.axes(x_label)]
    parts += [part for number, line in enumerate(drawn) for part in _line(frame, line, number)]
    parts += [_rule(frame, rule, at_end=abs(rule.y - leading[-1]) > abs(rule.y - leading[0])) for rule in rules]
    return _svg(parts, label)


def stacked_bars(
    steps: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]], *, label: str, most_bars: int = 60
) -> Markup | None:
    """Bars over steps, one layer upon the other; many steps share bars, each of its steps' mean."""
    if not steps or not layers:
        return None
    size = math.ceil(len(steps) / most_bars)
    starts = range(0, len(steps), size)
    means = [[_mean(heights[i : i + size]) for i in starts] for _, heights in layers]
    totals = [sum(column) for column in zip(*means, strict=True)]
    frame = Frame((min(steps), max(steps) + 1), (0.0, _spread(0.0, max(totals))[1]))
    parts = [frame.axes("step")]
    base = [0.0] * len(totals)
    for number, ((name, _), heights) in enumerate(zip(layers, means, strict=True)):
        for column, height in enumerate(heights):
            first, last = steps[column * size], steps[min(len(steps), (column + 1) * size) - 1]
            x0, y1 = frame.at(first, base[column] + height)
            x1, y0 = frame.at(last + 1, base[column])
            gap = min(1.0, (x1 - x0) / 5)
            box = {"x": x0, "y": y1, "width": round(x1 - x0 - gap, 1), "height": round(y0 - y1, 1)}
            parts.append(
                element("rect", _title(f"step {tick(first)}, {name}: {height:.2f} s"), cls=f"fill{number}", **box)
            )
            base[column] += height
    return _svg(parts, label)


def reliability_diagram(bins: Sequence[tuple[float, float, int]], *, label: str) -> Markup | None:
    """(predicted, observed, n) against the diagonal; a dot's area grows with the number of pairs in its bin."""
    if not bins:
        return None
    frame = Frame((0.0, 1.0), (0.0, 1.0), height=RELIABILITY_HEIGHT)
    most = max(n for _, _, n in bins)
    (x0, y0), (x1, y1) = frame.at(0, 0), frame.at(1, 1)
    places = [frame.at(predicted, observed) for predicted, observed, _ in bins]
    parts = [
        frame.axes("predicted probability", whole_x=False),
        element("line", cls="rule", x1=x0, y1=y0, x2=x1, y2=y1),
        element("text", "observed share", cls="note", x=x0 + 6, y=y1 + 14),
        element("text", "dashed: as often as predicted", cls="note end", x=x1 - 4, y=y0 - 8),
        element("path", cls="line0 thin", d=_path(places)),
    ]
    for (predicted, observed, n), (x, y) in zip(bins, places, strict=True):
        said = f"predicted {predicted:.2f}, observed {observed:.2f}, {n} pairs"
        radius = round(2.5 + 6.5 * math.sqrt(n / max(most, 1)), 1)
        parts.append(element("circle", _title(said), cls="fill0 dot", cx=x, cy=y, r=radius))
    return _svg(parts, label, height=RELIABILITY_HEIGHT)


def interval_plot(rows: Sequence[Interval], *, label: str, x_label: str, chance: float) -> Markup | None:
    """Figures with their 95% intervals under each other, beside the line of chance."""
    if not rows:
        return None
    height = TOP + BOTTOM + 44 * len(rows)
    frame = Frame((0.0, 1.0), (0.0, float(len(rows))), height=height, left=16)
    (x0, y0), (_, y1) = frame.at(chance, 0), frame.at(chance, len(rows))
    parts = [frame.axes(x_label, whole_x=False, grid=False), element("line", cls="rule", x1=x0, x2=x0, y1=y0, y2=y1)]
    for number, row in enumerate(rows):
        x, y = frame.at(row.value, len(rows) - number - 0.6)
        parts.append(element("text", row.label, cls="name", x=frame.left, y=y - 9))
        parts.append(element("text", f"{row.value:.3f}", cls="name end", x=WIDTH - RIGHT, y=y - 9))
        parts.append(element("line", cls="grid", x1=frame.left, x2=WIDTH - RIGHT, y1=y, y2=y))
        if row.bounds:
            (low, _), (high, _) = frame.at(row.bounds[0], 0), frame.at(row.bounds[1], 0)
            parts.append(element("line", cls="line0 whisker", x1=low, x2=high, y1=y, y2=y))
        parts.append(element("circle", cls="fill0", cx=x, cy=y, r=4.5))
    return _svg(parts, label, height=height)


def bar_rows(rows: Sequence[Row], *, label: str) -> Markup | None:
    """Named figures under each other, each a bar from zero; None where there is none."""
    if not rows:
        return None
    height = 8 + ROW * len(rows)
    longest = max(abs(row.value) for row in rows) or 1.0
    room = WIDTH - ROW_NAMES - ROW_FIGURES
    parts = []
    for number, row in enumerate(rows):
        top = 4 + ROW * number
        name = row.label if len(row.label) <= MOST_NAME else f"{row.label[: MOST_NAME - 1]}…"
        width = max(0.5, round(room * abs(row.value) / longest, 1))
        parts.append(element("text", name, cls="name end", x=ROW_NAMES - 6, y=top + 14))
        parts.append(
            element(
                "rect",
                _title(f"{row.label}: {short(row.value)}"),
                cls="fill0" if row.value >= 0 else "fill1",
                x=ROW_NAMES,
                y=top + 3,
                width=width,
                height=ROW - 8,
            )
        )
        parts.append(element("text", short(row.value), cls="tick", x=ROW_NAMES + width + 5, y=top + 14))
    return _svg(parts, label, height=height)


def timeline(lanes: Mapping[str, Sequence[Bar]], *, kinds: Sequence[str], label: str) -> Markup | None:
    """Each lane's bars over seconds, lanes under each other; a bar's colour is its kind's place in `kinds`."""
    end = max((bar.end for bars in lanes.values() for bar in bars), default=0.0)
    if not end:
        return None
    height = TOP + BOTTOM + LANE * len(lanes)
    frame = Frame((0.0, end), (0.0, float(len(lanes))), height=height, left=LANE_NAMES)
    parts = [frame.axes("seconds", whole_x=False, grid=False)]
    for number, (name, bars) in enumerate(lanes.items()):
        top = frame.at(0.0, len(lanes) - number)[1]
        parts.append(element("text", name, cls="name end", x=LANE_NAMES - 6, y=top + LANE / 2 + 4))
        for bar in bars:
            (x0, _), (x1, _) = frame.at(bar.start, 0), frame.at(bar.end, 0)
            said = _title(f"{name}, {bar.kind}: {bar.end - bar.start:.2f} s")
            box = {"x": x0, "y": top + 3, "width": max(0.3, round(x1 - x0, 1)), "height": LANE - 6}
            parts.append(element("rect", said, cls=f"fill{kinds.index(bar.kind)}", **box))
    return _svg(parts, label, height=height)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """At most `most` points: a long series is cut into buckets, each shown by its lowest and its highest."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        finite = [(x, y) for x, y in points[start : start + size] if y is not None]
        if not finite:
            kept.append((points[start][0], None))
            continue
        kept += sorted({min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float, *, whole: bool = False, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    gap = min((power * factor for factor in (1, 2, 5, 10)), key=lambda gap: abs(math.log(gap / rough)))
    if whole:
        gap = max(1.0, round(gap))
    first = math.ceil(low / gap - 1e-9)
    return [round(index * gap, 12) for index in range(first, math.floor(high / gap + 1e-9) + 1)]


def tick(value: float) -> str:
    """A figure as short as an axis wants it: `0.25`, `1500`, `20k`, `2e-06`."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"


def short(value: float | None) -> str:
    """A figure in three digits; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def element(name: str, content: str | Markup = "", *, cls: str = "", **attributes: str | float) -> Markup:
    """An SVG element; its content, unless it is markup already, and its attributes are escaped."""
    pairs = {**({"class": cls} if cls else {}), **attributes}
    said = Markup("").join(Markup(' {}="{}"').format(key.replace("_", "-"), value) for key, value in pairs.items())
    return Markup("<{0}{1}>{2}</{0}>").format(name, said, escape(content))


def _svg(parts: Iterable[Markup], label: str, *, height: int = HEIGHT) -> Markup:
    return element("svg", Markup("").join(parts), viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def _title(text: str) -> Markup:
    return element("title", text)


def _rule(frame: Frame, rule: Rule, *, at_end: bool) -> Markup:
    low, high = frame.y
    beyond = "\u2191 " if rule.y > high else "\u2193 " if rule.y < low else ""
    (x0, y), x1 = frame.at(frame.x[0], min(max(rule.y, low), high)), WIDTH - RIGHT
    place = {"x": x1 - 4 if at_end else x0 + 4, "y": y - 4 if y > TOP + 8 else y + 11}
    text = element("text", f"{beyond}{rule.label}", cls="note end" if at_end else "note", **place)
    return text if beyond else element("line", cls="rule", x1=x0, x2=x1, y1=y, y2=y) + text


def _line(frame: Frame, series: Series, number: int) -> list[Markup]:
    parts, run = [], list[tuple[float, float]]()
    for x, y in [*series.points, (0.0, None)]:
        if y is not None:
            run.append(frame.at(x, y))
            continue
        if len(run) == 1:
            parts.append(element("circle", cls=f"fill{number}", cx=run[0][0], cy=run[0][1], r=2.5))
        elif run:
            parts.append(element("path", cls=f"line{number}", d=_path(run)))
        run = []
    return parts


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in places)


def _spread(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return (low, high + room) if low == 0 else (low - room, high + room)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
