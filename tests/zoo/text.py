"""Encoders of text."""

from transformers import PreTrainedModel

from zoo.base import ENCODER, SPECIAL, Inputs, Tiny, table, text

LABELS = {**ENCODER, "num_labels": 3}
SMALL = {**LABELS, "embedding_size": 16}

_DISTILBERT = {
    "vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 44, "max_position_embeddings": 40,
}  # fmt: skip
_DEBERTA = {**LABELS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_MODERNBERT = {
    **LABELS, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 8,
}  # fmt: skip


def _unpadded(model: PreTrainedModel) -> Inputs:
    """Without padding no mask reaches the attention, which could not have one over its landmarks."""
    inputs = text(length=12)
    inputs["attention_mask"][:] = 1
    return inputs


TEXT = table(
    Tiny("bert", "BertForSequenceClassification", LABELS),
    Tiny("roberta", "RobertaForSequenceClassification", LABELS),
    Tiny("distilbert", "DistilBertForSequenceClassification", {**_DISTILBERT, "num_labels": 3}),
    Tiny("albert", "AlbertForSequenceClassification", SMALL),
    Tiny("electra", "ElectraForSequenceClassification", SMALL),
    Tiny("mpnet", "MPNetForSequenceClassification", LABELS),
    Tiny("deberta_v2", "DebertaV2ForSequenceClassification", {**_DEBERTA, "position_buckets": 8}),
    Tiny("modernbert", "ModernBertForSequenceClassification", _MODERNBERT),
)

TEXT_VARIANTS = table(
    Tiny("bert_mlm", "BertForMaskedLM", ENCODER),
    Tiny("bert_base", "BertModel", ENCODER),
    Tiny("bert_pretraining", "BertForPreTraining", ENCODER),
    Tiny("bert_tokens", "BertForTokenClassification", LABELS),
    Tiny("bert_qa", "BertForQuestionAnswering", ENCODER),
    Tiny("bert_three_layers", "BertForSequenceClassification", {**LABELS, "num_hidden_layers": 3}),
    Tiny("bert_decoder", "BertLMHeadModel", {**ENCODER, "is_decoder": True}),
    Tiny("roberta_mlm", "RobertaForMaskedLM", ENCODER),
    Tiny("distilbert_qa", "DistilBertForQuestionAnswering", _DISTILBERT),
    Tiny("albert_mlm", "AlbertForMaskedLM", {**ENCODER, "embedding_size": 16}),
    Tiny("albert_groups", "AlbertModel", {**ENCODER, "embedding_size": 16, "num_hidden_groups": 2}),
    Tiny("electra_discriminator", "ElectraForPreTraining", {**ENCODER, "embedding_size": 16}),
    Tiny("deberta_v2_shared_conv", "DebertaV2Model", {
        **_DEBERTA, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3,
        "position_biased_input": False,
    }),
    Tiny("modernbert_mlm", "ModernBertForMaskedLM", _MODERNBERT),
)  # fmt: skip

OTHER_TEXT = table(
    Tiny("bert_generation", "BertGenerationEncoder", ENCODER),
    Tiny("big_bird", "BigBirdModel", {**ENCODER, "attention_type": "original_full"}),
    Tiny("big_bird_sparse", "BigBirdModel", {
        **ENCODER, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1,
    }, lambda model: text(length=32)),
    Tiny("camembert", "CamembertForSequenceClassification", LABELS),
    Tiny("canine", "CanineModel", {
        **{key: value for key, value in ENCODER.items() if key != "vocab_size"}, "max_position_embeddings": 64,
        "num_hash_functions": 2, "num_hash_buckets": 37, "local_transformer_stride": 8, "downsampling_rate": 4,
    }, lambda model: text(length=32)),
    Tiny("convbert", "ConvBertModel", {**ENCODER, "embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 2}),
    Tiny("data2vec_text", "Data2VecTextModel", ENCODER),
    Tiny("deberta", "DebertaForSequenceClassification", {**_DEBERTA, "max_relative_positions": 8}),
    Tiny("ernie", "ErnieForSequenceClassification", {**LABELS, "use_task_id": True, "task_type_vocab_size": 3}),
    Tiny("esm", "EsmForMaskedLM", {**ENCODER, **SPECIAL, "mask_token_id": 4, "position_embedding_type": "rotary"}),
    Tiny("eurobert", "EuroBertModel", {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "mask_token_id": 4}),
    Tiny("flaubert", "FlaubertModel", {
        "vocab_size": 97, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40,
    }),
    Tiny("fnet", "FNetForSequenceClassification", {**LABELS, "tpu_short_seq_length": 11}),
    Tiny("funnel", "FunnelForSequenceClassification", {
        "vocab_size": 97, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8,
        "d_inner": 44, "num_labels": 3,
    }),
    Tiny("layoutlm", "LayoutLMForSequenceClassification", {**LABELS, "max_2d_position_embeddings": 20}),
    Tiny("lilt", "LiltModel", {
        **ENCODER, "hidden_size": 24, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 20,
    }),
    Tiny("longformer", "LongformerForSequenceClassification", {**LABELS, "attention_window": [4, 4]},
         lambda model: text(length=12)),
    Tiny("luke", "LukeModel", {**ENCODER, "entity_vocab_size": 13, "entity_emb_size": 12}),
    Tiny("markuplm", "MarkupLMForSequenceClassification", {
        **LABELS, "max_tree_id_unit_embeddings": 14, "max_xpath_tag_unit_embeddings": 15,
        "max_xpath_subs_unit_embeddings": 17, "tag_pad_id": 13, "subs_pad_id": 16, "xpath_unit_hidden_size": 6,
        "max_depth": 5,
    }),
    Tiny("megatron_bert", "MegatronBertForSequenceClassification", LABELS),
    Tiny("mobilebert", "MobileBertForSequenceClassification", {
        **LABELS, "embedding_size": 20, "intra_bottleneck_size": 16, "num_feedforward_networks": 2,
        "true_hidden_size": 16,
    }),
    Tiny("mra", "MraModel", {**ENCODER, "block_per_row": 2}, lambda model: text(length=32)),
    Tiny("nystromformer", "NystromformerForSequenceClassification", {
        **LABELS, "num_landmarks": 4, "segment_means_seq_len": 12, "conv_kernel_size": 3,
    }, _unpadded),
    Tiny("nomic_bert", "NomicBertModel", ENCODER),
    Tiny("perceiver", "PerceiverForMaskedLM", {
        "vocab_size": 97, "max_position_embeddings": 40, "d_model": 16, "d_latents": 24, "num_latents": 5,
        "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
        "num_cross_attention_heads": 2, "qk_channels": 16, "v_channels": 24,
    }, lambda model: {"inputs": text(length=40)["input_ids"]}),
    Tiny("rembert", "RemBertModel", {**ENCODER, "input_embedding_size": 12, "output_embedding_size": 20}),
    Tiny("roberta_prelayernorm", "RobertaPreLayerNormForSequenceClassification", LABELS),
    Tiny("roc_bert", "RoCBertModel", {
        **ENCODER, "pronunciation_vocab_size": 17, "shape_vocab_size": 19, "pronunciation_embed_dim": 10,
        "shape_embed_dim": 14,
    }),
    Tiny("roformer", "RoFormerForSequenceClassification", {**SMALL, "rotary_value": False}),
    Tiny("splinter", "SplinterForQuestionAnswering", {**ENCODER, "question_token_id": 4}),
    Tiny("squeezebert", "SqueezeBertForSequenceClassification", {
        **LABELS, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "post_attention_groups": 1,
        "intermediate_groups": 2, "output_groups": 2,
    }),
    Tiny("squeezebert_one_group", "SqueezeBertForSequenceClassification", {
        **LABELS, "embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1,
        "intermediate_groups": 1, "output_groups": 1,
    }),
    Tiny("tapas", "TapasModel", {
        **ENCODER, "type_vocab_sizes": [3, 5, 5, 2, 5, 5, 4], "max_num_rows": 6, "max_num_columns": 6,
    }),
    Tiny("xlm", "XLMForSequenceClassification", {
        "vocab_size": 97, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 40, "num_labels": 3,
    }),
    Tiny("xlm_roberta", "XLMRobertaForSequenceClassification", LABELS),
    Tiny("xlm_roberta_xl", "XLMRobertaXLForSequenceClassification", LABELS),
    Tiny("xlnet", "XLNetForSequenceClassification", {
        "vocab_size": 97, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 44, "num_labels": 3,
    }),
    Tiny("xmod", "XmodModel", {**ENCODER, "languages": ["en_XX", "de_DE"], "default_language": "en_XX"}),
    Tiny("yoso", "YosoModel", {**ENCODER, "use_expectation": True}),
    Tiny("jina_v3", "JinaEmbeddingsV3Model", ENCODER),
    Tiny("ibert", "IBertModel", ENCODER),
)  # fmt: skip
