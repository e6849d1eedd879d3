"""Experiments on stand-ins: their recipes, what their cards say, and one that takes seconds."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import recipe_files
import yaml

import hf_compress.recipe.measure as measuring
from hf_compress import ConfigError, Recipe
from hf_compress.config import TASKS

SCRIPTS = Path(__file__).parents[2] / "scripts"
OFFLINE = sorted((SCRIPTS / "recipes" / "offline").glob("*.yaml"))


@pytest.fixture
def scripts(monkeypatch):
    """Import a script by name, with none of its files read before."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("experiment", "experiment_card", "experiments"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


# --- recipes


ALONE = [path for path in OFFLINE if "levels" not in yaml.safe_load(path.read_text(encoding="utf-8"))]
STAGED = [path for path in OFFLINE if path not in ALONE]


def both(experiment, sparsity: float, root: Path):
    folders = (root / "data", root / "model")
    return (experiment.recipe_of(method, sparsity, 3, 0.5, folders, root / "out") for method in ("ours", "l2"))


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_recipes_of_a_run(scripts, path, tmp_path) -> None:
    experiment = scripts("experiment").Experiment.load(path)
    ours, l2 = both(experiment, 0.5, tmp_path)
    assert ours.task in TASKS and ours.task == l2.task
    assert ours.training == l2.training and ours.training["seed"] == 3
    assert any(
        ours.training.get(length) == experiment.settings["training"].get(length, 0) / 2
        for length in ("max_steps", "num_train_epochs")
    )
    assert set(ours.pruning.structures.values()) == {0.5} and ours.pruning.structures == l2.pruning.structures
    assert (l2.pruning.criterion, l2.distillation, l2.teacher) == ("l2", None, None)
    assert ours.pruning.criterion != "l2"
    assert (SCRIPTS / "stand_ins" / f"{experiment.stand_in}.py").is_file()
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", STAGED, ids=lambda path: path.stem)
def test_stages_of_a_run_are_the_published_ones(scripts, path, tmp_path) -> None:
    """In the same order, by the same methods; the baseline has as many steps of each."""
    experiment = scripts("experiment").Experiment.load(path)
    published = Recipe.load(SCRIPTS / "recipes" / experiment.recipe)
    assert experiment.sparsities() == tuple(sorted(experiment.levels))
    sizes = set()
    for sparsity in experiment.levels:
        ours, l2 = both(experiment, sparsity, tmp_path)
        assert kinds(ours) == kinds(published)
        assert (ours.teacher, ours.export) == (published.teacher, published.export)
        assert "l2" in {stage.pruning.criterion for stage in l2.stages if stage.pruning is not None}
        assert not any(stage.distillation for stage in l2.stages) and l2.teacher is None
        steps = [[run.training["max_steps"] for run in recipe.runs()] for recipe in (ours, l2)]
        assert sum(steps[0]) == sum(steps[1]) < 500
        sizes.add(str(ours.to_dict()))
    assert len(sizes) == len(experiment.levels) >= 2
    assert path.read_text(encoding="utf-8").startswith("# ")
    with pytest.raises(ConfigError, match=r"got a sparsity of 0\.123; allowed: "):
        experiment.budget_of("ours", 0.123)


def kinds(recipe: Recipe) -> list[tuple]:
    """What makes a stage what it is."""
    return [
        (
            stage.pruning and (stage.pruning.criterion, sorted(stage.pruning.structures), stage.pruning.gradients),
            stage.distillation and [(term.loss, term.layers) for term in stage.distillation.features],
            stage.quantization and stage.quantization.scheme,
            stage.oneshot_batches is not None,
            stage.repeat > 1,
        )
        for stage in recipe.stages
    ]


def test_every_published_recipe_has_a_stand_in_with_all_its_stages(scripts) -> None:
    experiments = [scripts("experiment").Experiment.load(path) for path in OFFLINE]
    published = {path.name: Recipe.load(path) for path in (SCRIPTS / "recipes").glob("*.yaml")}
    whole = {each.recipe for each in experiments if each.levels or published[each.recipe].stages is None}
    assert whole == set(published)


def test_parts_of_a_recipe_that_an_experiment_replaces_may_change(scripts) -> None:
    experiment = scripts("experiment").Experiment.load(OFFLINE[0].with_name("bert_wordnet.yaml"))
    data = yaml.safe_load((SCRIPTS / "recipes" / experiment.recipe).read_text(encoding="utf-8"))
    changed = {**data, "stages": [], "training": {}}
    assert experiment.effective(changed) == experiment.effective(data)
    assert experiment.effective({**data, "teacher": "self"}) != experiment.effective(data)


def test_structures_with_few_units_have_limits(scripts, tmp_path) -> None:
    experiment = scripts("experiment").Experiment.load(OFFLINE[0].with_name("vit_fashion_mnist.yaml"))
    found = experiment.recipe_of("ours", 0.9, 0, 1.0, (tmp_path, tmp_path), tmp_path)
    assert found.pruning.structures == {"heads": experiment.limits["heads"], "ffn": 0.9}


@pytest.mark.parametrize(
    ("change", "message"), [({"metrik": "x"}, "'metrik' is unknown"), ({"metric": None}, "missing .* 'metric'")]
)
def test_files_that_are_wrong(scripts, tmp_path, change, message) -> None:
    data = {**yaml.safe_load(OFFLINE[0].read_text(encoding="utf-8")), **change}
    data = {name: value for name, value in data.items() if value is not None}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        scripts("experiment").Experiment.load(tmp_path / "a.yaml")


def test_a_missing_library_is_named(scripts, monkeypatch) -> None:
    experiment = scripts("experiment").Experiment.load(OFFLINE[0].with_name("t5_gettext.yaml"))
    monkeypatch.delitem(sys.modules, "stand_ins.gettext_pairs", raising=False)
    monkeypatch.setitem(sys.modules, "polib", None)
    with pytest.raises(ConfigError, match=r"polib.*stand-ins"):
        experiment.folders()


# --- cards


def profile(parameters: int, encoder: int) -> dict:
    return {
        "parameters": parameters, "encoder_parameters": encoder, "flops": 2 * parameters,
        "bytes_on_disk": 4 * parameters, "measured_bytes": None,
    }  # fmt: skip


def made_up(method: str, sparsity: float, seed: int, score: float) -> dict:
    left = round(800_000 * (1 - sparsity))
    comparison = {
        "profiles": {"dense": profile(1_000_000, 800_000), "compressed": profile(200_000 + left, left)},
        "metrics": {"accuracy (%)": {"dense": 90.0, "compressed": score}},
        "latency_ms": {"batch 1": {"dense": 4.0, "compressed": 2.0}},
        "speedup": {"batch 1": {"compressed": 2.0}},
        "environment": {"cpu": "made up"},
    }
    kept = {"heads": [{"name": "h", "kept": 2, "total": 4}]}
    return {
        "method": method, "sparsity": sparsity, "seed": seed, "comparison": comparison, "kept": kept, "steps": 7,
        "seconds": 30.0, "examples": {"training": 1000, "evaluation": 100},
    }  # fmt: skip


def results(runs: list[dict], higher_is_better: bool = True) -> dict:
    about = {
        "name": "made_up", "title": "A made-up experiment", "stands_for": "something published", "data": "none",
        "model": "none either", "license": "mit", "metric": "accuracy (%)", "recipe": "some.yaml", "limits": {},
        "higher_is_better": higher_is_better, "structures": ["heads"], "settings": {"a": 1}, "baseline": {"b": 2},
    }  # fmt: skip
    settings = {"experiment": about, "steps_scale": 1.0, "dense_sha256": "0f"}
    return {"settings": settings, "sources": {"package": "1.0"}, "runs": runs}


def test_a_card_says_what_was_measured(scripts, tmp_path) -> None:
    runs = [made_up("ours", 0.5, seed, score) for seed, score in enumerate((80.0, 82.0))]
    runs += [made_up("l2", 0.5, 0, 70.0), made_up("ours", 0.75, 0, 60.0)]
    scripts("experiment_card").write_report(tmp_path, results(runs))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == ["dense", "-", "-", "90.00", "1.000 M", "0.0020 G", "4.00 MB", "4.00 ms", "-"]
    left = ["0.600 M", "0.0012 G", "2.40 MB", "2.00 ms", "2.00x"]
    assert rows[3] == ["ours (2 seeds)", "50 %", "50.0 \u00b1 0.0", "81.00 \u00b1 1.41", *left]
    assert rows[4] == ["l2 (1 seed)", "50 %", "50.0", "70.00", *left]
    assert rows[5][:4] == ["ours (1 seed)", "75 %", "75.0", "60.00"]
    assert "- at 50 %: ours is ahead of l2 by 11.00 (accuracy (%)), one seed: how much" in text
    assert "better than" not in text
    assert "accuracy on 100 examples is 3.00 points" in text and "at most" not in text
    assert "It is not something published" in text and "4 runs, 2 minutes" in text
    assert "75 % asked for, seed 0" in text
    for picture in ("curves.png", "kept_units.png"):
        assert f"]({picture})" in text and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_time_of_runs_that_were_finished_before_is_unknown(scripts) -> None:
    runs = [made_up("ours", 0.5, 0, 80.0), {**made_up("l2", 0.5, 0, 70.0), "seconds": None}]
    assert "2 runs, more than 0 minutes" in scripts("experiment_card").card(results(runs))


def test_lower_may_be_better_and_limits_are_said(scripts) -> None:
    runs = [made_up("ours", 0.5, 0, 80.0), made_up("l2", 0.5, 0, 70.0)]
    data = results(runs)
    data["settings"]["experiment"]["limits"] = {"heads": 0.8}
    assert "goes, at most 80 % of heads, so that every layer keeps one;" in scripts("experiment_card").card(data)
    found = scripts("experiment_card").differences(results(runs, higher_is_better=False))
    assert found == [
        "- at 50 %: l2 is ahead of ours by 10.00 (accuracy (%)), one seed: how much seeds differ is not known"
    ]


@pytest.mark.parametrize(
    ("ours", "l2", "verdict"),
    [
        ((80.0, 84.0), (79.0, 81.0), "ours is ahead of l2 by 2.00 (accuracy (%)), within the spread of 2 and 2 seeds"),
        ((80.0, 82.0), (91.0, 89.0), "l2 is ahead of ours by 9.00 (accuracy (%)), more than twice the gap's standard"),
        ((80.0, 82.0), (81.0, 81.0), "ours and l2 are level"),
        ((80.0, 82.0), (70.0,), "ours is ahead of l2 by 11.00 (accuracy (%)), one seed"),
    ],
)
def test_a_gap_is_seen_beside_the_spread_of_seeds(scripts, ours, l2, verdict) -> None:
    runs = [made_up("ours", 0.5, seed, score) for seed, score in enumerate(ours)]
    runs += [made_up("l2", 0.5, seed, score) for seed, score in enumerate(l2)]
    (line,) = scripts("experiment_card").differences(results(runs))
    assert verdict in line


@pytest.mark.parametrize(("sparsity", "said"), [(0.519, ""), (0.53, "ours lost 50 % of the encoder, l2 53 %")])
def test_models_of_unequal_sparsity_are_not_compared_in_silence(scripts, sparsity, said) -> None:
    l2 = {**made_up("l2", sparsity, 0, 70.0), "sparsity": 0.5}  # what was asked for
    (line,) = scripts("experiment_card").differences(results([made_up("ours", 0.5, 0, 80.0), l2]))
    assert line.endswith(said or "is not known")


def test_dense_models_that_each_run_trains_have_a_mean(scripts) -> None:
    runs = [made_up("ours", 0.5, seed, 80.0) for seed in (0, 1)]
    runs[1]["comparison"]["metrics"]["accuracy (%)"]["dense"] = 92.0
    assert "| 91.00 \u00b1 1.41 |" in scripts("experiment_card").table(results(runs))


def test_the_same_results_give_the_same_card(scripts, tmp_path) -> None:
    card = scripts("experiment_card")
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        card.write_report(folder, results([made_up("ours", 0.5, 0, 80.0)]))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


# --- runs


@pytest.fixture
def tiny(scripts, tmp_path, monkeypatch):
    """The script, with one experiment on light and dark images; calls it with more arguments."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    full = measuring.compare
    monkeypatch.setattr(measuring, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))
    whole = recipe_files.images(tmp_path)
    stand_in = ModuleType("stand_ins.shades")
    stand_in.data_folder = lambda: Path(whole["dataset"]["path"])
    stand_in.model_folder = lambda: Path(whole["model"])
    monkeypatch.setitem(sys.modules, "stand_ins.shades", stand_in)
    training = {name: value for name, value in whole["training"].items() if name != "seed"}
    data = {
        **yaml.safe_load((SCRIPTS / "recipes" / "offline" / "vit_fashion_mnist.yaml").read_text(encoding="utf-8")),
        "stand_in": "shades", "title": "Shades",
        "settings": {
            "stages": None, "dataset": {"flip": True}, "training": {**training, "max_steps": 8},
            "pruning": {"criterion": "taylor", "begin": 1, "end": 4, "update_every": 1},
            "distillation": {"alpha": 0.5},
        },
    }  # fmt: skip
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "shades.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    monkeypatch.setattr(scripts("experiment"), "OFFLINE", tmp_path / "offline")
    script = scripts("experiments")

    def call(*more: str) -> Path:
        script.main(["--cards", str(tmp_path / "cards"), "--runs", str(tmp_path / "runs"), *more])
        return tmp_path / "cards" / "shades"

    call.script = script
    return call


def test_an_experiment_goes_on_where_it_was(tiny, monkeypatch, tmp_path, capsys) -> None:
    folder = tiny("--sparsities", "0.5", "--seeds", "0", "--steps-scale", "0.5")
    first = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [(run["method"], run["steps"]) for run in first["runs"]] == [("ours", 4), ("l2", 4)]
    for run in first["runs"]:
        profiles = run["comparison"]["profiles"]
        assert profiles["compressed"]["encoder_parameters"] < 0.6 * profiles["dense"]["encoder_parameters"]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| ours (1 seed) | 50 % |" in text and "| l2 (1 seed) | 50 % |" in text
    assert str(tmp_path) not in text + json.dumps(first), "what is committed names no folder of this machine"
    assert {path.name for path in folder.iterdir()} == {"results.json", "README.md", "curves.png", "kept_units.png"}
    tiny("--sparsities", "0.5", "--seeds", "0", "1", "--steps-scale", "0.5")
    second = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert second["runs"][:2] == first["runs"] and [run["seed"] for run in second["runs"]] == [0, 0, 1, 1]
    (folder / "results.json").unlink()
    tiny("--sparsities", "0.5", "--seeds", "0", "1", "--steps-scale", "0.5")
    third = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert third["runs"] == [{**run, "seconds": None} for run in second["runs"]], "nothing ran again"
    written = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").unlink()
    monkeypatch.setattr(tiny.script, "run_recipe", None)
    tiny("--report")
    assert (folder / "README.md").read_text(encoding="utf-8") == written
    with pytest.raises(SystemExit, match="2"):
        tiny("--sparsities", "0.5", "--seeds", "0")
    assert "results of other settings: steps_scale" in capsys.readouterr().err


def test_a_report_needs_results(tiny, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        tiny("--report")
    assert "run without --report first" in capsys.readouterr().err
    (tmp_path / "cards" / "shades").mkdir(parents=True)
    (tmp_path / "cards" / "shades" / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        tiny("--report")
    assert "holds no runs with settings" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--sparsities", "1.5"], ["--steps-scale", "0"], ["--only", "nothing"]])
def test_arguments_that_are_wrong(tiny, words, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        tiny(*words)
    assert words[0] in capsys.readouterr().err
