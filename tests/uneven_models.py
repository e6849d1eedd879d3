"""A BERT whose layers differ in size, cut by hand, and what it takes to load it in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.export.pretrained import CompressedConfig
from hf_compress.shrinking.sizes import refresh_sizes, tensor_shapes

HEADS = (3, 2)
WIDTHS = (10, 30)
HEAD_SIZE = 8

LOAD = """
import json
import sys
import torch
import transformers
from safetensors.torch import load_file, save_file
{extra}
scratch, *folders = sys.argv[1:]
torch.set_num_threads(1)
inputs, errors = load_file(scratch + "/inputs.safetensors"), {{}}
for index, folder in enumerate(folders):
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    except Exception as error:
        errors[index] = repr(error)
        continue
    with torch.no_grad():
        save_file({{"logits": model(**inputs).logits}}, scratch + f"/{{index}}.safetensors")
with open(scratch + "/report.json", "w") as file:
    json.dump({{"errors": errors, "modules": sorted(sys.modules)}}, file)
"""


def cut_by_hand(model: PreTrainedModel) -> PreTrainedModel:
    """Keep the first HEADS heads and WIDTHS feed-forward units of each layer, in place."""
    for layer, num_heads, width in zip(model.base_model.encoder.layer, HEADS, WIDTHS, strict=True):
        attention = layer.attention
        for part in (attention.self.query, attention.self.key, attention.self.value):
            _keep_rows(part, num_heads * HEAD_SIZE)
        _keep_columns(attention.output.dense, num_heads * HEAD_SIZE)
        _keep_rows(layer.intermediate.dense, width)
        _keep_columns(layer.output.dense, width)
    refresh_sizes(model)
    return model


def describe(model: PreTrainedModel, original: dict[str, torch.Size], facts: dict[str, dict[str, int]]) -> None:
    """Write the sizes into the config, as ``shrink`` does."""
    changed = {name: list(shape) for name, shape in tensor_shapes(model).items() if shape != original[name]}
    model.config.quantization_config = CompressedConfig(shapes=changed, units=facts).to_dict()


def uneven_bert(**changes: object) -> PreTrainedModel:
    model = tiny_models.bert(**changes)
    original = tensor_shapes(model)
    facts = {"bert.encoder.layer.0.attention.heads": {"kept": HEADS[0], "of": 4}}
    describe(cut_by_hand(model), original, facts)
    return model


def uneven_llama() -> PreTrainedModel:
    """A sequence classifier without any bias, whose feed-forward widths differ."""
    config = transformers.LlamaConfig(**tiny_models.DECODER, pad_token_id=0, num_labels=3)
    model = tiny_models.randomize(transformers.LlamaForSequenceClassification(config))
    original = tensor_shapes(model)
    for layer, width in zip(model.model.layers, WIDTHS, strict=True):
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            _keep_rows(part, width)
        _keep_columns(layer.mlp.down_proj, width)
    refresh_sizes(model)
    describe(model, original, {"model.layers.0.mlp.ffn": {"kept": WIDTHS[0], "of": 44}})
    return model


def example_ids(batch: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model.eval()(input_ids=example_ids() if ids is None else ids).logits


def load_in_fresh_process(folders: list[Path], scratch: Path, *, plugin: bool) -> tuple[list[Tensor | str], str]:
    """Load each folder in one new Python process, with or without this package.

    Returns:
        For each folder its logits or the error; and what the process printed to stderr.
    """
    save_file({"input_ids": example_ids()}, scratch / "inputs.safetensors")
    script = LOAD.format(extra="import hf_compress" if plugin else "")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(scratch), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((scratch / "report.json").read_text())
    assert ("hf_compress" in report["modules"]) == plugin
    results: list[Tensor | str] = []
    for index in range(len(folders)):
        error = report["errors"].get(str(index))
        results.append(error or load_file(scratch / f"{index}.safetensors")["logits"])
    return results, done.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _keep_rows(layer: nn.Linear, count: int) -> None:
    layer.weight = nn.Parameter(layer.weight.data[:count].clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.data[:count].clone())


def _keep_columns(layer: nn.Linear, count: int) -> None:
    layer.weight = nn.Parameter(layer.weight.data[:, :count].clone())
