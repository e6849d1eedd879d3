"""Shrunk models reload in every way in which dense ones do."""

import json

import pytest
import tiny_models
import torch
import transformers
from masked_models import prunable, random_masks
from transformers import AutoModel, GenerationConfig
from uneven_models import load_in_fresh_process, logits
from zoo import ZOO
from zoo.base import ENCODER, VISION, randomize

from hf_compress import dimension_groups, make_example_inputs, shrink
from hf_compress.shrinking.sizes import tensor_shapes

BERT = [
    "ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForPreTraining",
]  # fmt: skip
ROBERTA = ["ForSequenceClassification", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForCausalLM"]
GPT2 = ["LMHeadModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
VIT = ["ForImageClassification", "ForMaskedImageModeling"]
SMALL_GPT2 = {**ZOO["gpt2"].sizes, "pad_token_id": 0}
HEADS = [
    *(("Bert", head, ENCODER) for head in BERT),
    *(("Roberta", head, ENCODER) for head in ROBERTA),
    *(("GPT2", head, SMALL_GPT2) for head in GPT2),
    *(("ViT", head, {**VISION, "encoder_stride": 4}) for head in VIT),
]


def small(model, *kinds, seed=1, **options):
    groups = prunable(dimension_groups(model), *kinds)
    return shrink(model, random_masks(groups, seed, lose=True), **options)


def build(family, head, sizes):
    model_class = getattr(transformers, family + head)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomize(model_class(model_class.config_class(**sizes)))


def same(a, b) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kinds", [("heads", "ffn", "layers"), ("heads", "ffn", "hidden")], ids="-".join)
@pytest.mark.parametrize(("family", "head", "sizes"), HEADS, ids=[family + head for family, head, _ in HEADS])
def test_heads(family, head, sizes, kinds, tmp_path) -> None:
    """With its head, without it, and with a new one, which fits whatever is left of the model under it."""
    model = small(build(family, head, sizes), *kinds)
    model.save_pretrained(tmp_path / "head")
    assert same(type(model).from_pretrained(tmp_path / "head"), model)
    base = AutoModel.from_pretrained(tmp_path / "head")
    kept = model.base_model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items() if name in kept)
    base.save_pretrained(tmp_path / "base")
    again, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] or head in ("LMHeadModel",)  # its head is tied to the embeddings
    assert tensor_shapes(again) == tensor_shapes(model)
    inputs = make_example_inputs(again)
    assert all(torch.isfinite(t).all() for t in again(**inputs).to_tuple() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "siglip", "mixtral", "llama"])
def test_ways_to_load(name, tmp_path) -> None:
    model = small(ZOO[name]())
    assert model.config.quantization_config["quant_method"] == "hf_compress"
    model.save_pretrained(tmp_path / "shards", max_shard_size="1KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}):
        assert same(type(model).from_pretrained(tmp_path / "shards", **options), model), options
    for dtype in (torch.bfloat16, torch.float16):
        loaded = type(model).from_pretrained(tmp_path / "shards", dtype=dtype)
        assert loaded.dtype == dtype
        full = model.state_dict()  # T5 keeps some weights in full precision
        assert all(torch.equal(tensor, full[key].to(tensor.dtype)) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart", "opt"])
def test_tied_weights_stay_tied_and_generation_settings_stay(name, tmp_path) -> None:
    model = small(ZOO[name]())
    model.generation_config = GenerationConfig(max_new_tokens=7, temperature=0.5, do_sample=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.generation_config.max_new_tokens == 7 and loaded.generation_config.temperature == 0.5


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert", {"num_hidden_layers": 1}),
        ("gemma3", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
        ("t5", {"num_layers": 1, "num_decoder_layers": 1}),
        ("bart", {"encoder_layers": 1, "decoder_layers": 1}),
    ],
)
def test_depth_is_stock(name, fields, tmp_path) -> None:
    """The first layer of each list goes: T5's position bias moves, layer types follow."""
    model = ZOO[name]()
    layers = prunable(dimension_groups(model), "layers")
    result = shrink(model, {group.name: torch.tensor([False, True]) for group in layers})
    result.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {key: stored[key] for key in fields} == fields
    assert "quantization_config" not in stored
    assert same(type(model).from_pretrained(tmp_path), result)


def test_without_this_package_stock_sizes_load_and_others_fail(tmp_path) -> None:
    model = tiny_models.bert()
    groups = dimension_groups(model)
    masks = {
        "uniform": {group.name: torch.arange(44) % 2 > 0 for group in prunable(groups, "ffn")},
        "shallow": {group.name: torch.tensor([False, True]) for group in prunable(groups, "layers")},
    }
    stock = {name: shrink(model, each, uniform=True) for name, each in masks.items()}
    uneven = {kind: small(model, kind) for kind in ("heads", "ffn", "hidden", "head_dim", "other")}
    for name, result in (stock | uneven).items():
        result.save_pretrained(tmp_path / name)
    results, _ = load_in_fresh_process([tmp_path / name for name in stock | uneven], tmp_path, plugin=False)
    for result, expected in zip(results, stock.values(), strict=False):
        assert torch.equal(result, logits(expected))
    assert all(isinstance(error, str) and error.startswith("RuntimeError") for error in results[len(stock) :])


def test_a_new_head_with_inputs_of_its_own_fits(tmp_path) -> None:
    """Multiple choice takes several rows an example."""
    base = small(tiny_models.bert(), "hidden", "ffn").base_model
    base.save_pretrained(tmp_path)
    model = transformers.BertForMultipleChoice.from_pretrained(tmp_path)
    assert model.bert.pooler.dense.weight.shape[1] == base.embeddings.word_embeddings.weight.shape[1] < 32
    assert model(input_ids=torch.ones(2, 3, 5, dtype=torch.long)).logits.shape == (2, 3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [120, 60])
def test_embeddings_resized_after_shrinking_come_back(size, tied, tmp_path) -> None:
    model = small(ZOO["llama"](tie_word_embeddings=tied), "heads", "ffn", "hidden")
    assert model.config.quantization_config["quant_method"] == "hf_compress"
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "first")
    again = type(model).from_pretrained(tmp_path / "first")
    assert again.lm_head.weight.shape[0] == size
    assert same(model, again)
    again.resize_token_embeddings(70)
    again.save_pretrained(tmp_path / "second")
    assert same(again, type(model).from_pretrained(tmp_path / "second"))


def test_a_head_of_the_same_name_but_other_inputs_is_not_taken(tmp_path) -> None:
    """One classifier reads the pooler, the other the hidden states, which are fewer now."""
    small(tiny_models.bert(), "hidden", "ffn").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.BertForTokenClassification.from_pretrained(tmp_path)
    model = transformers.BertForTokenClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.classifier.in_features == model.bert.embeddings.word_embeddings.embedding_dim < 32
    assert model(input_ids=torch.ones(2, 5, dtype=torch.long)).logits.shape[:2] == (2, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_in_memory_stays_stock(dtype) -> None:
    """Casting rounds the rotary frequencies too, which a loaded model makes anew in float32."""
    model = small(ZOO["llama"]().to(dtype), "ffn", uniform=True)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.intermediate_size == model.model.layers[0].mlp.up_proj.out_features


def test_a_new_head_on_fewer_heads_keeps_the_channels_of_each(tmp_path) -> None:
    """Query rows are heads times channels; norms over the channels of one head stay whole."""
    model = small(ZOO["qwen3"](), "heads", "hidden")
    model.save_pretrained(tmp_path)
    again = transformers.Qwen3ForSequenceClassification.from_pretrained(tmp_path)
    assert again.score.in_features == model.lm_head.in_features < ZOO["qwen3"].sizes["hidden_size"]
    ours = model.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.model.state_dict().items())
