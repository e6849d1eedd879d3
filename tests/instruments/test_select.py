"""Which single weights a config covers, on models where some cannot be masked."""

import warnings

import pytest
import torch
from zoo import ALL, ZOO

from hf_compress import PruningConfig, TargetError, make_example_inputs
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.pruner import Pruner
from hf_compress.instruments.select import select


def config_of(**settings) -> PruningConfig:
    return PruningConfig(**{"structures": {"weights": 0.5}, "criterion": "l1", **settings})


def names_of(model, **settings) -> set[str]:
    (found,) = select(model, ModelGraph(model, None).groups, config_of(**settings))
    return {name for name, _ in found.modules}


def logits(model):
    with torch.no_grad():
        return model.eval()(**make_example_inputs(model)).logits


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_layers_whose_weight_other_modules_read_are_left_out(name) -> None:
    """Nothing would mask them while training, but they would be zero afterwards."""
    model = ALL[name]()
    with pytest.warns(UserWarning, match=r"'weights' does not reach .*mixer\.conv1d\.weight'"):
        pruner = Pruner(model, ModelGraph(model), config_of(begin=0, end=1, update_every=1), 2)
    assert pruner.masks
    assert not any("conv1d" in each or "dt_proj" in each for each in pruner.masks)
    dense = logits(model)
    pruner.update(1)
    masked = logits(model)
    assert not torch.equal(masked, dense)
    pruner.fold()
    assert torch.equal(logits(model), masked)


def test_matrices_that_masks_do_not_reach_are_told() -> None:
    model = ZOO["mixtral"]()
    sizes = {name: each.numel() for name, each in model.model.named_parameters() if each.dim() > 1}
    total = sum(size for name, size in sizes.items() if "embed" not in name)
    missing = sum(size for name, size in sizes.items() if "experts" in name or "gate." in name)
    expected = rf"does not reach {missing:,} of the {total:,} weights .*\({missing / total:.1%}\): '.*' and 3 more"
    with pytest.warns(UserWarning, match=expected) as caught:
        assert names_of(model)
    assert len(caught) == 1
    assert "experts.gate_up_proj" in str(caught[0].message)


def test_matrices_that_exclude_names_are_not_told() -> None:
    model = ZOO["mixtral"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_of(model, exclude=(r"\.experts\.", r"mlp\.gate\.weight$"))
    with pytest.raises(TargetError, match="'expert_' matches no"):
        names_of(model, exclude=("expert_",))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5", "swin", "deberta_v2"])
def test_nothing_is_told_where_everything_but_embeddings_is_covered(name) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_of(ZOO[name]())


def test_weights_that_are_computed_from_others_are_left_out() -> None:
    """Weight norm; wav2vec2's positional convolution has it."""
    with pytest.warns(UserWarning, match=r"not reach .*: 'wav2vec2\.encoder\.pos_conv_embed\.conv\.weight'\. Only"):
        names = names_of(ZOO["wav2vec2"]())
    assert names and "wav2vec2.encoder.pos_conv_embed.conv" not in names


def test_matrices_that_are_reshaped_before_they_are_used_are_told() -> None:
    """XLNet's projections have a dimension for heads."""
    with pytest.warns(UserWarning, match=r"'transformer\.layer\.0\.rel_attn\.q', .*rel_attn\.k', "):
        assert names_of(ALL["xlnet"]())


def test_what_pytorch_attention_takes_is_left_out() -> None:
    with pytest.warns(UserWarning, match=r"attention\.in_proj_weight', '.*attention\.out_proj\.weight'\. Only"):
        assert not any("head.attention" in name for name in names_of(ZOO["siglip"]()))
