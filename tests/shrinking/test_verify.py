"""What verification can see: the models here compute with a size that the graph does not see, so only it is left."""

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, PreTrainedModel

from hf_compress import ShrinkError, dimension_groups, shrink
from hf_compress.shrinking.verify import relative_error

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


class Sized(PreTrainedModel):
    """Divides by the number of its units, which Python's len() takes from a parameter."""

    config_class = BertConfig

    def __init__(self, how: str) -> None:
        super().__init__(BertConfig())
        torch.manual_seed(0)
        self.up, self.down, self.head, self.how = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4), how

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = F.relu(self.up(x))
        if self.how == "slightly":
            return {"logits": self.head(x + self.down(hidden) * (1 + 0.002 * len(self.up.bias)))}
        if self.how in ("barely", "rounding"):
            factor = 1 + 1e-5 * len(self.up.bias) if self.how == "barely" else 1
            size = len(self.up.bias)  # dividing and multiplying by it is nothing but rounding
            return {"logits": (self.head(self.down(hidden) / size * size) * 1000).sin() * factor}
        if self.how == "length" and x.shape[1] < 5:
            hidden = hidden.roll(1, -1)
        logits = (
            self.head(self.down(hidden)) if self.how == "length" else self.head(self.down(hidden) / len(self.up.bias))
        )
        if self.how == "forbidden":
            return {"logits": torch.cat([logits, torch.full_like(logits[..., :1], torch.finfo(x.dtype).min)], dim=-1)}
        if self.how == "constant":
            return {"logits": torch.cat([logits, torch.full_like(logits[..., :1], 1e6)], dim=-1)}
        return {"ids": (logits * 300).cos().argmax(-1)} if self.how == "integers" else {"logits": logits}


def cut(model: PreTrainedModel, x: torch.Tensor = X) -> PreTrainedModel:
    inputs = {"x": x.to(model.dtype)}
    (group,) = [g for g in dimension_groups(model, inputs) if g.num_units == 20 and g.frozen is None]
    return shrink(model, {group.name: torch.arange(20) < 13}, example_inputs=inputs)


@pytest.mark.parametrize("how", ["plain", "forbidden", "constant"])
def test_constants_among_the_outputs_hide_nothing(how) -> None:
    with pytest.raises(ShrinkError, match="differs from the masked one"):
        cut(Sized(how))


def test_low_precision_is_verified_in_full_precision() -> None:
    """The error of one percent is within the rounding of bfloat16 outputs."""
    with pytest.raises(ShrinkError, match="differs from the masked one"):
        cut(Sized("slightly").to(torch.bfloat16))


def test_rounding_that_a_model_amplifies_is_no_error_but_small_errors_are() -> None:
    """Both differ by less than 1e-3 and by more than 1e-5; in float64 only one does."""
    small = cut(Sized("rounding"))
    masked = Sized("rounding")
    with torch.no_grad():
        masked.down.weight[:, 13:] = 0
        error = relative_error(masked(X)["logits"], small(X)["logits"])
    assert 1e-5 < error < 1e-3
    with pytest.raises(ShrinkError, match="differs from the masked one"):
        cut(Sized("barely"))


def test_a_lower_precision_model_stays_one() -> None:
    model = tiny_models.bert().to(torch.bfloat16)
    small = shrink(model, {"bert.encoder.layer.0.ffn": torch.arange(44) < 20})
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_own_inputs_are_also_cut_shorter() -> None:
    with pytest.raises(ShrinkError, match="differs from the masked one"):
        cut(Sized("length"))


def test_integers_are_compared_where_there_is_nothing_else() -> None:
    with pytest.raises(ShrinkError, match="differs from the masked one"):
        cut(Sized("integers"))


def test_outputs_that_say_nothing_verify_nothing() -> None:
    model = tiny_models.bert()
    mask = {"bert.encoder.layer.0.ffn": torch.arange(44) < 20}
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[3] = float("nan")
    with pytest.raises(ShrinkError, match="none is finite"):
        shrink(model, mask)
    assert shrink(model, mask, verify=False).num_parameters() < model.num_parameters()


def test_the_scale_of_errors_is_that_of_what_differs() -> None:
    a = torch.tensor([1.0, 2.0, -1e30])
    assert relative_error(a, a + torch.tensor([0.5, 0, 0])) == 0.25
    assert relative_error(a, a.clone()) == 0
    assert relative_error(a, torch.tensor([1.0, 2.0, float("-inf")])) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
