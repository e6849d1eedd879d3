"""The Pareto front against its definition, and the chart of it."""

import hypothesis
import hypothesis.strategies as st
import pytest

from hf_compress import ConfigError
from hf_compress.report.pareto import ParetoChart, ParetoPoint, pareto_front, plot_pareto

FEW_VALUES = st.integers(-3, 3).map(float)


@hypothesis.given(st.lists(st.tuples(FEW_VALUES, FEW_VALUES), max_size=12), st.booleans(), st.booleans())
def test_the_front_is_what_no_other_point_beats(pairs, more_x, more_y) -> None:
    def gains(pair):
        return (pair[0] if more_x else -pair[0], pair[1] if more_y else -pair[1])

    def beats(a, b):
        return gains(a) != gains(b) and all(x >= y for x, y in zip(gains(a), gains(b), strict=True))

    expected = [i for i, pair in enumerate(pairs) if not any(beats(other, pair) for other in pairs)]
    found = pareto_front(pairs, more_x=more_x, more_y=more_y)
    assert sorted(found) == expected
    assert [pairs[i][0] for i in found] == sorted(pairs[i][0] for i in found)


def chart(**changes) -> ParetoChart:
    points = [
        ParetoPoint(label="half", x=0.5, y=84.0, x_spread=0.01, y_spread=0.3),
        ParetoPoint(label="most", x=0.9, y=80.0),
        ParetoPoint(label="chance", x=0.5, y=70.0, is_baseline=True),
    ]
    settings = {"x_label": "sparsity", "y_label": "accuracy (%)", "more_x": True, "more_y": True, "in_percent": True}
    return ParetoChart(**{"points": points, **settings, **changes})


def words(path) -> str:
    return path.read_text(encoding="utf-8")


def test_the_chart_has_points_baselines_the_dense_line_and_published_curves(tmp_path) -> None:
    drawn = chart(dense=85.0, curves={"CoFi": [(0.6, 85.3), (0.95, 80.6)]}, notes=["from a paper"])
    text = words(plot_pareto(drawn, tmp_path / "chart.svg"))
    for label in ("half", "most", "chance", "runs", "baselines", "front", "dense: 85.00", "CoFi (published)"):
        assert f"<!-- {label} -->" in text
    assert "<!-- from a paper -->" in text and "<!-- sparsity (%) -->" in text


def test_what_there_is_none_of_is_not_in_the_chart(tmp_path) -> None:
    text = words(plot_pareto(chart(points=chart().points[:2]), tmp_path / "chart.svg"))
    assert not any(word in text for word in ("baselines", "dense", "published"))


def test_the_same_data_give_the_same_picture(tmp_path) -> None:
    first, second = (plot_pareto(chart(), tmp_path / f"{n}.png").read_bytes() for n in (1, 2))
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_a_chart_without_points_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_pareto(chart(points=[]), tmp_path / "chart.png")
    assert not any(tmp_path.iterdir())
