"""Encoder-decoders of text."""

from typing import Any

from transformers import PreTrainedModel

from zoo.base import SPECIAL, Inputs, Tiny, table, text, tokens

_BART: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 52, "max_position_embeddings": 40,
}  # fmt: skip
_BART_SPECIAL = {**_BART, **SPECIAL, "decoder_start_token_id": 2}
_T5: dict[str, Any] = {
    "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_GATED = {**_T5, "d_kv": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_GEMMA_STACK: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 44, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12, **SPECIAL,
}  # fmt: skip


def translation(length: int = 11, target: int = 7) -> Inputs:
    """Return a source text and the beginning of its translation, of another length."""
    return {**text(length=length), "decoder_input_ids": tokens(length=target, seed=1), "use_cache": False}


def _classification(model: PreTrainedModel) -> Inputs:
    """BART's classification head reads the last end-of-sequence token: every row needs as many."""
    inputs = text()
    inputs["input_ids"][:, 7] = int(model.config.eos_token_id)  # type: ignore[arg-type]
    return {**inputs, "use_cache": False}


SEQ2SEQ = table(
    Tiny("bart", "BartForConditionalGeneration", _BART),
    Tiny("t5", "T5ForConditionalGeneration", _T5),
    Tiny("mt5", "MT5ForConditionalGeneration", _GATED),
)

SEQ2SEQ_VARIANTS = table(
    Tiny("bart_base", "BartModel", _BART),
    Tiny("bart_classify", "BartForSequenceClassification", {**_BART_SPECIAL, "num_labels": 3}, _classification),
    Tiny("bart_qa", "BartForQuestionAnswering", _BART),
    Tiny("bart_causal", "BartForCausalLM", {**_BART, "is_decoder": True, "is_encoder_decoder": False}),
    Tiny("bart_uneven", "BartForConditionalGeneration", {**_BART, "decoder_attention_heads": 2, "decoder_layers": 3}),
    Tiny("t5_base", "T5Model", _T5),
    Tiny("t5_encoder", "T5EncoderModel", _T5),
    Tiny("t5_classify", "T5ForSequenceClassification", {**_T5, "num_labels": 3, "eos_token_id": 2}, _classification),
    Tiny("t5_tokens", "T5ForTokenClassification", {**_T5, "num_labels": 3}),
    Tiny("t5_qa", "T5ForQuestionAnswering", _T5),
    Tiny("t5_gated_three_layers", "T5ForConditionalGeneration", {**_GATED, "num_layers": 3, "num_decoder_layers": 2}),
)

OTHER_SEQ2SEQ = table(
    Tiny("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", {
        **_BART_SPECIAL, "attention_type": "original_full",
    }),
    Tiny("blenderbot", "BlenderbotForConditionalGeneration", _BART_SPECIAL),
    Tiny("blenderbot_small", "BlenderbotSmallForConditionalGeneration", _BART_SPECIAL),
    Tiny("fsmt", "FSMTForConditionalGeneration", {
        **_BART_SPECIAL, "src_vocab_size": 97, "tgt_vocab_size": 89, "langs": ["en", "de"],
    }, lambda model: {**translation(), "decoder_input_ids": tokens(length=7, vocab_size=89, seed=1)}),
    Tiny("led", "LEDForConditionalGeneration", {
        **_BART_SPECIAL, "attention_window": 4, "max_encoder_position_embeddings": 40,
        "max_decoder_position_embeddings": 36,
    }, lambda model: translation(length=12)),
    Tiny("longt5_local", "LongT5ForConditionalGeneration", {
        **_T5, "local_radius": 3, "encoder_attention_type": "local",
    }),
    Tiny("longt5_global", "LongT5ForConditionalGeneration", {
        **_T5, "local_radius": 3, "global_block_size": 4, "encoder_attention_type": "transient-global",
    }),
    Tiny("m2m100", "M2M100ForConditionalGeneration", _BART_SPECIAL),
    Tiny("marian", "MarianMTModel", {**_BART_SPECIAL, "decoder_vocab_size": 97}),
    Tiny("mbart", "MBartForConditionalGeneration", _BART_SPECIAL),
    Tiny("mvp", "MvpForConditionalGeneration", _BART_SPECIAL),
    Tiny("nllb_moe", "NllbMoeForConditionalGeneration", {
        **_BART_SPECIAL, "num_experts": 3, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 20,
    }),
    Tiny("pegasus", "PegasusForConditionalGeneration", _BART_SPECIAL),
    Tiny("pegasus_x", "PegasusXForConditionalGeneration", {
        **_BART_SPECIAL, "num_global_tokens": 3, "block_size": 4, "stagger_local_blocks": True,
    }, lambda model: translation(length=12)),
    Tiny("plbart", "PLBartForConditionalGeneration", _BART_SPECIAL),
    Tiny("prophetnet", "ProphetNetForConditionalGeneration", {
        "vocab_size": 97, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 44,
        "decoder_ffn_dim": 52, "max_position_embeddings": 40, "ngram": 2, "num_buckets": 8,
        "relative_max_distance": 12, **SPECIAL, "decoder_start_token_id": 1,
    }, lambda model: translation()),
    Tiny("switch_transformers", "SwitchTransformersForConditionalGeneration", {
        **_T5, "num_experts": 3, "expert_capacity": 20, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    }),
    Tiny("t5gemma", "T5GemmaForConditionalGeneration", {
        "encoder": _GEMMA_STACK,
        "decoder": {**_GEMMA_STACK, "intermediate_size": 52, "cross_attention_hidden_size": 32}, "vocab_size": 97,
        **SPECIAL,
    }, lambda model: translation()),
    Tiny("umt5", "UMT5ForConditionalGeneration", _GATED),
)  # fmt: skip
