import copy
import math
from typing import Any

import pytest
import torch
import transformers
from head_models import HEADS, WITHOUT_LOSS, build, detr, encoder_decoder, llava
from tiny_models import ENCODER
from torch import Tensor, nn

from hf_compress import GraphError, make_example_inputs, make_labels
from hf_compress.graph.labels import IGNORED


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in tensors(a).items())


@pytest.mark.parametrize("name", HEADS)
def test_labels_give_a_finite_loss_with_gradients(name) -> None:
    model = build(HEADS[name])
    inputs = make_example_inputs(model)
    labels = make_labels(model, inputs)
    loss = model.train()(**inputs, **labels).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert math.isfinite(loss.item())
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) > len(list(model.parameters())) / 2


@pytest.mark.parametrize("name", WITHOUT_LOSS)
@torch.no_grad()
def test_models_without_loss_run_and_have_no_labels(name) -> None:
    model = build(WITHOUT_LOSS[name])
    inputs = make_example_inputs(model)
    assert len(model(**inputs)) > 0
    with pytest.raises(GraphError, match="no labels"):
        make_labels(model, inputs)


@torch.no_grad()
def test_detection_runs() -> None:
    model = build(detr)
    assert model(**make_example_inputs(model)).pred_boxes.shape == (2, 5, 4)


@pytest.mark.parametrize("name", ["classes", "choices", "bart", "llava", "voxtral", "ctc", "masked autoencoder"])
def test_same_seed_same_inputs_and_nothing_else_changes(name) -> None:
    model = build(HEADS[name]).train()
    model.get_submodule(next(n for n, _ in model.named_children())).eval()
    modes = [module.training for module in model.modules()]
    config, state = copy.deepcopy(model.config), torch.random.get_rng_state()
    first, second, other = (make_example_inputs(model, seed=seed) for seed in (3, 3, 4))
    first_labels, second_labels = (make_labels(model, first, seed=5) for _ in range(2))
    assert same(first, second)
    assert not same(first, other)
    assert same(first_labels, second_labels)
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert model.config.to_dict() == config.to_dict()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["classes", "choices", "bart", "llava", "vit", "qwen2-vl", "whisper", "ctc"])
@torch.no_grad()
def test_other_batch_sizes_and_lengths(name) -> None:
    model = build(HEADS[name])
    for batch_size, length in ((1, 5), (3, 8)):
        inputs = make_example_inputs(model, batch_size=batch_size, length=length)
        assert model(**inputs).logits.shape[0] == batch_size


def test_last_text_example_ends_in_padding() -> None:
    model = build(HEADS["causal"])
    model.config.pad_token_id = 7
    inputs = make_example_inputs(model)
    padded = inputs["input_ids"] == 7
    assert padded.sum(dim=1).tolist() == [0, 3]
    assert padded[1, -3:].all()
    assert torch.equal(inputs["attention_mask"] == 0, padded)
    labels = make_labels(model, inputs)["labels"]
    assert torch.equal(labels == IGNORED, padded)


def test_special_tokens_stand_where_heads_look_for_them_only() -> None:
    config = transformers.BartConfig(
        vocab_size=20, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=44, decoder_ffn_dim=44,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_start_token_id=6, forced_eos_token_id=None,
        mask_token_id=9, pad_token_id=1, bos_token_id=3, eos_token_id=5,
    )  # fmt: skip
    inputs = make_example_inputs(build(lambda: transformers.BartModel(config)), length=30)
    ids, decoder_ids = inputs["input_ids"], inputs["decoder_input_ids"]
    assert (ids == 5).nonzero().tolist() == [[0, 29], [1, 26]]
    assert (ids == 3).nonzero().tolist() == [[0, 0], [1, 0]]
    assert not (ids == 9).any()
    assert not (ids == 6).any()
    assert (decoder_ids == 6).nonzero().tolist() == [[0, 0], [1, 0]]


def test_separators_mark_the_question() -> None:
    config = transformers.LongformerConfig(**ENCODER, attention_window=4, sep_token_id=50, pad_token_id=0)
    inputs = make_example_inputs(build(lambda: transformers.LongformerModel(config)))
    assert (inputs["input_ids"] == 50).sum(dim=1).tolist() == [3, 3]


def test_tokens_fit_each_side_of_an_encoder_decoder() -> None:
    model = build(encoder_decoder)
    inputs = make_example_inputs(model, batch_size=8, length=20)
    assert inputs["decoder_input_ids"].max() < 53
    assert inputs["input_ids"].max() >= 53


def test_tokens_fit_a_vocabulary_that_is_smaller_than_the_config_says() -> None:
    model = build(HEADS["causal"])
    model.get_input_embeddings().num_embeddings = 10
    assert make_example_inputs(model, batch_size=8)["input_ids"].max() < 10


@pytest.mark.parametrize(("positions", "expected"), [(12, 10), (40, 11), (7, 5)])
def test_length_is_cut_to_the_positions(positions, expected) -> None:
    config = transformers.RobertaConfig(**{**ENCODER, "max_position_embeddings": positions})
    inputs = make_example_inputs(build(lambda: transformers.RobertaModel(config)))
    assert inputs["input_ids"].shape == (2, expected)


def test_a_large_padding_id_shifts_the_positions() -> None:
    config = transformers.RobertaConfig(**{**ENCODER, "max_position_embeddings": 14}, pad_token_id=5)
    model = build(lambda: transformers.RobertaModel(config))
    inputs = make_example_inputs(model)
    assert inputs["input_ids"].shape == (2, 8)
    model(**inputs)


def test_image_tokens_stand_for_the_image_only() -> None:
    model = build(llava)
    inputs = make_example_inputs(model)
    is_image = inputs["input_ids"] == 90
    assert is_image.sum(dim=1).tolist() == [16, 16]
    assert inputs["input_ids"].shape == (2, 11 + 16)
    assert (make_labels(model, inputs)["labels"][is_image] == IGNORED).all()


def test_image_is_left_out_with_a_warning_when_no_layout_fits() -> None:
    model = build(llava)
    model.config.vision_config.num_channels = 4
    with pytest.warns(UserWarning, match=r"LlavaForConditionalGeneration: no layout of pixel_values worked .*image"):
        inputs = make_example_inputs(model)
    assert "pixel_values" not in inputs
    assert not (inputs["input_ids"] == 90).any()  # no token stands for one
    model(**inputs)


def test_segments_and_choices() -> None:
    inputs = make_example_inputs(build(HEADS["choices"]))
    assert {name: tuple(value.shape) for name, value in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (2, 3, 11)
    )
    assert inputs["token_type_ids"].sum(dim=-1).eq(6).all()
    assert inputs["attention_mask"].sum(dim=-1).tolist() == [[11, 11, 11], [11, 11, 8]]


def test_masked_patches_are_as_many_in_each_example() -> None:
    masked = make_example_inputs(build(HEADS["masked video"]), batch_size=3)["bool_masked_pos"]
    assert masked.dtype == torch.bool
    assert len(set(masked.sum(dim=1).tolist())) == 1
    assert not torch.equal(masked[0], masked[1])


def test_dtype_of_the_model() -> None:
    model = build(HEADS["vit"]).to(torch.bfloat16)
    inputs = make_example_inputs(model)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert make_example_inputs(build(HEADS["llava"]).to(torch.float16))["input_ids"].dtype == torch.long
    labels = make_labels(build(HEADS["image regression"]).to(torch.bfloat16), inputs)["labels"]
    assert labels.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("classes", (2,), torch.long),
        ("regression", (2,), torch.float32),
        ("several classes", (2, 3), torch.float32),
        ("token classes", (2, 11), torch.long),
        ("segformer", (2, 96, 96), torch.long),
        ("wavlm frames", (2, 17, 3), torch.float32),
        ("vilt", (2, 5), torch.float32),
    ],
)
def test_kind_of_label(name, shape, dtype) -> None:
    model = build(HEADS[name])
    labels = make_labels(model, make_example_inputs(model))["labels"]
    assert (tuple(labels.shape), labels.dtype) == (shape, dtype)


def test_transcripts_hold_no_blank_and_fit_the_frames() -> None:
    model = build(HEADS["ctc"])
    inputs = make_example_inputs(model, batch_size=8)
    labels = make_labels(model, inputs)["labels"]
    assert not (labels == model.config.pad_token_id).any()
    assert (labels == IGNORED).nonzero().tolist() == [[7, labels.shape[1] - 1]]
    assert 1 < labels.shape[1] < model(**inputs).logits.shape[1]


def test_answers_start_before_they_end() -> None:
    model = build(HEADS["span"])
    labels = make_labels(model, make_example_inputs(model, batch_size=16))
    start, end = labels["start_positions"], labels["end_positions"]
    assert (start <= end).all()
    assert (end < 11).all()
    assert len(set(start.tolist())) > 1


def test_heads_with_a_loss_of_their_own_need_no_labels() -> None:
    model = build(HEADS["masked autoencoder"])
    assert make_labels(model, make_example_inputs(model)) == {}


def test_labels_leave_the_problem_type_open() -> None:
    model = build(HEADS["classes"])
    make_labels(model, make_example_inputs(model))
    assert model.config.problem_type is None


def test_no_config_raises() -> None:
    with pytest.raises(GraphError, match=r"Linear has no config .*pass example_inputs"):
        make_example_inputs(nn.Linear(2, 2))


def test_unknown_arguments_raise() -> None:
    class Odd(transformers.PreTrainedModel):
        config_class = transformers.PreTrainedConfig

        def __init__(self, config: transformers.PreTrainedConfig) -> None:
            super().__init__(config)
            self.layer = nn.Linear(2, 2)

        def forward(self, points: Tensor) -> Tensor:
            return self.layer(points)

    with pytest.raises(GraphError, match=r"Odd.forward takes none of .*input_ids.*pixel_values.*; pass example_inputs"):
        make_example_inputs(Odd(transformers.PreTrainedConfig()))
