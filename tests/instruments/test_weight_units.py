"""Single weights as units of one layer."""

import pytest
import torch
from torch import nn

from hf_compress import PruningConfig
from hf_compress.instruments.weight_cut import WeightCut
from hf_compress.instruments.weight_units import WeightUnits
from hf_compress.pruning.allocate import achieved_sparsity, allocate
from hf_compress.pruning.method import Setting
from hf_compress.registry import criteria


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["one", "groups", "depthwise"])
def test_wanda_multiplies_each_weight_by_the_norm_of_its_own_channel(groups, granularity) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 8, 3, groups=groups), torch.randn(2, 4, 5, 5)
    method = criteria.get("wanda")(criteria.get("wanda").options(), Setting(score_decay=0.0))
    config = PruningConfig(structures={"weights": 0.5}, criterion="wanda", granularity=granularity)
    units = WeightUnits("layer", layer, config, method)
    assert units.blank()["activations"].shape == (5,)
    layer.train()(x)
    units.evidence.give(units.take())
    method.step("layer", units.evidence)
    norms = x.square().mean(dim=(0, 2, 3)).sqrt()
    expected = layer.weight.detach().abs().clone()
    for output in range(8):
        first = output // (8 // groups) * (4 // groups)
        expected[output] *= norms[first : first + 4 // groups, None, None]
    rows = expected.reshape(8, -1)
    wanted = {"element": rows.reshape(-1), "row": rows.sum(1), "column": rows.sum(0)}[granularity]
    torch.testing.assert_close(method.score("layer", units.evidence), wanted)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
def test_a_layer_of_small_weights_keeps_what_min_units_says(granularity) -> None:
    blocks = {"block_size": (4, 4)} if granularity == "block" else {}
    layers, scores = {}, {}
    for name, size in {"small": 1e-4, "large": 1.0}.items():
        config = PruningConfig(structures={"weights": 0.5}, criterion="level", granularity=granularity, **blocks)
        cut = WeightCut(name, torch.Size([8, 8]), 1, config)
        layers[name], scores[name] = cut.limits(config), torch.full((cut.num_units,), size)
    masks = allocate(scores, 0.5, layers, "global")
    assert int(masks["small"].sum()) == 1
    assert achieved_sparsity(masks, layers) == pytest.approx(0.5)


@pytest.mark.parametrize("granularity", ["element", "row", "block"])
def test_level_is_the_mean_over_the_weights_of_a_block_at_the_edge_too(granularity) -> None:
    blocks = {"block_size": (4, 4)} if granularity == "block" else {}
    layer = nn.Linear(6, 6)
    nn.init.constant_(layer.weight, -2.0)
    config = PruningConfig(structures={"weights": 0.5}, criterion="level", granularity=granularity, **blocks)
    method = criteria.get("level")(criteria.get("level").options(), Setting())
    scores = method.score("layer", WeightUnits("layer", layer, config, method).evidence)
    torch.testing.assert_close(scores, torch.full_like(scores, 2.0))
