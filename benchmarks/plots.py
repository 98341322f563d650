"""Charts of the report as files of their own, for the docs.

python benchmarks/plots.py runs/demo      # docs/profile.svg, of what `rlhf profile runs/demo` saw
"""

import json
import re
import sys
from itertools import accumulate
from pathlib import Path

from markupsafe import Markup

from rlhf_ray.training import charts
from rlhf_ray.training.charts import element
from rlhf_ray.training.panels import profile_panel

DOCS = Path(__file__).parent.parent / "docs"
STYLE = Path(charts.__file__).parent / "report_template/style.css"
KEY, LETTER = 30, 6
"""Width of a legend's entry without its label, and of a letter."""


def save(chart: Markup | None, name: str, *, legend: tuple[str, ...] = ()) -> Path:
    """Writes `docs/<name>.svg`, on a light card that reads well on any page, with a legend above the chart."""
    assert chart is not None, f"nothing to draw for {name}"
    style = STYLE.read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", style[: style.index("}")]))
    rules = [line for line in style.splitlines() if line.startswith("svg ") and "max-width" not in line]
    rules = ["text { font-family: system-ui, sans-serif; }", *rules]
    ends = list(accumulate((KEY + LETTER * len(label) for label in legend), initial=16.0))
    keys = [
        element("rect", x=x, y=8, width=10, height=10, rx=2, cls=f"fill{i}") + element("text", label, x=x + 15, y=17)
        for i, (label, x) in enumerate(zip(legend, ends, strict=False))
    ]
    top = 24 if legend else 0
    width, height = charts.WIDTH, int(str(chart).split('viewBox="')[1].split('"')[0].split()[3])
    plain = re.sub(r"var\(--([\w-]+)\)", lambda name: colours[name[1]], "\n".join(rules))  # for every viewer
    placed = str(chart).replace("<svg ", f'<svg y="{top}" width="{width}" height="{height}" ', 1)
    path = DOCS / f"{name}.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + top}" width="{2 * width}">\n'
        f"<style>\n{plain}\n</style>\n"
        f'<rect width="{width}" height="{height + top}" rx="8" style="fill: {colours["card"]}"/>\n'
        f"{''.join(keys)}\n{placed}\n</svg>\n"
    )
    return path


def main() -> None:
    """Draws a run's profile."""
    panel = profile_panel(json.loads((Path(sys.argv[1]) / "profile.json").read_text()))
    assert panel is not None, "a profile without work"
    print(save(panel.chart, "profile", legend=panel.legend))


if __name__ == "__main__":
    main()
