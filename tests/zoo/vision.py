"""Models of images and video."""

from transformers import PreTrainedModel

from zoo.base import VISION, Inputs, Tiny, noise, table

LABELS = {**VISION, "num_labels": 3}
_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "mlp_ratio": 3.0, "num_labels": 3,
}  # fmt: skip
_CONVNEXT = {"hidden_sizes": [8, 12, 20], "depths": [1, 2, 1], "num_stages": 3, "image_size": 32, "num_labels": 3}


def _images(size: int) -> Inputs:
    return {"pixel_values": noise(2, 3, size, size)}


def _image32(model: PreTrainedModel) -> Inputs:
    return _images(32)


def _image64(model: PreTrainedModel) -> Inputs:
    return _images(64)


def _masked_patches(model: PreTrainedModel) -> Inputs:
    """The noise decides which patches are hidden; without it, it is drawn anew at each call."""
    return {**_images(16), "noise": noise(2, 16, seed=1).abs()}


def _video(frames: int, size: int = 16) -> Inputs:
    return {"pixel_values": noise(2, frames, 3, size, size)}


VISION_MODELS = table(
    Tiny("vit", "ViTForImageClassification", LABELS),
    Tiny("deit", "DeiTForImageClassification", LABELS),
    Tiny("swin", "SwinForImageClassification", _SWIN),
    Tiny("dinov2", "Dinov2ForImageClassification", {**LABELS, "mlp_ratio": 2}),
)

VISION_VARIANTS = table(
    Tiny("vit_base", "ViTModel", VISION),
    Tiny("vit_masked", "ViTForMaskedImageModeling", {**VISION, "encoder_stride": 4}),
    Tiny("vit_three_layers", "ViTForImageClassification", {**LABELS, "num_hidden_layers": 3}),
    Tiny("deit_teacher", "DeiTForImageClassificationWithTeacher", LABELS),
    Tiny("swin_base", "SwinModel", _SWIN),
    Tiny("dinov2_swiglu", "Dinov2Model", {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    Tiny("dinov2_backbone", "Dinov2Backbone", {**VISION, "mlp_ratio": 2, "out_features": ["stage1", "stage2"]}),
)

OTHER_VISION = table(
    Tiny("beit", "BeitForImageClassification", {**LABELS, "use_relative_position_bias": True}),
    Tiny("beit_shared_bias", "BeitModel", {**VISION, "use_shared_relative_position_bias": True},
         lambda model: _images(16)),
    Tiny("bit", "BitForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "num_groups": 2, "num_labels": 3,
    }, _image32),
    Tiny("convnext", "ConvNextForImageClassification", _CONVNEXT),
    Tiny("convnextv2", "ConvNextV2ForImageClassification", _CONVNEXT),
    Tiny("cvt", "CvtForImageClassification", {
        "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [16, 24],
        "num_heads": [2, 3], "depth": [1, 2], "mlp_ratio": [2.0, 3.0], "attention_drop_rate": [0.0, 0.0],
        "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
        "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2],
        "padding_q": [1, 1], "stride_q": [1, 1], "num_labels": 3,
    }, _image32),
    Tiny("data2vec_vision", "Data2VecVisionForImageClassification", {**LABELS, "use_relative_position_bias": True}),
    Tiny("dinov2_registers", "Dinov2WithRegistersForImageClassification", {**LABELS, "mlp_ratio": 2}),
    Tiny("dinov3_vit", "DINOv3ViTModel", VISION),
    Tiny("dinov3_convnext", "DINOv3ConvNextModel", {
        "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 32,
    }),
    Tiny("dpt", "DPTForSemanticSegmentation", {
        **LABELS, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [6, 10, 14, 18], "fusion_hidden_size": 12,
        "use_auxiliary_head": False,
    }),
    Tiny("efficientnet", "EfficientNetForImageClassification", {
        "image_size": 32, "width_coefficient": 0.3, "depth_coefficient": 0.3, "depth_divisor": 2, "hidden_dim": 384,
        "num_labels": 3,
    }),
    Tiny("focalnet", "FocalNetForImageClassification", {
        "image_size": 32, "patch_size": 4, "embed_dim": 16, "hidden_sizes": [16, 24], "depths": [1, 2],
        "focal_levels": [2, 2], "focal_windows": [3, 3], "mlp_ratio": 2.0, "num_labels": 3,
    }),
    Tiny("glpn", "GLPNForDepthEstimation", {
        "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 20, 32],
        "num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 10,
    }, _image64),
    Tiny("hiera", "HieraForImageClassification", {
        "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "embed_dim": 8,
        "depths": [1, 1, 2], "num_heads": [1, 2, 4], "embed_dim_multiplier": 2.0, "num_query_pool": 2,
        "masked_unit_size": [4, 4], "masked_unit_attention": [True, True, False], "num_labels": 3,
        "mlp_ratio": 3.0,
    }),
    Tiny("ijepa", "IJepaForImageClassification", LABELS),
    Tiny("levit", "LevitForImageClassification", {
        "image_size": 32, "hidden_sizes": [16, 24], "num_attention_heads": [2, 3], "depths": [1, 1], "key_dim": [4, 6],
        "mlp_ratio": [2, 2], "attention_ratio": [2, 2], "num_labels": 3,
        "down_ops": [["Subsample", 6, 4, 2, 2, 2], [""]],
    }),
    Tiny("mgp_str", "MgpstrForSceneTextRecognition", {
        "image_size": [8, 16], "patch_size": 4, "max_token_length": 5, "num_character_labels": 7, "num_bpe_labels": 11,
        "num_wordpiece_labels": 13, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "mlp_ratio": 2.0,
    }),
    Tiny("mobilenet_v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "num_labels": 3}, _image32),
    Tiny("mobilenet_v2", "MobileNetV2ForImageClassification", {
        "depth_multiplier": 0.25, "depth_divisible_by": 2, "min_depth": 2, "num_labels": 3,
    }, _image32),
    Tiny("mobilevit", "MobileViTForImageClassification", {
        "image_size": 32, "hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [4, 6, 8, 10, 12, 14, 18],
        "num_attention_heads": 4, "mlp_ratio": 2.0, "num_labels": 3,
    }),
    Tiny("mobilevitv2", "MobileViTV2ForImageClassification", {
        "image_size": 64, "width_multiplier": 0.25, "base_attn_unit_dims": [32, 48, 64], "n_attn_blocks": [1, 1, 1],
        "num_labels": 3,
    }),
    Tiny("pixio", "PixioModel", VISION),
    Tiny("poolformer", "PoolFormerForImageClassification", {
        "image_size": 32, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "mlp_ratio": 2.0, "num_labels": 3,
    }),
    Tiny("pvt", "PvtForImageClassification", {
        "image_size": 32, "num_encoder_blocks": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 20, 32],
        "sequence_reduction_ratios": [2, 2, 1, 1], "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 3, 3],
        "num_labels": 3,
    }, _image32),
    Tiny("pvt_v2", "PvtV2ForImageClassification", {
        "image_size": 32, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 20, 32], "sr_ratios": [4, 2, 2, 1],
        "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 3, 3], "num_labels": 3,
    }, _image32),
    Tiny("regnet", "RegNetForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "groups_width": 4,
        "num_labels": 3,
    }, _image32),
    Tiny("resnet", "ResNetForImageClassification", {
        "embedding_size": 8, "hidden_sizes": [12, 16, 20, 24], "depths": [1, 1, 2, 1], "num_labels": 3,
    }, _image32),
    Tiny("segformer", "SegformerForImageClassification", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 20, 32], "sr_ratios": [4, 2, 2, 1],
        "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 3, 3], "num_labels": 3,
    }, _image64),
    Tiny("segformer_segments", "SegformerForSemanticSegmentation", {
        "depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 20, 32], "sr_ratios": [4, 2, 2, 1], "decoder_hidden_size": 18,
        "num_attention_heads": [1, 2, 4, 4], "mlp_ratios": [2, 2, 3, 3], "num_labels": 3,
    }, _image64),
    Tiny("siglip_vision", "SiglipVisionModel", VISION),
    Tiny("swiftformer", "SwiftFormerForImageClassification", {
        "image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 12, 20, 32], "mlp_ratio": 2, "num_labels": 3,
    }),
    Tiny("swin2sr", "Swin2SRForImageSuperResolution", {
        "image_size": 16, "patch_size": 1, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
        "mlp_ratio": 2.0,
    }),
    Tiny("swinv2", "Swinv2ForImageClassification", _SWIN),
    Tiny("timesformer", "TimesformerForVideoClassification", {**LABELS, "num_frames": 3},
         lambda model: _video(3)),
    Tiny("videomae", "VideoMAEForVideoClassification", {**LABELS, "num_frames": 4, "tubelet_size": 2},
         lambda model: _video(4)),
    Tiny("vit_mae", "ViTMAEForPreTraining", {
        **VISION, "decoder_hidden_size": 24, "decoder_num_attention_heads": 3, "decoder_num_hidden_layers": 2,
        "decoder_intermediate_size": 28, "mask_ratio": 0.5,
    }, _masked_patches),
    Tiny("vit_msn", "ViTMSNForImageClassification", LABELS),
    Tiny("vitdet", "VitDetModel", {**VISION, "num_channels": 3, "use_relative_position_embeddings": True}),
    Tiny("vivit", "VivitForVideoClassification", {**LABELS, "num_frames": 4, "tubelet_size": [2, 4, 4]},
         lambda model: _video(4)),
    Tiny("yolos", "YolosForObjectDetection", {**LABELS, "image_size": [16, 20], "num_detection_tokens": 5}),
)  # fmt: skip
