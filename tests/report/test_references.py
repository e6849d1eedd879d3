"""Published numbers: with sources, in the unit of the chart or not at all, and in the wheel."""

import tomllib
from pathlib import Path

import pytest

import hf_compress
from hf_compress import Recipe
from hf_compress.config.sweep import SIZES
from hf_compress.report.references import reference_curves

MNLI = {"path": "nyu-mll/glue", "name": "mnli", "text_columns": ["premise", "hypothesis"]}


def recipe(**data) -> Recipe:
    return Recipe(task="text-classification", dataset={**MNLI, **data}, pruning={"structures": {"ffn": 0.5}})


def curves(**data):
    return {curve.label: curve for curve in reference_curves(recipe(**data), "accuracy (%)")}


def test_every_curve_has_a_source_and_plausible_points() -> None:
    found = curves()
    assert list(found) == ["NNI 3.0", "NNI 2.10", "nn_pruning", "CoFi"]
    for curve in found.values():
        assert curve.url.startswith("https://") and curve.source and curve.note
        assert set(curve.columns) <= {*SIZES, "metric"}
        assert all(len(point) == len(curve.columns) for point in curve.points)
        pairs = curve.against("encoder sparsity")
        assert [x for x, _ in pairs] == sorted(x for x, _ in pairs)
        assert all(0 < x < 1 and 80 < y < 86 for x, y in pairs)


def test_a_size_that_the_source_does_not_give_has_no_curve() -> None:
    found = curves()
    assert found["CoFi"].against("sparsity") is None
    assert all(curve.against("latency") is None for curve in found.values())
    assert found["NNI 3.0"].against("sparsity")[0] == (pytest.approx(0.5776), 84.42)
    assert found["NNI 3.0"].against("encoder sparsity")[0] == (pytest.approx(0.6478), 84.42)


def test_only_the_same_data_and_metric_have_curves() -> None:
    assert curves(path="glue")
    assert not curves(name="qqp")
    assert not curves(path="other/mnli")
    assert not reference_curves(recipe(), "macro F1 (%)")
    assert not reference_curves(Recipe(pruning={"structures": {"ffn": 0.5}}), "accuracy (%)")


def test_the_file_goes_into_the_wheel() -> None:
    package = Path(hf_compress.__file__).parent
    project = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["hf_compress"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert packed >= {path for path in package.rglob("*") if path.suffix in (".yaml", ".json")}
    assert package / "report" / "references.yaml" in packed
