"""From one file to a saved model: every task, dry runs, interrupted runs, output folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_files
import resumable
import tiny_models
import torch
import trained_tokenizers
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import hf_compress.recipe.run as runs
from hf_compress import ConfigError, Ramp, Recipe, TrainingError, run_recipe
from hf_compress.recipe.trainer import training_arguments
from hf_compress.report.results import Results


def run(recipe: dict, **options):
    return run_recipe(Recipe.from_dict(recipe), **options)


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def ffn_units(config_folder: Path) -> int:
    weights = load_file(config_folder / "model.safetensors")
    return sum(weight.shape[0] for name, weight in weights.items() if name.endswith("intermediate.dense.weight"))


@pytest.fixture
def measured_once(monkeypatch):
    """Latencies are not what these tests are about."""
    import hf_compress.recipe.measure as measure

    full = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))


def test_text_classification_from_file_to_saved_model(tmp_path, measured_once) -> None:
    sections = {"quantization": {"begin": 2}, "export": "dense", "distillation": {"alpha": 0.5}}
    recipe = recipe_files.classification(tmp_path, **sections, teacher=str(tmp_path / "model"))
    result = run(recipe)
    out = tmp_path / "out"
    assert result.folders == {"compressed": out / "compressed", "compressed-dense": out / "compressed-dense"}
    assert Recipe.load(out / "recipe.yaml") == Recipe.from_dict(recipe)
    assert ffn_units(out / "compressed") == 44  # of 88
    model = AutoModelForSequenceClassification.from_pretrained(out / "compressed")
    tokenizer = AutoTokenizer.from_pretrained(out / "compressed-dense")
    assert model.config.id2label == {0: "down", 1: "up"}
    model(**tokenizer("the lazy dog", return_tensors="pt"))
    assert list(result.comparison.profiles) == ["dense", "compressed", "compressed-dense"]
    assert set(result.comparison.metrics["accuracy (%)"]) == set(result.comparison.profiles)
    assert "eval_accuracy" in result.metrics
    results = Results.load(out / "compressed" / "results.json")
    assert sum(unit["kept"] for unit in results.kept["heads"]) == 4
    assert str(out / "compressed") in str(result) and "accuracy (%)" in str(result)


def test_the_table_has_the_accuracy_that_the_trainer_measured(tmp_path, measured_once) -> None:
    """Pruning alone: the masked model that the Trainer evaluates and the small one compute the same."""
    training = {**recipe_files.TRAINING, "max_steps": 30, "learning_rate": 1e-2}
    result = run(recipe_files.classification(tmp_path, training=training))
    assert result.comparison.metrics["accuracy (%)"]["compressed"] == pytest.approx(
        100 * result.metrics["eval_accuracy"]
    )


def test_without_pruning_the_model_keeps_its_size(tmp_path, measured_once) -> None:
    recipe = recipe_files.classification(tmp_path, pruning=None, quantization={}, export="dense")
    result = run(recipe)
    sizes = {name: profile.parameters for name, profile in result.comparison.profiles.items()}
    assert len(set(sizes.values())) == 1
    small, grid = (load_file(folder / "model.safetensors") for folder in result.folders.values())
    assert small.keys() == grid.keys()
    assert not any("scale" in name for name in small)


@pytest.mark.parametrize("pruning", [None, {"structures": {"ffn": 0.5}, "criterion": "l2"}], ids=["alone", "pruned"])
def test_what_training_has_learned_is_what_is_exported(pruning, tmp_path, measured_once) -> None:
    """Learned steps and observed ranges lie beside the plain model, so that a finished run can be exported."""
    learned = {"method": "lsq_plus", "scheme": "int8_static", "weights": {"num_bits": 4}}
    recipe = recipe_files.classification(tmp_path, pruning=pruning, quantization=learned, export="dense")
    result = run(recipe)
    small, dense = (load_file(folder / "model.safetensors") for folder in result.folders.values())
    stored = json.loads((result.folders["compressed"] / "quantization.json").read_text())["layers"]
    assert len(stored) == 13
    for name, layer in stored.items():
        assert layer["weights"]["method"] == "lsq_plus"
        scale = torch.tensor(layer["weights"]["scale"])[:, None]
        expected = (small[f"{name}.weight"] / scale).round().clamp(-8, 7) * scale
        torch.testing.assert_close(dense[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)
        assert layer["inputs"]["zero_point"] is not None


def test_a_new_head_has_no_accuracy_before_training(tmp_path, measured_once) -> None:
    recipe_files.save_model(tmp_path / "model", "text-classification", num_labels=5)
    result = run(recipe_files.classification(tmp_path))
    assert set(result.comparison.metrics["accuracy (%)"]) == {"compressed"}
    assert "classifier" in result.comparison.notes[0]
    assert any(note.startswith("new, not from the checkpoint: classifier") for note in result.notes)


def test_causal_lm_pads_with_the_end_of_text_whose_label_counts(tmp_path, measured_once) -> None:
    tokenizer = trained_tokenizers.byte_level_bpe()
    tokenizer.pad_token = None
    tiny_models.gpt2(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "gpt")
    tokenizer.save_pretrained(tmp_path / "gpt")
    lines = [f"{sentence}<|endoftext|>" for sentence in recipe_files.SENTENCES]
    (tmp_path / "texts.txt").write_text("\n".join(["x", *lines, *lines]), encoding="utf-8")
    recipe = recipe_files.classification(
        tmp_path,
        model=str(tmp_path / "gpt"),
        task="causal-lm",
        dataset={"path": str(tmp_path / "texts.txt"), "max_length": 40},
    )
    result = run(recipe)
    loaded = AutoTokenizer.from_pretrained(result.folders["compressed"])
    model = AutoModelForCausalLM.from_pretrained(result.folders["compressed"])
    assert loaded.pad_token == loaded.eos_token
    assert model.config.pad_token_id == loaded.eos_token_id
    perplexity = result.comparison.metrics["perplexity"]
    inputs = loaded(lines[0], return_tensors="pt")
    assert inputs["input_ids"][0, -1] == loaded.eos_token_id
    assert 1 < perplexity["compressed"] < 10 * len(loaded)
    assert any("less than two tokens were left out" in note for note in result.notes)
    prepared = runs.prepare(Recipe.from_dict(recipe), tmp_path / "checkpoints")
    batch = prepared.collator([prepared.splits.train[i] for i in range(4)])
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)


def test_seq2seq_from_json_to_saved_model(tmp_path, measured_once) -> None:
    model = recipe_files.save_model(tmp_path / "bart", "seq2seq-lm")
    rows = [{"long": f"{a} {b}", "short": a} for a in recipe_files.SENTENCES for b in recipe_files.SENTENCES[:3]]
    data = recipe_files.write_json(tmp_path / "pairs.jsonl", rows)
    columns = {"text_columns": ["long"], "target_column": "short", "max_length": 24, "max_target_length": 9}
    recipe = recipe_files.classification(tmp_path, model=model, task="seq2seq-lm", dataset={"path": data, **columns})
    result = run(recipe)
    small = AutoModelForSeq2SeqLM.from_pretrained(result.folders["compressed"])
    tokenizer = AutoTokenizer.from_pretrained(result.folders["compressed"])
    small.generate(**tokenizer("the lazy dog", return_tensors="pt"), max_new_tokens=4)
    assert result.comparison.profiles["compressed"].parameters < result.comparison.profiles["dense"].parameters
    assert set(result.comparison.metrics["perplexity of targets"]) == {"dense", "compressed"}
    splits = runs.prepare(Recipe.from_dict(recipe), tmp_path / "checkpoints").splits
    assert max(map(len, splits.train["labels"])) == 9


def test_token_classification_labels_the_first_token_of_a_word(tmp_path, measured_once) -> None:
    model = recipe_files.save_model(tmp_path / "bert", "text-classification")  # three labels: none fits
    rows = [
        {"words": (words := sentence.split()), "labels": ["long" if len(word) > 4 else "short" for word in words]}
        for sentence in recipe_files.SENTENCES * 2
    ]
    recipe = recipe_files.classification(
        tmp_path,
        model=model,
        task="token-classification",
        dataset={"path": recipe_files.write_json(tmp_path / "words.json", rows), "text_columns": "words"},
    )
    prepared = runs.prepare(Recipe.from_dict(recipe), tmp_path / "checkpoints")
    first = prepared.splits.train[0]
    tokens = prepared.processor.convert_ids_to_tokens(first["input_ids"])
    assert any(token.startswith("##") for token in tokens)
    for token, label in zip(tokens, first["labels"], strict=True):
        assert (label == -100) == (token.startswith(("##", "[")))
    result = run(recipe)
    small = AutoModelForTokenClassification.from_pretrained(result.folders["compressed"])
    assert small.config.id2label == {0: "long", 1: "short"}
    assert result.comparison.metrics["accuracy of words (%)"].keys() == {"compressed"}  # the head is new


def test_a_dry_run_trains_nothing_and_writes_nothing(tmp_path, monkeypatch) -> None:
    recipe = recipe_files.classification(tmp_path, distillation={}, teacher=str(tmp_path / "model"), quantization={})
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    before = files_under(tmp_path)
    result = run(recipe, dry_run=True)
    assert files_under(tmp_path) == before
    assert result.comparison is None and result.folders == {}
    assert set(result.preview.sections) == {"pruning", "distillation", "quantization"}
    text = str(result)
    assert "21 training and 3 evaluation examples (held-out 10%)" in text
    assert "optimizer steps: 6" in text
    assert "labels: down, up" in text


ADVANCED = {"alpha": {"start": 0.9, "stop": 0.1, "end": 0.5}, "temperature": {"start": 1.0, "stop": 4.0}}


@pytest.mark.parametrize("teacher", ["self", "unmasked", ["self", "MODEL"], "ADAPTER"])
def test_whoever_can_teach_a_trainer_can_teach_a_recipe(tmp_path, teacher, measured_once, monkeypatch) -> None:
    recipe = recipe_files.classification(tmp_path, distillation=ADVANCED)
    save_adapter(tmp_path / "model", tmp_path / "adapter")
    names = {"MODEL": str(tmp_path / "model"), "ADAPTER": str(tmp_path / "adapter")}
    recipe["teacher"] = (
        [names.get(each, each) for each in teacher] if isinstance(teacher, list) else names.get(teacher, teacher)
    )
    made = []
    make = runs.make_callbacks

    def remember(recipe: Recipe) -> list:
        made.append(make(recipe))
        return made[-1]

    monkeypatch.setattr(runs, "make_callbacks", remember)
    result = run(recipe, dry_run=True)
    assert result.preview.sections["distillation"]["alpha"] == "0.9 to 0.1, linear, from 0.0 to 0.5"
    result = run(recipe)
    assert made[-1][-1].teacher == Recipe.from_dict(recipe).teacher
    assert isinstance(made[-1][-1].config.alpha, Ramp)
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == Recipe.from_dict(recipe)
    assert ffn_units(result.folders["compressed"]) == 44
    assert run(recipe, resume=True).metrics == result.metrics


def save_adapter(base: Path, folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(folder)


def cut_after(step: int, monkeypatch) -> None:
    make = runs.make_callbacks
    monkeypatch.setattr(runs, "make_callbacks", lambda recipe: [*make(recipe), resumable.CutAfterSave(step)])


def test_a_resumed_run_ends_as_the_straight_one(tmp_path, monkeypatch, measured_once) -> None:
    sections = {
        "quantization": {"begin": 2},
        "distillation": {
            "alpha": 0.5,
            "features": [{"loss": "hidden_mse", "layers": "dynamic", "projection": "always"}],
        },
        "teacher": str(tmp_path / "model"),
        "training": {**recipe_files.TRAINING, "save_steps": 1},
    }
    straight = run(recipe_files.classification(tmp_path, **sections, output=str(tmp_path / "straight")))
    recipe = recipe_files.classification(tmp_path, **sections)
    with monkeypatch.context() as patched:
        cut_after(3, patched)
        with pytest.raises(resumable.PowerCutError):
            run(recipe)
    assert not (tmp_path / "out" / "compressed").exists()
    with pytest.raises(ConfigError, match=r"holds a run of this recipe already.*--resume"):
        run(recipe)
    resumed = run(recipe, resume=True)
    a, b = (load_file(each.folders["compressed"] / "model.safetensors") for each in (straight, resumed))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert resumed.metrics["eval_accuracy"] == straight.metrics["eval_accuracy"]
    state = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6

    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("trained"))
    finished = run(recipe, resume=True)
    assert finished == resumed


def test_a_run_killed_while_it_saves_is_finished_by_resume(tmp_path, monkeypatch, measured_once) -> None:
    recipe = recipe_files.classification(tmp_path)
    replace = os.replace

    def stop(source, target):
        if Path(target).name == "compressed":
            (Path(source) / "model.safetensors").write_bytes(b"half")
            raise resumable.PowerCutError
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(resumable.PowerCutError):
            run(recipe)
    assert not (tmp_path / "out" / "compressed").exists()
    result = run(recipe, resume=True)
    assert result == type(result).load(tmp_path / "out")
    assert ffn_units(result.folders["compressed"]) == 44


@pytest.mark.parametrize(
    ("available", "said", "expected"), [(False, {}, True), (True, {}, False), (False, {"use_cpu": False}, False)]
)
def test_recipes_use_the_cpu_where_there_is_nothing_else(tmp_path, monkeypatch, available, said, expected) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
    recipe = Recipe(pruning=recipe_files.PRUNING, training={"seed": 1, **said})
    assert training_arguments(recipe, tmp_path).use_cpu is expected


def test_processes_that_training_arguments_do_not_count_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = recipe_files.classification(tmp_path, training={**recipe_files.TRAINING, "use_cpu": False})
    with pytest.raises(TrainingError, match=r"a launcher started 2 processes.*use_cpu=True"):
        run(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.multiprocess
def test_two_processes_save_once(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    training = {name: value for name, value in recipe_files.TRAINING.items() if name != "use_cpu"}
    Recipe.from_dict(recipe_files.classification(tmp_path, training=training)).save(path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "hf_compress.cli", "run", str(path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy (%)") == 1
    folder = tmp_path / "out" / "compressed"
    AutoModelForSequenceClassification.from_pretrained(folder)
    assert ffn_units(folder) == 44


def test_resume_starts_where_there_is_nothing_to_resume(tmp_path, measured_once) -> None:
    result = run(recipe_files.classification(tmp_path), resume=True)
    assert (result.output / "run.json").is_file()


def test_foreign_folders_and_other_recipes_are_not_touched(tmp_path) -> None:
    recipe = recipe_files.classification(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for options in ({}, {"resume": True}, {"dry_run": True}):
        with pytest.raises(ConfigError, match="holds files, but not from a recipe"):
            run(recipe, **options)
    assert files_under(out) == ["thesis.tex"]

    (out / "thesis.tex").unlink()
    Recipe.from_dict({**recipe, "training": {"max_steps": 7}}).save(out / "recipe.yaml")
    with pytest.raises(ConfigError, match=r"another recipe, which differs in training\.max_steps, training\."):
        run(recipe, resume=True)
    assert files_under(out) == ["recipe.yaml"]

    with pytest.raises(ConfigError, match="is a file"):
        run({**recipe, "output": recipe["dataset"]["path"]})


def test_a_moved_folder_is_still_of_its_recipe(tmp_path) -> None:
    recipe = recipe_files.classification(tmp_path)
    (tmp_path / "moved").mkdir()
    Recipe.from_dict(recipe).save(tmp_path / "moved" / "recipe.yaml")
    (tmp_path / "moved" / "hf_compress_run.json").write_text('{"data": null}')
    with pytest.raises(ConfigError, match="holds a run of this recipe already"):
        run({**recipe, "output": str(tmp_path / "moved")})


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path) -> None:
    recipe = recipe_files.classification(tmp_path)
    backend = trained_tokenizers.word_piece()._tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-sequence token"):
        run(recipe, dry_run=True)


def test_the_recipe_in_the_output_is_the_one_that_ran(tmp_path, monkeypatch) -> None:
    recipe = recipe_files.classification(tmp_path)
    cut_after(1, monkeypatch)
    with pytest.raises(resumable.PowerCutError):
        run({**recipe, "training": {**recipe["training"], "save_steps": 1}})
    stored = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert stored["training"] == {**recipe["training"], "save_steps": 1}
