"""Numbers that code makes from sizes and keeps for itself: the loaded model must compute with the same ones."""

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from uneven_models import logits
from zoo import ZOO

from hf_compress import ShrinkError, dimension_groups, shrink
from hf_compress.shrinking import shrink as shrink_module


class ScaledLlama(LlamaForCausalLM):
    """Scales by the width that it was built with, wherever that is kept."""

    keep = staticmethod(lambda width: width**-0.5)
    use = staticmethod(lambda kept, hidden: hidden * kept)

    def __init__(self, config):
        super().__init__(config)
        self._kept = self.keep(config.hidden_size)

    def forward(self, input_ids=None, attention_mask=None, **_):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(self.use(self._kept, hidden)))


PLACES = {
    "number": (lambda width: width**-0.5, lambda kept, hidden: hidden * kept),
    "list": (lambda width: [width**-0.5], lambda kept, hidden: hidden * kept[0]),
    "tensor": (lambda width: torch.tensor(width**-0.5, device="cpu"), lambda kept, hidden: hidden * kept),
    "closure": (lambda width: lambda hidden: hidden * width**-0.5, lambda kept, hidden: kept(hidden)),
    "flag": (lambda width: width > 30, lambda kept, hidden: hidden * 2 if kept else hidden),
}


def make(place: str):
    keep, use = PLACES[place]
    scaled = type("Scaled", (ScaledLlama,), {"keep": staticmethod(keep), "use": staticmethod(use)})
    torch.manual_seed(0)
    model = scaled(ZOO["llama"]().config).eval()
    (hidden,) = [g for g in dimension_groups(model) if g.kind == "hidden"]
    return model, {hidden.name: torch.arange(hidden.num_units) % 4 != 1}


@pytest.mark.parametrize("place", PLACES)
def test_a_model_loaded_again_computes_the_same(place: str, tmp_path) -> None:
    model, masks = make(place)
    small = shrink(model, masks)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(small))


def test_a_plain_model_of_these_sizes_is_stock() -> None:
    """What is above needs the uneven form because of the number alone."""
    model = ZOO["llama"]()
    _, masks = make("number")
    small = shrink(model, masks)
    assert small.config.hidden_size == small.lm_head.in_features < model.config.hidden_size
    assert getattr(small.config, "quantization_config", None) is None
    uneven = shrink(*make("number"))
    assert uneven.config.quantization_config["quant_method"] == "hf_compress"


def test_what_no_config_can_say_is_refused(monkeypatch) -> None:
    model, masks = make("number")
    monkeypatch.setattr(shrink_module, "reload_check", lambda *_: lambda config: False)
    with pytest.raises(ShrinkError, match="loaded again, the result would fail or compute something else"):
        shrink(model, masks)
