"""Every published recipe and sweep on a tiny model: dry runs of all stages, and runs to the end, with a few steps."""

import json
import math
from pathlib import Path

import published
import pytest
from fake_timer import FakeTimer
from huggingface_hub import constants
from transformers import AutoConfig

import hf_compress.recipe.measure as measuring
from hf_compress import Recipe, SweepConfig, run_recipe, run_sweep
from hf_compress.config.recipe import PlainRun
from hf_compress.recipe.overrides import change_setting, load_recipe

RECIPES = sorted(published.RECIPES.glob("*.yaml"))
SWEEPS = sorted((published.RECIPES / "sweeps").glob("*.yaml"))
MANY_STAGES = ("bert_mnli", "bert_mnli_ziplm", "t5_wmt16", "vit_cifar10")
LONG = (*MANY_STAGES, "bert_mnli_cofi", "bert_mnli_grain", "bert_sst2_jpqd")
"""Runs of more than about ten seconds. The scripts' own tests run every task in seconds."""

ALL = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}


def cases(paths: list[Path], slow: tuple[str, ...]) -> list:
    marks = dict.fromkeys(slow, pytest.mark.slow)
    return [pytest.param(p, id=p.stem, marks=[marks[p.stem]] if p.stem in marks else []) for p in paths]


@pytest.fixture(autouse=True)
def without_a_clock(monkeypatch, tmp_path) -> None:
    """Latencies are not what these tests are about; those of ZipLM's search come from a function of the sizes."""
    full = measuring.compare
    monkeypatch.setattr(measuring, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))
    monkeypatch.setattr("hf_compress.latency.measure.time_models", FakeTimer())
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))  # where tables of latencies are kept


def small(path: Path, root: Path, *more: str) -> Recipe:
    """The recipe on a tiny model, without changes of what its stages do."""
    settings = [f"{name}={value}" for name, value in published.stubs(Recipe.load(path), root).items()]
    settings += [
        "dataset.name=null",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=1",
    ]
    settings += ["training.dataloader_num_workers=0", *(f"training.{n}={json.dumps(v)}" for n, v in ALL.items())]
    return load_recipe(path, [*settings, *more], str(root / "out"))


@pytest.mark.parametrize("path", cases(RECIPES, MANY_STAGES))
def test_a_dry_run_says_what_every_stage_would_do(path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    # Five times of ZipLM's leave these tiny layers one head each, which is no structure to prune any more.
    recipe = small(path, tmp_path, *(["stages.1.repeat=2"] if path.stem == "bert_mnli_ziplm" else []))
    result = run_recipe(recipe, dry_run=True)
    previews = [result.preview] if recipe.stages is None else list(result.stages.values())
    assert len(previews) == len(recipe.runs())
    for run, preview in zip(recipe.runs(), previews, strict=True):
        epochs = run.training["num_train_epochs"]
        assert preview.total_steps == math.ceil(epochs * published.NUM_EXAMPLES["train"] / 2)
        assert (run.pruning is not None) == bool({"pruning", "before training"} & set(preview.sections))
        assert (run.distillation is not None) == ("distillation" in preview.sections)
        assert (run.quantization is not None) == ("quantization" in preview.sections)
    assert "dry run: nothing was trained" in str(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_dry_run_of_a_sweep_says_what_every_run_would_do(path, tmp_path) -> None:
    config = SweepConfig.load(path)
    recipe = small(Path(config.recipe), tmp_path).to_dict()
    found = run_sweep(
        SweepConfig.from_dict({**config.to_dict(), "recipe": recipe, "output": str(tmp_path / "sweep")}), dry_run=True
    )
    assert list(found.previews) == [name for name, _ in config.settings()]
    assert all(len(each.stages) > 5 for each in found.previews.values())
    assert not (tmp_path / "sweep").exists()


def few_steps(recipe: Recipe) -> Recipe:
    """The same stages, repeated twice at most, six steps each.

    Scores of movement pruning take larger steps, since with six of the published ones no unit would go.
    """
    data = recipe.to_dict()
    for place, stage in enumerate(data.get("stages") or ()):
        stage["repeat"] = min(stage["repeat"], 2)
        stage["training"] = {"max_steps": 6, "num_train_epochs": 6}
        if stage["pruning"] and stage["pruning"]["criterion"] == "movement":
            change_setting(data, f"stages.{place}.pruning.options.learning_rate", 2.0, "here")
        if stage["quantization"]:  # torchao's kernels have no matrices with a single input
            change_setting(data, f"stages.{place}.pruning.min_units", 2, "here")
    data["training"] |= {"max_steps": 6, "per_device_train_batch_size": published.NUM_EXAMPLES["train"]}
    return Recipe.from_dict(data)


@pytest.mark.parametrize("path", cases(RECIPES, LONG))
def test_a_recipe_runs_to_its_end(path, tmp_path) -> None:
    more = ["training.generation_num_beams=1", "training.generation_max_length=8"] if path.stem == "t5_wmt16" else []
    recipe = few_steps(small(path, tmp_path, *more))
    result = run_recipe(recipe)
    pruned = [run for run in recipe.runs() if not isinstance(run, PlainRun)]
    models = list(result.comparison.profiles)
    assert models[0] == "dense" and len(models) >= 2
    parameters = [result.comparison.profiles[name].parameters for name in models]
    assert parameters == sorted(parameters, reverse=True) and parameters[-1] < parameters[0]
    assert len(models) >= len(pruned) + 1 + (recipe.export is not None)
    for name, folder in result.folders.items():
        assert (folder / "README.md").is_file() and AutoConfig.from_pretrained(folder)
        assert all(math.isfinite(row[name]) for row in result.comparison.metrics.values())
