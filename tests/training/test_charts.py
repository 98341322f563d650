"""Charts: what is drawn must be where the figures are, and nothing that is not markup may pass as markup."""

from xml.etree import ElementTree

import pytest

from rlhf_ray.training.charts import (
    Bar,
    Interval,
    Rule,
    Series,
    element,
    interval_plot,
    line_chart,
    reliability_diagram,
    stacked_bars,
    thin,
    ticks,
    timeline,
)


def draw(*ys: float | None, **options: object) -> str:
    points = [(float(x), y) for x, y in enumerate(ys)]
    return str(line_chart([Series("kl", points)], label="KL", **options))  # type: ignore[arg-type]


def texts(svg: object) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(str(svg)).iter("text")]


def test_ticks_are_round_and_lie_within_the_axis() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.03, 0.01) == [-0.03, -0.02, -0.01, 0.0, 0.01]
    assert ticks(1.0, 3.0, whole=True) == [1.0, 2.0, 3.0]


def test_a_figure_that_is_not_finite_breaks_the_line() -> None:
    assert draw(1.0, 2.0, None, 3.0, 4.0).count("<path") == 2


def test_a_lone_figure_is_drawn_as_a_dot() -> None:
    assert "<circle" in draw(5.0)


def test_a_series_without_figures_has_no_chart() -> None:
    assert draw(None, None) == "None"


def test_a_limit_within_reach_is_a_line_and_one_out_of_reach_an_arrow() -> None:
    assert 'class="rule"' in draw(1.0, 10.0, rules=[Rule("limit 25", 25.0)])
    far = draw(1.0, 10.0, rules=[Rule("limit 900", 900.0)])
    assert 'class="rule"' not in far
    assert "\u2191 limit 900" in texts(far)


def test_a_spike_in_a_long_series_survives_thinning() -> None:
    points = [(float(x), 100.0 if x == 3333 else 0.5) for x in range(10_000)]
    kept = thin(points)
    assert len(kept) <= 400
    assert (3333.0, 100.0) in kept


def test_many_steps_share_bars_without_losing_height() -> None:
    steps = [float(x) for x in range(1, 601)]
    bars = str(stacked_bars(steps, [("rollout", [2.0] * 600), ("learn", [1.0] * 600)], label="seconds"))
    assert bars.count("<rect") == 120
    assert "rollout: 2.00 s" in bars


def test_dots_of_the_reliability_diagram_carry_their_figures() -> None:
    diagram = str(reliability_diagram([(0.75, 0.7, 40), (0.9, 0.95, 10)], label="reliability"))
    assert "predicted 0.75, observed 0.70, 40 pairs" in diagram


def test_intervals_are_drawn_only_where_they_are_known() -> None:
    plot = interval_plot(
        [Interval("model", 0.9, (0.88, 0.92)), Interval("longer", 0.6)], label="accuracy", x_label="share", chance=0.5
    )
    assert str(plot).count("whisker") == 1


@pytest.mark.parametrize("text", ["<script>", 'a"b', "a&b", "a'b"])
def test_text_and_attributes_are_escaped(text: str) -> None:
    parsed = ElementTree.fromstring(str(element("text", text, title=text)))
    assert (parsed.text, parsed.get("title")) == (text, text)


def test_a_timeline_draws_each_bar_where_its_seconds_are() -> None:
    lanes = {"learner": [Bar("learn", 5.0, 10.0)], "generator": [Bar("generate", 0.0, 5.0)]}
    svg = ElementTree.fromstring(str(timeline(lanes, kinds=["generate", "learn"], label="work")))
    learn, generate = svg.iter("rect")
    assert (learn.get("class"), generate.get("class")) == ("fill1", "fill0")
    assert float(learn.get("width", 0)) == pytest.approx(float(generate.get("width", 0)), abs=0.2)
    assert float(generate.get("x", 0)) + float(generate.get("width", 0)) == pytest.approx(float(learn.get("x", 0)))
    assert float(learn.get("y", 0)) < float(generate.get("y", 0))


def test_a_timeline_without_work_has_no_chart() -> None:
    assert timeline({"learner": []}, kinds=[], label="work") is None
