import json

import pytest
import tiny_models
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BertModel,
)
from uneven_models import (
    HEADS,
    WIDTHS,
    example_ids,
    files,
    logits,
    uneven_bert,
)

from hf_compress.errors import ExportError
from hf_compress.export.pretrained import CompressedConfig, is_uneven, resize_parameters
from hf_compress.graph.model import dimension_groups
from hf_compress.shrinking.shrink import shrink
from hf_compress.shrinking.sizes import tensor_shapes


@pytest.fixture
def saved(tmp_path):
    """An uneven model and its folder."""
    model = uneven_bert()
    model.save_pretrained(tmp_path / "small")
    return model, tmp_path / "small"


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored["quantization_config"].update(changes)
    path.write_text(json.dumps(stored))


def test_reloaded_logits_are_bit_identical(saved) -> None:
    model, folder = saved
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert tensor_shapes(reloaded) == tensor_shapes(model)
    assert torch.equal(logits(reloaded), logits(model))


def test_saved_again_it_is_the_same_bytes(saved, tmp_path) -> None:
    reloaded = BertForSequenceClassification.from_pretrained(saved[1])
    reloaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(saved[1])


def test_the_config_stays_stock_but_for_the_sizes(saved) -> None:
    stored = json.loads((saved[1] / "config.json").read_text())
    section = stored.pop("quantization_config")
    assert stored["model_type"] == "bert"
    assert stored["intermediate_size"] == tiny_models.ENCODER["intermediate_size"]
    assert section.keys() == {"quant_method", "version", "units", "shapes"}
    assert section["units"] == {"bert.encoder.layer.0.attention.heads": {"kept": 3, "of": 4}}
    assert section["shapes"]["bert.encoder.layer.1.intermediate.dense.weight"] == [30, 32]
    assert not any("LayerNorm" in name or "classifier" in name for name in section["shapes"])


def test_modules_know_their_sizes(saved) -> None:
    reloaded = BertForSequenceClassification.from_pretrained(saved[1])
    for layer, heads, width in zip(reloaded.bert.encoder.layer, HEADS, WIDTHS, strict=True):
        assert layer.attention.self.query.out_features == heads * 8
        assert layer.attention.output.dense.in_features == heads * 8
        assert (layer.intermediate.dense.out_features, layer.output.dense.in_features) == (width, width)


def test_afterwards_it_is_an_ordinary_model(saved, classification_data, make_trainer) -> None:
    reloaded = BertForSequenceClassification.from_pretrained(saved[1])
    assert not getattr(reloaded, "is_quantized", False)
    assert not hasattr(reloaded, "quantization_method")
    assert getattr(reloaded, "hf_quantizer", None) is None
    assert not hasattr(reloaded.config, "_is_quantized")
    assert reloaded.half().dtype == torch.float16
    reloaded.float()
    before = {name: tensor.clone() for name, tensor in reloaded.state_dict().items()}
    make_trainer(reloaded, classification_data(), max_steps=2).train()
    assert all(not torch.equal(p, before[n]) for n, p in reloaded.named_parameters() if "key.bias" not in n)


def test_after_training_it_saves_and_loads_like_before(saved, classification_data, make_trainer, tmp_path) -> None:
    reloaded = BertForSequenceClassification.from_pretrained(saved[1])
    trainer = make_trainer(reloaded, classification_data(), max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    again = BertForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(again), logits(reloaded))
    resumed = make_trainer(BertForSequenceClassification.from_pretrained(saved[1]), classification_data(), max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(resumed.model), logits(reloaded))


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"attn_implementation": "eager"}]
)
def test_loading_options(saved, options) -> None:
    model, folder = saved
    reloaded = BertForSequenceClassification.from_pretrained(folder, **options)
    assert reloaded.dtype == options.get("dtype", torch.float32)
    tolerance = 0.05 if "dtype" in options else 1e-5
    assert tiny_models.relative_error(logits(model), logits(reloaded).float()) < tolerance


def test_the_base_model_loads_from_a_checkpoint_with_a_head_and_back(saved, tmp_path) -> None:
    model, folder = saved
    base = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = model.bert(example_ids()).last_hidden_state
        assert torch.equal(base(example_ids()).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    names = json.loads((tmp_path / "base" / "config.json").read_text())["quantization_config"]["shapes"]
    assert names.keys() <= base.state_dict().keys()
    again = BertModel.from_pretrained(tmp_path / "base")
    with_head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again(example_ids()).last_hidden_state, expected)
        assert torch.equal(with_head.bert(example_ids()).last_hidden_state, expected)


def test_another_head_loads(saved) -> None:
    model, folder = saved
    other = AutoModelForTokenClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = model.bert(example_ids()).last_hidden_state
        assert torch.equal(other.bert(example_ids()).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "vit", "llama", "gpt2", "t5", "bart"])
def test_uneven_feed_forward_layers_of_any_architecture(name, tmp_path) -> None:
    model = getattr(tiny_models, name)()
    groups = [g for g in dimension_groups(model) if g.kind == "ffn" and g.frozen is None]
    masks = {g.name: torch.arange(g.num_units) < g.num_units - 3 - index for index, g in enumerate(groups)}
    small = shrink(model, masks)
    assert is_uneven(small)
    small.save_pretrained(tmp_path / "small")
    reloaded, info = type(small).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())
    assert tensor_shapes(reloaded) == tensor_shapes(small)
    states = small.state_dict(), reloaded.state_dict()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    reloaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "small")


BROKEN = {
    "a parameter that does not exist": (
        {"shapes": {"bert.encoder.layer.7.output.dense.weight": [32, 3]}},
        "no parameter",
    ),
    "another rank": ({"shapes": {"bert.encoder.layer.0.output.dense.weight": [32]}}, r"has shape \[32\]"),
    "larger than the config": (
        {"shapes": {"bert.encoder.layer.0.output.dense.weight": [32, 45]}},
        "only become smaller",
    ),
    "no shapes": ({"shapes": {}}, "non-empty mapping"),
    "shapes that are none": ({"shapes": {"bert.encoder.layer.0.output.dense.weight": [32, -1]}}, "non-empty mapping"),
    "a list of shapes": ({"shapes": [1, 2]}, "non-empty mapping"),
    "a newer version": ({"version": 2}, "version 2; this hf-compress reads version 1. Upgrade"),
    "an unknown key": ({"groups": 3}, r"unknown keys \['groups'\]"),
    "an unknown inner format": (
        {"inner": {"quant_method": "torcha"}},
        "unknown format 'torcha'; closest match: 'torchao'",
    ),
    "an inner format without a name": ({"inner": {}}, "unknown format None"),
}


@pytest.mark.parametrize(("changes", "message"), list(BROKEN.values()), ids=list(BROKEN))
def test_a_config_that_does_not_fit_raises(changes, message, saved) -> None:
    edit_config(saved[1], **changes)
    with pytest.raises(ExportError, match=message):
        BertForSequenceClassification.from_pretrained(saved[1])


def test_weights_that_do_not_fit_raise(saved) -> None:
    shapes = json.loads((saved[1] / "config.json").read_text())["quantization_config"]["shapes"]
    shapes["bert.encoder.layer.0.intermediate.dense.bias"] = [11]
    edit_config(saved[1], shapes=shapes)
    with pytest.raises((RuntimeError, ExportError), match=r"mismatch|the checkpoint has shape"):
        BertForSequenceClassification.from_pretrained(saved[1])


def test_tied_parameters_stay_one_when_resized() -> None:
    embedding, output = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    model = tiny_models.bert_mlm()
    assert resize_parameters(model, {embedding: [90, 32], output: [90, 32]}).keys() == {embedding, output}
    assert model.get_parameter(embedding) is model.get_parameter(output)
    assert model.get_parameter(embedding).shape == (90, 32)
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == 90
    with pytest.raises(ExportError, match=r"'cls\.predictions\.decoder\.weight' is tied, but its names differ"):
        resize_parameters(tiny_models.bert_mlm(), {embedding: [90, 32], output: [80, 32]})


def test_a_model_is_uneven_if_its_config_says_so() -> None:
    assert not is_uneven(tiny_models.bert())
    assert is_uneven(uneven_bert())


def test_the_config_object_survives_a_round_trip() -> None:
    section = uneven_bert().config.quantization_config
    assert CompressedConfig.from_dict(section).to_dict() == section
    section["inner"] = {"quant_method": "torchao"}
    assert CompressedConfig.from_dict(section).to_dict() == section
