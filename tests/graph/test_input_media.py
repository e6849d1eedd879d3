"""Layouts of images, sounds, series and the like, by what signature and config say."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_facts import facts
from torch import Tensor
from transformers import PreTrainedConfig

from hf_compress.graph.input_facts import MAX_TOKEN_ID, ModelFacts
from hf_compress.graph.input_media import (
    SIMPLE_MAKERS,
    Inputs,
    audio_variants,
    feature_rows,
    image_size,
    image_variants,
    patch_count,
    series_variants,
)

FRAMES = 104  # divided by 4 or 8 no size that models use
ENCODED_FRAMES = 19
SIDE = 96  # a multiple of 32, which hierarchical models divide by


def shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in inputs.items()}


def test_a_plain_image_comes_first_then_several_per_example() -> None:
    variants = [shapes(each) for each in image_variants(facts("pixel_values", image_size=8, num_channels=1))]
    assert variants == [{"pixel_values": (2, *more, 1, 8, 8)} for more in ((), (1,), (2,))]
    assert list(image_variants(facts("input_ids"))) == []
    colors = next(image_variants(facts("pixel_values", image_size=8)))
    assert shapes(colors) == {"pixel_values": (2, 3, 8, 8)}
    assert not torch.equal(colors["pixel_values"][0], colors["pixel_values"][1])


def test_videos() -> None:
    (video,) = image_variants(facts("pixel_values_videos", image_size=8))
    assert shapes(video) == {"pixel_values_videos": (2, 2, 3, 8, 8)}
    (video,) = image_variants(facts("pixel_values_videos", image_size=8, frames_per_clip=5))
    assert shapes(video) == {"pixel_values_videos": (2, 5, 3, 8, 8)}
    first, second, *_ = image_variants(facts("pixel_values", "pixel_values_videos?", image_size=8, num_frames=4))
    assert shapes(first) == {"pixel_values": (2, 4, 3, 8, 8)}
    assert shapes(second) == {"pixel_values": (2, 3, 8, 8)}


def test_an_image_of_tiles_and_its_size() -> None:
    both = facts("pixel_values", "image_sizes?", image_size=8, image_grid_pinpoints=[[32, 16], [16, 24], [64, 64]])
    tiles, plain, sized, *_ = image_variants(both)
    assert shapes(tiles) == {"pixel_values": (2, 2 * 3 + 1, 3, 8, 8), "image_sizes": (2, 2)}
    assert tiles["image_sizes"].tolist() == [[16, 24]] * 2
    assert shapes(plain) == {"pixel_values": (2, 3, 8, 8)}
    assert torch.equal(sized["pixel_values"], plain["pixel_values"])
    assert sized["image_sizes"].tolist() == [[8, 8]] * 2
    small = facts("pixel_values", "image_sizes?", image_size=8, image_grid_pinpoints=[[4, 4]])
    assert shapes(next(image_variants(small)))["pixel_values"] == (2, 2, 3, 8, 8)
    without = facts("pixel_values", image_size=8, image_grid_pinpoints=[[16, 24]])
    assert shapes(next(image_variants(without))) == {"pixel_values": (2, 3, 8, 8)}


def test_tiles_in_use_are_marked() -> None:
    first = next(image_variants(facts("pixel_values", "aspect_ratio_ids", image_size=8, max_num_tiles=3)))
    assert shapes(first) == {
        "pixel_values": (2, 1, 3, 3, 8, 8), "aspect_ratio_ids": (2, 1), "aspect_ratio_mask": (2, 1, 3)
    }  # fmt: skip
    assert first["aspect_ratio_ids"].tolist() == [[1], [1]]
    assert first["aspect_ratio_mask"].tolist() == [[[1, 0, 0]]] * 2
    alone = next(image_variants(facts("pixel_values", "aspect_ratio_ids", image_size=8)))
    assert shapes(alone)["pixel_values"] == (2, 1, 1, 3, 8, 8)


def test_masks_of_pixels() -> None:
    variants = list(image_variants(facts("pixel_values", "pixel_attention_mask?", image_size=[8, 6])))
    assert [shapes(each) for each in variants] == [
        {"pixel_values": (2, 3, 8, 6)},
        {"pixel_values": (2, 1, 3, 8, 6), "pixel_attention_mask": (2, 1, 8, 6)},
        {"pixel_values": (2, 1, 3, 8, 6)},
        {"pixel_values": (2, 2, 3, 8, 6)},
    ]
    assert variants[1]["pixel_attention_mask"].eq(1).all()
    assert variants[1]["pixel_attention_mask"].dtype == torch.long


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_size": 8}, (8, 8)),
        ({"img_size": (8, 6)}, (8, 6)),
        ({"input_size": {"height": 4, "width": 10}}, (4, 10)),
        ({"image_size": {"longest_edge": 4}}, (SIDE, SIDE)),
        ({"image_size": [8, 8, 8], "patch_size": 10}, (90, 90)),
        ({"image_size": [8, 2.5], "patch_size": 200}, (200, 200)),
        ({}, (SIDE, SIDE)),
        ({"image_size": 7, "vision_config": PreTrainedConfig(image_size=9)}, (9, 9)),
    ],
)
def test_sizes_of_images(config, expected) -> None:
    assert image_size(facts("pixel_values", **config)) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_size": (8, 12), "patch_size": 4}, 2 * 3),
        ({"image_size": (8, 12), "patch_size": (2, 6)}, 4 * 2),
        ({"image_size": 8, "patch_size": 4, "num_frames": 6, "tubelet_size": 2}, 4 * 3),
        ({"image_size": 8, "patch_size": 4, "num_frames": 6}, 4),
        ({"image_size": 8, "patch_size": 4, "tubelet_size": 2}, 4),
    ],
)
def test_numbers_of_patches(config, expected) -> None:
    assert patch_count(facts("pixel_values", **config)) == expected


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("hidden_states", "grid_thw"), ("hidden_states", "grid_thw")),
        (("pixel_values?", "image_grid_thw?"), ("pixel_values", "image_grid_thw")),
    ],
)
def test_rows_of_patches_come_flat_or_square_with_their_grid(arguments, names) -> None:
    config = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 1}
    flat, square, batched, *_ = image_variants(facts(*arguments, **config))
    rows = 2 * (2 * 2) * (3 * 2)
    assert shapes(flat) == {names[0]: (rows, 1 * 2 * 4 * 4), names[1]: (2, 3)}
    assert flat[names[1]].tolist() == [[1, 4, 6]] * 2
    assert shapes(square) == {names[0]: (rows, 1, 4, 4), names[1]: (2, 3)}
    assert torch.equal(square[names[0]].flatten(), flat[names[0]].flatten()[: square[names[0]].numel()])
    assert torch.equal(batched[names[0]], square[names[0]][None])
    default = next(image_variants(facts(*arguments)))
    assert shapes(default) == {names[0]: (2 * 2 * 3, 3 * 14 * 14), names[1]: (2, 3)}


def test_sequences_of_patches_come_with_height_and_width() -> None:
    given = facts("pixel_values", "spatial_shapes", "pixel_attention_mask", patch_size=4, downsample_factor=2)
    first = next(image_variants(given))
    assert shapes(first) == {
        "pixel_values": (2, 24, 3 * 16), "spatial_shapes": (2, 2), "pixel_attention_mask": (2, 24)
    }  # fmt: skip
    assert first["spatial_shapes"].tolist() == [[4, 6]] * 2
    assert first["pixel_attention_mask"].eq(1).all()
    assert first["pixel_attention_mask"].dtype == torch.long
    without = next(image_variants(facts("pixel_values", "spatial_shapes", num_channels=1)))
    assert shapes(without) == {"pixel_values": (2, 6, 16 * 16), "spatial_shapes": (2, 2)}


def test_spectrograms_by_time_or_by_frequency_first() -> None:
    variants = [shapes(each) for each in audio_variants(facts("input_features", num_mel_bins=20))]
    assert variants == [
        {"input_features": shape} for shape in ((2, FRAMES, 20), (2, 20, FRAMES), (2, 1, FRAMES, 20))
    ]  # fmt: skip
    (first, *_) = audio_variants(facts("input_features", n_window=7))
    assert shapes(first) == {"input_features": (2, 14, 80)}
    first, second, third = audio_variants(facts("input_features", num_mel_bins=20, max_source_positions=15))
    assert [shapes(each)["input_features"] for each in (first, second, third)] == [
        (2, 20, 30), (2, FRAMES, 20), (2, 1, FRAMES, 20)
    ]  # fmt: skip
    assert list(audio_variants(facts("input_ids"))) == []


def test_masks_are_as_long_as_the_sound() -> None:
    given = facts("input_features", "attention_mask?", "input_features_mask?", num_mel_bins=20, n_window=4)
    variants = list(audio_variants(given))
    assert [len(each) for each in variants] == [3, 1] * 3
    for each in variants[::2]:
        for name in ("attention_mask", "input_features_mask"):
            assert torch.equal(each[name], torch.ones(2, 8, dtype=torch.long))
    required = list(audio_variants(facts("input_features", "feature_attention_mask", num_mel_bins=20)))
    assert [set(each) for each in required] == [{"input_features", "feature_attention_mask"}] * 3
    of_text = list(audio_variants(facts("input_features", "input_ids", "attention_mask?", num_mel_bins=20)))
    assert [set(each) for each in of_text] == [{"input_features"}] * 3
    (waveform, *_) = audio_variants(facts("input_values", "padding_mask?", conv_stride=[5, 4]))
    assert torch.equal(waveform["padding_mask"], torch.ones(2, 20 * ENCODED_FRAMES, dtype=torch.long))


def test_waveforms_are_long_enough_for_what_convolutions_leave() -> None:
    def lengths(**config: Any) -> list[tuple[int, ...]]:
        return [tuple(each["input_values"].shape) for each in audio_variants(facts("input_values", **config))]

    assert lengths(conv_stride=[5, 4]) == [(2, 20 * ENCODED_FRAMES), (2, 1, 20 * ENCODED_FRAMES)]
    assert lengths() == [(2, 320 * ENCODED_FRAMES), (2, 1, 320 * ENCODED_FRAMES)]
    assert lengths(conv_stride=[5, 4], mask_time_length=30)[0] == (2, 20 * 33)
    assert lengths(upsampling_ratios=[2, 3], audio_channels=2) == [(2, 2, 6 * ENCODED_FRAMES), (2, 6 * ENCODED_FRAMES)]


def test_spectrograms_under_the_name_of_waveforms() -> None:
    sizes = {"num_mel_bins": 24, "max_length": 40, "patch_size": 8}
    assert [shapes(each) for each in audio_variants(facts("input_values", **sizes))] == [{"input_values": (2, 40, 24)}]
    for missing in sizes:
        rest = {name: size for name, size in sizes.items() if name != missing}
        assert shapes(next(audio_variants(facts("input_values", **rest))))["input_values"] == (2, 320 * ENCODED_FRAMES)


def test_who_insists_on_both_gets_spectrogram_and_waveform_together() -> None:
    both = list(audio_variants(facts("input_features", "input_values", num_mel_bins=20, conv_stride=[4])))
    assert len(both) == 3 * 2
    assert all(set(each) == {"input_features", "input_values"} for each in both)
    either = list(audio_variants(facts("input_features", "input_values?", num_mel_bins=20, conv_stride=[4])))
    assert [set(each) for each in either] == [{"input_features"}] * 3 + [{"input_values"}] * 2
    (only, *_) = audio_variants(facts("input_values", conv_stride=[4]))
    assert set(only) == {"input_values"}


def test_the_past_of_a_series() -> None:
    (plain,) = series_variants(facts("past_values"))
    assert shapes(plain) == {"past_values": (2, 32)}
    (several,) = series_variants(facts("past_values", "past_observed_mask", context_length=9, num_input_channels=1))
    assert shapes(several) == {"past_values": (2, 9, 1), "past_observed_mask": (2, 9, 1)}
    assert several["past_observed_mask"].eq(1).all()
    (wide,) = series_variants(facts("past_values", "past_observed_mask?", context_length=9, input_size=3))
    assert shapes(wide) == {"past_values": (2, 9, 3)}
    assert list(series_variants(facts("past_values?"))) == []


def test_the_future_of_a_series_where_the_model_reads_it() -> None:
    names = ("past_time_features", "future_time_features", "future_values", "static_categorical_features")
    given = facts(
        "past_values", *(f"{name}?" for name in names), "static_real_features?", context_length=9, prediction_length=4,
        lags_sequence=[1, 5], num_time_features=2, num_static_categorical_features=1, num_static_real_features=3,
    )  # fmt: skip
    (made,) = series_variants(given)
    assert shapes(made) == {
        "past_values": (2, 14), "past_time_features": (2, 14, 2), "future_time_features": (2, 4, 2),
        "future_values": (2, 4), "static_categorical_features": (2, 1), "static_real_features": (2, 3),
    }  # fmt: skip
    assert made["static_categorical_features"].dtype == torch.long
    assert not made["static_categorical_features"].any()
    static = ("static_categorical_features?", "static_real_features?")
    (untold,) = series_variants(facts("past_values", "past_time_features", "future_values", *static, context_length=9))
    assert shapes(untold) == {
        "past_values": (2, 9), "past_time_features": (2, 9, 0), "future_values": (2, 9),
        "static_categorical_features": (2, 0), "static_real_features": (2, 0),
    }  # fmt: skip
    (left_out,) = series_variants(facts("past_values", "future_values?", context_length=9))
    assert shapes(left_out) == {"past_values": (2, 9)}


def simple(name: str, given: ModelFacts) -> Tensor | None:
    return SIMPLE_MAKERS[name](given)


def test_two_fifths_of_the_patches_are_hidden() -> None:
    sizes = {"image_size": 20, "patch_size": 4}
    hidden = simple("bool_masked_pos", facts("bool_masked_pos", **sizes))
    assert hidden is not None and hidden.dtype == torch.bool
    assert hidden.sum(dim=1).tolist() == [10, 10] and hidden.shape == (2, 25)
    assert simple("bool_masked_pos", facts("bool_masked_pos?", **sizes)) is None
    by_token = simple("bool_masked_pos", facts("bool_masked_pos?", parameters=("mask_token",), **sizes))
    assert by_token is not None and by_token.shape == (2, 25)
    assert simple("bool_masked_pos", facts("bool_masked_pos", image_size=20)) is None
    one = simple("bool_masked_pos", facts("bool_masked_pos", image_size=4, patch_size=4))
    assert one is not None and one.tolist() == [[True], [True]]


def test_noise_decides_which_patches_stay() -> None:
    made = simple("noise", facts("noise", image_size=8, patch_size=4, mask_ratio=0.75))
    assert made is not None and made.shape == (2, 4)
    assert made.min() >= 0 and made.max() <= 1
    assert simple("noise", facts("noise", image_size=8, patch_size=4)) is None
    assert simple("noise", facts("noise", image_size=8, mask_ratio=0.75)) is None


def test_detected_objects_and_their_boxes() -> None:
    for field in ("visual_feat_dim", "visual_embedding_dim"):
        features = simple("visual_feats", facts("visual_feats", **{field: 6}))
        assert features is not None and features.shape == (2, 5, 6)
    boxes = simple("visual_pos", facts("visual_pos", visual_pos_dim=4))
    assert boxes is not None and boxes.shape == (2, 5, 4)
    assert boxes.min() >= 0 and boxes.max() <= 1
    assert simple("visual_embeds", facts("visual_embeds")) is None
    assert simple("visual_pos", facts("visual_pos")) is None


def test_flat_patches_begin_with_row_and_column() -> None:
    patches = simple("flattened_patches", facts("flattened_patches", patch_embed_hidden_size=5))
    assert patches is not None and patches.shape == (2, 6, 7)
    for example in patches:
        assert example[:, :2].tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert not torch.equal(patches[0, :, 2:], patches[1, :, 2:])
    assert simple("flattened_patches", facts("flattened_patches")) is None


def test_tokens_that_queries_read() -> None:
    def tokens(size: int) -> Tensor | None:
        return simple("qformer_input_ids", facts("qformer_input_ids", qformer_config=PreTrainedConfig(vocab_size=size)))

    few, many = tokens(3), tokens(10 * MAX_TOKEN_ID)
    assert few is not None and few.shape == (2, 7) and few.min() >= 0 and few.max() < 3
    assert many is not None and few.max() < many.max() < MAX_TOKEN_ID
    assert simple("qformer_input_ids", facts("qformer_input_ids")) is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.zeros(2, 5, 4), 10),
        ([torch.zeros(3, 4), (torch.zeros(2, 4), None)], 5),
        (SimpleNamespace(last_hidden_state=torch.zeros(2, 3, 4)), 6),
        (SimpleNamespace(pooler_output=torch.zeros(2, 4), last_hidden_state=torch.zeros(2, 3, 4)), 2),
        (SimpleNamespace(pooler_output=None, last_hidden_state=torch.zeros(2, 3, 4)), 6),
        (None, 0),
    ],
)
def test_embeddings_are_counted(output, expected) -> None:
    assert feature_rows(output) == expected
