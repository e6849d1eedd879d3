import pytest
import tiny_models
import torch

from hf_compress.errors import ConfigError, GraphError
from hf_compress.report import compare as comparing
from hf_compress.report.compare import Comparison, compare

DENSE, SMALL = "dense", "compressed"


@pytest.fixture(scope="module")
def table() -> Comparison:
    return compare(
        tiny_models.bert(),
        tiny_models.bert(intermediate_size=12),
        batch_sizes=(1, 2),
        length=9,
        rounds=2,
        notes=["tiny"],
    )


def cells(table: Comparison, label: str) -> tuple[str, ...]:
    return next(row[1:] for row in table.rows() if row[0] == label)


def test_ratios_refer_to_the_first_model(table: Comparison) -> None:
    dense, small = table.profiles[DENSE], table.profiles[SMALL]
    assert small.parameters < dense.parameters
    share = f"({small.encoder_parameters / dense.encoder_parameters:.0%})"
    assert cells(table, "encoder parameters")[1].endswith(share)
    assert "(" not in cells(table, "encoder parameters")[0]


def test_speedup_is_reference_time_over_own_time(monkeypatch) -> None:
    times = {DENSE: [8.0, 4.0, 6.0], SMALL: [2.0, 1.0, 2.0]}
    monkeypatch.setattr(comparing, "time_models", lambda models, inputs, rounds: times)
    found = compare(tiny_models.bert(), tiny_models.bert(), batch_sizes=(3,))
    assert found.latency_ms == {"batch 3": {DENSE: 6.0, SMALL: 2.0}}
    assert found.speedup == {"batch 3": {SMALL: 4.0}}
    assert cells(found, "latency, batch 3") == ("6.00 ms", "2.00 ms")
    assert cells(found, "speed-up, batch 3") == ("-", "4.00x")


def test_every_model_runs_on_the_same_inputs() -> None:
    seen: dict[str, set[tuple[int, ...]]] = {}

    def watched(name: str):
        model = tiny_models.bert()
        model.register_forward_hook(
            lambda module, args, kwargs, out: seen.setdefault(name, set()).add(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        return model

    compare(watched("a"), watched("b"), others={"c": watched("c")}, batch_sizes=(1, 3), length=7, rounds=1)
    assert seen == {name: {(1, 7), (3, 7)} for name in "abc"}


def test_metrics_come_first_with_their_difference(table: Comparison) -> None:
    scored = table.with_metric("accuracy (%)", {DENSE: 84.5, SMALL: 83.25})
    assert cells(scored, "accuracy (%)") == ("84.50", "83.25 (-1.25)")
    assert scored.rows()[1][0] == "accuracy (%)"
    assert not table.metrics
    with pytest.raises(ConfigError, match="'compresed'"):
        table.with_metric("accuracy (%)", {"compresed": 1.0})


def test_text_lines_up_and_markdown_has_all_rows(table: Comparison) -> None:
    text = str(table).splitlines()
    assert len({len(line) for line in text if not line.startswith("note: ")}) == 1
    assert "note: tiny" in text
    markdown = table.to_markdown().splitlines()
    assert markdown[1] == "|---|---:|---:|"
    assert sum(line.startswith("|") for line in markdown) == len(table.rows()) + 1
    assert "- tiny" in markdown


def test_round_trip(table: Comparison) -> None:
    scored = table.with_metric("accuracy (%)", {DENSE: 84.5})
    again = Comparison.from_dict(scored.to_dict())
    assert str(again) == str(scored)
    assert again.to_dict() == scored.to_dict()
    data = table.to_dict()
    data["speed"] = data.pop("speedup")
    with pytest.raises(ConfigError, match="'speed', 'speedup'"):
        Comparison.from_dict(data)


def test_names_and_directories_are_checked() -> None:
    model = tiny_models.bert()
    with pytest.raises(ConfigError, match="not distinct"):
        compare(model, model, names=("a", "a"))
    with pytest.raises(ConfigError, match="not distinct"):
        compare(model, model, others={"dense": model})
    with pytest.raises(ConfigError, match="directories"):
        compare(model, model, directories={"dens": "x"})


def test_measured_files_replace_the_computed_size(tmp_path) -> None:
    model = tiny_models.bert()
    model.save_pretrained(tmp_path)
    found = compare(model, model, rounds=1, batch_sizes=(1,), length=5, directories={SMALL: str(tmp_path)})
    assert found.profiles[SMALL].measured_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.profiles[DENSE].measured_bytes is None


def test_models_that_do_not_share_inputs_are_an_error() -> None:
    with pytest.raises(GraphError, match=r"ViTForImageClassification\.forward failed"):
        compare(tiny_models.bert(), tiny_models.vit(), rounds=1, batch_sizes=(1,))


def test_training_mode_is_restored() -> None:
    model = tiny_models.bert().train()
    compare(model, tiny_models.bert(), rounds=1, batch_sizes=(1,), length=5)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("own", "noted"), [([1.0, 2.0, 0.5], True), ([0.5, 1.0, 2.0], False)])
def test_a_speed_up_that_the_latencies_do_not_give_is_explained(monkeypatch, own, noted) -> None:
    """Three rounds on a machine that slows down; in the first case not for both models at once."""
    times = {"dense": [1.0, 2.0, 4.0], "compressed": own}
    monkeypatch.setattr("hf_compress.report.compare.time_models", lambda *a, **k: times)
    model = tiny_models.bert()
    table = compare(model, model, batch_sizes=(1,), length=5, notes=["first"])
    assert table.latency_ms["batch 1"] == {"dense": 2.0, "compressed": 1.0}
    assert table.speedup["batch 1"]["compressed"] == (1.0 if noted else 2.0)
    expected = "batch 1: the latencies of dense and compressed are 2.00 to 1, the speed-up is 1.00x"
    assert [note.startswith(expected) for note in table.notes[1:]] == [True] * noted
