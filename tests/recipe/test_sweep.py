"""Sweeps: runs of their own, what they share, failures in the middle, one table, one chart, searches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recipe_files
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

import hf_compress.recipe.measure as measure
from hf_compress import ConfigError, Recipe, SweepConfig, cli, run_sweep
from hf_compress.recipe.result import RunResult
from hf_compress.recipe.stages import Stage
from hf_compress.report.sweep_chart import is_maximized, sweep_chart

FFN = "stages.1.pruning.structures.ffn"
STAGES = [
    {"training": {"max_steps": 2, "learning_rate": 1e-2}},
    {"pruning": {"structures": {"ffn": 0.5}, "begin": 0, "end": 1}, "training": {"max_steps": 2}},
]
RUNS = {"half": {}, "most": {FFN: 0.75}}
NAMES = ["half-seed0", "half-seed1", "most-seed0", "most-seed1"]


def recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """Two stages, the first of which only trains."""
    found = recipe_files.classification(root, **{"pruning": None, "stages": STAGES, **changes})
    del found["output"]
    return found


def one_stage(root: Path) -> dict[str, Any]:
    training = {**recipe_files.TRAINING, "max_steps": 2}
    return recipe(root, stages=None, pruning={"structures": {"ffn": 0.5}, "begin": 0, "end": 1}, training=training)


def sweep(root: Path, output: Path, **changes: Any) -> SweepConfig:
    return SweepConfig(**{"recipe": recipe(root), "output": str(output), "runs": RUNS, "seeds": [0, 1], **changes})


def stored(output: Path) -> dict[str, Any]:
    return json.loads((output / "sweep.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True, scope="module")
def measured_once():
    """Latencies are not what these tests are about."""
    full = measure.compare
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))
        yield


class Straight:
    """One uninterrupted sweep for all tests that look at one."""

    def __init__(self, root: Path) -> None:
        self.root, self.output, self.trainings = root, root / "sweep", 0
        train = Trainer.train

        def counted(trainer: Trainer, *args: Any, **options: Any) -> Any:
            self.trainings += 1
            return train(trainer, *args, **options)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Trainer, "train", counted)
            self.result = run_sweep(sweep(root, self.output, baselines=["half"]))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"))


def test_every_run_has_a_folder_with_its_settings_and_its_seed(straight) -> None:
    assert list(straight.result.finished) == NAMES
    assert straight.result.failed == {}
    for name in NAMES:
        found = Recipe.load(straight.output / name / "recipe.yaml")
        assert found.training["seed"] == int(name[-1])
        assert found.stages[1].pruning.structures["ffn"] == (0.75 if "most" in name else 0.5)
    weights = {name: load_file(straight.output / name / "compressed" / "model.safetensors") for name in NAMES}
    units = {
        name: sum(len(tensor) for key, tensor in each.items() if "intermediate.dense.weight" in key)
        for name, each in weights.items()
    }
    assert units == {"half-seed0": 44, "half-seed1": 44, "most-seed0": 22, "most-seed1": 22}


def test_what_runs_share_is_trained_once_for_each_seed(straight) -> None:
    assert straight.trainings == 2 + len(NAMES)
    first, second = (straight.output / f"{run}-seed0" / "stage-1" / "model.safetensors" for run in RUNS)
    assert first.samefile(second)
    other = load_file(straight.output / "half-seed1" / "stage-1" / "model.safetensors")
    assert any(not torch.equal(other[name], tensor) for name, tensor in load_file(first).items())
    assert not list(straight.output.rglob("*.partial"))


def test_the_shared_stage_changes_no_result(straight, tmp_path) -> None:
    alone = run_sweep(sweep(straight.root, tmp_path / "alone", runs={"most": RUNS["most"]}, seeds=[1]))
    weights = [
        load_file(o / "most-seed1" / "compressed" / "model.safetensors") for o in (alone.output, straight.output)
    ]
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_the_numbers_are_those_of_the_runs(straight) -> None:
    records = {record["folder"]: record for record in stored(straight.output)["runs"]}
    assert list(records) == NAMES
    for name, record in records.items():
        run = json.loads((straight.output / name / "run.json").read_text(encoding="utf-8"))["comparison"]
        dense, small = run["profiles"]["dense"], run["profiles"]["compressed"]
        numbers = record["models"]["compressed"]
        assert numbers["parameters"] == small["parameters"] and numbers["flops"] == small["flops"]
        assert numbers["sparsity"] == pytest.approx(1 - small["parameters"] / dense["parameters"])
        assert numbers["encoder sparsity"] == pytest.approx(
            1 - small["encoder_parameters"] / dense["encoder_parameters"]
        )
        assert numbers["metrics"] == {metric: values["compressed"] for metric, values in run["metrics"].items()}
        assert numbers["speedup"] == {label: values["compressed"] for label, values in run["speedup"].items()}
        assert record["models"]["dense"]["metrics"]["accuracy (%)"] == run["metrics"]["accuracy (%)"]["dense"]


def test_the_table_has_means_and_spreads_over_seeds(straight) -> None:
    header, *rows = straight.result.table().cells()
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    tables = {name: RunResult.load(straight.output / name).comparison for name in NAMES}
    for run in RUNS:
        both = [tables[f"{run}-seed{seed}"] for seed in (0, 1)]
        accuracies = [table.metrics["accuracy (%)"] for table in both]
        mean = sum(values["compressed"] for values in accuracies) / 2
        spread = abs(accuracies[0]["compressed"] - accuracies[1]["compressed"]) / 2**0.5
        expected = f"{mean:.2f} \N{PLUS-MINUS SIGN} {spread:.2f}" if spread else f"{mean:.2f}"
        assert cells[run]["accuracy (%)"] == expected
        drop = sum(values["compressed"] - values["dense"] for values in accuracies) / 2
        assert cells[run]["accuracy (%) - dense"].startswith(f"{drop:+.2f}")
        dense, small = both[0].profiles["dense"].parameters, both[0].profiles["compressed"].parameters
        assert cells[run]["sparsity"] == f"{1 - small / dense:.1%}"
        assert cells[run]["seeds"] == "2"
    assert cells["dense"]["accuracy (%) - dense"] == "-"
    markdown = (straight.output / "sweep.md").read_text(encoding="utf-8")
    for row in straight.result.table().cells():
        assert "| " + " | ".join(row) + " |" in markdown
    assert "(pareto.png)" in markdown
    assert (straight.output / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_sweep_is_read_not_run_again(straight, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *a, **k: pytest.fail("trained"))
    config = sweep(straight.root, straight.output, baselines=["half"])
    with pytest.raises(ConfigError, match=r"holds a sweep already.*--resume"):
        run_sweep(config)
    before = stored(straight.output)
    again = run_sweep(config, resume=True)
    assert again.finished == straight.result.finished
    assert stored(straight.output) == before


def test_runs_may_be_added_but_not_changed(straight) -> None:
    changed = sweep(straight.root, straight.output, runs={**RUNS, "half": {FFN: 0.25}})
    with pytest.raises(ConfigError, match=r"run 'half': .*is from another recipe, which differs in stages"):
        run_sweep(changed, resume=True)
    assert SweepConfig.load(straight.output / "sweep.yaml").runs == RUNS


def test_killed_in_the_middle_and_resumed(straight, tmp_path, monkeypatch) -> None:
    config = sweep(straight.root, tmp_path / "out")
    save = Stage.save

    def stop_in_the_third_run(self: Stage, *args: Any) -> None:
        if "most-seed0" in str(self.folder):
            raise KeyboardInterrupt  # like a kill, it is no failure of the run
        save(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "save", stop_in_the_third_run)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(config)
    assert [record["status"] for record in stored(tmp_path / "out")["runs"]] == ["finished"] * 2
    found = run_sweep(config, resume=True)
    assert list(found.finished) == NAMES
    for name, result in found.finished.items():
        assert result.metrics["eval_accuracy"] == straight.result.finished[name].metrics["eval_accuracy"]
        assert result.comparison.metrics == straight.result.finished[name].comparison.metrics


def test_a_failed_run_does_not_lose_the_others_and_is_done_again(tmp_path, capsys) -> None:
    missing = tmp_path / "comes-later"
    data = {
        "recipe": one_stage(tmp_path),
        "output": str(tmp_path / "out"),
        "runs": {"bad": {"model": str(missing)}, "good": {"pruning.structures.ffn": 0.75}},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml")]) == 2
    captured = capsys.readouterr()
    assert "1 of the runs failed; --resume does them again" in captured.err and str(missing) in captured.err
    assert "good " in captured.out and "wrote" in captured.out
    found = stored(tmp_path / "out")
    assert [record["status"] for record in found["runs"]] == ["failed", "finished"]
    assert list(found["failed"]) == ["bad-seed0"] and found["failed"]["bad-seed0"]["traceback"] is None
    assert "- bad-seed0 failed: " in (tmp_path / "out" / "sweep.md").read_text(encoding="utf-8")
    recipe_files.save_model(missing, "text-classification", num_labels=2)
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--resume"]) == 0
    assert stored(tmp_path / "out")["failed"] == {}
    assert "- bad-seed0" not in (tmp_path / "out" / "sweep.md").read_text(encoding="utf-8")


def test_an_error_that_is_not_ours_is_kept_with_its_origin(tmp_path, monkeypatch) -> None:
    def breaks(*args: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "train", breaks)
    found = run_sweep(SweepConfig(recipe=one_stage(tmp_path), output=str(tmp_path / "out"), runs={"only": {}}))
    assert "in breaks" in found.failed["only-seed0"].traceback
    assert found.table().rows == [] and not (tmp_path / "out" / "pareto.png").exists()
    assert str(tmp_path / "out" / "sweep.json") in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {"good": {}, "bad": {"training.learning_rat": 1}}}, "run 'bad': Recipe.training: unknown key"),
        ({"runs": {"good": {}, "bad": {"pruning.structures.ffn": 2}}}, "run 'bad': PruningConfig"),
        ({"runs": {"good": {}, "bad": {"training.lr_scheduler_type": "x"}}}, "run 'bad': .*transformers refuses it"),
        ({"runs": {"good": {}, "bad": {"stages.0.repeat": 2}}}, "run 'bad': "),
        (
            {"runs": {"a": {"hub_model_id": "me/model"}}},
            "run 'a': Recipe.hub_model_id: got 'me/model'; allowed: None in a",
        ),
        ({"output": None}, "SweepConfig.output: missing"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: there is no such file"),
        (
            {"search": {"trials": 1, "space": {"pruning.structures.ffn": {"type": "float", "low": 0.5, "high": 1.5}}}},
            "run 'trial-ends': PruningConfig",
        ),
    ],
)
def test_what_is_wrong_with_the_last_run_shows_before_the_first_trains(changes, message, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *a, **k: pytest.fail("trained"))
    settings = {"recipe": one_stage(tmp_path), "output": str(tmp_path / "out"), "runs": {"good": {}}}
    with pytest.raises(ConfigError, match=message):
        run_sweep(SweepConfig(**{**settings, **changes}))
    assert not (tmp_path / "out").exists()


def test_a_setting_that_every_stage_replaces_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"run 'bad': training\.max_steps: has no effect"):
        run_sweep(sweep(tmp_path, tmp_path / "out", runs={"good": {}, "bad": {"training.max_steps": 9}}), dry_run=True)


def test_foreign_folders_are_not_touched(tmp_path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for output, message in ((tmp_path, "holds files, but not from a sweep"), (tmp_path / "file", "is a file")):
        with pytest.raises(ConfigError, match=message):
            run_sweep(SweepConfig(recipe=one_stage(tmp_path / ".."), output=str(output), runs={"a": {}}), resume=True)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_sweep_is_not_started_in_several_processes(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a sweep runs in one"):
        run_sweep(SweepConfig(recipe="r.yaml", output="out", runs={"a": {}}))


def test_a_metric_that_no_run_has_shows_after_the_first_and_can_be_mended(tmp_path) -> None:
    settings = {
        "recipe": one_stage(tmp_path),
        "output": str(tmp_path / "out"),
        "runs": {"a": {}, "b": {"model": "/no"}},
    }
    with pytest.raises(ConfigError, match=r"SweepConfig.metric: the runs have no metric 'acc'.*'accuracy \(%\)'"):
        run_sweep(SweepConfig(**settings, metric="acc"))
    assert not (tmp_path / "out" / "b-seed0").exists()
    found = run_sweep(SweepConfig(**settings, metric="macro F1 (%)"), resume=True)
    assert list(found.finished) == ["a-seed0"]
    assert stored(tmp_path / "out")["metric"] == "macro F1 (%)"


def test_a_dry_run_says_what_each_run_would_do_and_writes_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *a, **k: pytest.fail("trained"))
    data = {"recipe": one_stage(tmp_path), "grid": {"pruning.structures.ffn": [0.25, 0.75]}, "seeds": [3, 4]}
    (tmp_path / "sweep.json").write_text(json.dumps(data), encoding="utf-8")
    arguments = ["sweep", str(tmp_path / "sweep.json"), "--dry-run", "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("=== ffn-") == 2 and shown.count("dry run: nothing was trained") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ("sparsity", {"NNI 3.0"}),
        ("encoder sparsity", {"NNI 3.0", "NNI 2.10", "nn_pruning", "CoFi"}),
        ("latency", set()),
    ],
)
def test_published_curves_are_beside_runs_of_the_same_data(straight, x, expected, tmp_path) -> None:
    """On MNLI, and in the unit of the chart alone."""
    (first, *_) = straight.result.planned
    data = replace(first.recipe.dataset, path="nyu-mll/glue", name="mnli")
    config = sweep(straight.root, tmp_path, x=x)
    chart = sweep_chart(straight.result.table(), config, replace(first.recipe, dataset=data))
    assert set(chart.curves) == expected
    assert sum(note.startswith("not shown: ") for note in chart.notes) == 4 - len(expected)
    accuracies = {run[-1]: table.comparison.metrics["accuracy (%)"] for run, table in straight.result.finished.items()}
    assert chart.dense == pytest.approx(sum(values["dense"] for values in accuracies.values()) / 2)
    assert not sweep_chart(straight.result.table(), config, first.recipe).curves
    planned = [replace(run, recipe=replace(run.recipe, dataset=data)) for run in straight.result.planned]
    replace(straight.result, config=config, output=tmp_path, planned=planned).save()
    references = stored(tmp_path)["references"]
    assert {each["label"] for each in references if each["shown"]} == expected
    assert len(references) == 4 and all(each["source"] and each["url"] for each in references)


def test_baselines_and_spreads_are_in_the_chart(straight) -> None:
    (half, most) = sweep_chart(
        straight.result.table(), straight.result.config, straight.result.planned[0].recipe
    ).points
    assert (half.is_baseline, most.is_baseline) == (True, False)
    accuracies = [
        straight.result.finished[f"most-seed{n}"].comparison.metrics["accuracy (%)"]["compressed"] for n in (0, 1)
    ]
    assert most.y == pytest.approx(sum(accuracies) / 2)
    assert most.y_spread == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert most.x > half.x


def test_perplexities_are_minimized_unless_the_sweep_says_otherwise(straight) -> None:
    assert not is_maximized(straight.result.config, "perplexity of targets")
    assert is_maximized(straight.result.config, "BLEU")
    assert is_maximized(replace(straight.result.config, direction="maximize"), "perplexity")
    assert not is_maximized(replace(straight.result.config, direction="minimize"), "word errors")


def test_a_search_runs_trials_and_names_the_best(tmp_path) -> None:
    space = {
        "pruning.structures.ffn": {"type": "float", "low": 0.2, "high": 0.8},
        "training.learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
        "pruning.criterion": {"type": "categorical", "choices": ["l2", "random"]},
    }
    search = {"trials": 3, "space": space, "against_x": True}
    config = SweepConfig(recipe=one_stage(tmp_path), output=str(tmp_path / "out"), search=search)
    found = run_sweep(config)
    trials = json.loads((tmp_path / "out" / "trials.json").read_text(encoding="utf-8"))
    assert list(found.finished) == [f"trial-{n}-seed0" for n in range(3)]
    assert len({trial["pruning.structures.ffn"] for trial in trials}) == 3
    for number, trial in enumerate(trials):
        made = Recipe.load(tmp_path / "out" / f"trial-{number}-seed0" / "recipe.yaml")
        assert made.pruning.structures["ffn"] == trial["pruning.structures.ffn"]
        assert made.training["learning_rate"] == trial["training.learning_rate"]
        assert made.pruning.criterion == trial["pruning.criterion"]
    assert set(found.best) == set(stored(tmp_path / "out")["front"])  # of the same two quantities
    assert run_sweep(config, resume=True).best == found.best
    with pytest.raises(ConfigError, match="holds trials of another search"):
        run_sweep(replace(config, search={**search, "trials": 2}), resume=True)
