"""Models of sound."""

from typing import Any

from transformers import PreTrainedModel

from zoo.base import SPECIAL, Inputs, Tiny, noise, table, tokens

_WAV: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44,
    "conv_dim": (12, 12, 16), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0,
}  # fmt: skip
_WAV_LAYER = {**_WAV, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
_WHISPER: dict[str, Any] = {
    "vocab_size": 97, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 52,
    "max_source_positions": 15, "max_target_positions": 20, **SPECIAL, "decoder_start_token_id": 1,
}  # fmt: skip


def _wave(length: int = 400) -> Inputs:
    return {"input_values": noise(2, length)}


def _mel(model: PreTrainedModel) -> Inputs:
    return {"input_features": noise(2, 30, 8), "decoder_input_ids": tokens(length=6), "use_cache": False}


AUDIO = table(
    Tiny("whisper", "WhisperForConditionalGeneration", _WHISPER),
    Tiny("wav2vec2", "Wav2Vec2ForCTC", _WAV),
)

AUDIO_VARIANTS = table(
    Tiny(
        "whisper_classify", "WhisperForAudioClassification", {**_WHISPER, "num_labels": 3, "classifier_proj_size": 20}
    ),
    Tiny("wav2vec2_base", "Wav2Vec2Model", _WAV),
    Tiny("wav2vec2_classify", "Wav2Vec2ForSequenceClassification", {**_WAV, "num_labels": 3}),
    Tiny("wav2vec2_layer_norm", "Wav2Vec2ForCTC", _WAV_LAYER),
)

OTHER_AUDIO = table(
    Tiny("ast", "ASTForAudioClassification", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44, "patch_size": 4,
        "frequency_stride": 4, "time_stride": 4, "max_length": 20, "num_mel_bins": 8, "num_labels": 3,
    }, lambda model: {"input_values": noise(2, 20, 8)}),
    Tiny("clap_audio", "ClapAudioModelWithProjection", {
        "patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [1, 1], "num_attention_heads": [2, 4],
        "num_hidden_layers": 2, "window_size": 4, "spec_size": 32, "num_mel_bins": 8, "patch_size": 4,
        "patch_stride": [4, 4], "projection_dim": 20, "num_classes": 3, "enable_fusion": False, "mlp_ratio": 2.0,
    }, lambda model: {"input_features": noise(2, 1, 40, 8)}),
    Tiny("data2vec_audio", "Data2VecAudioForCTC", {**_WAV, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}),
    Tiny("encodec", "EncodecModel", {
        "num_filters": 4, "hidden_size": 12, "codebook_size": 16, "codebook_dim": 12, "num_lstm_layers": 1,
        "upsampling_ratios": [4, 2], "target_bandwidths": [1.5], "sampling_rate": 2400,
    }, lambda model: {"input_values": noise(2, 1, 240)}),
    Tiny("hubert", "HubertForCTC", _WAV),
    Tiny("moonshine", "MoonshineForConditionalGeneration", {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 2, "max_position_embeddings": 40,
        "pad_head_dim_to_multiple_of": None, **SPECIAL, "decoder_start_token_id": 1,
    }, lambda model: {**_wave(4000), "decoder_input_ids": tokens(length=6), "use_cache": False}),
    Tiny("sew", "SEWForCTC", {**_WAV, "squeeze_factor": 2, "num_conv_pos_embedding_groups": 4}),
    Tiny("sew_d", "SEWDForCTC", {**_WAV, "squeeze_factor": 2, "max_position_embeddings": 40, "position_buckets": 8}),
    Tiny("speech_to_text", "Speech2TextForConditionalGeneration", {
        **_WHISPER, "num_conv_layers": 2, "conv_kernel_sizes": [3, 3], "conv_channels": 24, "input_feat_per_channel": 8,
        "input_channels": 1, "max_source_positions": 40,
    }, _mel),
    Tiny("unispeech", "UniSpeechForCTC", {**_WAV, "num_ctc_classes": 29}),
    Tiny("unispeech_sat", "UniSpeechSatForCTC", _WAV),
    Tiny("wav2vec2_bert", "Wav2Vec2BertForCTC", {
        "vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44,
        "feature_projection_input_dim": 10, "conv_depthwise_kernel_size": 5, "left_max_position_embeddings": 6,
        "right_max_position_embeddings": 3,
    }, lambda model: {"input_features": noise(2, 30, 10)}),
    Tiny("wav2vec2_conformer", "Wav2Vec2ConformerForCTC", {
        **_WAV, "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 5, "max_source_positions": 60,
    }),
    Tiny("wav2vec2_conformer_rotary", "Wav2Vec2ConformerForCTC", {
        **_WAV, "position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 5,
    }),
    Tiny("wavlm", "WavLMForCTC", {**_WAV, "num_buckets": 8, "max_bucket_distance": 16}),
)  # fmt: skip
