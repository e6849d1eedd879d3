"""Tiny models of every task head and modality, by name."""

from collections.abc import Callable

import tiny_models
import torch
import transformers as hf
from tiny_models import DECODER, ENCODER, SPECIAL
from transformers import PreTrainedModel

SEQ2SEQ = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 52, "decoder_start_token_id": 2, **SPECIAL,
}  # fmt: skip
T5 = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
WINDOWS = {
    "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4,
    "encoder_stride": 8,
}  # fmt: skip
CONVOLUTIONS = {"conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
AUDIO = {
    "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, **CONVOLUTIONS,
}  # fmt: skip
CONTRASTIVE = {"text_config": {**ENCODER, **SPECIAL}, "vision_config": VISION, "projection_dim": 24}


def text(head: str, **changes: object) -> PreTrainedModel:
    return getattr(hf, f"BertFor{head}")(hf.BertConfig(**ENCODER, **changes))


def roberta(head: str) -> PreTrainedModel:
    config = hf.RobertaConfig(**{**ENCODER, "max_position_embeddings": 12}, num_labels=3)
    return getattr(hf, f"RobertaFor{head}")(config)


def seq2seq(family: str, head: str = "ForConditionalGeneration", **changes: object) -> PreTrainedModel:
    config = getattr(hf, f"{family}Config")(**SEQ2SEQ, max_position_embeddings=40, **changes)
    return getattr(hf, f"{family}{head}")(config)


def whisper(head: str = "ForConditionalGeneration") -> PreTrainedModel:
    config = hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=20, max_source_positions=30, max_target_positions=40)
    return getattr(hf, f"Whisper{head}")(config)


def speech_to_text() -> PreTrainedModel:
    config = hf.Speech2TextConfig(
        **SEQ2SEQ, input_feat_per_channel=20, conv_channels=24, max_source_positions=60, max_target_positions=40
    )
    return hf.Speech2TextForConditionalGeneration(config)


def encoder_decoder() -> PreTrainedModel:
    decoder = hf.BertConfig(**{**ENCODER, "vocab_size": 53}, is_decoder=True, add_cross_attention=True)
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**ENCODER), decoder)
    return hf.EncoderDecoderModel(with_start(config))


def captioner() -> PreTrainedModel:
    decoder = hf.GPT2Config(vocab_size=97, n_positions=40, n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    return hf.VisionEncoderDecoderModel(with_start(config))


def transcriber() -> PreTrainedModel:
    decoder = hf.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
    config = hf.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(hf.Wav2Vec2Config(**AUDIO), decoder)
    return hf.SpeechEncoderDecoderModel(with_start(config))


def with_start(config: hf.PreTrainedConfig) -> hf.PreTrainedConfig:
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return config


def image(family: str, head: str, **changes: object) -> PreTrainedModel:
    config = getattr(hf, f"{family}Config")(**{**VISION, "num_labels": 3, **changes})
    return getattr(hf, f"{family}{head}")(config)


def swin(head: str) -> PreTrainedModel:
    return getattr(hf, f"SwinFor{head}")(hf.SwinConfig(**WINDOWS, num_labels=3))


def segformer() -> PreTrainedModel:
    config = hf.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16,
        num_labels=5,
    )  # fmt: skip
    return hf.SegformerForSemanticSegmentation(config)


def convnext() -> PreTrainedModel:
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3)
    return hf.ConvNextForImageClassification(config)


def detr() -> PreTrainedModel:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = hf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, backbone=None, d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=44,
        num_queries=5, num_labels=3,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def video(head: str = "ForVideoClassification") -> PreTrainedModel:
    config = hf.VideoMAEConfig(
        **VISION, num_frames=4, tubelet_size=2, num_labels=3, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    return getattr(hf, f"VideoMAE{head}")(config)


def audio(family: str, head: str, **changes: object) -> PreTrainedModel:
    config = getattr(hf, f"{family}Config")(**{**AUDIO, "num_labels": 3, "ctc_zero_infinity": True, **changes})
    return getattr(hf, f"{family}For{head}")(config)


def spectrogram() -> PreTrainedModel:
    config = hf.ASTConfig(
        **{**VISION, "patch_size": 8}, num_mel_bins=24, max_length=40, frequency_stride=8, time_stride=8, num_labels=3
    )
    return hf.ASTForAudioClassification(config)


def dual(family: str) -> PreTrainedModel:
    return getattr(hf, f"{family}Model")(getattr(hf, f"{family}Config")(**CONTRASTIVE))


def blip() -> PreTrainedModel:
    return hf.BlipForConditionalGeneration(hf.BlipConfig(**CONTRASTIVE))


def vilt() -> PreTrainedModel:
    return hf.ViltForQuestionAnswering(hf.ViltConfig(**ENCODER, image_size=16, patch_size=4, num_labels=5))


def llava() -> PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**DECODER, **SPECIAL),
        image_token_index=90,
    )
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = hf.Qwen2VLConfig(
        text_config={**DECODER, **SPECIAL, "rope_parameters": rotary}, vision_config=vision, image_token_id=90,
        video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config)


def listener() -> PreTrainedModel:
    sound = {
        "num_mel_bins": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_source_positions": 24,
    }  # fmt: skip
    text_config = {"model_type": "llama", **DECODER, **SPECIAL}
    config = hf.VoxtralConfig(
        audio_config=sound, text_config=text_config, audio_token_id=90, projector_hidden_act="gelu"
    )
    return hf.VoxtralForConditionalGeneration(config)


def layout() -> PreTrainedModel:
    config = hf.LayoutLMConfig(**ENCODER, max_2d_position_embeddings=60, num_labels=3)
    return hf.LayoutLMForTokenClassification(config)


def classifier_of_decoder(head: str) -> PreTrainedModel:
    return getattr(hf, f"LlamaFor{head}")(hf.LlamaConfig(**DECODER, **SPECIAL, num_labels=3))


HEADS: dict[str, Callable[[], PreTrainedModel]] = {
    "classes": lambda: text("SequenceClassification", num_labels=3),
    "regression": lambda: text("SequenceClassification", num_labels=1),
    "several classes": lambda: text("SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
    "masked tokens": lambda: text("MaskedLM"),
    "token classes": lambda: text("TokenClassification", num_labels=3),
    "span": lambda: text("QuestionAnswering"),
    "choices": lambda: text("MultipleChoice"),
    "next sentence": lambda: text("NextSentencePrediction"),
    "two heads": lambda: text("PreTraining"),
    "replaced tokens": lambda: hf.ElectraForPreTraining(hf.ElectraConfig(**ENCODER, embedding_size=16)),
    "few positions": lambda: roberta("SequenceClassification"),
    "roberta choices": lambda: roberta("MultipleChoice"),
    "separators": lambda: hf.LongformerForQuestionAnswering(
        hf.LongformerConfig(**ENCODER, attention_window=4, sep_token_id=2, **SPECIAL)
    ),
    "boxes": layout,
    "causal": tiny_models.llama,
    "causal without padding": tiny_models.gpt2,
    "decoder classes": lambda: classifier_of_decoder("SequenceClassification"),
    "decoder span": lambda: classifier_of_decoder("QuestionAnswering"),
    "bart": tiny_models.bart,
    "bart classes": lambda: seq2seq("Bart", "ForSequenceClassification", num_labels=3),
    "bart span": lambda: seq2seq("Bart", "ForQuestionAnswering"),
    "mbart": lambda: seq2seq("MBart"),
    "pegasus": lambda: seq2seq("Pegasus"),
    "marian": lambda: seq2seq("Marian", "MTModel"),
    "t5": tiny_models.t5,
    "t5 classes": lambda: hf.T5ForSequenceClassification(hf.T5Config(**T5, num_labels=3)),
    "encoder-decoder": encoder_decoder,
    "captioner": captioner,
    "transcriber": transcriber,
    "whisper": whisper,
    "whisper classes": lambda: whisper("ForAudioClassification"),
    "speech to text": speech_to_text,
    "vit": tiny_models.vit,
    "image regression": lambda: image("ViT", "ForImageClassification", num_labels=1),
    "deit": lambda: image("DeiT", "ForImageClassification"),
    "dinov2": lambda: image("Dinov2", "ForImageClassification"),
    "beit": lambda: image("Beit", "ForImageClassification"),
    "beit tokens": lambda: image("Beit", "ForMaskedImageModeling", vocab_size=41, use_mask_token=True),
    "masked image": lambda: image("ViT", "ForMaskedImageModeling", encoder_stride=4),
    "masked autoencoder": lambda: image(
        "ViTMAE", "ForPreTraining", decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    ),
    "swin": lambda: swin("ImageClassification"),
    "swin masked image": lambda: swin("MaskedImageModeling"),
    "convnext": convnext,
    "segformer": segformer,
    "video": video,
    "masked video": lambda: video("ForPreTraining"),
    "ctc": lambda: audio("Wav2Vec2", "CTC"),
    "hubert": lambda: audio("Hubert", "SequenceClassification"),
    "wavlm frames": lambda: audio("WavLM", "AudioFrameClassification"),
    "speaker": lambda: audio("Wav2Vec2", "XVector"),
    "contrasts": lambda: audio("Wav2Vec2", "PreTraining", num_codevectors_per_group=8, codevector_dim=16),
    "spectrogram": spectrogram,
    "clip": lambda: dual("CLIP"),
    "siglip": lambda: dual("Siglip"),
    "blip": blip,
    "vilt": vilt,
    "llava": llava,
    "qwen2-vl": qwen2_vl,
    "voxtral": listener,
}
"""Models whose head has a loss."""

WITHOUT_LOSS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**ENCODER)),
    "dinov2": lambda: image("Dinov2", "Model"),
    "deit with distillation": lambda: image("DeiT", "ForImageClassificationWithTeacher"),
    "wav2vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**AUDIO)),
    "t5 base": lambda: hf.T5Model(hf.T5Config(**T5)),
}


def build(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()
