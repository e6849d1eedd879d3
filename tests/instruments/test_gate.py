import copy
import pickle

import pytest
import tiny_models
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import ZOO

from hf_compress import TargetError, TrainingError, dimension_groups, make_example_inputs
from hf_compress.instruments.attach import attach, attachment_of, detach_all, detach_if_empty, leaf_kind
from hf_compress.instruments.finished import instrumented_modules
from hf_compress.instruments.gate import Gate, gates_on, open_units, unit_gradients, unit_weights


def groups_of(model, kind):
    return [g for g in dimension_groups(model) if g.kind == kind and g.frozen is None]


def loss_of(model):
    inputs = make_example_inputs(model)
    return model(**inputs, labels=torch.tensor([0, 2])).loss


def test_open_gates_change_no_bit_of_outputs_and_gradients() -> None:
    """Law 1."""
    plain, gated = tiny_models.bert(), tiny_models.bert()
    for kind in ("heads", "ffn"):
        for group in groups_of(gated, kind):
            Gate(group, gated, needs_gradient=True)
    loss_of(plain).backward()
    loss_of(gated).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), gated.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_the_gate_gradient_is_the_sum_of_weight_times_gradient_of_the_consumer() -> None:
    model = tiny_models.bert()
    group = groups_of(model, "heads")[0]
    gate = Gate(group, model, needs_gradient=True)
    loss_of(model).backward()
    weight = model.bert.encoder.layer[0].attention.output.dense.weight
    expected = (weight * weight.grad).sum(0).view(4, 8).sum(1)
    torch.testing.assert_close(gate.take_gradient(), expected, rtol=1e-4, atol=1e-6)
    assert gate.take_gradient() is None


def test_a_closed_gate_equals_zero_columns_after_folding() -> None:
    model = tiny_models.bert()
    group = groups_of(model, "ffn")[0]
    mask = torch.arange(44) % 3 > 0
    gate = Gate(group, model, needs_gradient=False)
    gate.set_mask(mask)
    inputs = make_example_inputs(model)
    with torch.no_grad():
        gated = model(**inputs).logits
        gate.fold(mask)
        gate.remove()
        folded = model(**inputs).logits
    assert torch.equal(gated, folded)
    assert attachment_of(model.bert.encoder.layer[0].output.dense) is None


def test_state_dict_and_class_come_back() -> None:
    model = tiny_models.bert()
    keys = list(model.state_dict())
    gates = [Gate(g, model, needs_gradient=True) for g in groups_of(model, "heads")]
    assert list(model.state_dict()) == keys
    assert type(model.bert.encoder.layer[0].attention.output.dense) is not nn.Linear
    assert len(list(model.parameters())) == len(list(tiny_models.bert().parameters()))
    for gate in gates:
        gate.remove()
    assert type(model.bert.encoder.layer[0].attention.output.dense) is nn.Linear


def test_gates_reach_what_pytorch_attention_takes_from_its_output_projection() -> None:
    """Its forward reads the weight of ``out_proj`` and never calls that module."""
    model = ZOO["siglip"]()
    name = "vision_model.head.attention"
    (group,) = [g for g in groups_of(model, "heads") if g.gates[0].module.startswith(name)]
    attention = model.get_submodule(name)
    mask = torch.arange(group.num_units) > 0
    gate = Gate(group, model, needs_gradient=True)
    gate.set_mask(mask)
    x = torch.randn(2, 5, attention.embed_dim)
    gated = attention(x, x, x)[0]
    gated.square().sum().backward()
    assert gate.take_gradient().abs().min() > 0
    gate.fold(mask)
    gate.remove()
    assert type(attention) is nn.MultiheadAttention
    assert tiny_models.relative_error(gated, attention(x, x, x)[0]) < 1e-6


def test_a_norm_is_gated_and_sees_the_kept_units_alone() -> None:
    """Qwen 3 normalizes queries and keys, whose units are both a norm's own and contracted with each other."""
    model = ZOO["qwen3"]()
    group = next(g for g in groups_of(model, "head_dim") if g.sources and g.subsets)
    gate = Gate(group, model, needs_gradient=True)
    mask = torch.arange(group.num_units) % 3 > 0
    gate.set_mask(mask)
    inputs = make_example_inputs(model)
    model(**inputs).logits.square().sum().backward()
    assert gate.take_gradient()[mask].abs().min() > 0
    gate.remove()
    assert all("Instrumented" not in type(module).__name__ for module in model.modules())


def test_gates_of_two_groups_share_a_consumer() -> None:
    """head_dim and heads both lie along the attention output's input."""
    model = tiny_models.bert()
    heads, inner = groups_of(model, "heads")[0], groups_of(model, "head_dim")[1]
    assert [part.parameter for part in inner.gates] == ["bert.encoder.layer.0.attention.output.dense.weight"]
    first, second = (Gate(g, model, needs_gradient=False) for g in (heads, inner))
    first.set_mask(torch.tensor([True, False, True, True]))
    second.set_mask(torch.arange(8) > 0)
    factors = attachment_of(model.bert.encoder.layer[0].attention.output.dense).factors().view(4, 8)
    assert factors[1].sum() == 0 and factors[:, 0].sum() == 0 and factors.sum() == 3 * 7


def test_gated_models_can_be_copied_and_pickled() -> None:
    model = tiny_models.bert()
    gate = Gate(groups_of(model, "ffn")[0], model, needs_gradient=False)
    gate.set_mask(torch.arange(44) > 20)
    inputs = make_example_inputs(model)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(duplicate(**inputs).logits, model(**inputs).logits)
        detach_all(duplicate)
        assert type(duplicate.bert.encoder.layer[0].output.dense) is nn.Linear
    assert attachment_of(model.bert.encoder.layer[0].output.dense) is not None


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Linear(6, 4, bias=False), torch.randn(2, 3, 6)),
        (Conv1D(4, 6), torch.randn(2, 3, 6)),
        (nn.Conv1d(6, 4, 3), torch.randn(2, 6, 9)),
        (nn.Conv2d(6, 4, 3, padding=1), torch.randn(2, 6, 5, 5)),
    ],
)
def test_attached_leaves_compute_what_they_did(module, x) -> None:
    expected = module(x)
    attachment = attach("leaf", module)
    assert torch.equal(module(x), expected)
    factors = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    attachment.input_gates.append(lambda: factors)
    channel = 1 if x.dim() > 2 and not isinstance(module, nn.Linear | Conv1D) else -1
    shape = [1] * x.dim()
    shape[channel] = 6
    gated = module(x)
    attachment.input_gates.clear()
    detach_if_empty(module)
    assert torch.equal(gated, module(x * factors.view(shape)))


def test_a_module_with_its_own_forward_is_refused() -> None:
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TargetError, match="cannot attach to Odd"):
        leaf_kind("odd", Odd(2, 2))
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    with pytest.raises(TargetError, match="replaced on the instance"):
        attach("patched", patched)


def test_unit_weights_gathers_everything_a_unit_owns() -> None:
    model = tiny_models.bert()
    group = groups_of(model, "ffn")[0]
    layer = model.bert.encoder.layer[0]
    expected = torch.cat(
        [layer.intermediate.dense.weight, layer.intermediate.dense.bias[:, None], layer.output.dense.weight.T], dim=1
    )
    assert torch.equal(unit_weights(model, group).sort(1).values, expected.detach().sort(1).values)
    assert unit_weights(model, group).shape[1] == group.parameters_per_unit


@pytest.mark.parametrize("kind", ["ffn", "hidden", "layers"])
def test_gates_that_were_taken_off_leave_those_of_the_next_run_alone(kind) -> None:
    """As when the callback of an interrupted run is told to remove its own, long after."""
    model = tiny_models.bert()
    group = groups_of(model, kind)[0]
    earlier = Gate(group, model, needs_gradient=True)
    detach_all(model)
    later = Gate(group, model, needs_gradient=True)
    on = instrumented_modules(model)
    earlier.remove()
    assert instrumented_modules(model) == on != []
    later.remove()
    assert instrumented_modules(model) == []


@pytest.mark.parametrize("kind", ["ffn", "layers"])
def test_unit_gradients_are_those_of_unit_weights(kind) -> None:
    model = tiny_models.bert()
    group = groups_of(model, kind)[0]
    weights = unit_weights(model, group)
    with pytest.raises(TrainingError, match=f"weights of {group.name!r} get no gradients: they are frozen"):
        unit_gradients(model, group)
    for parameter in model.parameters():
        parameter.grad = 2 * parameter.detach()
    assert torch.equal(unit_gradients(model, group), 2 * weights)
    learning = model.bert.encoder.layer[0].intermediate.dense.weight
    for parameter in model.parameters():
        parameter.grad = None if parameter is not learning else torch.ones_like(parameter)
    found = unit_gradients(model, group)
    assert found.sum() == learning.numel() and set(found.flatten().tolist()) == {0.0, 1.0}


def test_gates_are_found_once_and_say_which_units_are_open() -> None:
    model = tiny_models.bert()
    made = [
        Gate(group, model, needs_gradient=False) for group in (*groups_of(model, "ffn"), *groups_of(model, "heads"))
    ]
    made += [Gate(group, model, needs_gradient=False) for group in groups_of(model, "hidden")]
    found = gates_on(model)
    assert len(found) == len(made) and {id(gate) for gate in found} == {id(gate) for gate in made}
    mask = torch.arange(made[0].value.numel()) % 3 != 0
    made[0].set_mask(mask)
    assert torch.equal(open_units(made[0]), mask)
    for gate in made:
        gate.remove()
    assert gates_on(model) == []
