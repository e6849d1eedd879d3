"""Recipes with stages: prune, shrink and heal several times; interrupted anywhere, they end as if nothing happened."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import recipe_files
import resumable
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import hf_compress.callbacks.distillation as distillation
import hf_compress.recipe.run as runs
import hf_compress.recipe.trial as trial
from hf_compress import (
    CompressionError,
    ConfigError,
    Recipe,
    StageConfig,
    TargetError,
    TrainingError,
    cli,
    dimension_groups,
    make_callbacks,
    run_recipe,
    shrink,
)
from hf_compress.recipe.stages import Stage, stages_of, track, tracked_after, with_what_is_left
from hf_compress.report.results import Results

SHORT = {**recipe_files.TRAINING, "max_steps": 4, "save_steps": 1}


def pruning(**structures: float) -> dict[str, Any]:
    return {"structures": structures, "begin": 0, "end": 2, "update_every": 1}


STAGES = [
    {"pruning": pruning(heads=0.25), "distillation": {"alpha": 0.5}},
    {"pruning": pruning(ffn=0.5), "training": {"learning_rate": 2e-3}, "repeat": 2},
    {"pruning": pruning(heads=0.5), "distillation": {"alpha": 0.9}, "quantization": {}, "training": {"max_steps": 3}},
]


SHARED = {**pruning(), "structures": ["heads", "ffn"], "criterion": "l2", "target_params": 0.8}


def staged(root: Path, stages: Any = STAGES, **changes: Any) -> Recipe:
    distills = any("distillation" in stage for stage in stages)
    return Recipe.from_dict(
        recipe_files.classification(
            root,
            pruning=None,
            stages=stages,
            teacher=str(root / "model") if distills else None,
            training=SHORT,
            **changes,
        )
    )


def sizes(folder: Path) -> tuple[int, int]:
    """Rows of all query projections and of all feed-forward layers."""
    weights = load_file(folder / "model.safetensors")
    return tuple(  # type: ignore[return-value]
        sum(weight.shape[0] for name, weight in weights.items() if name.endswith(f"{part}.weight"))
        for part in ("query", "intermediate.dense")
    )


@pytest.fixture(autouse=True)
def measured_once(monkeypatch):
    """Latencies are not what these tests are about."""
    import hf_compress.recipe.measure as measure

    full = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))


def test_every_stage_leaves_a_smaller_model_a_card_and_a_row(tmp_path) -> None:
    """Sparsities are of what a stage, or a repeat, begins with: 88 units, 44, 22; 8 heads of 8 channels, 6, 3."""
    result = run_recipe(staged(tmp_path, export="dense"))
    names = ["stage-1", "stage-2", "stage-3", "compressed", "compressed-dense"]
    assert list(result.folders) == names
    assert list(result.comparison.profiles) == ["dense", *names]
    found = {name: sizes(folder) for name, folder in result.folders.items()}
    assert found == {
        "stage-1": (48, 88),
        "stage-2": (48, 44),
        "stage-3": (48, 22),
        "compressed": (24, 22),
        "compressed-dense": (24, 22),
    }
    for name, folder in result.folders.items():
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.id2label == {0: "down", 1: "up"}
        results = Results.load(folder / "results.json")
        assert (results.model, results.training["optimizer_steps"]) == (name, 3 if "comp" in name else 4)
        assert "accuracy (%)" in (folder / "README.md").read_text(encoding="utf-8")
    kept = Results.load(result.folders["compressed"] / "results.json").kept
    assert {kind: (sum(u["kept"] for u in units), sum(u["total"] for u in units)) for kind, units in kept.items()} == {
        "heads": (3, 8),
        "ffn": (22, 88),
    }
    first = Results.load(result.folders["stage-1"] / "results.json").kept
    assert {kind: sum(u["kept"] for u in units) for kind, units in first.items()} == {"heads": 6}
    card = (result.folders["compressed"] / "README.md").read_text(encoding="utf-8")
    assert all(f"- {tag}\n" in card for tag in ("pruning", "distillation", "quantization"))
    assert run_recipe(staged(tmp_path, export="dense"), resume=True) == result


def test_a_structure_that_shares_a_budget_may_be_used_up_by_an_earlier_stage(tmp_path, monkeypatch, recwarn) -> None:
    """Under a budget of time every head may go; the next stage has feed-forward units alone to choose from."""
    compressed = runs._compressed

    def without_heads(trainer: Any, stage: Stage) -> Any:
        small = compressed(trainer, stage)
        if stage.name != "stage-1":
            return small
        heads = [group for group in dimension_groups(small) if group.kind == "heads"]
        return shrink(small, {group.name: torch.zeros(group.num_units, dtype=torch.bool) for group in heads})

    monkeypatch.setattr(runs, "_compressed", without_heads)
    result = run_recipe(staged(tmp_path, [{"pruning": SHARED, "repeat": 2}]))
    (note,) = [note for note in result.notes if "left no" in note]
    assert re.match("compressed: earlier stages have left no heads .* met with ffn alone", note)
    assert not [warning for warning in recwarn if "left no" in str(warning.message)]
    assert run_recipe(staged(tmp_path, [{"pruning": SHARED, "repeat": 2}]), resume=True).notes == result.notes
    first, second = (sizes(folder) for folder in result.folders.values())
    assert first[0] == second[0] <= 8  # the last head of a layer is no choice
    assert second[1] < first[1]


def test_only_what_earlier_stages_pruned_is_left_out(tmp_path) -> None:
    """A structure that the model never had, or that has a target of its own, is an error of the stage."""
    bare = tiny_models.bert()
    del bare.bert.encoder.layer[:]
    one, two = stages_of(staged(tmp_path, [{"pruning": SHARED, "repeat": 2}]), tmp_path)
    assert with_what_is_left(two, [], bare) is two
    assert with_what_is_left(two, [one], tiny_models.bert()) is two
    assert with_what_is_left(two, [one], bare) is two  # nothing is left to choose from
    own, again = stages_of(staged(tmp_path / "own", [{"pruning": pruning(heads=0.5), "repeat": 2}]), tmp_path)
    assert with_what_is_left(again, [own], bare) is again


def without_heads_after_the_first(monkeypatch) -> None:
    """Let a dry run's trial masks take all heads with the first stage."""
    shrunk = trial.shrink

    def shrink_more(model: Any, masks: Any, **options: Any) -> Any:
        small = shrunk(model, masks, **options)
        heads = [group for group in dimension_groups(small) if group.kind == "heads"]
        return shrink(small, {group.name: torch.zeros(group.num_units, dtype=torch.bool) for group in heads})

    monkeypatch.setattr(trial, "shrink", shrink_more)


def test_a_dry_run_notes_what_an_earlier_stage_uses_up(tmp_path, monkeypatch, recwarn) -> None:
    without_heads_after_the_first(monkeypatch)
    result = run_recipe(staged(tmp_path, [{"pruning": SHARED, "repeat": 2}]), dry_run=True)
    assert str(result).count("compressed: earlier stages have left no heads to choose from") == 1
    assert not [warning for warning in recwarn if "left no" in str(warning.message)]


def test_an_error_after_trained_stages_has_the_name_of_its_stage(tmp_path) -> None:
    """A stage that prunes before it trains is not checked before the first one trains."""
    halves = {**pruning(heads=0.5), "allocation": "per_layer"}
    too_much = {"pruning": {"structures": {"heads": 0.9}, "criterion": "l2"}, "oneshot_batches": 1}
    with pytest.raises(TargetError, match=r"^compressed: (?!compressed).*sparsity 0\.9 of 4 units leaves 0\.4"):
        run_recipe(staged(tmp_path, [{"pruning": halves}, too_much]))
    assert (tmp_path / "out" / "stage-1" / "stage.json").is_file()


class Straight:
    """One uninterrupted run for all tests that interrupt one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.result = run_recipe(staged(root))
        self.weights = {n: load_file(f / "model.safetensors") for n, f in self.result.folders.items()}

    def again(self, folder: Path) -> Recipe:
        """Return the same recipe, to be run elsewhere."""
        return staged(self.root, output=str(folder / "out"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight"))


def assert_ends_as(straight: Straight, recipe: Recipe) -> None:
    result = run_recipe(recipe, resume=True)
    assert list(result.folders) == list(straight.weights)
    for name, folder in result.folders.items():
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == straight.weights[name].keys()
        assert [n for n in weights if not torch.equal(weights[n], straight.weights[name][n])] == [], name
    assert result.metrics["eval_accuracy"] == straight.result.metrics["eval_accuracy"]
    assert result.comparison.metrics == straight.result.comparison.metrics


def interrupted(recipe: Recipe) -> None:
    with pytest.raises(resumable.PowerCutError):
        run_recipe(recipe)
    assert not (Path(str(recipe.output)) / "run.json").exists()
    with pytest.raises(ConfigError, match=r"holds a run of this recipe already.*--resume"):
        run_recipe(recipe)


def test_killed_between_stages(straight, tmp_path, monkeypatch) -> None:
    recipe = straight.again(tmp_path)
    save = Stage.save

    def save_and_stop(self: Stage, *args: Any) -> None:
        save(self, *args)
        if self.name == "stage-2":
            raise resumable.PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "save", save_and_stop)
        interrupted(recipe)
    trained = []
    run_stage = runs._run_stage
    monkeypatch.setattr(runs, "_run_stage", lambda stage, *rest: trained.append(stage.name) or run_stage(stage, *rest))
    assert_ends_as(straight, recipe)
    assert trained == ["stage-3", "compressed"]


@pytest.mark.parametrize("number", [1, 3], ids=["first", "third"])
def test_killed_in_the_middle_of_a_stage(straight, tmp_path, monkeypatch, number) -> None:
    recipe = straight.again(tmp_path)
    make = runs.make_callbacks
    chosen = recipe.runs()[number - 1]

    def make_and_cut(run: Recipe) -> Any:
        cut = [resumable.CutAfterSave(2)] if run.pruning == chosen.pruning and run.training == chosen.training else []
        first_repeat = number == 3 and str(run.model).endswith("stage-1")
        return [*make(run), *([] if first_repeat else cut)]

    with monkeypatch.context() as patched:
        patched.setattr(runs, "make_callbacks", make_and_cut)
        interrupted(recipe)
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("stage-")}
    assert folders == {f"stage-{i}" for i in range(1, number)}
    assert (tmp_path / "out" / "checkpoints" / f"stage-{number}" / "checkpoint-2").is_dir()
    steps = []
    monkeypatch.setattr(runs, "last_complete_checkpoint", lambda f: steps.append(found := last(f)) or found)
    assert_ends_as(straight, recipe)
    assert Path(steps[0]).parts[-2:] == (f"stage-{number}", "checkpoint-2")
    assert steps[1:] == [None] * (len(recipe.runs()) - number)


last = runs.last_complete_checkpoint


@pytest.mark.parametrize("name", ["stage-1", "compressed"])
def test_killed_while_a_result_is_saved(straight, tmp_path, monkeypatch, name) -> None:
    """With half of the weights on disk, and just before the finished folder gets its name."""
    recipe = straight.again(tmp_path)
    replace = os.replace

    def stop(source: Any, target: Any) -> None:
        if Path(target).name == name:
            (Path(source) / "model.safetensors").write_bytes(b"half")
            raise resumable.PowerCutError
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        interrupted(recipe)
    assert (tmp_path / "out" / f"{name}.partial" / "model.safetensors").read_bytes() == b"half"
    assert not (tmp_path / "out" / name).exists()
    assert_ends_as(straight, recipe)
    assert not (tmp_path / "out" / f"{name}.partial").exists()


def test_killed_while_it_measures(straight, tmp_path, monkeypatch) -> None:
    recipe = straight.again(tmp_path)

    def stop(*args: Any) -> None:
        raise resumable.PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(runs, "measure", stop)
        interrupted(recipe)
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    assert_ends_as(straight, recipe)


def test_a_dry_run_says_the_sizes_of_every_stage(tmp_path, monkeypatch) -> None:
    recipe = staged(tmp_path)
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    result = run_recipe(recipe, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert result.preview is None
    assert list(result.stages) == ["stage-1", "stage-2", "stage-3", "compressed"]
    facts = {name: each.sections["pruning"] for name, each in result.stages.items()}
    left = [facts[name]["parameters after shrink"] for name in facts]
    begun = [facts[name]["parameters"] for name in facts]
    assert begun[1:] == left[:-1]
    assert [facts[name]["ffn"]["units"] for name in ("stage-2", "stage-3")] == [88, 44]
    assert facts["compressed"]["heads"]["units"] == 6
    assert set(result.stages["compressed"].sections) == {"pruning", "distillation", "quantization"}
    assert result.stages["compressed"].total_steps == 3
    text = str(result)
    assert text.index("== stage-1 ==") < text.index("== compressed ==") < text.index("dry run: nothing was trained")


def test_a_dry_run_goes_on_after_a_stage_that_decides_itself_how_much_goes(tmp_path) -> None:
    soft = {"structures": ["heads"], "criterion": "movement", "options": {"mode": "soft"}, "begin": 0, "end": 2}
    result = run_recipe(staged(tmp_path, [{"pruning": soft}, {"pruning": pruning(ffn=0.5)}]), dry_run=True)
    first, last = (result.stages[name].sections["pruning"] for name in ("stage-1", "compressed"))
    assert first["parameters after shrink"] == last["parameters"] > last["parameters after shrink"]


def test_the_dry_run_names_what_fails_in_a_later_stage(tmp_path) -> None:
    """Two heads in each of two layers are left: 0.9 of them cannot go."""
    halves = {**pruning(heads=0.5), "allocation": "per_layer"}
    recipe = staged(tmp_path, [{"pruning": halves}, {"pruning": pruning(heads=0.9)}])
    with pytest.raises(TargetError, match=r"^compressed: .*sparsity 0\.9 of 4 units leaves 0\.4"):
        run_recipe(recipe, dry_run=True)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"pruning": pruning(heads=0.9)}, r"compressed: .*sparsity 0\.9 of 4 units leaves 0\.4"),
        ({"pruning": {**pruning(ffn=0.5), "end": 9}}, "compressed: .*the run has 4 optimizer steps"),
        (
            {"distillation": {"features": [{"loss": "hidden_mse", "layers": {7: 0}}]}},
            "compressed: .*layer",
        ),
    ],
)
def test_a_later_stage_fails_before_the_first_one_trains(tmp_path, monkeypatch, last, message) -> None:
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    halves = {"pruning": {**pruning(heads=0.5), "allocation": "per_layer"}}
    with pytest.raises(CompressionError, match=message):
        run_recipe(staged(tmp_path, [{}, halves, last]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("removed", "feature", "message"),
    [
        (pruning(layers=0.5), {"loss": "hidden_mse", "layers": "same"}, "the student has 1 layers, the teacher 2"),
        (pruning(layers=0.5), {"loss": "hidden_mse", "layers": {0: 3}}, "the teacher has 2 layers, and no layer 3"),
    ],
)
def test_what_a_teacher_to_come_cannot_teach_shows_before_it_is_trained(
    tmp_path, monkeypatch, removed, feature, message
) -> None:
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    stages = [{}, {"pruning": removed}, {"distillation": {"features": [feature]}}]
    recipe = Recipe.from_dict({**staged(tmp_path, stages).to_dict(), "teacher": "dense"})
    for dry_run in (True, False):
        with pytest.raises(CompressionError, match=message):
            run_recipe(recipe, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_teacher_to_come_in_its_own_size(tmp_path) -> None:
    taught = {"pruning": pruning(ffn=0.5), "distillation": {"features": [{"loss": "hidden_mse", "layers": "same"}]}}
    recipe = Recipe.from_dict({**staged(tmp_path, [{}, taught, taught]).to_dict(), "teacher": "dense"})
    found = run_recipe(recipe, dry_run=True).stages
    teachers = [found[name].sections["distillation"]["teacher"] for name in ("stage-2", "compressed")]
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").num_parameters()
    assert teachers == [f"BertForSequenceClassification, {whole:,} parameters"] * 2
    assert found["compressed"].sections["pruning"]["parameters"] < whole


@pytest.mark.parametrize("number", [1, 2])
def test_a_model_of_nan_is_not_saved(tmp_path, number) -> None:
    """Its classes would have an accuracy all the same."""
    stages = [{}, {"quantization": {}}]
    stages[number - 1]["training"] = {"learning_rate": 1e30, "max_grad_norm": 0.0}
    name = ("stage-1", "compressed")[number - 1]
    with pytest.raises(TrainingError, match=f"^{name}: '.*' is NaN or infinite in places after training"):
        run_recipe(staged(tmp_path, stages))
    assert not (tmp_path / "out" / name).exists() and not (tmp_path / "out" / "run.json").exists()


def test_checking_stages_first_changes_no_result(straight, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "check_stages", lambda *a: None)
    assert_ends_as(straight, straight.again(tmp_path))


def test_uniform_stages_need_no_loader(tmp_path) -> None:
    stage = {"pruning": {**pruning(ffn=0.5), "allocation": "per_layer"}}
    result = run_recipe(staged(tmp_path, [stage, stage], shrink={"uniform": True}))
    config = AutoModelForSequenceClassification.from_pretrained(result.folders["compressed"]).config
    assert not hasattr(config, "quantization_config")
    assert config.intermediate_size == 11


def test_all_kinds_go_one_after_the_other(tmp_path) -> None:
    """Residual streams and layers too, and single weights at the end."""
    stages = [{"pruning": pruning(**{kind: 0.5})} for kind in ("hidden", "layers", "ffn", "weights")]
    recipe = staged(tmp_path, stages)
    previews = run_recipe(recipe, dry_run=True).stages
    assert len(previews) == 4
    result = run_recipe(recipe)
    small = AutoModelForSequenceClassification.from_pretrained(result.folders["compressed"])
    (layer,) = small.bert.encoder.layer
    assert layer.intermediate.dense.weight.shape == (22, 16)
    zeros = (layer.intermediate.dense.weight == 0).float().mean()
    assert zeros == pytest.approx(0.5, abs=0.3)
    left = [profile.parameters for profile in result.comparison.profiles.values()]
    assert left[0] > left[1] > left[2] > left[3] == left[4]
    kept = Results.load(result.folders["compressed"] / "results.json").kept
    assert {kind: [(u["kept"], u["total"]) for u in units] for kind, units in kept.items()} == {
        "ffn": [(22, 44)],
        "hidden": [(16, 32)],
        "layers": [(1, 2)],
    }


def test_stages_without_pruning_keep_the_size(tmp_path) -> None:
    recipe = staged(tmp_path, [{"distillation": {}}, {"quantization": {}}])
    result = run_recipe(recipe)
    assert sizes(result.folders["stage-1"]) == sizes(result.folders["compressed"]) == (64, 88)
    assert Results.load(result.folders["compressed"] / "results.json").kept == {}


def test_in_every_stage_the_model_it_begins_with_teaches_itself(tmp_path, monkeypatch) -> None:
    stages = [{"pruning": pruning(ffn=0.25), "distillation": {}}, {"pruning": pruning(heads=0.25), "distillation": {}}]
    recipe = Recipe.from_dict({**staged(tmp_path, stages).to_dict(), "teacher": "self"})
    copied = []
    copy_of = distillation.copy_of
    monkeypatch.setattr(distillation, "copy_of", lambda *args: copied.append(copy_of(*args)) or copied[-1])
    result = run_recipe(recipe)
    assert len(copied) == 4  # of each stage one in the check before anything trains, and one to train
    kept = load_file(result.folders["stage-1"] / "model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in copied[3].state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, r"Recipe\.stages: got \[\]; allowed: a list of at least one stage"),
        ({"stages": {"pruning": {}}}, "a list of at least one stage"),
        ({"stages": [3]}, "stage 1: got 3"),
        ({"stages": [{}]}, "Recipe: nothing to do"),
        ({"stages": [{"training": {"max_steps": 3}}]}, "Recipe: nothing to do"),
        ({"stages": [{"oneshot_batches": 2}]}, "oneshot_batches: got 2; allowed: None without a pruning"),
        ({"stages": [{"oneshot_batches": 0, "pruning": {"structures": {"ffn": 0.5}}}]}, "oneshot_batches: got 0"),
        ({"stages": [{"lora": {}, "pruning": {"structures": {"ffn": 0.5}}}]}, "lora: adapters are merged after"),
        ({"stages": [{"lora": {"r": 0}, "distillation": {}}]}, "LoraSection.r"),
        ({"stages": [{"lora": {"dropout": 1}, "distillation": {}}]}, "LoraSection.dropout"),
        (
            {"stages": [{"oneshot_batches": 2, "pruning": {"structures": {"weights": 0.5}}}]},
            "prunes single weights, which training then overwrites",
        ),
        ({"stages": [STAGES[0], {"prunning": {}}]}, "stage 2: .*unknown key 'prunning'; closest match: 'pruning'"),
        ({"stages": [{**STAGES[0], "repeat": 0}]}, r"StageConfig\.repeat: got 0; allowed: an int >= 1"),
        (
            {"stages": [{**STAGES[0], "repeat": 1_001}]},
            r"StageConfig\.repeat: got 1001; allowed: an int in \[1, 1000\]",
        ),
        ({"stages": [{**STAGES[0], "training": {"learning_rat": 1}}]}, r"StageConfig\.training: unknown key"),
        ({"stages": [{**STAGES[0], "training": {"output_dir": "x"}}]}, "has no place in a recipe"),
        ({"stages": [{**STAGES[0], "training": [1]}]}, "a mapping of TrainingArguments fields"),
        ({"pruning": pruning(heads=0.5)}, r"Recipe\.pruning: got .* None beside stages\. Put it into a stage"),
        ({"quantization": {}}, r"Recipe\.quantization: got"),
        ({"distillation": {}}, r"Recipe\.distillation: got"),
        ({"stages": [{"quantization": {}}, STAGES[1]], "teacher": None}, "quantization would be forgotten"),
        ({"stages": [{"quantization": {}, "repeat": 2}], "teacher": None}, "quantization would be forgotten"),
        ({"stages": [{"pruning": pruning(weights=0.5)}, STAGES[0]]}, "pruning of single weights would be forgotten"),
        ({"stages": [STAGES[1]]}, r"Recipe\.teacher: got .* None without a distillation section"),
        ({"stages": [{"distillation": {}}], "shrink": {"uniform": True}}, r"Recipe\.shrink: got"),
    ],
)
def test_what_stages_must_not_be(tmp_path, changes, message) -> None:
    fields = {"stages": STAGES, "teacher": "teacher", **changes}
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(fields)


def test_a_teacher_that_is_missing_shows_before_the_first_stage(tmp_path, monkeypatch) -> None:
    recipe = Recipe.from_dict({**staged(tmp_path).to_dict(), "teacher": None})
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=r"Recipe\.teacher: got None"):
        run_recipe(recipe)
    assert not (tmp_path / "out").exists()


def test_the_first_stage_makes_the_teacher_of_the_others(tmp_path) -> None:
    """A pretrained model with a new head: what the plain stage made of it is the reference, and teaches."""
    recipe_files.save_model(tmp_path / "model", "text-classification", num_labels=5)  # does not fit: a new head
    stages = [{"training": {"max_steps": 6, "learning_rate": 1e-2}}, STAGES[0], {"pruning": pruning(ffn=0.5)}]
    recipe = Recipe.from_dict({**staged(tmp_path, stages).to_dict(), "teacher": "dense"})
    dry = run_recipe(recipe, dry_run=True)
    assert list(dry.stages) == ["stage-1", "stage-2", "compressed"] and dry.stages["stage-1"].sections == {}
    result = run_recipe(recipe)
    assert list(result.comparison.profiles) == ["dense", "stage-2", "compressed"]
    assert list(result.folders) == ["stage-2", "compressed"]
    dense = load_file(tmp_path / "out" / "stage-1" / "model.safetensors")
    assert dense["classifier.weight"].shape[0] == 2
    assert sizes(tmp_path / "out" / "stage-1") == (64, 88)
    assert result.comparison.metrics["accuracy (%)"].keys() == {"dense", "stage-2", "compressed"}
    (found,) = {run.teacher for run in recipe.runs() if run.distillation}
    assert found == "dense"
    stages_ = runs.stages_of(recipe, tmp_path / "out")
    assert stages_[1].recipe.teacher == str(tmp_path / "out" / "stage-1")
    assert "trained before it began to compress" in str(result)


def test_the_dense_teacher_is_the_models_own_where_nothing_trains_first(tmp_path) -> None:
    recipe = Recipe.from_dict({**staged(tmp_path).to_dict(), "teacher": "dense"})
    assert runs.stages_of(recipe, tmp_path / "out")[0].recipe.teacher == str(tmp_path / "model")
    alone = Recipe.from_dict({"distillation": {}, "teacher": "dense"})
    with pytest.raises(ConfigError, match="it names none"):
        make_callbacks(alone)
    assert make_callbacks(Recipe.from_dict({**alone.to_dict(), "model": str(tmp_path / "model")}))


def test_pruned_in_one_shot_and_healed_by_adapters(tmp_path) -> None:
    oneshot = {"structures": {"heads": 0.25, "ffn": 0.5}, "criterion": "taylor"}
    stages = [{"pruning": oneshot, "oneshot_batches": 2, "distillation": {}, "lora": {"r": 2, "alpha": 4}}]
    recipe = staged(tmp_path, stages)
    dry = run_recipe(recipe, dry_run=True)
    (preview,) = dry.stages.values()
    assert all("keeps" in text for text in preview.sections["before training"].values())
    result = run_recipe(recipe)
    small = result.folders["compressed"]
    assert sizes(small) == (48, 44)
    weights, dense = load_file(small / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert set(weights) == set(dense), "no adapters are left"
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.output.dense.bias"):
        assert torch.equal(weights[name], dense[name]), "adapters are on the weights of linear layers alone"
    pooler = "bert.pooler.dense.weight"
    assert not torch.equal(weights[pooler], dense[pooler]), "what was learned is merged"
    results = Results.load(small / "results.json")
    assert sum(unit["kept"] for unit in results.kept["ffn"]) == 44


def test_a_stage_of_one_shot_pruning_can_be_followed_by_plain_training(tmp_path) -> None:
    oneshot = {"structures": {"ffn": 0.5}, "criterion": "l2"}
    stages = [{"pruning": oneshot, "oneshot_batches": 1}, {"training": {"max_steps": 2}}]
    result = run_recipe(staged(tmp_path, stages))
    assert list(result.folders) == ["stage-1", "compressed"]
    assert sizes(result.folders["stage-1"]) == sizes(result.folders["compressed"]) == (64, 44)


def test_stages_survive_files_and_become_runs(tmp_path) -> None:
    recipe = staged(tmp_path, export="dense", shrink={"multiple_of": 4})
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert all(isinstance(stage, StageConfig) for stage in recipe.stages)
    found = recipe.runs()
    assert [run.training["max_steps"] for run in found] == [4, 4, 4, 3]
    assert [run.training["learning_rate"] for run in found] == [1e-3, 2e-3, 2e-3, 1e-3]
    assert [run.teacher is not None for run in found] == [True, False, False, True]
    assert [run.export for run in found] == [None, None, None, "dense"]
    assert all(run.shrink == recipe.shrink and run.stages is None for run in found)
    assert found[0].runs() == (found[0],)
    with pytest.raises(ConfigError, match=r"has stages.*recipe\.runs\(\)"):
        make_callbacks(recipe)


def test_epochs_of_a_stage_replace_the_steps_of_the_recipe() -> None:
    stages = [{"pruning": pruning(heads=0.5), "training": {"num_train_epochs": 2}}]
    (run,) = Recipe.from_dict({"stages": stages, "training": {"max_steps": 9, "seed": 3}}).runs()
    assert run.training == {"seed": 3, "num_train_epochs": 2}


def test_groups_are_followed_when_layers_go(tiny_bert) -> None:
    groups = dimension_groups(tiny_bert())
    (layers,) = (group.name for group in groups if group.kind == "layers")
    heads = [f"bert.encoder.layer.{i}.attention.heads" for i in range(2)]
    masks = {layers: torch.tensor([False, True]), heads[1]: torch.tensor([True, True, True, False])}
    once = tracked_after(track(groups), groups, masks)
    again = tracked_after(once, [], {heads[0]: torch.tensor([True, False, False])})
    found = {each.name: (each.kept, each.total, each.now, each.pruned) for each in again}
    assert found[heads[0]] == (0, 4, None, False)
    assert found[heads[1]] == (1, 4, heads[0], True)
    assert found[layers] == (1, 2, layers, True)


def test_the_command_line_runs_stages(tmp_path, capsys) -> None:
    staged(tmp_path, [STAGES[1]]).save(tmp_path / "recipe.yaml")
    assert cli.main(["run", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    assert "== stage-1 ==" in capsys.readouterr().out
    assert cli.main(["run", str(tmp_path / "recipe.yaml")]) == 0
    table = capsys.readouterr().out
    assert "stage-1" in table and "compressed" in table


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_are_killed_one_after_the_other(straight, tmp_path) -> None:
    """As soon as a checkpoint, half of a result, and a whole one begin to exist."""
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe = straight.again(tmp_path)
    recipe.save(path)
    moments = ("checkpoints/stage-1/checkpoint-2", "stage-1.partial", "stage-2", "checkpoints/stage-3/checkpoint-1")
    for moment in (*moments, "compressed.partial"):
        command = [sys.executable, "-m", "hf_compress.cli", "run", str(path), "--resume"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (out / moment).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert_ends_as(straight, recipe)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_save_every_stage_once(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    staged(tmp_path).save(path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "hf_compress.cli", "run", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy (%)") == 1
    found = [sizes(tmp_path / "out" / name) for name in ("stage-1", "stage-2", "stage-3", "compressed")]
    assert found == [(48, 88), (48, 44), (48, 22), (24, 22)]


@pytest.mark.slow
def test_a_language_model_and_a_translator_go_through_stages(tmp_path) -> None:
    """Twice the same structure; what the first stage leaves is loaded with the classes of the task."""
    rows = [{"long": f"{a} {b}", "short": a} for a in recipe_files.SENTENCES for b in recipe_files.SENTENCES[:3]]
    data = recipe_files.write_json(tmp_path / "pairs.jsonl", rows)
    tasks: dict[str, dict[str, Any]] = {
        "causal-lm": {"path": data, "text_columns": "long", "max_length": 24},
        "seq2seq-lm": {"path": data, "text_columns": "long", "target_column": "short", "max_length": 24},
    }
    for task, dataset in tasks.items():
        model = recipe_files.save_model(tmp_path / task, task)
        stages = [{"pruning": pruning(heads=0.25, ffn=0.25), "repeat": 2}, {"distillation": {}}]
        changes = {"model": model, "task": task, "dataset": dataset, "output": str(tmp_path / f"{task}-out")}
        recipe = Recipe.from_dict({**staged(tmp_path, stages, **changes).to_dict(), "teacher": model})
        result = run_recipe(recipe)
        sizes_left = [profile.parameters for profile in result.comparison.profiles.values()]
        assert sizes_left[0] > sizes_left[1] > sizes_left[2] == sizes_left[3]
        (metric,) = result.comparison.metrics.values()
        assert all(1 < value < 1e6 for value in metric.values()) and len(metric) == 4
