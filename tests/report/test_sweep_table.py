"""Means and spreads over seeds, and what a table shows where something was not measured."""

import math

import pytest

from hf_compress import ConfigError, ModelProfile, SweepConfig
from hf_compress.config import Recipe
from hf_compress.report.compare import Comparison
from hf_compress.report.sweep_chart import front_labels, sweep_chart
from hf_compress.report.sweep_table import SweepRow, SweepTable, difference, metric, size


def profile(parameters: int, encoder: int | None) -> ModelProfile:
    return ModelProfile(
        model_class="Any",
        parameters=parameters,
        encoder_parameters=encoder,
        embedding_parameters=0,
        flops=2 * parameters,
        bytes_on_disk=4 * parameters,
        measured_bytes=None,
        peak_memory=1,
        latency_ms=None,
        inputs={},
        num_threads=1,
    )


def comparison(parameters: int, metrics: dict[str, dict[str, float]], encoder: int | None = 40) -> Comparison:
    return Comparison(
        profiles={"dense": profile(200, None if encoder is None else 100), "compressed": profile(parameters, encoder)},
        latency_ms={"batch 1": {"dense": 8.0, "compressed": parameters / 25}, "batch 32": {"dense": 80.0}},
        speedup={"batch 1": {"compressed": 200 / parameters}},
        metrics=metrics,
        notes=(),
        environment={},
    )


def row(name: str, *tables: Comparison) -> SweepRow:
    return SweepRow(name, name, "compressed", dict(enumerate(tables)))


def accuracies(dense: float, compressed: float) -> dict[str, dict[str, float]]:
    return {"accuracy (%)": {"dense": dense, "compressed": compressed}}


def test_sizes_and_differences_are_means_with_the_deviation_of_a_sample() -> None:
    tables = [comparison(p, accuracies(d, c)) for p, d, c in ((100, 80.0, 70.0), (100, 82.0, 76.0), (130, 84.0, 76.0))]
    found = row("half", *tables)
    assert found.statistic(size("sparsity")).mean == pytest.approx((0.5 + 0.5 + 0.35) / 3)
    assert found.statistic(size("encoder sparsity")).mean == pytest.approx(0.6)
    assert found.statistic(size("latency")).mean == pytest.approx((4 + 4 + 5.2) / 3)
    assert found.statistic(metric("accuracy (%)")).mean == pytest.approx(74)
    assert found.statistic(metric("accuracy (%)")).spread == pytest.approx(math.sqrt((16 + 4 + 4) / 2))
    assert found.statistic(difference("accuracy (%)")).mean == pytest.approx(-8)
    assert row("one", tables[0]).statistic(metric("accuracy (%)")).spread == 0


def test_the_table_shows_what_was_measured_and_a_dash_for_the_rest() -> None:
    table = SweepTable([row("a", comparison(100, {"F1": {"compressed": 3.5}}, encoder=None)), row("b")])
    header, dense, first, _ = table.cells()
    cells = dict(zip(header, first, strict=True))
    assert cells["sparsity"] == "50.0%" and cells["encoder sparsity"] == "-"
    assert cells["F1"] == "3.50" and cells["F1 - dense"] == "-" and cells["speed-up, batch 1"] == "2.00x"
    assert dict(zip(header, dense, strict=True))["F1"] == "-"
    lines = table.to_markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert str(table).splitlines()[2].startswith("dense ")


def test_seeds_of_which_one_was_not_measured_have_no_mean() -> None:
    found = row("a", comparison(100, accuracies(80, 70)), comparison(100, {}))
    assert found.statistic(metric("accuracy (%)")) is None


RECIPE = Recipe(pruning={"structures": {"ffn": 0.5}})


def test_the_chart_of_a_size_has_its_front() -> None:
    rows = [row(n, comparison(p, accuracies(80, y))) for n, p, y in (("a", 50, 70), ("b", 100, 69), ("c", 150, 75))]
    for x in ("sparsity", "parameters", "flops", "latency"):
        chart = sweep_chart(SweepTable(rows), SweepConfig(recipe="r", runs={"a": {}}, x=x), RECIPE)
        assert set(front_labels(chart)) == {"a", "c"}
        assert chart.in_percent == chart.more_x == (x == "sparsity")
    flipped = SweepConfig(recipe="r", runs={"a": {}}, direction="minimize")
    assert set(front_labels(sweep_chart(SweepTable(rows), flipped, RECIPE))) == {"a", "b"}


def test_a_chart_of_what_models_lack_is_refused() -> None:
    rows = [row("a", comparison(50, accuracies(80, 70), encoder=None))]
    config = SweepConfig(recipe="r", runs={"a": {}}, x="encoder sparsity")
    with pytest.raises(ConfigError, match=r"SweepConfig\.x: a has no 'encoder sparsity'; choose another x"):
        sweep_chart(SweepTable(rows), config, RECIPE)
    with pytest.raises(ConfigError, match=r"no metric 'acc'; .*'accuracy \(%\)'"):
        sweep_chart(SweepTable(rows), SweepConfig(recipe="r", runs={"a": {}}, metric="acc"), RECIPE)
