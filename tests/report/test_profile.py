"""Counts are checked against numbers worked out by hand."""

import itertools

import pytest
import tiny_models
import torch
from torch import nn

from hf_compress.errors import ConfigError, GraphError
from hf_compress.report.profile import (
    ModelProfile,
    _flops,
    _peak_memory,
    file_bytes,
    layer_stacks,
    profile,
    weight_bytes,
)

HIDDEN, FFN, LAYERS, VOCAB, POSITIONS, TYPES, LABELS = 32, 44, 2, 97, 40, 2, 3


class Chain(nn.Module):
    """Linear layers on an input ``x``, nothing else."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_parameters_of_a_bert() -> None:
    found = profile(tiny_models.bert(), latency=False)
    attention = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN
    feed_forward = 2 * HIDDEN * FFN + FFN + HIDDEN + 2 * HIDDEN
    tables = (VOCAB + POSITIONS + TYPES) * HIDDEN
    pooler_and_head = HIDDEN * HIDDEN + HIDDEN + HIDDEN * LABELS + LABELS
    assert found.encoder_parameters == LAYERS * (attention + feed_forward)
    assert found.embedding_parameters == tables
    assert found.parameters == LAYERS * (attention + feed_forward) + tables + 2 * HIDDEN + pooler_and_head
    assert found.bytes_on_disk == 4 * found.parameters
    assert found.latency_ms is None
    assert found.model_class == "BertForSequenceClassification"


def test_operations_of_a_bert_include_attention() -> None:
    batch, length = 2, 11
    inputs = {"input_ids": torch.randint(1, VOCAB, (batch, length))}
    found = profile(tiny_models.bert(), inputs, latency=False)
    tokens = batch * length
    linears = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN) * tokens
    attention = LAYERS * 2 * batch * length * length * HIDDEN
    head = batch * (HIDDEN * HIDDEN + HIDDEN * LABELS)
    assert found.flops == 2 * (linears + attention + head)
    assert found.inputs == {"input_ids": (batch, length)}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_operations_do_not_depend_on_the_attention_kernel(implementation: str) -> None:
    model = tiny_models.bert()
    model.set_attn_implementation(implementation)
    assert profile(model, latency=False).flops == profile(tiny_models.bert(), latency=False).flops


@pytest.mark.parametrize(
    ("make", "stacks"),
    [
        (tiny_models.bert, ["bert.encoder.layer"]),
        (tiny_models.distilbert, ["distilbert.transformer.layer"]),
        (tiny_models.albert, ["albert.encoder.albert_layer_groups"]),
        (tiny_models.gpt2, ["transformer.h"]),
        (tiny_models.llama, ["model.layers"]),
        (tiny_models.mixtral, ["model.layers"]),
        (tiny_models.t5, ["encoder.block", "decoder.block"]),
        (tiny_models.bart, ["model.encoder.layers", "model.decoder.layers"]),
        (tiny_models.vit, ["vit.layers"]),
    ],
)
def test_the_encoder_is_the_stacks_of_layers(make, stacks: list[str]) -> None:
    model = make()
    assert list(layer_stacks(model)) == stacks
    expected = sum(p.numel() for stack in stacks for p in model.get_submodule(stack).parameters())
    assert profile(model, latency=False).encoder_parameters == expected


def test_lists_of_plain_layers_are_no_encoder() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
            self.empty = nn.ModuleList()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(head(x) for head in self.heads)

    found = profile(Heads(), {"x": torch.ones(1, 4)}, latency=False)
    assert found.encoder_parameters is None
    assert "none found" in str(found)


def test_tied_weights_count_once() -> None:
    tied, untied = tiny_models.gpt2(), tiny_models.gpt2()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.clone())
    extra = untied.lm_head.weight.numel()
    a, b = profile(tied, latency=False), profile(untied, latency=False)
    assert b.parameters - a.parameters == extra
    assert b.bytes_on_disk - a.bytes_on_disk == 4 * extra


def test_weights_on_disk_match_the_saved_file(tmp_path) -> None:
    model = tiny_models.gpt2()
    model.save_pretrained(tmp_path)
    found = profile(model, latency=False, directory=tmp_path)
    assert found.measured_bytes == (tmp_path / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert found.measured_bytes == found.bytes_on_disk + 8 + header


def test_half_precision_halves_the_bytes() -> None:
    model = tiny_models.bert()
    assert 2 * weight_bytes(model.to(torch.bfloat16)) == weight_bytes(tiny_models.bert())


def test_int8_weights_count_as_integers_and_scales_and_their_products_as_operations() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    dense, integer = Chain(64, 32, 16).eval(), Chain(64, 32, 16).eval()
    quantization.quantize_(integer, quantization.Int8DynamicActivationInt8WeightConfig())
    assert weight_bytes(dense) == 4 * (64 * 32 + 32 * 16)
    zero_points = sum(w.zero_point.numel() for w in integer.parameters() if w.zero_point is not None)
    assert weight_bytes(integer) == (64 * 32 + 32 * 16) + 4 * (32 + 16) + zero_points
    inputs = {"x": torch.ones(5, 64)}
    with torch.no_grad():
        assert _flops(integer, inputs) == _flops(dense, inputs) == 2 * 5 * (64 * 32 + 32 * 16)


def test_peak_memory_is_the_largest_sum_of_live_tensors() -> None:
    model = Chain(10, 1000, 20, 30)
    inputs = {"x": torch.ones(7, 10)}
    weights = 4 * (10 * 1000 + 1000 * 20 + 20 * 30)
    with torch.no_grad():
        # The widest moment: weights, input, [7, 1000] and [7, 20]; the [7, 30] comes after the [7, 1000] is gone.
        assert _peak_memory(model, inputs) == weights + 4 * 7 * (10 + 1000 + 20)


def test_peak_memory_does_not_count_views_twice() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(100))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).view(10, 10).t()[:5]

    with torch.no_grad():
        assert _peak_memory(Views(), {"x": torch.ones(100)}) == 4 * 300


def test_the_model_stays_as_it_was() -> None:
    model = tiny_models.bert()
    model.bert.encoder.train()
    before = {name: (module.training, type(module)) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    profile(model)
    assert before == {name: (module.training, type(module)) for name, module in model.named_modules()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_latency_is_measured_and_the_profile_round_trips() -> None:
    found = profile(tiny_models.bert())
    assert found.latency_ms is not None
    assert found.latency_ms > 0
    assert ModelProfile.from_dict(found.to_dict()) == found
    assert f"{found.latency_ms:.2f} ms" in str(found)


def test_damaged_profiles_are_refused() -> None:
    data = profile(tiny_models.bert(), latency=False).to_dict()
    with pytest.raises(ConfigError, match="'flops'"):
        ModelProfile.from_dict({name: value for name, value in data.items() if name != "flops"})


def test_inputs_that_do_not_fit_are_an_error_of_our_own() -> None:
    with pytest.raises(GraphError, match=r"Chain.forward failed.*\(2, 9\).*example_inputs"):
        profile(Chain(10, 4), {"x": torch.ones(2, 9)}, latency=False)


def test_a_folder_without_weights_is_an_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no weight files"):
        file_bytes(tmp_path)
