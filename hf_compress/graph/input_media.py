"""Images, videos, audio and time series for any model.

Models that take the same argument expect different layouts, and neither signature nor config always says which.
Each function yields variants, the likeliest first; the caller keeps the first on which the model runs.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from hf_compress.graph.input_facts import MAX_TOKEN_ID, ModelFacts, integers, noise

Inputs = dict[str, Tensor]

IMAGE_SIZE = 96
"""Pixels of an image where the config sets no size: three times the stride of most hierarchical models."""

GRID = (2, 3)
"""Rows and columns of merged patches per image, for models that take patches instead of images."""

FRAMES = 104
"""Spectrogram frames where the config sets no number: 26 or 13 after the usual reductions by 4 or 8."""

ENCODED_FRAMES = 19
"""What is left of a waveform after the convolutions: more than speaker heads convolve over."""

DETECTED = 5
SERIES_LENGTH = 32


def image_variants(facts: ModelFacts) -> Iterator[Inputs]:
    """Yield image arguments in the layouts that the model may expect."""
    if facts.takes("grid_thw") or facts.takes("image_grid_thw"):
        yield from _patch_rows(facts)
    if facts.takes("spatial_shapes"):
        yield _patch_sequences(facts)
    channels = facts.number("num_channels", "in_channels", "in_chans", "num_input_channels", kind="vision", default=3)
    height, width = image_size(facts)
    frames = facts.lookup("num_frames", "frames_per_clip", kind="vision")
    if facts.takes("pixel_values_videos") and not facts.takes("pixel_values"):
        yield {"pixel_values_videos": noise(facts, frames or 2, channels, height, width)}
    if not facts.takes("pixel_values"):
        return
    sizes = torch.tensor([[height, width]] * facts.batch_size)
    if isinstance(frames, int):
        yield {"pixel_values": noise(facts, frames, channels, height, width)}
    resolutions = facts.lookup("image_grid_pinpoints")
    if facts.takes("image_sizes") and resolutions:
        tall, wide = min(resolutions, key=prod)  # an image of such a size is cut into tiles that fill it exactly
        tiles = max(tall // height, 1) * max(wide // width, 1) + 1
        original = torch.tensor([[tall, wide]] * facts.batch_size)
        yield {"pixel_values": noise(facts, tiles, channels, height, width), "image_sizes": original}
    if facts.takes("aspect_ratio_ids"):
        yield _tiles(facts, noise(facts, 1, facts.number("max_num_tiles", default=1), channels, height, width))
    plain = {"pixel_values": noise(facts, channels, height, width)}
    yield plain
    if facts.takes("image_sizes"):
        yield {**plain, "image_sizes": sizes}
    if facts.takes("pixel_attention_mask"):
        mask = torch.ones(facts.batch_size, 1, height, width, dtype=torch.long)
        yield {"pixel_values": noise(facts, 1, channels, height, width), "pixel_attention_mask": mask}
    yield {"pixel_values": noise(facts, 1, channels, height, width)}
    yield {"pixel_values": noise(facts, 2, channels, height, width)}  # models that match two images


def image_size(facts: ModelFacts) -> tuple[int, int]:
    """Return height and width of the images that the model expects."""
    size = facts.lookup("image_size", "img_size", "input_size", kind="vision")
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    patch = facts.number("patch_size", kind="vision", default=1)
    side = IMAGE_SIZE // patch * patch or patch
    return side, side


def patch_count(facts: ModelFacts) -> int:
    """Return how many patches an image, or a video of the configured frames, is cut into."""
    patch = facts.lookup("patch_size", kind="vision")
    vertical, horizontal = (patch, patch) if isinstance(patch, int) else patch
    height, width = image_size(facts)
    patches = (height // vertical) * (width // horizontal)
    frames, tubelet = facts.lookup("num_frames", kind="vision"), facts.lookup("tubelet_size", kind="vision")
    return patches * (frames // tubelet) if isinstance(frames, int) and isinstance(tubelet, int) else patches


def _tiles(facts: ModelFacts, pixels: Tensor) -> Inputs:
    """Return one image of each example cut into tiles [batch, images, tiles, channels, height, width], one in use."""
    mask = torch.zeros(pixels.shape[:3], dtype=torch.long)
    mask[..., 0] = 1
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.ones(pixels.shape[:2], dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def _patch_rows(facts: ModelFacts) -> Iterator[Inputs]:
    """Yield the patches of all images one after the other, flattened or not, with the grid of each image."""
    merge = facts.number("spatial_merge_size", kind="vision", default=1)
    patch = facts.number("patch_size", kind="vision", default=14)
    frames = facts.number("temporal_patch_size", kind="vision", default=1)
    channels = facts.number("in_channels", "num_channels", "in_chans", kind="vision", default=3)
    height, width = (side * merge for side in GRID)
    rows = facts.batch_size * height * width
    grid = torch.tensor([[1, height, width]] * facts.batch_size)
    values = torch.randn(rows, channels * frames * patch * patch, generator=facts.generator)
    names = ("hidden_states", "grid_thw") if facts.takes("grid_thw") else ("pixel_values", "image_grid_thw")
    yield dict(zip(names, (values, grid), strict=True))
    squares = values.view(-1, channels, patch, patch)[:rows]
    yield dict(zip(names, (squares, grid), strict=True))
    yield dict(zip(names, (squares[None], grid), strict=True))


def _patch_sequences(facts: ModelFacts) -> Inputs:
    """Return flattened patches per image [batch, patches, values], with height, width and mask of each image."""
    patch = facts.number("patch_size", kind="vision", default=16)
    channels = facts.number("num_channels", kind="vision", default=3)
    merge = facts.number("downsample_factor", kind="vision", default=1)
    height, width = (side * merge for side in GRID)
    made = {
        "pixel_values": noise(facts, height * width, channels * patch * patch),
        "spatial_shapes": torch.tensor([[height, width]] * facts.batch_size),
    }
    mask = torch.ones(facts.batch_size, height * width, dtype=torch.long)
    return made | {name: mask for name in ("pixel_attention_mask",) if facts.takes(name)}


def audio_variants(facts: ModelFacts) -> Iterator[Inputs]:
    """Yield audio arguments: spectrograms or waveforms, both for models that insist on both."""
    spectrograms, waveforms = list(_spectrograms(facts)), list(_waveforms(facts))
    if spectrograms and facts.requires("input_values"):
        yield from ({**a, **b} for a in spectrograms for b in waveforms)
    else:
        yield from spectrograms
        yield from waveforms


def _spectrograms(facts: ModelFacts) -> Iterator[Inputs]:
    """Yield spectrograms, by time or by frequency first, with the masks that the model may want."""
    if not facts.takes("input_features"):
        return
    bins = facts.number(
        "feature_projection_input_dim", "input_dim", "num_mel_bins", "input_feat_per_channel", "n_mels",
        "feature_size", kind="audio", default=80,
    )  # fmt: skip
    positions = facts.lookup("max_source_positions", kind="audio")
    frames = 2 * facts.number("n_window", kind="audio", default=FRAMES // 2)  # some encoders work on whole windows
    layouts = [(1, noise(facts, frames, bins))]
    if isinstance(positions, int):  # Whisper-like models take spectrograms of one length only
        layouts.insert(0, (2, noise(facts, bins, 2 * positions)))
    else:
        layouts.append((2, noise(facts, bins, frames)))
    layouts.append((2, noise(facts, 1, frames, bins)))
    for time, value in layouts:
        yield from _with_masks(facts, {"input_features": value}, value.shape[time])


def _waveforms(facts: ModelFacts) -> Iterator[Inputs]:
    """Yield waveforms, or the spectrograms that some models take under the same name."""
    if not facts.takes("input_values"):
        return
    bins, frames = facts.lookup("num_mel_bins", kind="audio"), facts.lookup("max_length", kind="audio")
    if isinstance(bins, int) and isinstance(frames, int) and facts.lookup("patch_size") is not None:
        yield {"input_values": noise(facts, frames, bins)}
        return
    strides = facts.lookup("conv_stride", "upsampling_ratios", "downsampling_ratios", kind="audio") or (320,)
    masked = facts.number("mask_time_length", kind="audio", default=0)
    samples = prod(strides) * max(ENCODED_FRAMES, masked + 3)
    channels = facts.number("audio_channels", kind="audio", default=1)
    layouts = [noise(facts, samples), noise(facts, channels, samples)]
    for value in layouts[::-1] if facts.lookup("audio_channels") else layouts:
        yield from _with_masks(facts, {"input_values": value}, samples)


def _with_masks(facts: ModelFacts, inputs: Inputs, length: int) -> Iterator[Inputs]:
    """Yield the inputs with the masks that the model takes, then without what it does not insist on."""
    names = ["input_features_mask", "feature_attention_mask", "padding_mask"]
    names += [] if facts.takes("input_ids") else ["attention_mask"]
    masks = dict.fromkeys(filter(facts.takes, names), torch.ones(facts.batch_size, length, dtype=torch.long))
    yield {**inputs, **masks}
    if masks and not any(map(facts.requires, masks)):
        yield inputs


def series_variants(facts: ModelFacts) -> Iterator[Inputs]:
    """Yield the past of a time series with what the model wants to know about it."""
    if not facts.requires("past_values"):
        return
    context = facts.number("context_length", default=SERIES_LENGTH)
    channels = facts.number("num_input_channels", "input_size", default=1)
    lags = facts.lookup("lags_sequence") or (0,)
    past, future = context + max(lags), facts.number("prediction_length", default=context)
    width = (channels,) if channels > 1 or facts.lookup("num_input_channels") else ()
    made: dict[str, Tensor] = {"past_values": noise(facts, past, *width)}
    extra = facts.number("num_time_features", default=0)
    if extra or facts.requires("past_time_features"):
        made["past_time_features"] = noise(facts, past, extra)
        made["future_time_features"] = noise(facts, future, extra)
        made["future_values"] = noise(facts, future, *width)
        categories = facts.number("num_static_categorical_features", default=0)
        made["static_categorical_features"] = torch.zeros(facts.batch_size, categories, dtype=torch.long)
        made["static_real_features"] = noise(facts, facts.number("num_static_real_features", default=0))
    if facts.requires("past_observed_mask"):
        made["past_observed_mask"] = torch.ones_like(made["past_values"])
    yield {name: value for name, value in made.items() if facts.takes(name)}


def masked_patches(facts: ModelFacts) -> Tensor | None:
    """Return which patches are hidden, the same number in each example; None unless the model has a mask token."""
    has_token = any(name.endswith("mask_token") for name, _ in facts.model.named_parameters())
    if facts.lookup("patch_size", kind="vision") is None or not (has_token or facts.requires("bool_masked_pos")):
        return None
    count = patch_count(facts)
    order = torch.rand(facts.batch_size, count, generator=facts.generator).argsort(dim=1)
    return order < max(2 * count // 5, 1)


def patch_noise(facts: ModelFacts) -> Tensor | None:
    """Return the noise that decides which patches stay: else two runs of the model would differ."""
    if not isinstance(facts.lookup("mask_ratio"), float) or facts.lookup("patch_size", kind="vision") is None:
        return None
    return torch.rand(facts.batch_size, patch_count(facts), generator=facts.generator)


def object_features(facts: ModelFacts) -> Tensor | None:
    """Return features of detected objects, for models that take those instead of an image."""
    width = facts.lookup("visual_feat_dim", "visual_embedding_dim")
    return noise(facts, DETECTED, width) if isinstance(width, int) else None


def object_positions(facts: ModelFacts) -> Tensor | None:
    """Return the boxes of detected objects."""
    width = facts.lookup("visual_pos_dim")
    return torch.rand(facts.batch_size, DETECTED, width, generator=facts.generator) if isinstance(width, int) else None


def flat_patches(facts: ModelFacts) -> Tensor | None:
    """Return patches, each preceded by its row and its column, counted from 1."""
    width = facts.lookup("patch_embed_hidden_size", kind="vision")
    if not isinstance(width, int):
        return None
    rows, columns = GRID
    places = torch.cartesian_prod(torch.arange(1, rows + 1), torch.arange(1, columns + 1)).float()
    values = noise(facts, rows * columns, width)
    return torch.cat([places.expand(facts.batch_size, -1, -1), values], dim=-1)


def query_tokens(facts: ModelFacts) -> Tensor | None:
    """Return the text that the transformer between image and language model reads with its queries."""
    vocabulary = getattr(facts.lookup("qformer_config"), "vocab_size", None)
    if not isinstance(vocabulary, int):
        return None
    return integers(facts, min(vocabulary, MAX_TOKEN_ID), facts.batch_size, facts.length)


SIMPLE_MAKERS: dict[str, Callable[[ModelFacts], Tensor | None]] = {
    "bool_masked_pos": masked_patches,
    "noise": patch_noise,
    "visual_feats": object_features,
    "visual_embeds": object_features,
    "visual_pos": object_positions,
    "qformer_input_ids": query_tokens,
    "flattened_patches": flat_patches,
}
"""Arguments with one layout, by name."""

MEDIA_ARGUMENTS: tuple[str, ...] = (
    "pixel_values", "pixel_values_videos", "input_features", "input_values", "past_values", *SIMPLE_MAKERS,
)  # fmt: skip


def feature_rows(output: Any) -> int:
    """Return how many embeddings the features of an image, video or audio are."""
    features = getattr(output, "pooler_output", None)
    if features is None:
        features = getattr(output, "last_hidden_state", output)
    return sum(leaf.numel() // leaf.shape[-1] for leaf in _tensors(features))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
