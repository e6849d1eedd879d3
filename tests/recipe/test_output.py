"""Output folders: what is the user's own there is never replaced, and a run goes on with the data it began with."""

import json
from pathlib import Path
from typing import Any

import pytest
import recipe_files
import resumable
import yaml

import hf_compress.recipe.measure as measure
import hf_compress.recipe.run as runs
from hf_compress import ConfigError, Recipe, SweepConfig, cli, run_recipe, run_sweep
from hf_compress.recipe.sweep_plan import plan_run, share_stages

SHORT = {**recipe_files.TRAINING, "max_steps": 4, "save_steps": 1, "save_total_limit": 1}
COMMENT = "# what my thesis needs\n"


@pytest.fixture(autouse=True)
def measured_once(monkeypatch) -> None:
    """Latencies are not what these tests are about."""
    full = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))


def own_recipe(root: Path, **changes: Any) -> tuple[Path, bytes]:
    """A recipe file that the user keeps in its output folder, and what is in it."""
    recipe = Recipe.from_dict(recipe_files.classification(root, training=SHORT, **changes))
    path = root / "out" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(COMMENT + recipe.to_yaml(), encoding="utf-8")
    return path, path.read_bytes()


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(recipe: Recipe, monkeypatch, step: int = 2) -> None:
    make = runs.make_callbacks
    with monkeypatch.context() as patched:
        patched.setattr(runs, "make_callbacks", lambda recipe: [*make(recipe), resumable.CutAfterSave(step)])
        with pytest.raises(resumable.PowerCutError):
            run_recipe(recipe)


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_recipe_in_its_own_output_folder_runs_and_stays_as_it_is(tmp_path, resume) -> None:
    path, text = own_recipe(tmp_path)
    put(path.parent / "notes.txt")
    assert cli.main(["run", str(path), *resume]) == 0
    assert path.read_bytes() == text
    assert (path.parent / "compressed" / "model.safetensors").is_file()
    assert (path.parent / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/checkpoint-1/trainer_state.json",
        "compressed/model.safetensors",
        "compressed.partial/thesis.tex",
        "compressed-dense/model.safetensors",
        "run.json",
    ],
)
def test_what_a_run_would_replace_is_refused_by_name(tmp_path, name, capsys) -> None:
    path, _ = own_recipe(tmp_path, export="dense")
    put(path.parent / name)
    before = contents(path.parent)
    for options in ([], ["--resume"], ["--dry-run"]):
        assert cli.main(["run", str(path), *options]) == 2
        message = capsys.readouterr().err
        assert f"holds {name.partition('/')[0]}, which no run of this recipe has made" in message
        assert "Move them away, or choose another output" in message
    assert contents(path.parent) == before


def test_folders_of_stages_are_refused_as_well(tmp_path) -> None:
    stages = [{"quantization": None, "distillation": {}}, {"pruning": recipe_files.PRUNING}]
    path, _ = own_recipe(tmp_path, pruning=None, stages=stages, teacher="self")
    for name in ("stage-1", "stage-1.partial"):
        put(path.parent / name / "mine.txt")
    with pytest.raises(ConfigError, match=r"holds stage-1, stage-1\.partial, which no run"):
        run_recipe(Recipe.load(path), resume=True)


def test_empty_folders_are_in_nobodys_way(tmp_path) -> None:
    path, _ = own_recipe(tmp_path)
    (path.parent / "checkpoints" / "stage-1").mkdir(parents=True)
    (path.parent / "compressed.partial").mkdir()
    assert run_recipe(Recipe.load(path), dry_run=True).preview.total_steps == 4


def test_an_empty_folder_in_place_of_a_result_is_no_finished_stage(tmp_path) -> None:
    path, _ = own_recipe(tmp_path)
    (path.parent / "compressed").mkdir()
    with pytest.raises(ConfigError, match="holds compressed, which no run"):
        run_recipe(Recipe.load(path), resume=True)


def test_a_begun_run_is_told_by_its_mark_and_resumes(tmp_path, monkeypatch) -> None:
    path, text = own_recipe(tmp_path)
    recipe = Recipe.load(path)
    cut(recipe, monkeypatch)
    with pytest.raises(ConfigError, match=r"holds a run of this recipe already.*--resume"):
        run_recipe(recipe)
    assert run_recipe(recipe, resume=True).comparison is not None
    assert path.read_bytes() == text


@pytest.mark.parametrize("left", ["checkpoints", "compressed", "run.json"])
def test_runs_of_older_versions_had_no_mark_and_resume(tmp_path, monkeypatch, left) -> None:
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, training=SHORT))
    out = tmp_path / "out"
    if left == "checkpoints":
        cut(recipe, monkeypatch)
    else:
        run_recipe(recipe)
        (out / ("run.json" if left == "compressed" else "compressed/stage.json")).unlink()
        (out / "checkpoints" / "checkpoint-4" / "hf_compress_state.json").unlink()
    if left == "compressed":
        monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    (out / "hf_compress_run.json").unlink()
    assert run_recipe(recipe, resume=True).comparison is not None


def test_a_plain_stage_of_an_older_version_resumes(tmp_path) -> None:
    stages = [{"training": {"max_steps": 1}}, {"pruning": recipe_files.PRUNING}]
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, training=SHORT, pruning=None, stages=stages))
    (tmp_path / "out").mkdir()
    recipe.save(tmp_path / "out" / "recipe.yaml")
    put(tmp_path / "out" / "checkpoints" / "stage-1" / "checkpoint-1" / "trainer_state.json")
    with pytest.raises(ConfigError, match="holds a run of this recipe already"):
        run_recipe(recipe)


def without_a_row(recipe: Recipe, number: int = 3) -> None:
    rows = recipe_files.reviews()
    del rows[number]
    recipe_files.write_csv(Path(recipe.dataset.path), rows)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_row_less_is_noticed_on_resume(tmp_path, monkeypatch, dry_run) -> None:
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, training=SHORT))
    cut(recipe, monkeypatch)
    before = contents(tmp_path / "out")
    without_a_row(recipe)
    with pytest.raises(ConfigError, match=r"training data .*: 21 examples then, 20 now.*Bring the old data back"):
        run_recipe(recipe, resume=True, dry_run=dry_run)
    assert contents(tmp_path / "out") == before
    recipe_files.write_csv(Path(recipe.dataset.path), recipe_files.reviews())
    assert run_recipe(recipe, resume=True).comparison is not None


def test_another_text_is_noticed_on_resume(tmp_path, monkeypatch) -> None:
    evaluated = recipe_files.write_csv(tmp_path / "held.csv", recipe_files.reviews(6))
    given = recipe_files.classification(tmp_path, training=SHORT)
    recipe = Recipe.from_dict({**given, "dataset": {**given["dataset"], "eval_file": evaluated}})
    cut(recipe, monkeypatch)
    rows = recipe_files.reviews(6)
    rows[4]["review"] += "!"
    recipe_files.write_csv(tmp_path / "held.csv", rows)
    with pytest.raises(ConfigError, match=r"the evaluation data .*as many examples, 6, but with other contents"):
        run_recipe(recipe, resume=True)


def test_a_run_of_an_older_version_goes_on_unchecked(tmp_path, monkeypatch) -> None:
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, training=SHORT))
    cut(recipe, monkeypatch)
    (tmp_path / "out" / "hf_compress_run.json").unlink()
    without_a_row(recipe)
    assert run_recipe(recipe, resume=True).comparison is not None
    stored = json.loads((tmp_path / "out" / "hf_compress_run.json").read_text())["data"]
    assert stored["training"]["examples"] == 20


def test_a_damaged_mark_is_an_error(tmp_path, monkeypatch) -> None:
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, training=SHORT))
    cut(recipe, monkeypatch)
    for text in ("", "[]", '{"data": {"training": 3}}'):
        (tmp_path / "out" / "hf_compress_run.json").write_text(text)
        with pytest.raises(ConfigError, match=r"hf_compress_run\.json: is damaged"):
            run_recipe(recipe, resume=True)


def own_sweep(root: Path, **changes: Any) -> tuple[Path, bytes]:
    """A sweep's file in its output folder, with the path of its recipe."""
    recipe = recipe_files.classification(root, training={**SHORT, "max_steps": 2}, pruning={"structures": {"ffn": 0.5}})
    (root / "base.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    path = root / "out" / "sweep.yaml"
    path.parent.mkdir()
    return path, write_sweep(path, **changes)


def write_sweep(path: Path, **changes: Any) -> bytes:
    data = {"recipe": "../base.yaml", "output": str(path.parent), "runs": {"a": {}}, **changes}
    path.write_text(COMMENT + yaml.safe_dump(data), encoding="utf-8")
    return path.read_bytes()


def test_a_sweep_in_its_own_output_folder_runs_and_its_file_stays(tmp_path, capsys) -> None:
    path, text = own_sweep(tmp_path)
    assert cli.main(["sweep", str(path)]) == 0
    assert path.read_bytes() == text
    assert cli.main(["sweep", str(path)]) == 2
    assert "holds a sweep already" in capsys.readouterr().err
    more = write_sweep(path, runs={"a": {}, "b": {"pruning.structures.ffn": 0.25}})
    assert cli.main(["sweep", str(path), "--resume"]) == 0
    assert path.read_bytes() == more
    assert (path.parent / "b-seed0" / "run.json").is_file()
    other = {**SweepConfig.load(path).to_dict(), "runs": {"a": {}}}
    with pytest.raises(ConfigError, match=r"sweep\.yaml is of another sweep, and no sweep has written it"):
        run_sweep(SweepConfig.from_dict(other), resume=True)


def test_another_sweep_file_is_not_replaced(tmp_path) -> None:
    path, text = own_sweep(tmp_path)
    config = SweepConfig.from_dict({**SweepConfig.load(path).to_dict(), "runs": {"other": {}}})
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"sweep\.yaml is of another sweep, and no sweep has written it"):
            run_sweep(config, resume=resume)
    assert contents(path.parent) == {"sweep.yaml": text}


def test_what_a_sweep_would_replace_is_refused_by_name(tmp_path) -> None:
    path, _ = own_sweep(tmp_path)
    for name in ("sweep.json", "sweep.md"):
        put(path.parent / name)
    before = contents(path.parent)
    with pytest.raises(ConfigError, match=r"holds sweep\.json, sweep\.md, which no sweep has made"):
        run_sweep(SweepConfig.load(path), resume=True)
    for name in ("sweep.json", "sweep.md"):
        (path.parent / name).unlink()
    put(path.parent / "a-seed0" / "compressed.partial" / "mine.txt")
    with pytest.raises(ConfigError, match=r"run 'a': .*holds files, but not from a recipe"):
        run_sweep(SweepConfig.load(path), resume=True)
    assert contents(path.parent)["sweep.yaml"] == before["sweep.yaml"]


def test_a_sweep_of_an_older_version_had_no_mark_and_may_get_more_runs(tmp_path) -> None:
    path, _ = own_sweep(tmp_path)
    config = SweepConfig.load(path)
    path.unlink()
    run_sweep(config)
    (path.parent / "hf_compress_sweep.json").unlink()
    more = SweepConfig.from_dict({**config.to_dict(), "runs": {"a": {}, "b": {"pruning.structures.ffn": 0.25}}})
    assert list(run_sweep(more, resume=True).finished) == ["a-seed0", "b-seed0"]
    assert set(SweepConfig.load(path).runs) == {"a", "b"}


def test_runs_that_share_a_stage_share_the_knowledge_of_its_data(tmp_path) -> None:
    stages = [{"training": {"max_steps": 1}}, {"pruning": {"structures": {"ffn": 0.5}}, "training": {"max_steps": 2}}]
    recipe = recipe_files.classification(tmp_path, pruning=None, stages=stages)
    del recipe["output"]
    runs_ = {"a": {}, "b": {"stages.1.pruning.structures.ffn": 0.25}}
    config = SweepConfig(recipe=recipe, output=str(tmp_path / "out"), runs={"a": {}})
    run_sweep(config)
    recipe_files.write_csv(Path(recipe["dataset"]["path"]), recipe_files.reviews(22))
    found = run_sweep(SweepConfig(recipe=recipe, output=str(tmp_path / "out"), runs=runs_), resume=True)
    assert "the training data are not those that the run" in found.failed["b-seed0"].error


@pytest.mark.parametrize(("seeds", "shared"), [((0, 0), True), ((0, 1), False)])
def test_runs_share_a_stage_only_if_they_choose_the_same_examples(tmp_path, seeds, shared) -> None:
    """The recipe's own seed chooses them, whatever the seed of the stage is."""
    training = {"max_steps": 1, "seed": 5}
    stages = [{"training": training}, {"pruning": {"structures": {"ffn": 0.5}}}]
    recipe = recipe_files.classification(tmp_path, pruning=None, stages=stages)
    settings = {name: {"training.seed": seed} for name, seed in zip("ab", seeds, strict=True)}
    config = SweepConfig(recipe=recipe, output=str(tmp_path / "out"), runs=settings)
    first, second = (plan_run(config, tmp_path / "out", name, settings[name])[0] for name in "ab")
    put(first.folder / "stage-1" / "stage.json")
    share_stages(second, [first])
    assert (second.folder / "stage-1" / "stage.json").is_file() == shared
