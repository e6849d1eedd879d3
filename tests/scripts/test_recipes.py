"""Recipe files of the repository are valid, and the training scripts turn arguments into recipes."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import recipe_files
from hub_server import hub_server
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import hf_compress.recipe.measure as measuring
from hf_compress import ConfigError, Recipe
from hf_compress.config import TASKS

RECIPES = sorted((Path(__file__).parents[2] / "scripts" / "recipes").glob("*.yaml"))
SCRIPTS = {
    "run_text_classification": "text-classification",
    "run_translation": "seq2seq-lm",
    "run_image_classification": "image-classification",
    "run_causal_lm": "causal-lm",
    "run_question_answering": "question-answering",
}


@pytest.fixture
def scripts(monkeypatch):
    """Import a training script by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete_and_survive_files(path, tmp_path) -> None:
    recipe = Recipe.load(path)
    assert recipe.task in TASKS and recipe.model and recipe.dataset
    assert "\n# " in path.read_text(encoding="utf-8") or path.read_text(encoding="utf-8").startswith("# ")
    recipe.save(tmp_path / "again.yaml")
    assert Recipe.load(tmp_path / "again.yaml") == recipe
    assert "/" in recipe.model, "a name on the Hub, whose canonical form has an owner"


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10
    assert {Recipe.load(path).task for path in RECIPES} == set(SCRIPTS.values())


def built(scripts, name: str, *arguments: str) -> tuple[Recipe, bool]:
    script, shared = scripts(name), scripts("recipe_script")
    kind = next(each for each in vars(script).values() if isinstance(each, type) and each.__module__ == name)
    task = SCRIPTS[name]
    return shared.build_recipe(task, kind, script.columns, shared.parse(task, kind, list(arguments)))


README_COMMANDS = [
    line.split()[1:]
    for line in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("python scripts/run_")
]


@pytest.mark.parametrize("words", README_COMMANDS, ids=lambda words: Path(words[0]).stem)
def test_commands_of_the_readme_train_as_long_as_they_prune(scripts, words, monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe, _ = built(scripts, Path(words[0]).stem, *words[1:])
    for run in recipe.runs():
        if run.pruning is not None and run.oneshot_batches is None and str(run.pruning.end).endswith(" epochs"):
            assert float(run.pruning.end.removesuffix(" epochs")) <= run.training["num_train_epochs"]


def test_the_readme_has_a_command_for_each_script() -> None:
    assert {Path(words[0]).stem for words in README_COMMANDS} == set(SCRIPTS)


def recipe_of(task: str) -> str:
    return str(next(path for path in RECIPES if Recipe.load(path).task == task))


@pytest.mark.parametrize(("name", "task"), SCRIPTS.items())
def test_a_recipe_alone_is_enough(scripts, name, task) -> None:
    path = recipe_of(task)
    recipe, resume = built(scripts, name, "--recipe", path, "--output_dir", "out", "--seed", "7")
    stored = Recipe.load(path)
    assert recipe.output == "out" and not resume
    assert recipe.training == {**stored.training, "seed": 7}, "no default of TrainingArguments hides the recipe's"
    assert (recipe.model, recipe.dataset, recipe.stages) == (stored.model, stored.dataset, stored.stages)


def test_arguments_take_the_place_of_the_recipes(scripts) -> None:
    words = "--model_name_or_path m --teacher_name_or_path self --data_file a.csv --text_column_names a,b "
    words += "--label_column_name c --max_seq_length 9 --max_train_samples 5 --learning_rate 1e-3 --bf16 false "
    words += "--resume_from_checkpoint true --eval_split dev"
    path = recipe_of("text-classification")
    recipe, resume = built(scripts, "run_text_classification", "--recipe", path, *words.split())
    assert resume and (recipe.model, recipe.teacher) == ("m", "self")
    data = recipe.dataset
    assert (data.path, data.name, data.text_columns, data.label_column) == ("a.csv", None, ("a", "b"), "c")
    assert (data.max_length, data.max_train_examples, data.eval_split) == (9, 5, "dev")
    assert recipe.training["learning_rate"] == 1e-3 and recipe.training["bf16"] is False


def lengths(recipe: Recipe) -> set[tuple]:
    return {tuple(run.training.get(name) for name in ("num_train_epochs", "max_steps")) for run in recipe.runs()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num_train_epochs 2", {(2.0, None)}),
        ("--max_steps 10", {(None, 10)}),
        ("--num_train_epochs 2 --max_steps 10", {(2.0, 10)}),
    ],
)
@pytest.mark.parametrize("task", ["seq2seq-lm", "text-classification"])
def test_arguments_hold_for_every_stage(scripts, task, words, expected) -> None:
    name = next(script for script, of in SCRIPTS.items() if of == task)
    recipe, _ = built(scripts, name, "--recipe", recipe_of(task), *words.split(), "--learning_rate", "0.25")
    assert len(recipe.runs()) > 3
    assert lengths(recipe) == expected
    assert {run.training["learning_rate"] for run in recipe.runs()} == {0.25}


def test_epochs_take_the_place_of_a_recipes_steps(scripts, tmp_path) -> None:
    Recipe(pruning={"structures": {"ffn": 0.5}}, training={"max_steps": 7, "seed": 1}).save(tmp_path / "r.yaml")
    words = ["--recipe", str(tmp_path / "r.yaml"), "--num_train_epochs", "2", "--data_file", "a.csv"]
    recipe, _ = built(scripts, "run_text_classification", *words)
    assert recipe.training == {"seed": 1, "num_train_epochs": 2.0}


def test_help_says_what_arguments_mean_with_stages(scripts, capsys) -> None:
    with pytest.raises(SystemExit):
        built(scripts, "run_causal_lm", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "hold for every stage" in text and "are the length of each stage" in text


def test_languages_name_parts_of_a_column(scripts) -> None:
    words = "--dataset_name wmt/wmt16 --source_lang de --target_lang fr --source_prefix x --predict_with_generate false"
    recipe, _ = built(scripts, "run_translation", "--recipe", recipe_of("seq2seq-lm"), *words.split())
    assert recipe.dataset.text_columns == ("translation.de",) and recipe.dataset.target_column == "translation.fr"
    assert recipe.dataset.prefix == "x" and recipe.training["predict_with_generate"] is False


def test_another_data_set_has_squads_columns(scripts) -> None:
    arguments = ("--recipe", recipe_of("question-answering"), "--dataset_name", "mine")
    recipe, _ = built(scripts, "run_question_answering", *arguments)
    assert recipe.dataset.text_columns == ("question", "context") and recipe.dataset.eval_split is None
    assert (recipe.dataset.max_length, recipe.dataset.stride) == (384, 128)


def test_another_data_set_keeps_what_is_not_of_the_data(scripts) -> None:
    stored = Recipe.load(recipe_of("seq2seq-lm")).dataset
    words = ["--train_file", "a.jsonl", "--validation_file", "b.jsonl", "--source_column", "a", "--target_column", "b"]
    data = built(scripts, "run_translation", "--recipe", recipe_of("seq2seq-lm"), *words)[0].dataset
    assert (data.path, data.eval_file, data.name, data.eval_split) == ("a.jsonl", "b.jsonl", None, None)
    kept = (stored.prefix, stored.max_length, stored.max_target_length)
    assert (data.prefix, data.max_length, data.max_target_length) == kept and None not in kept
    words = ("--recipe", recipe_of("image-classification"), "--dataset_name", "photos")
    assert built(scripts, "run_image_classification", *words)[0].dataset.flip is True


def test_tasks_of_glue_have_names(scripts) -> None:
    words = ("--recipe", recipe_of("text-classification"), "--task_name")
    for name, columns, split in (
        ("mrpc", ("sentence1", "sentence2"), ""),
        ("mnli", ("premise", "hypothesis"), "_matched"),
    ):
        data = built(scripts, "run_text_classification", *words, name)[0].dataset
        assert (data.path, data.name, data.text_columns) == ("nyu-mll/glue", name, columns)
        assert data.eval_split == f"validation{split}"
    with pytest.raises(ConfigError, match=r"--task_name: got 'stsb'"):
        built(scripts, "run_text_classification", *words, "stsb")
    with pytest.raises(ConfigError, match="got both"):
        built(scripts, "run_text_classification", *words, "mnli", "--dataset_name", "a")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--resume_from_checkpoint false", False),
        ("--resume_from_checkpoint True", True),
        ("--resume", True),
        ("--resume false", False),
        ("--do_train --do_eval true", False),
    ],
)
def test_when_a_run_is_resumed(scripts, words, expected) -> None:
    _, resume = built(scripts, "run_causal_lm", "--recipe", recipe_of("causal-lm"), *words.split())
    assert resume is expected


def test_unknown_arguments_are_one_message(scripts, capsys) -> None:
    script = scripts("run_causal_lm")
    for words in (["--nothing", "1"], ["--overwrite_output_dir"], ["--trust_remote_code=true"]):
        with pytest.raises(SystemExit, match="2"):
            scripts("recipe_script").main(
                "causal-lm", script.LanguageArguments, script.columns, ["--recipe", "r", *words]
            )
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 2 and words[0].partition("=")[0] in lines[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset_name a --data_file b", "got both"),
        ("--do_train false", "--do_train: got false; allowed: true"),
        ("--do_predict", "--do_predict: not for recipes"),
        ("--streaming true", "--streaming: not for recipes. Data are read as a whole"),
        ("--resume_from_checkpoint /no/such", "got '/no/such'; allowed: true or false"),
        ("--source_column only", "target_column"),
        ("--hub_private_repo true", "give --push_to_hub or --hub_model_id"),
        ("--push_to_hub false --hub_model_id me/it", "leave one of them out"),
        ("--hub_strategy checkpoint", "has no place in a recipe"),
    ],
)
def test_what_does_not_go_together(scripts, words, message) -> None:
    name = "run_translation" if "source" in words else "run_text_classification"
    with pytest.raises(ConfigError, match=message):
        built(scripts, name, "--recipe", recipe_of(SCRIPTS[name]), "--data_file", "a.csv", *words.split())


def test_a_recipe_for_another_task_is_refused(scripts) -> None:
    with pytest.raises(ConfigError, match="Use the other script"):
        built(scripts, "run_causal_lm", "--recipe", recipe_of("seq2seq-lm"))


CASES = {
    "run_text_classification": (recipe_files.classification, AutoModelForSequenceClassification, {
        "path": "data_file", "text_columns": "text_column_names", "label_column": "label_column_name",
        "max_length": "max_seq_length",
    }),
    "run_translation": (recipe_files.translation, AutoModelForSeq2SeqLM, {
        "path": "dataset_name", "text_columns": "source_column", "target_column": "target_column",
        "prefix": "source_prefix", "max_length": "max_source_length",
    }),
    "run_image_classification": (recipe_files.images, AutoModelForImageClassification, {"path": "dataset_name"}),
    "run_causal_lm": (recipe_files.language, AutoModelForCausalLM, {"path": "data_file", "max_length": "block_size"}),
    "run_question_answering": (recipe_files.questions, AutoModelForQuestionAnswering, {
        "path": "data_file", "max_length": "max_seq_length", "stride": "doc_stride",
    }),
}  # fmt: skip
"""Script -> a whole recipe, the class of its models, and the arguments that stand for fields of its data."""


def arguments_for(name: str, root: Path) -> tuple[list[str], dict]:
    """Write a recipe that says how to compress and nothing else; return the arguments that say the rest."""
    make, _, names = CASES[name]
    whole = make(root)
    Recipe(pruning=whole["pruning"]).save(root / "only.yaml")
    given = {
        "recipe": str(root / "only.yaml"),
        "model_name_or_path": whole["model"],
        "output_dir": whole["output"],
        **{argument: whole["dataset"][field] for field, argument in names.items()},
        **whole["training"],
    }
    return [text for key, value in given.items() for text in (f"--{key}", str(value))], whole


def test_an_output_folder_that_cannot_be_is_one_message(scripts, tmp_path, capsys) -> None:
    arguments, _ = arguments_for("run_text_classification", tmp_path)
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path / ("x" * 300))
    script, shared = scripts("run_text_classification"), scripts("recipe_script")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        shared.main("text-classification", script.TextArguments, script.columns, arguments)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {tmp_path}/xxx") and printed.count("\n") == 1
    assert "File name too long. Name another file or folder" in printed


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_leaves_a_smaller_model_with_a_card(scripts, name, tmp_path, capsys, monkeypatch) -> None:
    full = measuring.compare
    monkeypatch.setattr(measuring, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))
    arguments, whole = arguments_for(name, tmp_path)
    script, shared = scripts(name), scripts("recipe_script")
    kind = next(each for each in vars(script).values() if isinstance(each, type) and each.__module__ == name)
    result = shared.main(SCRIPTS[name], kind, script.columns, arguments)
    assert "parameters" in capsys.readouterr().out
    auto_class = CASES[name][1]
    small, dense = (auto_class.from_pretrained(folder) for folder in (result.folders["compressed"], whole["model"]))
    assert small.num_parameters() < dense.num_parameters()
    assert (result.folders["compressed"] / "README.md").is_file()
    assert set(result.comparison.metrics) and all("compressed" in each for each in result.comparison.metrics.values())
    with pytest.raises(SystemExit, match="2"):
        shared.main(SCRIPTS[name], kind, script.columns, arguments)
    assert "holds a run of this recipe already" in capsys.readouterr().err


UPLOADS = {
    "--push_to_hub": "tester/out",
    "--hub_model_id tester/small": "tester/small",
    "--push_to_hub --hub_model_id small --hub_private_repo true --save_strategy steps --save_steps 2": "tester/small",
}
"""Arguments -> the repository that they make."""


@pytest.mark.parametrize("words", UPLOADS)
def test_a_script_uploads_the_compressed_model_in_one_commit(scripts, tmp_path, monkeypatch, capsys, words) -> None:
    full = measuring.compare
    monkeypatch.setattr(measuring, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))
    arguments, _ = arguments_for("run_text_classification", tmp_path)
    script, shared = scripts("run_text_classification"), scripts("recipe_script")
    run = partial(shared.main, "text-classification", script.TextArguments, script.columns)
    with hub_server() as hub:
        hub.use(monkeypatch)
        run([*arguments, *words.split(), "--dry_run"])
        assert hub.requests == []
        result = run([*arguments, *words.split()])
    assert set(hub.repositories) == {UPLOADS[words]}
    (commit,) = hub.commits(UPLOADS[words])
    weights = (result.folders["compressed"] / "model.safetensors").read_bytes()
    assert commit.files["model.safetensors"] == weights
    assert {"config.json", "README.md", "tokenizer.json"} <= set(commit.files)
    assert "training_args.bin" not in commit.files
    assert hub.repositories[UPLOADS[words]].private == ("--hub_private_repo" in words)
    assert "is on the Hub" in capsys.readouterr().out


def test_a_recipes_repository_can_be_changed_and_left_out(scripts, tmp_path) -> None:
    path = str(tmp_path / "recipe.yaml")
    recipe = Recipe.load(recipe_of("text-classification"))
    replace(recipe, hub_model_id="me/it", hub_private=True).save(path)
    for words, expected in {
        "": ("me/it", True),
        "--push_to_hub": ("me/it", True),
        "--hub_model_id me/other --hub_private_repo false": ("me/other", False),
        "--push_to_hub false": (None, False),
    }.items():
        found, _ = built(scripts, "run_text_classification", "--recipe", path, *words.split())
        assert (found.hub_model_id, found.hub_private) == expected


def test_an_upload_without_a_network_is_one_line(scripts, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    arguments, _ = arguments_for("run_text_classification", tmp_path)
    script, shared = scripts("run_text_classification"), scripts("recipe_script")
    with pytest.raises(SystemExit, match="2"):
        shared.main("text-classification", script.TextArguments, script.columns, [*arguments, "--push_to_hub"])
    printed = capsys.readouterr().err  # with progress bars before it, unless an earlier test has switched them off
    assert "Traceback" not in printed
    line = printed.splitlines()[-1]
    assert line.startswith("error: ") and "Unset it" in line


def test_arguments_may_lie_in_a_file(scripts, tmp_path) -> None:
    stored = {"recipe": recipe_of("causal-lm"), "learning_rate": 1e-3, "bf16": False, "output_dir": "out"}
    (tmp_path / "arguments.json").write_text(json.dumps(stored), encoding="utf-8")
    recipe, _ = built(scripts, "run_causal_lm", str(tmp_path / "arguments.json"))
    assert recipe.training["learning_rate"] == 1e-3 and recipe.training["bf16"] is False and recipe.output == "out"


@pytest.mark.parametrize("content", [None, "[1]", "{", '{"a": 1, "a": 2}'])
def test_a_file_of_arguments_that_cannot_be_read_is_one_message(scripts, tmp_path, capsys, content) -> None:
    shared, script = scripts("recipe_script"), scripts("run_causal_lm")
    path = tmp_path / "arguments.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        shared.main("causal-lm", script.LanguageArguments, script.columns, [str(path)])
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {path}: cannot be read: ") and printed.count("\n") == 1
    assert "Give a .json file of one object" in printed


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_run_a_script(tmp_path) -> None:
    arguments, whole = arguments_for("run_text_classification", tmp_path)
    position = arguments.index("--use_cpu")
    del arguments[position : position + 2]  # where there is no accelerator, recipes say it themselves
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    script = str(root / "scripts" / "run_text_classification.py")
    done = subprocess.run([*launch, script, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("accuracy (%)") == 1, "the first process alone prints"
    small = AutoModelForSequenceClassification.from_pretrained(Path(whole["output"]) / "compressed")
    assert small.num_parameters() < AutoModelForSequenceClassification.from_pretrained(whole["model"]).num_parameters()
