"""A BERT whose layers differ in size, cut by hand, and what it takes to load it in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.export.pretrained import mark_uneven
from hf_compress.shrinking.sizes import parameter_shapes, refresh_sizes

HEADS = (3, 2)
WIDTHS = (10, 30)
HEAD_SIZE = 8

LOAD = """
import sys
import torch
import transformers
from safetensors.torch import load_file, save_file
{extra}
folder, inputs, outputs, auto_class = sys.argv[1:]
torch.set_num_threads(1)
model = getattr(transformers, auto_class).from_pretrained(folder)
with torch.no_grad():
    save_file({{"logits": model(**load_file(inputs)).logits}}, outputs)
assert "{absent}" not in sys.modules, "loaded through more than transformers"
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


def uneven_bert(**changes: object) -> PreTrainedModel:
    model = tiny_models.bert(**changes)
    original = parameter_shapes(model)
    facts = {"bert.encoder.layer.0.attention.heads": {"kept": HEADS[0], "of": 4}}
    mark_uneven(cut_by_hand(model), original, facts)
    return model


def example_ids(batch: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    return model.eval()(input_ids=example_ids() if ids is None else ids).logits


def logits_in_fresh_process(
    folder: Path, scratch: Path, auto_class: str = "AutoModelForSequenceClassification", *, plugin: bool
) -> Tensor:
    """Load the folder in a new Python process, with or without this package, and return the logits."""
    inputs, outputs = scratch / "inputs.safetensors", scratch / "outputs.safetensors"
    save_file({"input_ids": example_ids()}, inputs)
    script = LOAD.format(extra="import hf_compress" if plugin else "", absent="nothing" if plugin else "hf_compress")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(folder), str(inputs), str(outputs), auto_class]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return load_file(outputs)["logits"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _keep_rows(layer: nn.Linear, count: int) -> None:
    layer.weight = nn.Parameter(layer.weight.data[:count].clone())
    layer.bias = nn.Parameter(layer.bias.data[:count].clone())


def _keep_columns(layer: nn.Linear, count: int) -> None:
    layer.weight = nn.Parameter(layer.weight.data[:, :count].clone())
