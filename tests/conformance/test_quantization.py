"""Every registered quantization method that trains obeys the same laws, on several architectures."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from masked_models import random_masks
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_compress import (
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    dimension_groups,
    enable_quantizers,
    shrink,
)
from hf_compress.errors import ConfigError
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.instruments.gate import gated
from hf_compress.instruments.quantize import attached_quantizers
from hf_compress.registry import quantization_methods

METHODS = [name for name in quantization_methods if quantization_methods.get(name).trains]

STATIC = {"dynamic": False, "granularity": "tensor"}
FORMATS: dict[str, dict[str, Any]] = {
    "dynamic": {"scheme": "int8_dynamic"},
    "static": {"scheme": "int8_static"},
    "per tensor": {"weights": {"granularity": "tensor"}, "inputs": STATIC, "outputs": {"dynamic": True}},
    "whole tensors": {"weights": {"granularity": "tensor"}, "inputs": STATIC},
    "affine": {"weights": {"granularity": "tensor"}, "inputs": {**STATIC, "symmetric": False}},
    "percentile": {
        "weights": {"granularity": "tensor", "observer": "percentile"},
        "inputs": {"observer": "mse", "granularity": "tensor"},
    },
    # Sums of signs are often 0, whose sign is that of a rounding error: no inputs of one bit here.
    "one bit": {"weights": {"num_bits": 1, "granularity": "tensor"}, "inputs": False},
    "one bit per channel": {"weights": {"num_bits": 1}, "inputs": False},
}
"""Each method is tried with all that it accepts."""

ARCHITECTURES = {"bert": tiny_models.bert, "gpt2": tiny_models.gpt2, "llama": tiny_models.llama}
MORE = {"vit": tiny_models.vit, "mixtral": partial(tiny_models.mixtral, experts_implementation="eager")}
KINDS = ("heads", "ffn", "hidden", "layers")


def config_of(method: str, **settings: Any) -> QuantizationConfig | None:
    try:
        return QuantizationConfig(method=method, **settings)
    except ConfigError:
        return None


ACCEPTED = [(method, name) for method in METHODS for name, each in FORMATS.items() if config_of(method, **each)]


def examples(model: PreTrainedModel, count: int = 4) -> list[dict[str, torch.Tensor]]:
    inputs = make_example_inputs(model, batch_size=count, seed=3)
    columns = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    writes = model.can_generate()
    columns["labels"] = columns["input_ids"] if writes else torch.arange(count) % model.config.num_labels
    return [{name: tensor[i] for name, tensor in columns.items()} for i in range(count)]


def train(
    model: PreTrainedModel, callbacks: list[Any], folder: Path, resume: str | None = None, **args: Any
) -> Trainer:
    defaults = {
        "use_cpu": True,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    run = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    settings = TrainingArguments(output_dir=str(folder), **{**defaults, **run, **args})
    trainer = Trainer(model=model, args=settings, train_dataset=examples(model), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits(model: PreTrainedModel) -> torch.Tensor:
    """In float64: the least number of a row lies half way between two integers, so rounding of sums would decide."""
    precise = copy.deepcopy(model).double().eval()
    inputs = make_example_inputs(model, batch_size=2, seed=7)
    given = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    with torch.no_grad():
        return precise(**given).logits


@cache
def trained(architecture: str, method: str, formats: str, folder: Path) -> PreTrainedModel:
    model = {**ARCHITECTURES, **MORE}[architecture]()
    config = config_of(method, **FORMATS[formats])
    assert config is not None
    return train(model, [QuantizationCallback(config)], folder).model


def masks_of(model: PreTrainedModel, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    groups = {g.name: g for g in dimension_groups(model) if g.kind == kind and g.frozen is None}
    return groups, random_masks(groups.values(), seed=0, lose=True)


def slow_unless(quick: bool, *values: str) -> Any:
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


FIRST = dict(reversed(ACCEPTED))
"""The formats of the default run; the others are slow."""

CASES = [
    slow_unless(architecture == "bert" and FIRST[method] == formats, *each, architecture)
    for each in ACCEPTED
    for method, formats in [each]
    for architecture in (*ARCHITECTURES, *MORE)
]


@pytest.mark.parametrize(("method", "formats", "architecture"), CASES)
def test_masked_is_shrunk(method, formats, architecture, tmp_path_factory) -> None:
    """Whatever is pruned after a model was trained quantized: the rest rounds as before."""
    model = trained(architecture, method, formats, tmp_path_factory.getbasetemp())
    quantizers = attached_quantizers(model).named()
    for kind in KINDS:
        groups, masks = masks_of(model, kind)
        assert groups or kind not in ("heads", "ffn"), kind
        if not groups:
            continue
        masked = copy.deepcopy(model)
        with gated(masked, groups, needs_gradient=False) as gates:
            for name, gate in gates.items():
                gate.set_mask(masks[name])
                if gate.layers is not None:
                    gate.value.data.copy_(masks[name])
            expected = logits(masked)
        small = shrink(model, masks)
        enable_quantizers(small)
        assert len(attached_quantizers(small).named()) <= len(quantizers)
        assert attached_quantizers(small).named()
        assert tiny_models.relative_error(expected, logits(small)) < 1e-5, kind
        assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize(("method", "formats"), [slow_unless(m == "qat" and FIRST[m] == f, m, f) for m, f in ACCEPTED])
def test_pruned_and_quantized_in_one_run(method, formats, tmp_path) -> None:
    """The trained model, masks written into its weights or still on it, computes what the shrunk one does."""
    config = config_of(method, **FORMATS[formats])
    for structures in ({"heads": 0.5, "ffn": 0.5}, {"hidden": 0.25, "layers": 0.5}):
        pruning = PruningCallback(PruningConfig(structures=structures, criterion="l2", schedule="one_shot", end=1))
        with pytest.warns(UserWarning) if "hidden" in structures else _silently():
            trainer = train(tiny_models.llama(), [pruning, QuantizationCallback(config)], tmp_path)
        small = shrink(trainer)
        enable_quantizers(small)
        assert tiny_models.relative_error(logits(trainer.model), logits(small)) < 1e-5, structures
        kept = attached_quantizers(small)
        small.save_pretrained(tmp_path / "small")
        again = type(small).from_pretrained(tmp_path / "small", config=small.config)
        assert again.state_dict().keys() == small.state_dict().keys()
        assert len(kept.layers) == len(attached_quantizers(trainer.model).layers) // (
            2 if "layers" in structures else 1
        )


class Weights(TrainerCallback):
    """Keeps the weights after every step, and stops if asked."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.stop = stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("architecture", [slow_unless(each == "bert", each) for each in ARCHITECTURES])
@pytest.mark.parametrize("method", METHODS)
def test_a_late_start_is_neutral_and_checkpoints_are_plain_and_resumable(method, architecture, tmp_path) -> None:
    """Before begin training is the plain one; a run cut off in between ends with the same weights, bit for bit."""
    formats = next(name for tried, name in ACCEPTED if tried == method)
    make = ARCHITECTURES[architecture]
    plain, straight, resumed = Weights(), Weights(), Weights()
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    train(make(), [plain], tmp_path / "plain", max_steps=2)

    def quantize() -> QuantizationCallback:
        config = config_of(method, **FORMATS[formats], begin=2)
        assert config is not None
        return QuantizationCallback(config)

    trainer = train(make(), [quantize(), straight], tmp_path / "run", **saving)
    assert all(same(a, b) for a, b in zip(plain.seen, straight.seen, strict=False))
    assert attached_quantizers(trainer.model).layers
    checkpoint = tmp_path / "run" / "checkpoint-3"
    stored = load_file(checkpoint / "model.safetensors").keys()
    assert stored == load_file(_saved_plain(make(), tmp_path) / "model.safetensors").keys()
    again = train(make(), [quantize(), resumed], tmp_path / "run", resume=str(checkpoint), **saving)
    assert same(resumed.seen[-1], straight.seen[-1])
    first, second = (attached_quantizers(each.model).named() for each in (trainer, again))
    for name, quantizer in first.items():
        if hasattr(quantizer, "state"):
            a, b = quantizer.state(), second[name].state()
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_bits_trains(method, architecture, tmp_path) -> None:
    tried = 0
    for bits in range(1, 9):
        for name in ("dynamic", "whole tensors", "affine"):
            changes = {role: {**_fields(name, role), "num_bits": bits} for role in ("weights", "inputs")}
            config = config_of(method, scheme=FORMATS[name].get("scheme", "int8_dynamic"), **changes)
            if config is None:
                continue
            tried += 1
            trainer = train(
                ARCHITECTURES[architecture](), [QuantizationCallback(config)], tmp_path, max_steps=2, logging_steps=1,
                logging_strategy="steps",
            )  # fmt: skip
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            assert len(losses) == 2
            assert all(math.isfinite(loss) for loss in losses), (bits, name)
            assert torch.isfinite(logits(trainer.model)).all()
            break  # one kind of format for each number of bits
    lowest, highest = (getattr(quantization_methods.get(method), each) for each in ("fewest_bits", "most_bits"))
    assert tried == highest - lowest + 1


def _fields(formats: str, role: str) -> dict[str, Any]:
    found = FORMATS[formats].get(role)
    return dict(found) if isinstance(found, dict) else {}


def _saved_plain(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder / "saved")
    return folder / "saved"


@contextmanager
def _silently() -> Iterator[None]:
    yield
