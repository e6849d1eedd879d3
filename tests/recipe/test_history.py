"""What the Trainer logged outlives the checkpoints, and a report of a real run shows it."""

import json

import pytest
import recipe_files
from page import Page

import hf_compress.recipe.measure as measure
from hf_compress import Recipe, run_recipe, write_report


@pytest.fixture(autouse=True)
def _measured_once(monkeypatch) -> None:
    """Latencies are not what these tests are about."""
    full = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))


def test_the_log_is_kept_without_checkpoints_and_reported(tmp_path) -> None:
    logged = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "no"}
    data = recipe_files.classification(tmp_path, training={**recipe_files.TRAINING, **logged})
    found = run_recipe(Recipe.from_dict(data))
    assert not list((tmp_path / "out" / "checkpoints").glob("checkpoint-*"))
    log = json.loads((tmp_path / "out" / "compressed" / "log_history.json").read_text(encoding="utf-8"))
    assert [entry["heads_sparsity"] for entry in log if "heads_sparsity" in entry][-1] == 0.5
    assert {entry["step"] for entry in log} == set(range(1, 7))
    page = Page(write_report(tmp_path / "out"))
    curves = {each["data-name"]: each for each in page.all("g") if "data-name" in each}
    assert {"loss", "eval_loss", "eval_accuracy", "heads_sparsity", "ffn_sparsity", "learning_rate"} <= set(curves)
    assert curves["loss"]["data-y"].split() == [f"{entry['loss']:.6g}" for entry in log if "loss" in entry]
    for row in found.comparison.rows():
        assert set(row) - {""} <= set(page.cells)
    assert {"4 of 8 (50%)", "44 of 88 (50%)"} <= set(page.cells)
