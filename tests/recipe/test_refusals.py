"""``hf-compress run``: what is wrong with a recipe is one clear message, exit code 2, and nothing is written."""

import json
from pathlib import Path

import pytest
import recipe_files
import yaml
from transformers import T5Config, T5ForConditionalGeneration

from hf_compress import ConfigError, Recipe, cli, make_callbacks
from hf_compress.recipe.models import load_tokenizer
from hf_compress.recipe.overrides import load_recipe


def hf_compress(tmp_path: Path, recipe: dict, *arguments: str) -> int:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return cli.main(["run", str(path), *arguments])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["modle=x"], "unknown key 'modle'; closest match: 'model'"),
        (["task=text-clasification"], "closest match: 'text-classification'"),
        (
            ["dataset.path=missing.csv"],
            "'missing.csv': there is no such file, and no such data set on the Hub. Relative",
        ),
        (["dataset.eval_file=missing.csv"], "'missing.csv': there is no such file"),
        (["dataset.path=missing"], "'missing': cannot be loaded from the Hub or from disk"),
        (
            ["dataset.label_column=review"],
            "dataset.label_column: got 'review'; allowed: another column than those of t",
        ),
        (["dataset.paht=x"], "DatasetConfig: unknown key 'paht'; closest match: 'path'"),
        (["dataset.text_columns=reviews"], "no column 'reviews' in the training data; closest match: 'review'"),
        (["dataset.label_column=star"], "no column 'star' in the training data; closest match: 'stars'"),
        (["dataset.label_column=null"], "no column 'label'"),
        (["dataset.eval_split=dev"], "has no split 'dev'; allowed: 'train'"),
        (["dataset.eval_split=train"], "split 'train' is the training split"),
        (["dataset.max_length=41"], "max_length: got 41; allowed: at most 40, the model's limit"),
        (["dataset.target_column=stars"], "dataset.target_column: got 'stars'; allowed: None for text-classification"),
        (["task=causal-lm"], "dataset.label_column: got 'stars'; allowed: None for causal-lm"),
        (["model=missing/model"], "There is no such folder here, either."),
        (["training.learning_rat=1"], "Recipe.training: unknown key 'learning_rat'; closest match: 'learning_rate'"),
        (["training.learning_rate=high"], "training.learning_rate: got 'high'; allowed: a number"),
        (["training.learning_rate=.nan"], "training.learning_rate: got nan; allowed: a finite number >= 0"),
        (["training.learning_rate=-1"], "training.learning_rate: got -1; allowed: a finite number >= 0"),
        (["training.max_grad_norm=.nan"], "training.max_grad_norm: got nan; allowed: a number other than NaN"),
        (["training.per_device_train_batch_size=0"], "per_device_train_batch_size: got 0; allowed: an int >= 1"),
        (["training.per_device_eval_batch_size=2.5"], "per_device_eval_batch_size: got 2.5; allowed: an int >= 1"),
        (["training.gradient_accumulation_steps=-1"], "gradient_accumulation_steps: got -1; allowed: an int >= 1"),
        (["training.use_cpu=1"], "training.use_cpu: got 1; allowed: true or false"),
        (["training.output_dir=x"], "'output_dir' has no place in a recipe. Set the recipe's output"),
        (["training.report_to=tensorboard"], "Recipe.training: the Trainer refuses it: TensorBoardCallback requires"),
        (["training.optim=adamw_bnb_8bit"], "Recipe.training: the Trainer refuses it: "),
        (["training.lr_scheduler_kwargs={nope: 1}"], "Recipe.training: the Trainer refuses it: "),
        (["training.dataloader_num_workers=-2"], "num_workers option should be non-negative"),
        (["training.metric_for_best_model=acuracy"], "metric_for_best_model: got 'acuracy', but nothing is evaluated"),
        (["training.eval_strategy=often"], "Recipe.training: transformers refuses it"),
        (["pruning.structures={heads: 0.9}"], "sparsity 0.9 of 8 units leaves 0.8"),
        (["pruning.structures={vocab: 0.5}"], "unknown structure 'vocab'"),
        (["pruning.structures={experts: 0.5}"], "got 'experts'"),
        (["pruning.structures={experts: 0.5}", "pruning.criterion=l2"], "the model has no 'experts' to prune"),
        (["distillation={}"], "Recipe.teacher: got None"),
        (["distillation={}", "teacher=missing/teacher"], "missing/teacher"),
        (["export=int4"], "unknown format 'int4'"),
        (["export=torchao", "quantization.scheme=int8_static"], "format 'torchao' cannot store layer"),
        (["pruning=null", "quantization={}", "shrink={uniform: true}"], "shrink: got"),
        (["output=null"], "Recipe.output: missing; a run needs model, task, dataset and output"),
        (["model.x=1"], "'model' is"),
        (["x"], "--set 'x': allowed: NAME=VALUE"),
        (["training.seed=["], "the value is no YAML"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_one_message_and_exit_code_2(settings, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    changes = [part for setting in settings for part in ("--set", setting)]
    code = hf_compress(tmp_path, recipe_files.classification(tmp_path), "--dry-run", *changes)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    error = captured.err[captured.err.index("error: ") :]
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_metric_that_is_not_there_is_one_message(tmp_path, capsys) -> None:
    """Only the first evaluation knows which there are."""
    changes = {"load_best_model_at_end": True, "metric_for_best_model": "acuracy"}
    changes |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    recipe = recipe_files.classification(tmp_path)
    assert hf_compress(tmp_path, {**recipe, "training": {**recipe["training"], **changes}}) == 2
    error = capsys.readouterr().err
    assert "error: Recipe.training.metric_for_best_model: " in error and "eval_accuracy" in error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"review": "a b", "stars": ""}] * 4, "column 'stars' has no values in the training data"),
        ([{"review": "", "stars": "up"}] * 4, "column 'review' has no values in the training data"),
        ([{"review": "a", "stars": 0.5}] * 4, "column 'stars' holds float64 values; class labels are needed"),
        ([{"review": 3, "stars": "up"}] * 4, "column 'review' of the training data holds"),
        ([{"review": "a", "stars": "up"}], "too few examples (1) to hold some out. Give two or more, or an eval_file"),
    ],
)
def test_useless_data_are_one_message(rows, message, tmp_path, capsys) -> None:
    recipe = recipe_files.classification(tmp_path)
    recipe_files.write_csv(tmp_path / "reviews.csv", rows)
    assert hf_compress(tmp_path, recipe, "--dry-run") == 2
    assert message in capsys.readouterr().err


def test_several_labels_for_an_example_are_refused(tmp_path, capsys) -> None:
    recipe = recipe_files.classification(tmp_path)
    rows = [{"review": "a", "stars": [1, 0, 1]}] * 4
    recipe["dataset"]["path"] = recipe_files.write_json(tmp_path / "reviews.jsonl", rows)
    assert hf_compress(tmp_path, recipe, "--dry-run") == 2
    assert "column 'stars' holds lists of labels; one class for each example" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["text-classification", "seq2seq-lm"])
def test_a_made_up_tokenizer_is_refused(task, tmp_path) -> None:
    """Transformers makes an empty one where there are no files, of T5 with a mark of spaces in it."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 120}
    if task == "seq2seq-lm":
        T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    else:
        recipe_files.save_model(tmp_path, task)
        for file in tmp_path.glob("*token*"):
            file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer, or one that knows no words.*save_pretrained"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys) -> None:
    recipe = recipe_files.classification(tmp_path)
    recipe_files.save_model(tmp_path / "other", "seq2seq-lm")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens([f"new{i}" for i in range(200)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert hf_compress(tmp_path, recipe, "--dry-run") == 2
    assert "the model embeds only" in capsys.readouterr().err


def test_the_command_line_changes_single_settings(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("quantization: {begin: 0.5}\ntraining: {learning_rate: 1e-4, seed: 3}\noutput: here\n")
    settings = ["training.learning_rate=3e-5", "pruning.structures.heads=0.25", "quantization=null"]
    recipe = load_recipe(path, settings, output="there")
    assert recipe == Recipe.from_dict(
        {
            "training": {"learning_rate": 3e-5, "seed": 3},
            "pruning": {"structures": {"heads": 0.25}},
            "output": "there",
        }
    )


def test_recipes_make_callbacks_in_code() -> None:
    recipe = Recipe.from_dict({"pruning": {"structures": {"heads": 0.5}}, "quantization": {}})
    assert [callback.section for callback in make_callbacks(recipe)] == ["pruning", "quantization"]
    assert make_callbacks(recipe)[0].config is recipe.pruning
    with pytest.raises(ConfigError, match="no distillation section"):
        make_callbacks(recipe, teacher="somewhere")
    taught = Recipe.from_dict({"distillation": {}, "teacher": "a"})
    assert [callback.teacher for callback in (*make_callbacks(taught), *make_callbacks(taught, "b"))] == ["a", "b"]


def test_a_tokenizer_whose_ids_have_gaps(tmp_path, capsys) -> None:
    recipe = recipe_files.classification(tmp_path)
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 200
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert hf_compress(tmp_path, recipe, "--dry-run") == 2
    assert "the tokenizer has 201 tokens, the model embeds only 150" in capsys.readouterr().err


def test_an_output_that_cannot_be_made(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    recipe = recipe_files.classification(tmp_path, output=str(tmp_path / "file" / "inside" / "out"))
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    assert hf_compress(tmp_path, recipe) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Recipe.output" in error and "Choose another output" in error
