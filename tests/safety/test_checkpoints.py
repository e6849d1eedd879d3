"""Models of others: configs and weight files, through ``from_pretrained`` and the commands that load them.

What is wrong with files that are transformers' own is reported by transformers, with its own errors; ``THEIRS`` lists
them. The commands turn all of these into one message.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hostile import ESCAPE, JSON, SAFETENSORS, changed, contained, refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from uneven_models import uneven_bert

from hf_compress import cli, export_quantized
from hf_compress.errors import CompressionError, ExportError
from hf_compress.export.contents import contents_of

LOAD = AutoModelForSequenceClassification.from_pretrained
THEIRS = (CompressionError, OSError, ValueError, TypeError, RuntimeError, AttributeError, SafetensorError)
WIDE = "bert.encoder.layer.0.intermediate.dense.weight"
COMMANDS = {
    "inspect": ["inspect"],
    "inspect with weights": ["inspect", "--load-weights"],
    "profile": ["profile", "--no-latency"],
    "export": ["export"],
    "push": ["push"],
}


def arguments(command: str, folder: Path) -> list[str]:
    more = {"export": [str(folder.parent / "exported")], "push": ["me/model"]}
    name, *options = COMMANDS[command]
    return [name, str(folder), *more.get(command, []), *options]


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """Folders of models: ``plain`` and ``uneven``."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.bert().save_pretrained(folder / "plain")
    uneven_bert().save_pretrained(folder / "uneven")
    return folder


@pytest.fixture
def uneven(templates, tmp_path) -> Path:
    return Path(shutil.copytree(templates / "uneven", tmp_path / "model"))


def edit(folder: Path, where: str, value: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), where, value)))


SIZES: list[tuple[str, Any]] = [
    ("version", 99),
    ("version", True),
    ("version", "1"),
    ("version", None),
    ("no_such_key", 1),
    (ESCAPE, 1),
    ("k" * 100_000, 1),
    ("shapes", {}),
    ("shapes", []),
    ("shapes", 5),
    ("shapes", {WIDE: 5}),
    ("shapes", {WIDE: [10**12, 10**12]}),
    ("shapes", {WIDE: [-10, 32]}),
    ("shapes", {WIDE: [True, 32]}),
    ("shapes", {WIDE: [10.0, 32]}),
    ("shapes", {WIDE: ["10", 32]}),
    ("shapes", {WIDE: [10, 32, 1]}),
    ("shapes", {WIDE: [10]}),
    ("shapes", {WIDE: []}),
    ("shapes", {WIDE: [45, 32]}),
    ("shapes", {"": [1]}),
    ("shapes", {"../../outside/secret": [1]}),
    ("shapes", {"bert.__class__": [1]}),
    ("shapes", {"bert.encoder.layer.0": [1]}),
    ("shapes", {"n" * 100_000: [1]}),
    ("shapes", {ESCAPE: [1]}),
    ("units", 5),
    ("units", [1]),
    ("units", {"a": 5}),
    ("units", {"a": {"kept": 5}}),
    ("units", {"a": {"kept": 5, "of": 4}}),
    ("units", {"a": {"kept": -1, "of": 4}}),
    ("units", {"a": {"kept": True, "of": 4}}),
    ("units", {"a": {"kept": float("nan"), "of": 4}}),
    ("units", {"a": {"kept": 1, "of": 10**30}}),
    ("attributes", 5),
    ("attributes", {"a": 1}),
    ("attributes", [5]),
    ("attributes", [["bert", ["config"], 5]]),
    ("attributes", [["bert", [], 5]]),
    ("attributes", [["bert", [0], 5]]),
    ("attributes", [["bert", ["__class__"], 5]]),
    ("attributes", [["bert", ["_modules"], 5]]),
    ("attributes", [["bert", ["forward"], 5]]),
    ("attributes", [["bert", ["training"], 5]]),
    ("attributes", [["bert", ["encoder", "layer", 0, "chunk_size_feed_forward"], 5]]),
    ("attributes", [["bert.encoder.layer.0.attention.self", ["num_attention_heads"], True]]),
    ("attributes", [["bert.encoder.layer.0.attention.self", ["num_attention_heads"], 2.0]]),
    ("attributes", [["bert.encoder.layer.0.attention.self", ["num_attention_heads"], 10**12]]),
    ("attributes", [["bert.encoder.layer.0.attention.self", ["scaling"], 2]]),
    ("attributes", [["../../outside", ["x"], 1]]),
    ("attributes", [["a" * 100_000, ["x"], 1]]),
    ("buffers", 5),
    ("buffers", {"a": 5}),
    ("buffers", {"a": {"x": [0]}}),
    ("buffers", {"no.such.buffer": {"0": [0]}}),
    ("buffers", {"bert.embeddings.position_ids": {"0": [-1]}}),
    ("buffers", {"bert.embeddings.position_ids": {"0": [1, 0]}}),
    ("buffers", {"bert.embeddings.position_ids": {"0": [0, 0]}}),
    ("buffers", {"bert.embeddings.position_ids": {"0": [True]}}),
    ("buffers", {"bert.embeddings.position_ids": {"0": []}}),
    ("buffers", {"bert.embeddings.position_ids": {"1": [10**12]}}),
    ("buffers", {"bert.embeddings.position_ids": {"-1": [0]}}),
    ("buffers", {"bert.embeddings.position_ids": {"7": [0]}}),
    ("flexible", 5),
    ("flexible", "bert"),
    ("flexible", [5]),
    ("emptied", 5),
    ("emptied", [1]),
    ("emptied", {"bert": 5}),
    ("emptied", {"bert": [5, 5]}),
    ("emptied", {"bert": [None, -1]}),
    ("emptied", {"bert": [None, 10**12]}),
    ("emptied", {"bert": ["no.such.module", None]}),
    ("emptied", {"": [None, None]}),
    ("emptied", {"bert.encoder.layer.0": [None, 1]}),
    ("inner", 5),
    ("inner", "torchao"),
    ("inner", {}),
    ("inner", {"quant_method": "no such method"}),
    ("inner", {"quant_method": "bitsandbytes"}),
    ("inner", {"quant_method": ["torchao"]}),
    ("inner", {"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system", "_data": {}}}}),
    ("inner", {"quant_method": "compressed-tensors", "config_groups": 5}),
    ("guard", 5),
    ("guard", ["a"]),
]


@pytest.mark.parametrize(("key", "value"), SIZES, ids=[f"{key[:20]!r}: {str(value)[:60]!r}" for key, value in SIZES])
def test_sizes_in_a_config(key, value, uneven) -> None:
    edit(uneven, f"quantization_config/{key}", value)
    refused(uneven, lambda: LOAD(uneven), "config.json", ExportError)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("attack", [name for name in JSON if "version" not in name and "key" not in name])
def test_configs_that_are_none(command, attack, uneven, capsys) -> None:
    if command == "push" and attack in ("control characters", "a long name"):
        pytest.skip("an object with keys that nobody knows is a config; nothing is loaded")
    (uneven / "config.json").write_bytes(JSON[attack])
    with contained(uneven):
        assert cli.main(arguments(command, uneven)) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert str(uneven) in error and ESCAPE not in error and len(error) < 4000


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "inspect"])
@pytest.mark.parametrize("attack", SAFETENSORS)
def test_weight_files(command, attack, uneven, capsys) -> None:
    (uneven / "model.safetensors").write_bytes(SAFETENSORS[attack])
    with contained(uneven):
        assert cli.main(arguments(command, uneven)) == cli.EXIT_ERROR
    assert str(uneven) in capsys.readouterr().err


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_weight_files_of_uneven_models(attack, uneven) -> None:
    """The headers are read before transformers reads the rest: by this package, whose error names the file."""
    (uneven / "model.safetensors").write_bytes(SAFETENSORS[attack])
    refused(uneven, lambda: LOAD(uneven), "model.safetensors", ExportError)


def replace(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 3), torch.zeros(11, 32), torch.zeros(320), torch.zeros(()), torch.zeros(0, 32)]
)
def test_weights_of_other_shapes(tensor, uneven) -> None:
    replace(uneven, WIDE, tensor)
    refused(uneven, lambda: LOAD(uneven), "", THEIRS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**12),
        ("intermediate_size", 10**12),
        ("vocab_size", 10**12),
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("num_attention_heads", 10**12),
        ("max_position_embeddings", 10**12),
        ("max_position_embeddings", 2**31),
        ("num_labels", 10**9),
        ("hidden_size", -32),
        ("hidden_size", float("nan")),
        ("hidden_size", "32"),
        ("hidden_size", True),
        ("architectures", ["../../outside"]),
        ("architectures", "BertModel"),
        ("architectures", [5]),
        ("architectures", ["pipeline"]),
        ("architectures", ["AutoConfig"]),
        ("model_type", "../../outside"),
        ("model_type", ["bert"]),
        ("auto_map", {"AutoModelForSequenceClassification": "../outside/evil.Model"}),
        ("quantization_config", 5),
        ("quantization_config", {"quant_method": "no such method"}),
        ("id2label", {"0": 5, "x": 3}),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "profile"])
def test_values_of_configs(command, key, value, templates, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(templates / "plain", tmp_path / "model"))
    edit(folder, key, value)
    with contained(folder):
        code = cli.main(arguments(command, folder))
    # Transformers asks no one about scripts that are not trusted, and passes over formats that it does not know.
    harmless = key in ("auto_map", "id2label") or value == {"quant_method": "no such method"}
    assert harmless or code == cli.EXIT_ERROR
    assert code == 0 or str(folder) in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        *JSON.values(),
        b'{"weight_map": 5}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"t": 5}}',
        b'{"weight_map": {"t": "../outside/secret.json"}}',
        b'{"weight_map": {"t": "/etc/passwd"}}',
        b'{"weight_map": {"t": "model-00001-of-00002.safetensors"}}',
        b'{"weight_map": {"t": "optimizer.pt"}}',
        b'{"weight_map": {"t": "model.safetensors/../../x.safetensors"}}',
    ],
)
def test_indices_of_weights(data, uneven) -> None:
    (uneven / "model.safetensors").unlink()
    (uneven / "model.safetensors.index.json").write_bytes(data)
    refused(uneven, lambda: contents_of(uneven), str(uneven), ExportError)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "tokenizer.json"])
def test_links_are_not_published(name, uneven) -> None:
    with contained(uneven):
        pass
    (uneven / name).unlink(missing_ok=True)
    (uneven / name).symlink_to(uneven.parent / "outside" / "secret.json")
    with pytest.raises(ExportError, match=name):
        contents_of(uneven)


def test_compare_names_the_model_that_is_damaged(templates, uneven, capsys) -> None:
    (uneven / "model.safetensors").write_bytes(SAFETENSORS["giant sizes"])
    with contained(uneven):
        assert cli.main(["compare", str(templates / "plain"), str(uneven)]) == cli.EXIT_ERROR
    assert str(uneven) in capsys.readouterr().err


@pytest.mark.parametrize("step", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("form", ["torchao", "compressed-tensors"])
def test_steps_that_are_none(form, step, tmp_path) -> None:
    pytest.importorskip(form.replace("-", "_"))
    folder = export_quantized(uneven_bert(), tmp_path / "model", format=form, verify=False)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("scale") and "layer.0" in name)
    replace(folder, name, torch.full_like(tensors[name], step))
    refused(folder, lambda: LOAD(folder), "model.safetensors", ExportError)
