"""Layers are updated one after the other: each on what it is given once all before it are pruned.

What comes after a layer does not change its inputs, so that the inputs in the final model say what each update saw.
"""

from typing import Any

import pytest
import torch
from oneshot_models import batches, for_language, gram_of_inputs, prune, trained

from hf_compress import PruningConfig, dimension_groups
from hf_compress.pruning.obs import Consumer, inverse_hessian, removal_order, sparsegpt, without_units


def data_for(kind: str) -> list[Any]:
    return batches(3) if kind == "bert" else for_language(batches(3))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("allocation", ["global", "per_layer"])
def test_units(kind: str, allocation: str) -> None:
    model, dense, data = trained(kind), trained(kind), data_for(kind)
    config = PruningConfig(structures={"heads": 0.5, "ffn": 0.5}, allocation=allocation)
    result = prune(model, data, config, criterion="obs", options={"damping": 0.02})
    for group in dimension_groups(dense):
        if group.name not in result.masks:
            continue
        (reader,) = group.gates
        inverse = inverse_hessian(gram_of_inputs(model, reader.module, data), 0.02)
        consumer = Consumer(dense.get_parameter(reader.parameter).detach(), inverse, reader.index)
        mask = result.masks[group.name]
        gone = (~mask).nonzero().flatten()
        assert sorted(removal_order([consumer], len(gone)).order.tolist()) == gone.tolist()
        expected = without_units(consumer, gone)
        torch.testing.assert_close(model.get_parameter(reader.parameter).detach(), expected, rtol=1e-3, atol=1e-4)
    lost = {name: int((~mask).sum()) for name, mask in result.masks.items() if name.endswith("ffn")}
    assert sum(lost.values()) == 64
    assert (len(set(lost.values())) == 1) == (allocation == "per_layer")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_single_weights(kind: str) -> None:
    model, dense, data = trained(kind), trained(kind), data_for(kind)
    config = PruningConfig(structures={"heads": 0.5}, allocation="per_layer")
    result = prune(model, data, config, structures={"weights": 0.5}, criterion="obs", options={"block_size": 16})
    names = [name for name in result.weight_masks if "pooler" not in name]
    assert len(names) >= 12
    for name in names:
        inverse = inverse_hessian(gram_of_inputs(model, name.removesuffix(".weight"), data))
        expected, mask = sparsegpt(dense.get_parameter(name).detach(), inverse, sparsity=0.5, block_size=16)
        assert float((mask == result.weight_masks[name]).float().mean()) > 0.99  # rounding may decide between equals
        same = (mask == result.weight_masks[name]).all(1)
        torch.testing.assert_close(model.get_parameter(name).detach()[same], expected[same], rtol=1e-2, atol=1e-3)
