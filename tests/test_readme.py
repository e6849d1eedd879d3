"""The README says what is true: its example runs, its lists are complete, its numbers come from a run."""

import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import recipe_files
import tiny_models
import torch
from fake_timer import FakeTimer
from hub_server import hub_server
from huggingface_hub import constants
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import hf_compress
from hf_compress import PruningCallback, PruningConfig, cli, shrink
from hf_compress.config import TRAINABLE_STRUCTURES
from hf_compress.export.formats.table import FORMATS
from hf_compress.latency import measure
from hf_compress.oneshot.prune import CRITERIA
from hf_compress.registry import (
    allocators,
    criteria,
    distillation_losses,
    observers,
    quantization_methods,
    schemes,
)
from hf_compress.schedule import LOTTERY_TICKET, POLYNOMIAL, STEPS, schedules

ROOT = Path(hf_compress.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_runs(tiny_bert, classification_data, make_trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = blocks("python")[0]
    data = classification_data(32)
    args = make_trainer(tiny_bert(), data, max_steps=20).args
    names = {"model": tiny_bert(), "teacher": tiny_bert(seed=1), "args": args, "train": data, "dev": data}
    exec(compile(example, "README.md", "exec"), names)
    assert isinstance(names["trainer"], Trainer)
    assert names["small"].num_parameters() < tiny_bert().num_parameters()
    AutoModelForSequenceClassification.from_pretrained("bert-small")


def test_the_example_of_a_speedup_runs(tmp_path, monkeypatch) -> None:
    timer = FakeTimer()
    monkeypatch.setattr(measure, "time_models", lambda models, inputs, rounds: timer(models, inputs, rounds))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (example,) = [block for block in blocks("python") if "fit_speedup" in block]
    names = {"model": tiny_models.bert(intermediate_size=96), "torch": torch}
    exec(compile(example, "README.md", "exec"), names)
    assert names["fit"].measured.ratio == pytest.approx(3.0, rel=0.1)
    AutoModelForSequenceClassification.from_pretrained("three-times-as-fast")


def test_the_other_examples_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, masks, vocabulary, *_ = blocks("python")
    torch.manual_seed(0)
    names = {"model": tiny_models.bert()}
    exec(compile(masks, "README.md", "exec"), names)
    assert names["small"].num_parameters() < names["model"].num_parameters()

    tokenizer = word_tokenizer(97)
    names = {"model": tiny_models.bert(), "tokenizer": tokenizer, "texts": ["w5 w6 w7", "w8 w5"]}
    exec(compile(vocabulary, "README.md", "exec"), names)
    assert len(AutoTokenizer.from_pretrained("small")) == len(names["small_tokenizer"]) < len(tokenizer)


def test_the_examples_of_configs_are_accepted() -> None:
    found = [block for block in blocks("python") if "(\n    targets=" in block or 'method="lsq_plus"' in block]
    assert len(found) == 2
    for example in found:
        exec(compile(example, "README.md", "exec"), {})


@pytest.mark.filterwarnings("ignore:PruningCallback. units were removed from the base weights")
def test_the_adapter_example_runs(tiny_bert, classification_data, make_trainer) -> None:
    (before,) = (block for block in blocks("python") if "print(preview(trainer))" in block)
    (adapters,) = (block for block in blocks("python") if "LoraConfig" in block)
    data = classification_data(16)
    names = {
        "model": tiny_bert(),
        "args": make_trainer(tiny_bert(), data, max_steps=8).args,
        "train": data,
        "config": PruningConfig(structures={"heads": 0.5}),
        "shrink": shrink,
        "PruningCallback": PruningCallback,
        "Trainer": Trainer,
    }
    names["trainer"] = make_trainer(tiny_bert(), data, [PruningCallback(names["config"])], max_steps=8)
    exec(compile(before, "README.md", "exec"), names)
    exec(compile(adapters, "README.md", "exec"), names)
    assert names["small"].num_parameters() < tiny_bert().num_parameters()


def test_the_example_without_training_runs(tiny_bert, classification_data) -> None:
    (example,) = (block for block in blocks("python") if "prune_oneshot" in block)
    data = torch.utils.data.DataLoader(classification_data(16), batch_size=4)
    names = {"model": tiny_bert(), "dataloader": data}
    exec(compile(example, "README.md", "exec"), names)
    assert names["small"].num_parameters() < tiny_bert().num_parameters()


def test_the_examples_that_quantize_without_training_run(tiny_bert, classification_data, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    calibrated, mixed = (block for block in blocks("python") if "calibrate(model" in block)
    data = torch.utils.data.DataLoader(classification_data(16), batch_size=4)
    names = {"model": tiny_bert(), "dataloader": data, "json": json}
    exec(compile(calibrated, "README.md", "exec"), names)
    names["result"] = hf_compress.apply_calibration_config(names["model"], "calibration.json")
    (batch, *_) = data
    assert torch.equal(names["fresh"](**batch).logits, names["model"].eval()(**batch).logits)
    loaded = AutoModelForSequenceClassification.from_pretrained("bert-quantized")
    assert torch.equal(loaded.bert.pooler.dense.weight, names["fresh"].bert.pooler.dense.weight)

    names = {"model": tiny_bert(), "dataloader": data}
    exec(compile(mixed, "README.md", "exec"), names)
    layers = hf_compress.calibration_config(names["model"])["layers"].values()
    assert {layer["weights"]["num_bits"] for layer in layers} > {8}
    assert Path("sensitivity.png").is_file()


def test_the_options_of_ptq_are_all_there() -> None:
    rows = README.split("## Quantize without training")[1].split("## Methods")[0]
    names = set(quantization_methods.get("ptq").options().to_dict()) - {"damping"}
    assert [name for name in names if f"`{name}=" not in rows] == []


def test_the_example_that_keeps_zeros_runs(tiny_bert, classification_data, make_trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if 'schedule="one_shot"' in block)
    data = classification_data(16)
    names = {"model": tiny_bert(), "data": data, "PruningConfig": PruningConfig, "PruningCallback": PruningCallback}
    arguments = functools.partial(TrainingArguments, use_cpu=True, report_to="none", save_strategy="no", max_steps=3)
    names |= {"Trainer": Trainer, "TrainingArguments": arguments}
    exec(compile(example, "README.md", "exec"), names)
    names["trainer"].train()
    weight = names["model"].bert.encoder.layer[0].output.dense.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_the_example_of_a_search_runs(tiny_bert, classification_data, make_trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "auto_compress" in block)
    data = classification_data(16)
    inputs = {key: torch.stack([each[key] for each in data]) for key in data[0]}
    names = {
        "model": tiny_bert(),
        "args": make_trainer(tiny_bert(), data, max_steps=8).args,
        "data": data,
        "dev": inputs,
        "accuracy": lambda model, dev: float((model(**dev).logits.argmax(1) == dev["labels"]).float().mean()),
    }
    exec(compile(example, "README.md", "exec"), names)
    assert names["small"].num_parameters() < tiny_bert().num_parameters()
    loaded = AutoModelForSequenceClassification.from_pretrained("searched")
    assert sum(layer.intermediate.dense.out_features for layer in loaded.bert.encoder.layer) == 48


def test_the_recipe_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    example, *_ = blocks("yaml")
    recipe_files.save_model(Path("bert-base-uncased"), "text-classification")
    recipe_files.write_csv(Path("reviews.csv"), recipe_files.reviews(72))
    Path("recipe.yaml").write_text(example, encoding="utf-8")
    lines = [line.split("#")[0] for line in README.splitlines() if line.startswith("hf-compress run recipe")]
    dry, whole, resumed, changed = (line.split()[1:] for line in lines)
    assert cli.main(dry) == 0
    assert not Path("runs").exists()
    assert cli.main(whole) == 0
    for name in ("compressed", "compressed-torchao"):
        AutoModelForSequenceClassification.from_pretrained(f"runs/reviews/{name}")
        assert "accuracy (%)" in Path(f"runs/reviews/{name}/README.md").read_text(encoding="utf-8")
    table = capsys.readouterr().out.partition("    dense  ")[2]
    assert cli.main(resumed) == 0
    assert capsys.readouterr().out.partition("    dense  ")[2] == table != ""
    assert cli.main([*changed, "--dry-run"]) == 0


def test_the_examples_of_distillation_run(tiny_bert, classification_data, make_trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (teaching,) = (block for block in blocks("python") if "Ramp(" in block)
    (caching,) = (block for block in blocks("python") if "cache_teacher_outputs" in block)
    data, teacher = classification_data(16), tiny_bert(seed=1)
    teacher.save_pretrained("bert-reviews")
    names = {"model": tiny_bert(), "args": make_trainer(tiny_bert(), data).args, "train": data, "Trainer": Trainer}
    exec(compile(teaching, "README.md", "exec"), names)
    names["trainer"].train()
    names |= {"teacher": teacher, "DistillationConfig": hf_compress.DistillationConfig}
    exec(compile(caching, "README.md", "exec"), names)
    assert (tmp_path / "runs" / "teacher-outputs").is_dir()
    cached = Trainer(tiny_bert(), names["args"], train_dataset=data, callbacks=[names["callback"]])
    cached.train()
    assert cached.state.global_step == names["trainer"].state.global_step


def test_the_recipe_with_stages_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    _, example, *_ = blocks("yaml")
    recipe_files.save_model(Path("bert-reviews"), "text-classification", num_labels=2)
    recipe_files.write_csv(Path("reviews.csv"), recipe_files.reviews(72))
    Path("stages.yaml").write_text(example, encoding="utf-8")
    assert cli.main(["run", "stages.yaml", "--dry-run"]) == 0
    assert not Path("runs").exists()
    assert "== stage-4 ==" in capsys.readouterr().out
    assert cli.main(["run", "stages.yaml"]) == 0
    table = capsys.readouterr().out
    names = [*(f"stage-{i}" for i in range(1, 5)), "compressed", "compressed-torchao"]
    for name in names:
        AutoModelForSequenceClassification.from_pretrained(f"runs/stages/{name}")
        assert Path(f"runs/stages/{name}/README.md").is_file()
        assert f"{name}: " in table
    small = AutoModelForSequenceClassification.from_pretrained("runs/stages/compressed")
    assert sum(layer.intermediate.dense.out_features for layer in small.bert.encoder.layer) == 45  # of 88, by 0.8^3


def test_the_recipe_that_prunes_before_it_trains_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("yaml") if "oneshot_batches" in block)
    recipe_files.save_model(Path("bert-base-uncased"), "text-classification", num_labels=5)
    recipe_files.write_csv(Path("reviews.csv"), recipe_files.reviews(72))
    Path("oneshot.yaml").write_text(example, encoding="utf-8")
    assert cli.main(["run", "oneshot.yaml"]) == 0
    assert "dense: " not in capsys.readouterr().out
    small = AutoModelForSequenceClassification.from_pretrained("runs/oneshot/compressed")
    assert sum(layer.intermediate.dense.out_features for layer in small.bert.encoder.layer) == 53  # of 88


def test_the_training_scripts_take_the_readmes_arguments(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(ROOT)
    shared = importlib.import_module("recipe_script")
    lines = [
        line.split() for block in blocks("bash") for line in block.splitlines() if line.startswith("python scripts/")
    ]
    assert len(lines) == 5
    for _, script, *arguments in lines:
        module = importlib.import_module(Path(script).stem)
        kind = next(
            each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__
        )
        task = hf_compress.Recipe.load(arguments[1]).task
        recipe, _ = shared.build_recipe(task, kind, module.columns, shared.parse(task, kind, arguments))
        assert recipe.output.startswith("runs/")


def test_the_sweeps_are_accepted(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, *_ = blocks("yaml")
    examples = [block for block in blocks("yaml") if block.startswith("recipe:")]
    recipe_files.save_model(Path("bert-base-uncased"), "text-classification")
    recipe_files.write_csv(Path("reviews.csv"), recipe_files.reviews(72))
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    dry, *_ = (
        line.split("#")[0].split()[1:] for line in README.splitlines() if line.startswith("hf-compress sweep sw")
    )
    shown = []
    for example in examples:
        Path("sweep.yaml").write_text(example, encoding="utf-8")
        assert cli.main(dry) == 0
        shown.append(capsys.readouterr().out)
    assert [line for line in shown[0].splitlines() if line.startswith("===")] == [
        "=== gentle ===",
        "=== hard ===",
        "=== magnitude ===",
    ]
    assert "search: 20 trials over pruning.structures.ffn, training.learning_rate, pruning.criterion" in shown[1]
    assert not Path("runs").exists()


def test_the_export_example_writes_models_that_load(tmp_path, monkeypatch) -> None:
    pytest.importorskip("torchao")
    (example,) = (block for block in blocks("python") if "int4_weight_only" in block)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_compress.export.quantized.verify_export", lambda folder, format, reference: None)
    model = tiny_models.bert(intermediate_size=64)
    exec(compile(example, "README.md", "exec"), {"model": model})
    for folder in ("int8", "int4"):
        type(model).from_pretrained(tmp_path / folder)


def test_the_example_of_the_hub_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks("python") if "push_to_hub" in block)
    for name in ("compressed", "compressed-torchao"):
        tiny_models.bert().save_pretrained(f"runs/reviews/{name}")
    with hub_server() as hub:
        hub.use(monkeypatch)
        exec(compile(example.replace('"me/', '"tester/'), "README.md", "exec"), {})
        assert hub.repositories["tester/bert-reviews-small"].private
        assert "model.safetensors" in hub.files("tester/bert-reviews-small")
        assert "model.safetensors" in hub.files("tester/bert-reviews-small", "torchao")


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    words = {f"w{i}": i for i in range(len(special), size)}
    backend = Tokenizer(WordLevel({**special, **words}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


@pytest.mark.parametrize(
    "names",
    [
        TRAINABLE_STRUCTURES,
        criteria,
        allocators,
        schedules,
        distillation_losses,
        schemes,
        quantization_methods,
        observers,
        FORMATS,
    ],
    ids=["structure", "criterion", "allocation", "schedule", "loss", "scheme", "method", "observer", "format"],
)
def test_the_method_table_is_complete(names) -> None:
    rows = README.split("## Methods")[1].split("## Limits")[0]
    assert [name for name in names if f"`{name}`" not in rows] == []


def test_the_method_table_names_the_other_schedules_and_searches() -> None:
    rows = README.split("## Methods")[1].split("## Limits")[0]
    names = (POLYNOMIAL, STEPS, LOTTERY_TICKET, "simulated_annealing", "auto_compress")
    assert [name for name in names if f"`{name}`" not in rows] == []


def test_the_criteria_without_training_are_all_there() -> None:
    rows = README.split("## Without training")[1].split("## Methods")[0]
    assert [name for name in CRITERIA if f"`{name}`" not in rows] == []


def test_every_command_exists() -> None:
    commands = {line.split()[1] for block in blocks("bash") for line in block.splitlines() if "hf-compress " in line}
    assert commands == {"inspect", "profile", "compare", "run", "sweep", "report", "export", "card", "push"}
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
    scripts = {path for block in blocks("bash") for path in re.findall(r"bash (scripts/\w+)", block)}
    assert scripts == {"scripts/demo", "scripts/test"}
    assert all((ROOT / path).is_file() for path in scripts)


def test_the_results_are_those_of_the_stored_run() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "readme_results.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert checked.returncode == 0, checked.stderr


def test_links_into_the_repository_exist() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
