"""Tiny models for a tokenizer, whose configs name its special tokens."""

import tiny_models
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask")
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}


def _sizes(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> dict[str, object]:
    return {"vocab_size": rows or len(tokenizer), **_special(tokenizer)}


def bert(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> PreTrainedModel:
    config = transformers.BertConfig(**{**tiny_models.ENCODER, **_sizes(tokenizer, rows)}, num_labels=3)
    return tiny_models.randomize(transformers.BertForSequenceClassification(config))


def bert_mlm(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> PreTrainedModel:
    config = transformers.BertConfig(**{**tiny_models.ENCODER, **_sizes(tokenizer, rows)})
    return tiny_models.randomize(transformers.BertForMaskedLM(config))


def roberta(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> PreTrainedModel:
    config = transformers.RobertaConfig(**{**tiny_models.ENCODER, **_sizes(tokenizer, rows)}, num_labels=3)
    return tiny_models.randomize(transformers.RobertaForSequenceClassification(config))


def gpt2(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> PreTrainedModel:
    config = transformers.GPT2Config(
        n_positions=40, n_embd=32, n_layer=2, n_head=4, n_inner=44, **_sizes(tokenizer, rows)
    )  # fmt: skip
    return tiny_models.randomize(transformers.GPT2LMHeadModel(config))


def llama(tokenizer: PreTrainedTokenizerBase, rows: int | None = None, *, tied: bool = False) -> PreTrainedModel:
    config = transformers.LlamaConfig(
        **{**tiny_models.DECODER, **_sizes(tokenizer, rows)}, tie_word_embeddings=tied
    )  # fmt: skip
    return tiny_models.randomize(transformers.LlamaForCausalLM(config))


def t5(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> PreTrainedModel:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=44, num_layers=2, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id, **_sizes(tokenizer, rows),
    )  # fmt: skip
    return tiny_models.randomize(transformers.T5ForConditionalGeneration(config))


def bart(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> PreTrainedModel:
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=44, decoder_ffn_dim=52, max_position_embeddings=40, forced_eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id, **_sizes(tokenizer, rows),
    )  # fmt: skip
    model = tiny_models.randomize(transformers.BartForConditionalGeneration(config))
    model.final_logits_bias.normal_()
    return model
