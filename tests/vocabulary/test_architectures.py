"""Models that keep or use their vocabulary in a way of their own."""

import pytest
import tiny_models
import torch
import trained_tokenizers
import transformers
import vocabulary_models

from hf_compress import ShrinkError, prune_vocabulary

TEXTS = ["the quick fox jumps", "banana box", "judge my vow! caf\u00e9"]
TEXT_ENCODER = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}


def sizes(tokenizer, **changes):
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask")
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in kinds}
    return {**ids, "vocab_size": len(tokenizer), **changes}


def pruned_and_reloaded(model, tokenizer, folder, **options):
    small, small_tokenizer = prune_vocabulary(tiny_models.randomize(model), tokenizer, TEXTS, **options)
    small.save_pretrained(folder)
    loaded, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in small.named_parameters()
    }
    assert small.config.get_text_config().vocab_size == len(small_tokenizer) < len(tokenizer)
    return small, small_tokenizer


def test_an_untied_masked_language_model_has_a_bias_that_nothing_reads(tmp_path) -> None:
    tokenizer = trained_tokenizers.word_piece()
    config = transformers.BertConfig(**{**tiny_models.ENCODER, **sizes(tokenizer)}, tie_word_embeddings=False)
    small, small_tokenizer = pruned_and_reloaded(transformers.BertForMaskedLM(config), tokenizer, tmp_path)
    head = small.cls.predictions
    assert head.bias is not head.decoder.bias and head.bias.shape == head.decoder.bias.shape == (len(small_tokenizer),)


def test_a_model_that_pads_its_own_inputs(tmp_path) -> None:
    """Longformer pads ids to a multiple of its window, with a number that the config names."""
    tokenizer = trained_tokenizers.word_piece()
    config = transformers.LongformerConfig(
        **{**tiny_models.ENCODER, **sizes(tokenizer)}, attention_window=4, num_labels=3
    )  # fmt: skip
    pruned_and_reloaded(transformers.LongformerForSequenceClassification(config), tokenizer, tmp_path)


def test_a_decoder_of_speech_keeps_the_tokens_that_it_suppresses(tmp_path) -> None:
    tokenizer = trained_tokenizers.byte_fallback_bpe()
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=44, decoder_ffn_dim=52, max_target_positions=40, max_source_positions=20, num_mel_bins=8,
        decoder_start_token_id=2, suppress_tokens=[380, 381], **sizes(tokenizer),
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    small, small_tokenizer = pruned_and_reloaded(model, tokenizer, tmp_path)
    tokens = small_tokenizer.convert_ids_to_tokens(small.config.suppress_tokens)
    assert tokens == tokenizer.convert_ids_to_tokens([380, 381]) and small.config.suppress_tokens != [380, 381]


def test_a_model_that_sees_images_needs_inputs_without_them(tmp_path) -> None:
    tokenizer = trained_tokenizers.byte_fallback_bpe()
    image = len(tokenizer) - 1
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**{**tiny_models.DECODER, **sizes(tokenizer)}),
        vision_config=transformers.CLIPVisionConfig(**TEXT_ENCODER, image_size=16, patch_size=8),
        image_token_index=image,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ShrinkError, match="does not run on texts of the corpus"):
        prune_vocabulary(model, tokenizer, TEXTS)
    inputs = {"input_ids": torch.randint(5, 97, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    small, small_tokenizer = pruned_and_reloaded(model, tokenizer, tmp_path, example_inputs=inputs)
    assert small_tokenizer.convert_ids_to_tokens(small.config.image_token_id) == tokenizer.convert_ids_to_tokens(image)
    assert small.config.image_token_id < image


def test_a_model_that_looks_for_the_largest_id_is_refused() -> None:
    tokenizer = trained_tokenizers.byte_fallback_bpe()
    config = transformers.CLIPTextConfig(**TEXT_ENCODER, **sizes(tokenizer, eos_token_id=2))
    with pytest.raises(ShrinkError, match="argmax in its forward computes with token ids"):
        prune_vocabulary(transformers.CLIPTextModel(config), tokenizer, TEXTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype) -> None:
    tokenizer = trained_tokenizers.byte_fallback_bpe()
    small, _ = prune_vocabulary(vocabulary_models.llama(tokenizer).to(dtype), tokenizer, TEXTS)
    assert small.dtype is dtype


def test_several_ids_end_a_text() -> None:
    """As in Llama 3."""
    tokenizer = trained_tokenizers.byte_fallback_bpe()
    model = vocabulary_models.llama(tokenizer)
    model.config.eos_token_id = [tokenizer.eos_token_id, len(tokenizer) - 1]
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS)
    expected = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    assert small_tokenizer.convert_ids_to_tokens(small.config.eos_token_id) == expected
