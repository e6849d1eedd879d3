"""Models of several modalities."""

from typing import Any

import torch
from transformers import PreTrainedModel

from zoo.base import DECODER, ENCODER, SPECIAL, VISION, Inputs, Tiny, noise, table, text, tokens

_CLIP_TEXT = {**ENCODER, "eos_token_id": 2}
_CLIP_VISION: dict[str, Any] = {
    "hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_CLIP = {"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": 20}
_SIGLIP = {
    "text_config": {**ENCODER, "projection_size": 24, **SPECIAL}, "vision_config": {**_CLIP_VISION, "hidden_size": 24},
}  # fmt: skip
IMAGE_TOKEN = 96


def _captioned(model: PreTrainedModel) -> Inputs:
    return {**text(), "pixel_values": noise(2, 3, 16, 16)}


def _with_image_tokens(count: int) -> Inputs:
    """A prompt that begins with ``count`` places for the features of one image."""
    image = torch.full((2, count), IMAGE_TOKEN)
    ids = torch.cat([tokens(length=1), image, tokens(length=5, vocab_size=90, seed=1)], dim=1)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(2, 3, 16, 16),
        "use_cache": False,
    }  # fmt: skip


def _llama(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **DECODER, **SPECIAL, **changes}


MULTIMODAL = table(
    Tiny("clip", "CLIPModel", _CLIP),
    Tiny("siglip", "SiglipModel", _SIGLIP),
)

MULTIMODAL_VARIANTS = table(
    Tiny("clip_text", "CLIPTextModelWithProjection", {**_CLIP_TEXT, "projection_dim": 20}),
    Tiny("clip_vision", "CLIPVisionModelWithProjection", {**_CLIP_VISION, "projection_dim": 20}),
    Tiny("clip_classify", "CLIPForImageClassification", {**_CLIP, "num_labels": 3},
         lambda model: {"pixel_values": noise(2, 3, 16, 16)}),
)  # fmt: skip

OTHER_MULTIMODAL = table(
    Tiny("align", "AlignModel", {
        "text_config": ENCODER, "projection_dim": 96,
        "vision_config": {
            "image_size": 32, "width_coefficient": 0.3, "depth_coefficient": 0.3, "depth_divisor": 2, "hidden_dim": 30,
        },
    }, lambda model: {**text(), "pixel_values": noise(2, 3, 32, 32)}),
    Tiny("altclip", "AltCLIPModel", {
        "text_config": {**ENCODER, "project_dim": 20}, "vision_config": _CLIP_VISION, "projection_dim": 20,
    }, _captioned),
    Tiny("blip", "BlipForImageTextRetrieval", {
        "text_config": {**ENCODER, "encoder_hidden_size": 24, "projection_dim": 20, **SPECIAL},
        "vision_config": _CLIP_VISION, "projection_dim": 20, "image_text_hidden_size": 18,
    }, _captioned),
    Tiny("blip_caption", "BlipForConditionalGeneration", {
        "text_config": {**ENCODER, "encoder_hidden_size": 24, "projection_dim": 20, **SPECIAL},
        "vision_config": _CLIP_VISION, "projection_dim": 20,
    }, _captioned),
    Tiny("blip2", "Blip2ForConditionalGeneration", {
        "vision_config": _CLIP_VISION, "num_query_tokens": 3, "image_token_index": IMAGE_TOKEN,
        "qformer_config": {
            "vocab_size": 97, "hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 36, "encoder_hidden_size": 24,
        },
        "text_config": {
            "model_type": "opt", "vocab_size": 97, "hidden_size": 32, "word_embed_proj_dim": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 44, "max_position_embeddings": 40,
        },
    }, lambda model: _with_image_tokens(3)),
    Tiny("bridgetower", "BridgeTowerModel", {
        "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1,
        "text_config": {**ENCODER, "hidden_size": 128},
        "vision_config": {"hidden_size": 128, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4},
    }, _captioned),
    Tiny("chinese_clip", "ChineseCLIPModel", _CLIP),
    Tiny("clipseg", "CLIPSegForImageSegmentation", {
        "text_config": _CLIP_TEXT, "vision_config": {**_CLIP_VISION, "num_hidden_layers": 3}, "projection_dim": 20,
        "extract_layers": [0, 1, 2], "reduce_dim": 16, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 28,
    }, _captioned),
    Tiny("flava_text", "FlavaTextModel", ENCODER),
    Tiny("git", "GitForCausalLM", {**ENCODER, **SPECIAL, "vision_config": _CLIP_VISION}, _captioned),
    Tiny("idefics3_vision", "Idefics3VisionTransformer", VISION),
    Tiny("layoutlmv3", "LayoutLMv3ForSequenceClassification", {
        **ENCODER, "max_2d_position_embeddings": 20, "coordinate_size": 6, "shape_size": 4, "input_size": 16,
        "patch_size": 4, "rel_pos_bins": 8, "max_rel_pos": 12, "rel_2d_pos_bins": 10, "max_rel_2d_pos": 14,
        "num_labels": 3,
    }, lambda model: {**_captioned(model), "bbox": torch.ones(2, 11, 4, dtype=torch.long)}),
    Tiny("llava", "LlavaForConditionalGeneration", {
        "text_config": _llama(), "vision_config": {"model_type": "clip_vision_model", **_CLIP_VISION},
        "image_token_index": IMAGE_TOKEN, "vision_feature_select_strategy": "default", "vision_feature_layer": -1,
    }, lambda model: _with_image_tokens(16)),
    Tiny("lxmert", "LxmertModel", {
        **ENCODER, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 10, "visual_pos_dim": 4,
    }, lambda model: {**text(), "visual_feats": noise(2, 5, 10), "visual_pos": noise(2, 5, 4)}),
    Tiny("metaclip_2", "MetaClip2Model", _CLIP),
    Tiny("owlvit", "OwlViTModel", {**_CLIP, "text_config": {**_CLIP_TEXT, "max_position_embeddings": 16}}, _captioned),
    Tiny("paligemma", "PaliGemmaForConditionalGeneration", {
        "text_config": {"model_type": "gemma", **DECODER, "head_dim": 12, **SPECIAL},
        "vision_config": {"model_type": "siglip_vision_model", **_CLIP_VISION, "vision_use_head": False},
        "projection_dim": 32, "image_token_id": IMAGE_TOKEN,
    }, lambda model: _with_image_tokens(16)),
    Tiny("siglip2_text", "Siglip2TextModel", {**ENCODER, "projection_size": 24, **SPECIAL}),
    Tiny("vilt", "ViltForQuestionAnswering", {
        **ENCODER, "image_size": 16, "patch_size": 4, "num_labels": 3,
    }, _captioned),
    Tiny("visual_bert", "VisualBertModel", {**ENCODER, "visual_embedding_dim": 10}, lambda model: {
        **text(), "visual_embeds": noise(2, 5, 10), "visual_attention_mask": torch.ones(2, 5),
        "visual_token_type_ids": torch.ones(2, 5, dtype=torch.long),
    }),
    Tiny("xclip", "XCLIPModel", {
        "text_config": _CLIP_TEXT, "projection_dim": 20, "prompt_layers": 1, "prompt_num_attention_heads": 4,
        "vision_config": {
            **_CLIP_VISION, "num_frames": 3, "mit_hidden_size": 20, "mit_intermediate_size": 28,
            "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2,
        },
    }, lambda model: {**text(), "pixel_values": noise(2, 3, 3, 16, 16)}),
)  # fmt: skip
