import pytest
import tiny_models
import torch

from hf_compress import Recipe, dimension_groups
from hf_compress.config import QuantizationConfig
from hf_compress.errors import ConfigError
from hf_compress.report.compare import compare
from hf_compress.report.plots import KeptUnits
from hf_compress.report.results import Results, kept_units


@pytest.fixture(scope="module")
def facts() -> dict:
    model = tiny_models.bert()
    table = compare(model, model, rounds=1, batch_sizes=(1,), length=5)
    return {
        "name": "tiny",
        "model": "compressed",
        "base_model": "me/tiny",
        "auto_class": "AutoModelForSequenceClassification",
        "task": "text-classification",
        "dataset": "nothing",
        "comparison": table.to_dict(),
        "kept": {"heads": [{"name": "layer.0.heads", "kept": 3, "total": 4}]},
    }


def test_results_survive_a_file(facts, tmp_path) -> None:
    results = Results(**facts, recipe=Recipe(quantization=QuantizationConfig()).to_dict(), checks=("seen",))
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert results.kept_units() == {"heads": [KeptUnits(name="layer.0.heads", kept=3, total=4)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_relation": "child"}, r"Results\.base_model_relation: unknown value 'child'"),
        ({"model": "small"}, r"Results\.model: got 'small'.*'dense', 'compressed'"),
        ({"kept": {"heads": [{"name": "a", "kep": 3}]}}, r"Results\.kept"),
        ({"kept": {"heads": [{"name": "a", "kept": "3", "total": 4}]}}, r"Results\.kept.*total"),
        ({"kept": {"heads": 3}}, r"Results\.kept"),
        ({"kept": ["heads"]}, r"Results\.kept"),
        ({"comparison": {"profiles": {}}}, r"Comparison\.from_dict"),
        ({"recipe": {"prunning": {}}}, "closest match: 'pruning'"),
        ({"schema_version": 99}, "schema_version"),
    ],
)
def test_damaged_results_are_refused(facts, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Results.from_dict({**Results(**facts).to_dict(), **change})


@pytest.mark.parametrize("metrics", [{"accuracy": {"compressed": "high"}}, {"accuracy": 3}, ["accuracy"]])
def test_metrics_that_are_no_numbers_are_refused(facts, metrics) -> None:
    with pytest.raises(ConfigError, match=r"Comparison\.from_dict: metrics: got .* a number for each model"):
        Results(**{**facts, "comparison": {**facts["comparison"], "metrics": metrics}})


def test_kept_units_are_counted_by_kind_in_the_models_order() -> None:
    groups = dimension_groups(tiny_models.bert())
    masks = {g.name: torch.arange(g.num_units) > 0 for g in reversed(groups) if g.kind in ("heads", "ffn")}
    found = kept_units(groups, masks)
    assert [(unit["kept"], unit["total"]) for unit in found["heads"]] == [(3, 4), (3, 4)]
    assert [(unit["kept"], unit["total"]) for unit in found["ffn"]] == [(43, 44), (43, 44)]
    assert [unit["name"] for unit in found["ffn"]] == [g.name for g in groups if g.kind == "ffn"]
