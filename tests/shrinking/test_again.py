"""Shrinking what was shrunk before, and loaded again in between: in any order, as often as one likes."""

from typing import Any

import pytest
import tiny_models
import torch
from masked_models import Masks, other_inputs, outputs, prunable, random_masks
from transformers import AutoConfig, BertForSequenceClassification, GenerationMixin, PreTrainedModel
from uneven_models import load_in_fresh_process, logits
from zoo import ZOO, Tiny

from hf_compress import PruningCallback, PruningConfig, ShrinkError, cli, dimension_groups, plan_shrink, profile, shrink
from hf_compress.export.quantized import export_quantized
from hf_compress.export.skeleton import build_skeleton
from hf_compress.graph.capture import main_outputs
from hf_compress.graph.groups import DimensionGroup
from hf_compress.shrinking.depth import renamed
from hf_compress.shrinking.verify import relative_error

KINDS = ("heads", "ffn", "hidden", "layers")
ORDERS = (KINDS, ("layers", "hidden", "ffn", "heads"), ("ffn", "layers", "heads", "hidden"))
OFTEN = ("bert", "llama", "t5", "gpt2", "vit")
"""The families of the default suite."""


def entries(chosen: tuple[str, ...] = OFTEN) -> list[Any]:
    marks = {name: () if name in chosen else (pytest.mark.slow,) for name in ZOO}
    return [pytest.param(entry, id=name, marks=marks[name]) for name, entry in ZOO.items()]


def through_disk(model: PreTrainedModel, folder: Any) -> PreTrainedModel:
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for parameter in loaded.parameters():  # loaded ones lie at odd addresses, where some kernels round otherwise
        parameter.data = parameter.data.clone()
    return loaded.eval()


def find_group(model: PreTrainedModel, inputs: Any, kind: str, where: tuple[str, int] | str) -> DimensionGroup:
    """Return the group of a kind that has a parameter's dimension, or the list of layers of that name."""
    (found,) = (
        group
        for group in prunable(dimension_groups(model, inputs), kind)
        if group.name == where or where in {(part.parameter, part.dim) for part in group.slices}
    )
    return found


def difference(a: PreTrainedModel, b: PreTrainedModel, inputs: dict[str, Any]) -> float:
    return max(relative_error(x, y) for x, y in zip(outputs(a, inputs), outputs(b, inputs), strict=True))


def same_weights(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("entry", entries())
def test_one_kind_after_the_other_is_all_at_once(entry: Tiny, order: tuple[str, ...], tmp_path) -> None:
    """Weights bit for bit, whichever comes first; what is saved loads again as it was."""
    dense = entry()
    inputs = entry.example_inputs(dense)
    groups = prunable(dimension_groups(dense, inputs), *KINDS)
    masks = {name: mask for name, mask in random_masks(groups, seed=3, lose=True).items() if not mask.all()}
    once = shrink(dense, masks, example_inputs=inputs)
    small, layers = dense, {}
    for step, kind in enumerate(order):
        now: Masks = {}
        gone = {}
        for group in groups:
            if group.name not in masks or group.kind != kind:
                continue
            where: Any = group.name
            if group.modules:
                gone[group.modules[0].rpartition(".")[0]] = masks[group.name].nonzero().flatten().tolist()
            else:
                left = ((renamed(part.parameter, layers), part.dim) for part in group.slices)
                where = next(((name, dim) for name, dim in left if name is not None), None)
            if where is not None:
                now[find_group(small, inputs, kind, where).name] = masks[group.name]
        if now:
            small = through_disk(shrink(small, now, example_inputs=inputs), tmp_path / str(step))
        layers |= gone
    assert same_weights(small, once)
    given = other_inputs(entry, dense)
    assert difference(small, once, given) <= 1e-5
    assert gradient_difference(small, once, given) <= 1e-4
    if isinstance(small, GenerationMixin) and small.can_generate() and "input_ids" in given:
        prompt = {key: value for key, value in given.items() if key not in ("use_cache", "decoder_input_ids")}
        expected = written(once, prompt, use_cache=False)
        assert torch.equal(written(small, prompt, use_cache=True), expected)
        assert torch.equal(written(small, prompt, cache_implementation="static"), expected)


def gradient_difference(a: PreTrainedModel, b: PreTrainedModel, inputs: dict[str, Any]) -> float:
    """Compare the gradients of all parameters that learn in ``b``, each relative to its largest.

    Transformers makes frozen tables (Whisper's positions) trainable when it loads a model.
    """
    found = []
    for model in (a, b):
        model.zero_grad()
        results = [t for t in main_outputs(model(**inputs)) if t.requires_grad]
        torch.stack([result.square().sum() for result in results]).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() >= found[1].keys()
    return max(relative_error(found[0][name], found[1][name]) for name in found[1])


@torch.no_grad()
def written(model: PreTrainedModel, prompt: dict[str, Any], **options: Any) -> torch.Tensor:
    """Return greedy tokens, [batch, length]."""
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    return model.generate(**prompt, **settings, **options)


def harsh_masks(groups: list[DimensionGroup], seed: int) -> Masks:
    """Take everything from some groups that may lose everything, and half of residual streams.

    SigLIP's pooling head, emptied, and Whisper with two channels could not be built again, dense or not.
    """
    masks = random_masks(groups, seed, lose=True)
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        may_be_empty = group.min_units == 0 and not group.name.startswith("vision_model.head")
        if group.kind == "hidden":
            masks[group.name] = torch.arange(group.num_units) % 2 == 0
        elif may_be_empty and torch.rand(1, generator=generator) < 0.3:
            masks[group.name] = torch.zeros(group.num_units, dtype=torch.bool)
    return masks


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("entry", entries(("bert", "gpt2", "llama")))
def test_the_same_groups_twice_lose_what_both_masks_say(entry: Tiny, seed: int, tmp_path) -> None:
    """Blocks without units and groups of one unit included, which are no groups any more."""
    depth = next((key for key in ("num_hidden_layers", "n_layer") if key in entry.sizes), None)
    dense = entry(**({depth: 3} if depth and "layer_types" not in entry.sizes else {}))
    inputs = entry.example_inputs(dense)
    groups = prunable(dimension_groups(dense, inputs), "heads", "ffn", "hidden")
    first = harsh_masks(groups, seed)
    small = through_disk(shrink(dense, first, example_inputs=inputs), tmp_path / "small")
    left = prunable(dimension_groups(small, inputs), *KINDS)
    # Of one key-value head, the queries are heads of their own now, and values may look like an ffn.
    left = [g for g in left if g.modules or (g.name in first and g.num_units == int(first[g.name].sum()))]
    second = harsh_masks(left, seed + 100)
    both = {name: mask.clone() for name, mask in first.items()}
    for name, mask in second.items():
        if name in first:
            both[name] = torch.zeros_like(first[name])
            both[name][first[name].nonzero().flatten()[mask]] = True
        else:
            both[name] = mask
    twice, once = shrink(small, second, example_inputs=inputs), shrink(dense, both, example_inputs=inputs)
    assert same_weights(twice, once)
    assert difference(twice, once, other_inputs(entry, dense)) <= 1e-5
    assert difference(through_disk(twice, tmp_path / "twice"), twice, other_inputs(entry, dense)) == 0


HEADS = [f"bert.encoder.layer.{i}.attention.heads" for i in range(2)]


def kept(*flags: int) -> torch.Tensor:
    return torch.tensor(flags, dtype=torch.bool)


def test_sizes_that_become_even_need_no_loader(tmp_path) -> None:
    """The config is compared with what is left of its own sizes, not with the last ones."""
    uneven = shrink(tiny_models.bert(), {HEADS[0]: kept(1, 1, 1, 0), HEADS[1]: kept(1, 1, 0, 0)})
    assert uneven.config.quantization_config["units"] == {
        HEADS[0]: {"kept": 3, "of": 4},
        HEADS[1]: {"kept": 2, "of": 4},
    }
    again = shrink(through_disk(uneven, tmp_path / "uneven"), {HEADS[0]: kept(0, 1, 1)})
    facts = again.config.quantization_config["units"]
    assert facts == {HEADS[0]: {"kept": 2, "of": 4}, HEADS[1]: {"kept": 2, "of": 4}}

    widths = [f"bert.encoder.layer.{i}.ffn" for i in range(2)]
    half = torch.arange(44) < 22
    one = shrink(tiny_models.bert(), {widths[0]: half})
    both = shrink(one, {widths[1]: half})
    assert hasattr(one.config, "quantization_config")
    assert not hasattr(both.config, "quantization_config")
    assert both.config.intermediate_size == 22
    both.save_pretrained(tmp_path / "even")
    assert BertForSequenceClassification.from_pretrained(tmp_path / "even").num_parameters() == both.num_parameters()


def test_sizes_that_cannot_become_the_same_are_refused() -> None:
    """Layers with a single head, which are no group any more, too."""
    for first in (kept(1, 1, 0, 0), kept(1, 0, 0, 0)):
        small = shrink(tiny_models.bert(), {HEADS[0]: first})
        with pytest.raises(ShrinkError, match=r"asks for 3 units .*'heads', but an earlier shrink has left"):
            shrink(small, {HEADS[1]: kept(1, 1, 1, 0)}, uniform=True)
        even = shrink(small, {HEADS[1]: first}, uniform=True)
        assert {layer.attention.self.query.out_features for layer in even.bert.encoder.layer} == {8 * int(first.sum())}


def test_facts_follow_layers_that_move_up(tmp_path) -> None:
    small = shrink(tiny_models.bert(), {HEADS[0]: kept(1, 0, 0, 0), HEADS[1]: kept(1, 1, 0, 1)})
    shallow = shrink(small, {"bert.encoder.layer.layers": kept(0, 1)})
    units = shallow.config.quantization_config["units"]
    assert units[HEADS[0]] == {"kept": 3, "of": 4}
    assert HEADS[1] not in units
    assert same_weights(through_disk(shallow, tmp_path), shallow)


def test_a_fresh_process_loads_what_was_shrunk_three_times(tmp_path) -> None:
    model = tiny_models.bert()
    for step in range(3):
        groups = prunable(dimension_groups(model), "heads", "ffn", "hidden")
        masks = random_masks(groups, step)
        masks = {n: m | (torch.arange(len(m)) % 4 != step) for n, m in masks.items()}  # not too much at once
        model = through_disk(shrink(model, masks), tmp_path / str(step))
    (loaded,), _ = load_in_fresh_process([tmp_path / "2"], tmp_path, plugin=True)
    assert torch.equal(loaded, logits(model))


def test_it_generates_without_an_attention_block(tmp_path) -> None:
    """Places in the cache close up after blocks and layers went in different shrinks."""
    model = ZOO["llama"](num_hidden_layers=4, pad_token_id=0)
    small = shrink(model, {"model.layers.1.self_attn.heads": kept(0, 0)})
    small = through_disk(small, tmp_path / "emptied")
    small = through_disk(shrink(small, {"model.layers": kept(0, 1, 1, 1)}), tmp_path / "shallow")
    places = [layer.self_attn.layer_idx for layer in small.model.layers[1:]]
    assert places == [0, 1]
    prompt = {"input_ids": torch.arange(5, 17).view(2, 6)}
    cached, plain = (written(small, prompt, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_mask_token_that_is_read_in_training_alone_goes_along_twice() -> None:
    model = ZOO["dinov2"]()
    for size in (24, 16):
        (group,) = prunable(dimension_groups(model), "hidden")
        model = shrink(model, {group.name: torch.arange(group.num_units) < size})
        assert model.dinov2.embeddings.mask_token.shape[-1] == size


def test_a_callback_prunes_what_was_shrunk(tiny_bert, classification_data, make_trainer, tmp_path) -> None:
    model = shrink(tiny_bert(), {HEADS[0]: kept(1, 1, 1, 0), HEADS[1]: kept(0, 0, 0, 0)})
    model = through_disk(model, tmp_path / "small")
    config = PruningConfig(structures={"heads": 0.3, "ffn": 0.5}, begin=0, end=2, update_every=1)
    trainer = make_trainer(model, classification_data(), [PruningCallback(config)])
    trainer.train()
    small = shrink(trainer)
    assert small.bert.encoder.layer[0].attention.self.query.weight.shape[0] == 16
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6)}
    assert difference(through_disk(small, tmp_path / "again"), small, inputs) == 0


def test_groups_and_profile_are_those_of_the_smaller_model(tmp_path, capsys) -> None:
    """From its config alone, too, where a block is without heads."""
    (hidden,) = prunable(dimension_groups(tiny_models.bert()), "hidden")
    masks = {HEADS[0]: kept(1, 0, 1, 0), HEADS[1]: kept(0, 0, 0, 0), hidden.name: torch.arange(32) < 20}
    small = shrink(tiny_models.bert(), masks)
    small.save_pretrained(tmp_path)
    skeleton = build_skeleton(AutoConfig.from_pretrained(tmp_path), BertForSequenceClassification)
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (small, skeleton)]
    assert shapes[0] == shapes[1]
    assert names(skeleton) == names(small)
    assert HEADS[1] not in names(small)
    assert profile(small, latency=False).parameters == small.num_parameters()
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "shrunk before" in capsys.readouterr().out


def names(model: PreTrainedModel) -> dict[str, int]:
    return {group.name: group.num_units for group in dimension_groups(model)}


def test_plans_count_what_is_left() -> None:
    small = shrink(tiny_models.bert(), {HEADS[0]: kept(1, 1, 1, 0)})
    plan = plan_shrink(small, {HEADS[0]: kept(1, 0, 0)})
    assert plan.groups[HEADS[0]].num_units == 3
    assert plan.num_parameters == (small.num_parameters(), shrink(small, {HEADS[0]: kept(1, 0, 0)}).num_parameters())


def test_integer_weights_are_refused(tmp_path) -> None:
    pytest.importorskip("torchao")
    small = shrink(tiny_models.bert(), {HEADS[0]: kept(1, 1, 1, 0)})
    export_quantized(small, tmp_path, verify=False)
    with pytest.raises(ShrinkError, match=r"quantized already.*torchao"):
        shrink(BertForSequenceClassification.from_pretrained(tmp_path), {HEADS[0]: kept(1, 1, 0)})
