import copy
import pickle

import peft
import pytest
import tiny_models
import torch
from quantized_models import install_quantizers, on_int8_grid
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D
from zoo import ZOO

from hf_compress import ExportError, TargetError, export_quantized, make_example_inputs
from hf_compress.instruments.attach import attach, attachment_of, suspended
from hf_compress.instruments.fake_quantize import quantizable_layers, remove_fake_quantizers
from hf_compress.instruments.mask import ElementMask

LEAVES = {
    "linear": lambda: (nn.Linear(6, 4), torch.randn(2, 3, 6)),
    "without bias": lambda: (nn.Linear(6, 4, bias=False), torch.randn(3, 6)),
    "Conv1D": lambda: (Conv1D(4, 6), torch.randn(2, 3, 6)),
    "conv1d": lambda: (nn.Conv1d(6, 4, 3), torch.randn(2, 6, 9)),
    "conv2d": lambda: (nn.Conv2d(6, 4, 3, padding=1, groups=2), torch.randn(2, 6, 5, 5)),
    "embedding": lambda: (nn.Embedding(6, 4), torch.tensor([0, 3, 3, 5])),
}


def half(parameter):
    return torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)) > 0.5


def encoder_linears(model):
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear and "encoder" in name}


def masked(model, **options):
    masks = {}
    for name, module in encoder_linears(model).items():
        masks[name] = ElementMask(name, module, **options)
        masks[name].set_mask(half(module.weight))
    return masks


def loss_of(model):
    ids = torch.arange(22).view(2, 11)
    return model(input_ids=ids, labels=torch.tensor([0, 2])).loss


def logits_of(model):
    with torch.no_grad():
        return model(**make_example_inputs(model)).logits


def gradients(model):
    torch.manual_seed(0)  # for dropout
    model.zero_grad()
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("straight_through", [False, True])
def test_masks_that_keep_all_change_no_bit_of_outputs_and_gradients(straight_through) -> None:
    """Law 1."""
    plain, other = tiny_models.bert(), tiny_models.bert()
    for name, module in encoder_linears(other).items():
        ElementMask(name, module, straight_through=straight_through)
    expected, found = gradients(plain), gradients(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(logits_of(plain), logits_of(other))


@pytest.mark.parametrize("kind", LEAVES)
def test_a_masked_leaf_computes_with_zeros_and_their_gradient_is_zero(kind) -> None:
    module, x = LEAVES[kind]()
    zeroed = copy.deepcopy(module)
    keep = half(module.weight)
    with torch.no_grad():
        zeroed.weight.mul_(keep)
    before = module.weight.detach().clone()
    mask = ElementMask("leaf", module)
    mask.set_mask(keep)
    y, expected = module(x), zeroed(x)
    assert torch.equal(y, expected)
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    assert torch.equal(module.weight.grad, zeroed.weight.grad * keep)
    assert torch.equal(module.weight, before), "the weight itself is not touched"
    mask.fold()
    mask.remove()
    assert type(module) is type(zeroed)
    assert torch.equal(module.weight, zeroed.weight)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize("kind", LEAVES)
def test_straight_through_the_gradient_reaches_pruned_weights(kind) -> None:
    module, x = LEAVES[kind]()
    zeroed = copy.deepcopy(module)
    keep = half(module.weight)
    with torch.no_grad():
        zeroed.weight.mul_(keep)
    ElementMask("leaf", module, straight_through=True).set_mask(keep)
    for each in (module, zeroed):
        (each(x) + 1).pow(2).sum().backward()
    assert torch.equal(module.weight.grad, zeroed.weight.grad)
    assert module.weight.grad[~keep].abs().max() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_momentum_and_weight_decay_revive_nothing(optimizer) -> None:
    model = tiny_models.bert()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    stepper = optimizer(model.parameters(), lr=0.05, weight_decay=0.1, **options)
    masks: dict[str, ElementMask] = {}
    for step in range(4):
        if step == 2:  # by now there is momentum
            masks = masked(model)
        gradients(model)
        stepper.step()
    used = logits_of(model)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert weight[~mask.tensor()].abs().max() > 0
        mask.fold()
        mask.remove()
        assert weight[~mask.tensor()].abs().max() == 0
    assert torch.equal(logits_of(model), used)


def test_a_pruned_weight_neither_sets_the_scale_nor_leaves_zero() -> None:
    layer, x = nn.Linear(10, 6), torch.randn(4, 10)
    keep = torch.ones(6, 10, dtype=torch.bool)
    keep[2, 3] = keep[5, 1] = False
    with torch.no_grad():
        layer.weight[~keep] = 30.0
    zeroed = copy.deepcopy(layer)
    with torch.no_grad():
        zeroed.weight.mul_(keep)
    mask = ElementMask("layer", layer)
    mask.set_mask(keep)
    install_quantizers({"layer": layer, "zeroed": zeroed})
    attachment = attachment_of(layer)
    masked = attachment.weight_mask(layer.weight)
    used = attachment.weight_quantizer.fake_quantize(masked, None, attachment.weight_quantizer.prepare(masked, None))
    assert used[~keep].abs().max() == 0
    assert torch.equal(used, on_int8_grid(zeroed.weight))
    assert torch.equal(layer(x), zeroed(x))
    remove_fake_quantizers(layer)
    assert attachment.weight_mask is mask, "removing the quantizer took the mask along"


def test_with_a_gate_and_a_fake_quantizer_it_is_the_smaller_sparse_quantized_layer() -> None:
    big, x = nn.Linear(10, 6), torch.randn(4, 10)
    keep = half(big.weight)
    kept = torch.tensor([0, 1, 3, 4, 5, 6, 8, 9])
    with torch.no_grad():
        big.weight[:, 2] = 30.0
        x[:, 7] = 90.0
    small = nn.Linear(8, 6)
    small.load_state_dict({"weight": (big.weight * keep)[:, kept], "bias": big.bias})
    gate = torch.zeros(10).index_fill(0, kept, 1.0)
    attach("big", big).input_gates.append(lambda: gate)
    ElementMask("big", big).set_mask(keep)
    install_quantizers({"big": big, "small": small})
    # The sum over the inputs is taken in another order where there are fewer.
    torch.testing.assert_close(big(x), small(x[:, kept]), rtol=1e-6, atol=1e-6)


def test_state_dict_buffers_and_parameters_stay_as_they_are() -> None:
    model = tiny_models.bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers, classes = len(list(model.buffers())), [type(module) for module in model.modules()]
    masks = masked(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(list(model.buffers())) == buffers
    for mask in masks.values():
        mask.remove()
    assert [type(module) for module in model.modules()] == classes


def test_copies_and_pickles_are_masked_on_their_own() -> None:
    model = tiny_models.bert()
    masks = masked(model)
    before = logits_of(model)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(duplicate), before)
        for name in masks:
            mask = attachment_of(duplicate.get_submodule(name)).weight_mask
            mask.set_mask(torch.zeros_like(mask.tensor()))
        assert not torch.equal(logits_of(duplicate), before)
        assert torch.equal(logits_of(model), before)


def test_gradient_checkpointing_changes_no_bit() -> None:
    model = tiny_models.bert()
    masked(model)
    model.train()
    expected = gradients(model)
    model.gradient_checkpointing_enable()
    found = gradients(model)
    assert model.is_gradient_checkpointing
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_new_masks_reach_compiled_code_without_compiling_again() -> None:
    torch.compiler.reset()
    model = tiny_models.bert(num_hidden_layers=1)
    masks = masked(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    found = []
    for round in range(3):
        for mask in masks.values():
            mask.set_mask(half(mask.tensor()) ^ (round == 1))
        expected = gradients(model)
        found.append(gradients(compiled)["_orig_mod.bert.encoder.layer.0.output.dense.weight"])
        assert torch.equal(found[-1], expected["bert.encoder.layer.0.output.dense.weight"])
        if round == 0:
            first = len(graphs)
    assert len(graphs) == first > 0
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("init", [False, True], ids=["fresh", "trained"])
def test_a_lora_layer_is_masked_as_merging_will_leave_it(init) -> None:
    model = peft.get_peft_model(
        tiny_models.bert(), peft.LoraConfig(target_modules=["query"], init_lora_weights=not init)
    ).get_base_model()
    name = "bert.encoder.layer.0.attention.self.query"
    layer = model.get_submodule(name)
    merged = layer.weight + layer.get_delta_weight("default")
    mask = ElementMask(name, layer)
    mask.set_mask(half(layer.weight))
    x = torch.randn(3, 32)
    expected = nn.functional.linear(x, merged * mask.tensor(), layer.base_layer.bias)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.lora_B["default"].weight.grad is not None
    with pytest.raises(TargetError, match="Merge the adapter first"):
        mask.fold()
    layer.merge()
    assert torch.equal(layer(x), expected)
    mask.fold()
    mask.remove()
    assert torch.equal(layer.base_layer(x), expected)
    assert type(layer.base_layer) is nn.Linear


def test_lora_dropout_is_refused() -> None:
    model = peft.get_peft_model(tiny_models.bert(), peft.LoraConfig(target_modules=["query"], lora_dropout=0.1))
    with pytest.raises(TargetError, match="lora_dropout"):
        ElementMask("query", model.get_base_model().bert.encoder.layer[0].attention.self.query)


def test_parameters_of_experts_are_masked_while_their_module_runs() -> None:
    model = ZOO["mixtral"]()
    name, experts = next((n, m) for n, m in model.named_modules() if "gate_up_proj" in m._parameters)
    zeroed = copy.deepcopy(model)
    masks = [ElementMask(name, experts, each) for each in ("gate_up_proj", "down_proj")]
    plain = logits_of(model)
    for mask, parameter in zip(masks, ("gate_up_proj", "down_proj"), strict=True):
        keep = half(experts.get_parameter(parameter))
        mask.set_mask(keep)
        with torch.no_grad():
            zeroed.get_submodule(name).get_parameter(parameter).mul_(keep)
    assert torch.equal(logits_of(model), logits_of(zeroed))
    assert not torch.equal(logits_of(model), plain)
    model(**make_example_inputs(model)).logits.square().sum().backward()
    assert experts.down_proj.grad[~masks[1].tensor()].abs().max() == 0
    assert experts.down_proj.grad[masks[1].tensor()].abs().max() > 0
    with pytest.raises(TargetError, match="there is one already"):
        ElementMask(name, experts, "down_proj")
    for mask in masks:
        mask.fold()
        mask.remove()
    assert torch.equal(logits_of(model), logits_of(zeroed))
    assert type(experts) is type(zeroed.get_submodule(name))


def test_what_pytorch_attention_takes_from_its_output_projection_is_masked() -> None:
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    assert type(attention.out_proj) is NonDynamicallyQuantizableLinear
    with pytest.raises(TargetError, match=r"Mask 'out_proj\.weight' of the attention module"):
        ElementMask("attention.out_proj", attention.out_proj)
    zeroed = copy.deepcopy(attention)
    mask = ElementMask("attention", attention, "out_proj.weight")
    mask.set_mask(half(attention.out_proj.weight))
    with torch.no_grad():
        zeroed.out_proj.weight.mul_(mask.tensor())
    assert torch.equal(attention(x, x, x)[0], zeroed(x, x, x)[0])


def test_what_cannot_be_masked_raises_and_changes_nothing() -> None:
    layer = nn.Linear(6, 4, bias=False)
    with pytest.raises(TargetError, match=r"'layer.wight': there is no such parameter; 'layer' has \['weight'\]"):
        ElementMask("layer", layer, "wight")
    assert type(layer) is nn.Linear
    mask = ElementMask("layer", layer)
    with pytest.raises(TargetError, match="there is one already"):
        ElementMask("layer", layer)
    for wrong in (torch.ones(4, 6), torch.ones(6, 4, dtype=torch.bool)):
        with pytest.raises(TargetError, match=r"allowed: torch.bool \[4, 6\]"):
            mask.set_mask(wrong)
    assert mask.tensor().all()


def test_suspended_masks_do_nothing() -> None:
    model = tiny_models.bert()
    plain = logits_of(model)
    masked(model)
    with suspended(model):
        assert torch.equal(logits_of(model), plain)
    assert not torch.equal(logits_of(model), plain)


def test_a_masked_model_is_not_exported(tmp_path) -> None:
    pytest.importorskip("torchao")
    model = tiny_models.bert()
    name, module = next(iter(quantizable_layers(model).items()))
    ElementMask(name, module)
    with pytest.raises(ExportError, match="weight masks are attached"):
        export_quantized(model, tmp_path, verify=False)
