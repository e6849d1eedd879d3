"""Law 2: logits of the masked model equal those of the shrunk one, for random masks, whatever the architecture."""

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_compress import dimension_groups, make_example_inputs, shrink
from hf_compress.graph.capture import main_outputs
from hf_compress.instruments.attach import detach_all
from hf_compress.instruments.gate import Gate

BOTH = ("heads", "ffn")
CASES = [
    (tiny_models.bert, BOTH),
    (tiny_models.bert_mlm, BOTH),
    (tiny_models.roberta, BOTH),
    (tiny_models.distilbert, BOTH),
    (tiny_models.albert, BOTH),
    (tiny_models.electra, BOTH),
    (tiny_models.mpnet, BOTH),
    (tiny_models.deberta_v2, BOTH),
    (tiny_models.modernbert, BOTH),
    (tiny_models.gpt2, BOTH),
    (tiny_models.gpt_neox, BOTH),
    (tiny_models.opt, BOTH),
    (tiny_models.llama, BOTH),
    (tiny_models.phi3, BOTH),
    (tiny_models.mixtral, ("heads",)),
    (tiny_models.bart, BOTH),
    (tiny_models.t5, BOTH),
    (tiny_models.vit, BOTH),
]


def random_masks(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for group in groups:
        mask = torch.rand(group.num_units, generator=generator) < torch.rand(1, generator=generator)
        mask[torch.randint(group.num_units, (1,), generator=generator)] = True
        masks[group.name] = mask
    return masks


@torch.no_grad()
def outputs(model, inputs):
    return [t for t in main_outputs(model(**inputs)) if t.is_floating_point()]


@pytest.mark.parametrize(("build", "kinds"), CASES, ids=lambda value: getattr(value, "__name__", None))
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_masked_equals_shrunk(build, kinds, seed) -> None:
    model = build()
    groups = [g for g in dimension_groups(model) if g.kind in kinds and g.frozen is None]
    masks = random_masks(groups, seed)
    if all(mask.all() for mask in masks.values()):
        return
    small = shrink(model, masks)
    for group in groups:
        Gate(group, model, needs_gradient=False).set_mask(masks[group.name])
    inputs = make_example_inputs(model, batch_size=3, length=7, seed=seed)
    for masked, shrunk in zip(outputs(model, inputs), outputs(small, inputs), strict=True):
        assert tiny_models.relative_error(masked, shrunk) < 1e-5
    detach_all(model)
    removed = sum(int((~masks[g.name]).sum()) * g.parameters_per_unit for g in groups)
    assert model.num_parameters() - small.num_parameters() == removed
