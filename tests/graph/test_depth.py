"""Config fields that say how many layers there are."""

import pytest
import tiny_models
from transformers import T5Config, T5ForConditionalGeneration

import hf_compress.graph.depth as depth
from hf_compress.graph.depth import edited, find_shallower, integer_fields


def t5() -> T5ForConditionalGeneration:
    """As many layers on both sides, and as many heads."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "vocab_size": 30, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("make", "name", "field"),
    [
        (tiny_models.bart, "model.encoder.layers", "encoder_layers"),
        (tiny_models.bart, "model.decoder.layers", "decoder_layers"),
        (t5, "encoder.block", "num_layers"),
        (t5, "decoder.block", "num_decoder_layers"),
        (tiny_models.bert, "bert.encoder.layer", "num_hidden_layers"),
    ],
)
def test_the_number_of_layers_is_found(make, name, field) -> None:
    model = make()
    count = len(model.get_submodule(name))
    found = find_shallower(model, {name: range(1, count)})
    assert found is not None
    assert found.edits[(field,)] == count - 1
    assert len(found.model.get_submodule(name)) == count - 1
    assert {each.device.type for each in found.model.parameters()} == {"meta"}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_fields_that_sound_like_the_list_are_tried_first(side, monkeypatch) -> None:
    """Models take time to build."""
    model, built = tiny_models.bart(), []
    build = depth.build_empty
    monkeypatch.setattr(depth, "build_empty", lambda *args: built.append(args) or build(*args))
    assert find_shallower(model, {f"model.{side}.layers": range(1)}) is not None
    assert len(built) == 1


def test_lists_one_after_the_other() -> None:
    model = tiny_models.bart()
    found = find_shallower(model, {"model.encoder.layers": [0], "model.decoder.layers": [1]})
    assert found is not None
    assert (found.edits[("encoder_layers",)], found.edits[("decoder_layers",)]) == (1, 1)
    config = edited(model.config, found.edits)
    assert (config.encoder_layers, config.decoder_layers) == (1, 1)
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, 2)


def test_a_list_that_no_field_describes() -> None:
    model = tiny_models.bert()
    model.bert.encoder.layer.append(model.bert.encoder.layer[0])
    assert find_shallower(model, {"bert.encoder.layer": [0]}) is None


def test_fields_that_hold_a_number() -> None:
    config = T5Config(num_layers=3, num_decoder_layers=4, num_heads=3, eos_token_id=3)
    config.widths = [3, 5, 3]
    config.flags = [True, False]
    found = set(integer_fields(config, 3))
    assert {("num_layers",), ("num_heads",), ("widths", 0), ("widths", 2)} <= found
    assert ("num_decoder_layers",) not in found
    assert ("eos_token_id",) not in found
    assert not {path for path in integer_fields(config, 1) if path[0] == "flags"}
