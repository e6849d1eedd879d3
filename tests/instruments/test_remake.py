"""What is made again in the backward pass is not kept, and changes no bit."""

import copy
from contextlib import nullcontext

import pytest
import torch
from quantized_models import install_quantizers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_compress.instruments import leaf_forward as attaching
from hf_compress.instruments.attach import attach
from hf_compress.instruments.mask import ElementMask

IN, OUT = 24, 16
SHAPES = {"rows": (7, IN), "sequence": (3, 5, IN), "four dimensions": (2, 3, 5, IN), "empty": (0, 5, IN)}
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}
INSTRUMENTS = ("gate", "mask", "quantizer")


def instrument(layer: nn.Module, *names: str) -> torch.Tensor:
    """Return the gate's value."""
    gate = (torch.arange(IN) % 3 > 0).float().requires_grad_()
    if "gate" in names:
        attach("layer", layer).input_gates.append(lambda: gate * 1.0)
    if "mask" in names:
        ElementMask("layer", layer).set_mask(torch.rand(layer.weight.shape) > 0.5)
    if "quantizer" in names:
        install_quantizers({"layer": layer})
    return gate


def results(layer, gate, shape, run=lambda layer, x: layer(x), autocast=False):
    torch.manual_seed(1)
    x = torch.randn(shape, requires_grad=True)
    gate.grad = None
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = run(layer, x * 1.0)
    y.float().pow(3).sum().backward()
    return [y, x.grad, gate.grad, *(p.grad for p in layer.parameters())]


def without_remaking(monkeypatch):
    monkeypatch.setattr(
        attaching,
        "remade_linear",
        lambda compute, operands, changes, *_: compute(changes[0](operands[0]), changes[1](operands[1]), operands[2]),
    )


def check_same(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_what_autograd_computes_bit_for_bit(monkeypatch, kind, shape, autocast) -> None:
    for names in (("gate",), ("mask",), ("quantizer",), INSTRUMENTS):
        if (kind == "conv1d" or shape == "empty") and "quantizer" in names:
            continue  # only nn.Linear is quantized, and an empty batch has no scale
        layer = LAYERS[kind]()
        gate = instrument(layer, *names)
        remade = results(layer, gate, SHAPES[shape], autocast=autocast)
        with monkeypatch.context() as patched:
            without_remaking(patched)
            check_same(remade, results(layer, gate, SHAPES[shape], autocast=autocast))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant) -> None:
    layer = nn.Linear(IN, OUT)
    gate = instrument(layer, *INSTRUMENTS)
    plain = results(layer, gate, (3, 5, IN))
    recomputed = results(layer, gate, (3, 5, IN), lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    check_same(plain, recomputed)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_gates_in_the_weight_are_gates_at_the_input(monkeypatch, gate) -> None:
    """Few tokens are multiplied by the gates; where there are many, the weight is."""
    layer = nn.Linear(IN, OUT)
    value = torch.ones(IN).index_fill_(0, torch.arange(5, 9), gate).requires_grad_()
    attach("layer", layer).input_gates.append(lambda: value)
    many = results(layer, value, (50, IN))
    torch.manual_seed(1)
    x = torch.randn(50, IN)
    expected = torch.nn.functional.linear(x * value, layer.weight, layer.bias)
    assert torch.equal(many[0], expected)
    (upstream,) = torch.autograd.grad(expected.pow(3).sum(), value)
    torch.testing.assert_close(many[2], upstream, rtol=1e-5, atol=1e-3)  # a sum over outputs, not over tokens


def test_gradients_can_be_differentiated_again(monkeypatch) -> None:
    layer = nn.Linear(IN, OUT)
    gate = instrument(layer, "gate", "mask")
    x = torch.randn(5, IN, requires_grad=True)

    def second_order():
        (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), [x, gate, layer.weight])

    remade = second_order()
    without_remaking(monkeypatch)
    for a, b in zip(remade, second_order(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # summed in another order


def kept_bytes(layer, x) -> int:
    """Bytes kept for the backward pass besides the layer's parameters and its input."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    for known in (x, *layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("names", [("gate",), ("mask",), ("quantizer",), INSTRUMENTS], ids=" ".join)
def test_only_masks_and_factors_are_kept(names) -> None:
    layer, x = nn.Linear(IN, OUT), torch.randn(50, IN, requires_grad=True)
    plain = kept_bytes(layer, x)
    instrument(layer, *names)
    # In bytes: one bool per weight, and one float per gate.
    allowed = ("mask" in names) * OUT * IN + ("gate" in names) * 4 * IN
    assert plain <= kept_bytes(layer, x) <= plain + allowed


def test_what_a_frozen_weight_or_input_does_not_need_is_not_kept() -> None:
    layer, x = nn.Linear(IN, OUT), torch.randn(50, IN)
    instrument(layer, "quantizer")
    saved = []
    for needs_x, needs_weight in ((True, False), (False, True)):
        layer.weight.requires_grad_(needs_weight)
        y = layer(x.clone().requires_grad_(needs_x))
        saved.append([None if t is None else t.shape for t in y.grad_fn.saved_tensors])
    assert saved == [[None, layer.weight.shape], [x.shape, None]]


def test_a_weight_or_mask_that_changes_before_the_backward_pass_is_an_error() -> None:
    layer, x = nn.Linear(IN, OUT), torch.randn(5, IN, requires_grad=True)
    mask = ElementMask("layer", layer)
    y = layer(x)
    mask.set_mask(torch.zeros(OUT, IN, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_compiled_layer_computes_the_same() -> None:
    torch.compiler.reset()
    layer = nn.Linear(IN, OUT)
    gate = instrument(layer, *INSTRUMENTS)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager")
    expected = results(layer, gate, (3, 5, IN))
    # The copy has a gate of its own, so its gradient is elsewhere.
    found = results(compiled, gate.detach().clone().requires_grad_(), (3, 5, IN))
    check_same(expected[:2] + expected[3:], found[:2] + found[3:])


@pytest.mark.parametrize("instruments", [(each,) for each in INSTRUMENTS])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_it_returns_may_be_changed_in_place(layer, instruments) -> None:
    """As speech models do, which overwrite masked frames."""
    outcomes = []
    for changed in (False, True):
        torch.manual_seed(0)
        module = LAYERS[layer]()
        instrument(module, *instruments)
        x = torch.randn(3, 5, IN, requires_grad=True)
        output = module(x * 1.0)
        where = torch.arange(5) % 2 == 0
        if changed:
            output[:, where] = 0.5
        else:
            output = torch.where(where[:, None], 0.5, output)
        output.square().sum().backward()
        outcomes.append((output.detach(), x.grad, module.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
