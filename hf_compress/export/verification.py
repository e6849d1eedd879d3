"""Load what was written in a process of its own and compare it with the model that was trained."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.errors import ExportError
from hf_compress.export.formats.base import Format, run_example
from hf_compress.graph.capture import evaluating
from hf_compress.instruments.quantize import QuantizedLayer
from hf_compress.quantization.quantizers import RangeQuantizer

EXACT = {torch.float32: 1e-4}
"""What the output may differ by where only weights are rounded: the same sums in another order. Relative (rms)."""

ROUNDED = 0.02
"""Where inputs are rounded, too: the last bit decides on which side of a tie a value lies, so some values differ by a
whole step, and ranges that are computed at every call move. Such differences stay below what rounding inputs and
outputs changes, or below this, relative (rms)."""

SHARE = 0.3
"""Of what that changes, where all ranges are fixed. Inputs that are not rounded would differ by all of it."""

REMEDY = "The target folder was not touched. To write it without this check, pass verify=False."

_START = """
import importlib, json, logging, sys
logging.disable(logging.WARNING)
folder, scratch = sys.argv[1:]
facts = json.load(open(scratch + "/facts.json"))
sys.path += [each for each in facts["path"] if each not in sys.path]
from safetensors.torch import load_file, save_file
given = load_file(scratch + "/inputs.safetensors")
"""

_SCRIPTS = {
    "transformers": _START
    + """
import torch
if facts["plugin"]:
    import hf_compress
kind = getattr(importlib.import_module(facts["module"]), facts["class"])
model, found = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
wrong = {key: sorted(map(str, keys)) for key, keys in found.items() if key != "error_msgs" and keys}
assert not wrong, wrong
with torch.no_grad():
    result = model.eval()(**given, **facts["options"], return_dict=True)
save_file({name: result[name].contiguous().clone() for name in facts["outputs"]}, scratch + "/outputs.safetensors")
""",
    "onnxruntime": _START
    + """
import torch
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
# Its kernel for weights alone would round inputs by default, which is nothing that the file says.
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
names = {each.name for each in session.get_inputs()}
result = session.run(facts["outputs"], {name: each.numpy() for name, each in given.items() if name in names})
tensors = {name: torch.from_numpy(each) for name, each in zip(facts["outputs"], result)}
save_file(tensors, scratch + "/outputs.safetensors")
""",
}


@dataclass(frozen=True)
class Reference:
    """What the exported model has to compute."""

    inputs: dict[str, Any]
    outputs: dict[str, Tensor]
    """With quantizers, on the CPU."""

    coarse: dict[str, Tensor]
    """With the quantizers of weights alone: what is rounded of inputs and outputs is the difference."""

    rounds: str | None
    """Whether inputs or outputs are rounded, in ``"dynamic"`` or only in ``"static"`` ranges; None: neither."""

    facts: dict[str, Any]
    """What the other process needs to know."""


def make_reference(
    model: PreTrainedModel, layers: list[QuantizedLayer], format: Format, inputs: Mapping[str, Any]
) -> Reference:
    """Run the model with its quantizers.

    Args:
        model: A copy with its quantizers; those that the format does not have act no more afterwards.
        layers: Its layers.
        format: Which quantizers act in what is stored.
        inputs: Keyword arguments on which it runs.

    Raises:
        ExportError: If it does not run, or another process could not find its class.
    """
    own = type(model)
    if getattr(sys.modules.get(own.__module__), own.__name__, None) is not own or own.__module__ == "__main__":
        raise ExportError(
            f"export_quantized: {own.__name__} is defined in {own.__module__}, where a fresh process does not find it "
            "to check what was written. Define it in a module that can be imported, or pass verify=False."
        )
    for layer in layers:
        for role, quantizer in layer.quantizers():
            quantizer.enabled = quantizer.enabled and role in format.acting
    outputs = named_outputs(model, inputs)
    rounding = [
        each for layer in layers for role, each in layer.quantizers() if role in format.acting and role != "weights"
    ]
    for each in rounding:
        each.enabled = False
    coarse = named_outputs(model, inputs)
    dynamic = any(isinstance(each, RangeQuantizer) for each in rounding)
    rounds = "dynamic" if dynamic else "static" if rounding else None
    facts = {
        "module": own.__module__,
        "class": own.__name__,
        "plugin": getattr(model.config, "quantization_config", None) is not None,
        "options": {name: value for name, value in inputs.items() if not isinstance(value, Tensor)},
        "outputs": list(outputs),
        "path": sys.path,  # it has to find what this process finds
    }
    return Reference(dict(inputs), outputs, coarse, rounds, facts)


def named_outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the floating-point outputs that count, by name, on the CPU.

    Raises:
        ExportError: If the model does not run, or has none.
    """
    remedy = "so what is written cannot be checked. Pass example_inputs that it runs on, or verify=False."
    with evaluating(model):
        result = run_example(model, inputs, remedy)
    found = {name: each.detach().cpu() for name, each in result.items() if each.is_floating_point()}
    if not found:
        raise ExportError(
            f"export_quantized: {type(model).__name__} returns no numbers by which it could be checked; pass "
            "verify=False."
        )
    return found


def verify_export(folder: Path, format: Format, reference: Reference) -> None:
    """Load a folder in a process of its own and compare.

    Raises:
        ExportError: If it does not load there, or computes something else.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors = {name: each for name, each in reference.inputs.items() if isinstance(each, Tensor)}
        save_file({n: each.cpu().contiguous().clone() for n, each in tensors.items()}, f"{scratch}/inputs.safetensors")
        Path(scratch, "facts.json").write_text(json.dumps(reference.facts))
        command = [sys.executable, "-c", _SCRIPTS[format.runtime], str(folder), scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ExportError(
                f"export_quantized: what was written as {format.name!r} does not load in a fresh process: {last}. "
                f"{REMEDY}"
            )
        actual = load_file(f"{scratch}/outputs.safetensors")
    for name, expected in reference.outputs.items():
        _compare(name, expected, actual[name], reference, format)


def _compare(name: str, expected: Tensor, actual: Tensor, reference: Reference, format: Format) -> None:
    if expected.shape != actual.shape:
        raise ExportError(
            f"export_quantized: reloaded from {format.name!r}, {name} has shape {list(actual.shape)} instead of "
            f"{list(expected.shape)}. {REMEDY}"
        )
    # A difference that is no number, such as that of two infinities, is compared by itself.
    same = torch.equal(torch.isfinite(expected), torch.isfinite(actual))
    known = torch.isfinite(expected) & torch.isfinite(actual) & torch.isfinite(reference.coarse[name])
    target, found, coarse = (each[known].double() for each in (expected, actual, reference.coarse[name]))
    size = _rms(target)
    allowed = EXACT.get(expected.dtype, ROUNDED) * size
    if reference.rounds == "dynamic":  # what another kernel adds up otherwise moves ranges, and all that is rounded
        allowed = max(ROUNDED * size, _rms(target - coarse))
    elif reference.rounds == "static":  # only what lies between two integers may go the other way
        allowed = max(allowed, SHARE * _rms(target - coarse))
    error = _rms(found - target)
    if not same or error > allowed:
        raise ExportError(
            f"export_quantized: reloaded from {format.name!r} in a fresh process, {name} differs from the model with "
            f"fake quantizers by {error:.1e} (rms; allowed: {allowed:.1e}, of {size:.1e}). {REMEDY}"
        )


def _rms(x: Tensor) -> float:
    return float(x.pow(2).mean().sqrt()) if x.numel() else 0.0
