"""PyTorch's attention with a forward of its own: the same numbers, and sizes from the parameters."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_compress.graph.multihead import FlexibleMultiheadAttention, can_loosen, loosen, loosened

QUERIES, KEYS, SIZE, HEADS = 3, 5, 12, 4
PADDING = torch.tensor([[False, False, False, True, True], [False, True, False, False, False]])
CAUSAL = torch.ones(QUERIES, KEYS).triu(1).bool()
PER_HEAD = torch.linspace(-1, 1, 2 * HEADS * QUERIES * KEYS).view(2 * HEADS, QUERIES, KEYS)
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL},
    "both": {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    "added": {"attn_mask": PER_HEAD[0], "key_padding_mask": torch.where(PADDING, -2.0, 1.0)},
    "per head": {"attn_mask": PER_HEAD},
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"batch_first": True},
    "length first": {},
    "without bias": {"bias": False, "batch_first": True},
    "other sizes": {"kdim": 6, "vdim": 10, "batch_first": True},
}


def attention(**form: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(SIZE, HEADS, **form).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module


def inputs(form: dict[str, Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((QUERIES, SIZE), (KEYS, form.get("kdim", SIZE)), (KEYS, form.get("vdim", SIZE)))
    made = [torch.randn(2, *size, generator=generator) for size in sizes]
    return made if form.get("batch_first") else [x.transpose(0, 1) for x in made]


def same(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("form", "mask"), itertools.product(FORMS, MASKS))
@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
def test_it_computes_what_pytorch_does(form, mask, weights) -> None:
    module, given = attention(**FORMS[form]), inputs(FORMS[form])
    expected = module(*given, **MASKS[mask], **weights)
    with loosened([module]):
        assert type(module) is FlexibleMultiheadAttention
        same(module(*given, **MASKS[mask], **weights), expected)
    assert type(module) is nn.MultiheadAttention and not hasattr(module, "scaling")


@pytest.mark.parametrize("form", FORMS)
def test_examples_without_a_batch(form) -> None:
    module, axis = attention(**FORMS[form]), 0 if FORMS[form].get("batch_first") else 1
    given = [x.select(axis, 0) for x in inputs(FORMS[form])]
    masks: dict[str, Tensor] = {"key_padding_mask": PADDING[0]}
    expected = [module(*given, **masks, need_weights=flag) for flag in (True, False)]
    loosen(module)
    for flag, result in zip((True, False), expected, strict=True):
        same(module(*given, **masks, need_weights=flag), result)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_alone(need_weights) -> None:
    module, given = attention(dropout=0.5, batch_first=True), inputs({"batch_first": True})
    loosen(module)
    evaluated = module(*given, need_weights=need_weights)[0]
    assert torch.equal(module(*given, need_weights=need_weights)[0], evaluated)
    module.train()
    first, second = (module(*given, need_weights=need_weights)[0] for _ in range(2))
    assert not torch.equal(first, second) and not torch.equal(first, evaluated)


def test_heads_may_go() -> None:
    """Without the first two of four heads it computes what the whole one does with their part of the output at 0."""
    module, given = attention(batch_first=True), inputs({"batch_first": True})
    loosen(module)
    kept = torch.arange(SIZE // 2, SIZE)
    whole = attention(batch_first=True)
    with torch.no_grad():
        whole.out_proj.weight[:, : SIZE // 2] = 0
    expected = whole(*given, need_weights=False)[0]
    rows = torch.cat([kept, kept + SIZE, kept + 2 * SIZE])
    module.in_proj_weight = nn.Parameter(module.in_proj_weight[rows])
    module.in_proj_bias = nn.Parameter(module.in_proj_bias[rows])
    module.out_proj.weight = nn.Parameter(module.out_proj.weight[:, kept])
    module.num_heads = HEADS // 2
    torch.testing.assert_close(module(*given, need_weights=False)[0], expected)


class Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return None


@pytest.mark.parametrize(
    "module",
    [attention(add_bias_kv=True), attention(add_zero_attn=True), nn.Linear(2, 2), Own(SIZE, HEADS)],
    ids=["bias", "zero", "another", "own"],
)
def test_other_forms_are_left_alone(module) -> None:
    own = type(module)
    assert not can_loosen(module)
    with loosened([module]):
        assert type(module) is own
    loosen(module)
    assert type(module) is own


def test_a_missing_bias_is_none() -> None:
    module = attention()
    module.bias_k = None
    assert can_loosen(module)
    module.bias_v = nn.Parameter(torch.zeros(1, 1, SIZE))
    assert not can_loosen(module)
