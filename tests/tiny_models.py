"""Tiny random models of many architectures. All sizes differ, so that a mix-up of dimensions shows."""

import torch
import transformers
from transformers import PreTrainedModel

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 40,
    "vocab_size": 97,
}
DECODER = {**ENCODER, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give every parameter, biases and norms too, values that matter, so that equalities are no accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise * 0.15)
    return model.eval()


def bert(num_labels: int = 3, **changes: object) -> PreTrainedModel:
    config = transformers.BertConfig(**{**ENCODER, "num_labels": num_labels, **changes})
    return randomize(transformers.BertForSequenceClassification(config))


def bert_mlm() -> PreTrainedModel:
    return randomize(transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)))


def roberta() -> PreTrainedModel:
    config = transformers.RobertaConfig(**ENCODER, num_labels=3)
    return randomize(transformers.RobertaForSequenceClassification(config))


def distilbert() -> PreTrainedModel:
    config = transformers.DistilBertConfig(
        vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=44, max_position_embeddings=40, num_labels=3
    )
    return randomize(transformers.DistilBertForSequenceClassification(config))


def albert() -> PreTrainedModel:
    config = transformers.AlbertConfig(**ENCODER, embedding_size=16, num_labels=3)
    return randomize(transformers.AlbertForSequenceClassification(config))


def electra() -> PreTrainedModel:
    config = transformers.ElectraConfig(**ENCODER, embedding_size=16, num_labels=3)
    return randomize(transformers.ElectraForSequenceClassification(config))


def deberta_v2() -> PreTrainedModel:
    config = transformers.DebertaV2Config(
        **ENCODER, num_labels=3, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    )
    return randomize(transformers.DebertaV2ForSequenceClassification(config))


def modernbert() -> PreTrainedModel:
    config = transformers.ModernBertConfig(
        **ENCODER, **SPECIAL, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=8,
        num_labels=3,
    )  # fmt: skip
    return randomize(transformers.ModernBertForSequenceClassification(config))


def gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=40, n_embd=32, n_layer=2, n_head=4, n_inner=44, bos_token_id=1, eos_token_id=2
    )
    return randomize(transformers.GPT2LMHeadModel(config))


def gpt_neox() -> PreTrainedModel:
    return randomize(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**ENCODER)))


def llama() -> PreTrainedModel:
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)))


def phi3() -> PreTrainedModel:
    return randomize(transformers.Phi3ForCausalLM(transformers.Phi3Config(**DECODER, **SPECIAL)))


def bart() -> PreTrainedModel:
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=44, decoder_ffn_dim=52, max_position_embeddings=40,
    )  # fmt: skip
    return randomize(transformers.BartForConditionalGeneration(config))


def t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return randomize(transformers.T5ForConditionalGeneration(config))


def vit() -> PreTrainedModel:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=44, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return randomize(transformers.ViTForImageClassification(config))


def mpnet() -> PreTrainedModel:
    return randomize(transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**ENCODER, num_labels=3)))


def opt() -> PreTrainedModel:
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=32, word_embed_proj_dim=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=44,
        max_position_embeddings=40,
    )  # fmt: skip
    return randomize(transformers.OPTForCausalLM(config))


def mixtral() -> PreTrainedModel:
    config = transformers.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2)
    return randomize(transformers.MixtralForCausalLM(config))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


