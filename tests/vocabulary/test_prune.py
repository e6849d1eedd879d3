import copy
import json

import pytest
import tiny_models
import torch
import trained_tokenizers
import transformers
import vocabulary_models
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_compress import ShrinkError, TargetError, dimension_groups, make_example_inputs, prune_vocabulary, shrink
from hf_compress.export.quantized import export_quantized

TEXTS = ["the quick fox jumps", "banana box", "judge my vow!"]
CASES = [
    (vocabulary_models.bert, trained_tokenizers.word_piece),
    (vocabulary_models.bert_mlm, trained_tokenizers.word_piece),
    (vocabulary_models.bert, trained_tokenizers.word_level),
    (vocabulary_models.roberta, trained_tokenizers.word_piece),
    (vocabulary_models.gpt2, trained_tokenizers.byte_level_bpe),
    (vocabulary_models.llama, trained_tokenizers.byte_fallback_bpe),
    (vocabulary_models.llama, trained_tokenizers.suffix_bpe),
    (vocabulary_models.t5, trained_tokenizers.unigram),
    (vocabulary_models.t5, trained_tokenizers.unigram_with_bytes),
    (vocabulary_models.bart, trained_tokenizers.byte_fallback_bpe),
]


@torch.no_grad()
def outputs(model, **inputs):
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model.eval()(**inputs).logits


def encoded(tokenizer, text):
    return {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}


def old_ids(tokenizer, small_tokenizer):
    """Old id by new id, by token."""
    old, new = tokenizer.get_vocab(), small_tokenizer.get_vocab()
    return torch.tensor([old[token] for token in sorted(new, key=new.__getitem__)])


@pytest.mark.parametrize(("build", "make"), CASES)
def test_tokens_and_logits_stay(build, make) -> None:
    tokenizer = make()
    model = build(tokenizer)
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS, verify=False)
    assert small.config.vocab_size == len(small_tokenizer) < len(tokenizer)
    rows = old_ids(tokenizer, small_tokenizer)
    for text in TEXTS:
        before, after = tokenizer(text), small_tokenizer(text)
        assert before.tokens() == after.tokens()
        assert small_tokenizer.decode(after["input_ids"]) == tokenizer.decode(before["input_ids"])
        expected = outputs(model, **encoded(tokenizer, text))
        actual = outputs(small, **encoded(small_tokenizer, text))
        if expected.shape[-1] == len(tokenizer):
            expected = expected[..., rows]
        assert tiny_models.relative_error(expected, actual) < 1e-6


@pytest.mark.parametrize(("build", "make"), CASES)
def test_everything_that_names_a_token_follows(build, make) -> None:
    tokenizer = make()
    model = build(tokenizer)
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS)
    names = [name for name in model.config.to_dict() if name.endswith("_token_id")]
    assert names
    pairs = [(small.config, model.config)]
    if model.can_generate():
        pairs.append((small.generation_config, model.generation_config))
    for config, before in pairs:
        for name in names:
            old, new = getattr(before, name, None), getattr(config, name, None)
            assert tokenizer.convert_ids_to_tokens(old or 0) == small_tokenizer.convert_ids_to_tokens(new or 0), name
    assert small_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    pads = {m.padding_idx for m in small.modules() if isinstance(m, nn.Embedding)} - {None}
    assert pads <= {small_tokenizer.pad_token_id}
    for module in small.modules():
        assert getattr(module, "vocab_size", len(small_tokenizer)) == len(small_tokenizer)


def test_ids_far_behind_in_configs_are_rewritten() -> None:
    """GPT-2's special token is its last one, so that its id cannot stay."""
    tokenizer = trained_tokenizers.byte_level_bpe()
    model = vocabulary_models.gpt2(tokenizer)
    end, last = tokenizer.eos_token_id, tokenizer.convert_ids_to_tokens(len(tokenizer) - 2)
    token = tokenizer.convert_tokens_to_ids(last)
    model.config.eos_token_id, model.config.forced_decoder_ids = [end, token], [[1, token]]
    model.generation_config.update(
        eos_token_id=[end, token], suppress_tokens=[token], bad_words_ids=[[token, end]],
        sequence_bias=[[[token, end], -2.5]],
    )  # fmt: skip
    small, small_tokenizer = prune_vocabulary(model, tokenizer, ["banana"])
    new_end, new = small_tokenizer.eos_token_id, small_tokenizer.convert_tokens_to_ids(last)
    assert (new_end, new) != (end, token) and new_end == len(small_tokenizer) - 1
    assert small.config.eos_token_id == small.generation_config.eos_token_id == [new_end, new]
    assert small.generation_config.suppress_tokens == [new]
    assert small.generation_config.bad_words_ids == [[new, new_end]]
    assert small.config.forced_decoder_ids == [[1, new]]
    assert small.generation_config.sequence_bias == [[[new, new_end], -2.5]]
    assert model.config.eos_token_id == [end, token]


def test_generation_gives_the_same_tokens() -> None:
    tokenizer = trained_tokenizers.byte_level_bpe()
    model = vocabulary_models.gpt2(tokenizer)
    prompt = encoded(tokenizer, TEXTS[0])
    said = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    text = tokenizer.decode(said)
    keep = set(tokenizer.convert_ids_to_tokens(said))
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS, keep_tokens=keep)
    again = small.generate(**encoded(small_tokenizer, TEXTS[0]), max_new_tokens=8, do_sample=False)[0]
    assert small_tokenizer.decode(again) == text


@pytest.mark.parametrize("tied", [True, False])
def test_tying_stays_and_the_original_is_untouched(tied) -> None:
    tokenizer = trained_tokenizers.byte_fallback_bpe()
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template = 77, "left", "{{ messages }}"
    model = vocabulary_models.llama(tokenizer, tied=tied).train()
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    generation, backend = model.generation_config.to_dict(), tokenizer.backend_tokenizer.to_str()
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS)
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert small.lm_head.weight.shape == small.model.embed_tokens.weight.shape == (len(small_tokenizer), 32)
    assert (small.lm_head.out_features, small.model.embed_tokens.num_embeddings) == (len(small_tokenizer),) * 2
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
    assert tokenizer.backend_tokenizer.to_str() == backend and model.training and not small.training
    settings_of = (small_tokenizer.model_max_length, small_tokenizer.padding_side, small_tokenizer.chat_template)
    assert settings_of == (77, "left", "{{ messages }}")


def test_the_result_trains() -> None:
    tokenizer = trained_tokenizers.word_piece()
    small, small_tokenizer = prune_vocabulary(vocabulary_models.bert_mlm(tokenizer), tokenizer, TEXTS)
    inputs = encoded(small_tokenizer, TEXTS[0])
    small.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in small.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []


def test_shrinking_and_pruning_the_vocabulary_combine() -> None:
    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer)
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS)
    masks = {g.name: torch.arange(44) < 20 for g in dimension_groups(small) if g.kind == "ffn"}
    both = shrink(small, masks)
    assert (both.config.intermediate_size, both.config.vocab_size) == (20, len(small_tokenizer))
    again, _ = prune_vocabulary(both, small_tokenizer, TEXTS[:1])
    assert again.config.vocab_size < both.config.vocab_size


def test_rows_that_no_token_has_go() -> None:
    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer, rows=192)
    small, small_tokenizer = prune_vocabulary(model, tokenizer, trained_tokenizers.SENTENCES)
    assert small.config.vocab_size == len(small_tokenizer) <= len(tokenizer)


def test_a_row_that_a_config_names_stays() -> None:
    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer, rows=192)
    model.config.sep_token_id = 180
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS)
    assert small.config.sep_token_id == len(small_tokenizer) == small.config.vocab_size - 1
    row = small.get_input_embeddings().weight[-1]
    assert torch.equal(row, model.get_input_embeddings().weight[180])


def test_multiple_of_adds_tokens_then_rows() -> None:
    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer, rows=192)
    plain = prune_vocabulary(model, tokenizer, TEXTS)[0].config.vocab_size
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS, multiple_of=64)
    assert small.config.vocab_size == len(small_tokenizer) == -(-plain // 64) * 64
    assert small_tokenizer(TEXTS[0]).tokens() == tokenizer(TEXTS[0]).tokens()
    padded, all_tokens = prune_vocabulary(model, tokenizer, trained_tokenizers.SENTENCES, multiple_of=160)
    assert (padded.config.vocab_size, len(all_tokens)) == (160, len(tokenizer))
    with pytest.raises(ShrinkError, match="rounded up to a multiple of 512"):
        prune_vocabulary(model, tokenizer, TEXTS, multiple_of=512)


def test_min_count_and_keep_tokens() -> None:
    tokenizer = trained_tokenizers.word_level()
    model = vocabulary_models.bert(tokenizer)
    texts = ["the fox the box", "my box"]
    _, small = prune_vocabulary(model, tokenizer, texts, min_count=2, keep_tokens=["quick"])
    assert set(small.get_vocab()) == {*tokenizer.all_special_tokens, "the", "box", "quick"}
    with pytest.raises(TargetError, match="no token 'qick'"):
        prune_vocabulary(model, tokenizer, texts, keep_tokens=["qick"])
    with pytest.raises(ShrinkError, match=r"keep_tokens='the': pass a list"):
        prune_vocabulary(model, tokenizer, texts, keep_tokens="the")


def test_other_texts_in_the_same_characters_are_spelled() -> None:
    tokenizer = trained_tokenizers.word_piece()
    _, small = prune_vocabulary(vocabulary_models.bert(tokenizer), tokenizer, ["the fox"])
    assert small.tokenize("hot foxet") == ["h", "##o", "##t", "fox", "##e", "##t"]
    assert small.tokenize("zebra") == ["[UNK]"]


def test_pairs_generators_and_columns() -> None:
    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer)
    expected = prune_vocabulary(model, tokenizer, ["the fox", "my box"])[1].get_vocab()
    columns = Dataset.from_dict({"text": ["the fox", "my box"]})
    generator = (text for text in ["the fox", "my box"])
    for texts in ([("the fox", "my box")], generator, columns["text"], [["the", "fox my box"]]):
        assert prune_vocabulary(model, tokenizer, texts)[1].get_vocab() == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "texts is empty"),
        (iter(()), "texts is empty"),
        ("the fox", "texts is a str; allowed: an iterable of strings"),
        (["fox", 3], r"texts\[1\] is '3' \(int\)"),
        ([{"text": "fox"}], r"texts\[0\] is .* \(dict\).*dataset\[\"text\"\]"),
        ([("a", "b", "c")], r"texts\[0\] is"),
        (3, "texts is a int"),
        (["fox", "\ud800 fox"], r"texts\[1\] cannot be written as UTF-8 \(surrogates not allowed\)"),
        ([""], "no token but added ones occurs 1 times in the 1 texts"),
    ],
)
def test_texts_that_are_none(texts, message) -> None:
    tokenizer = trained_tokenizers.word_piece()
    with pytest.raises(ShrinkError, match=message):
        prune_vocabulary(vocabulary_models.bert(tokenizer), tokenizer, texts)


@pytest.mark.parametrize("setting", [{"min_count": 0}, {"min_count": True}, {"multiple_of": 0}, {"multiple_of": 1.5}])
def test_settings_out_of_range(setting) -> None:
    tokenizer = trained_tokenizers.word_piece()
    with pytest.raises(ShrinkError, match=r"allowed: an int >= 1"):
        prune_vocabulary(vocabulary_models.bert(tokenizer), tokenizer, TEXTS, **setting)


def test_a_tokenizer_of_another_model() -> None:
    tokenizer = trained_tokenizers.word_piece()
    with pytest.raises(ShrinkError, match=r"has only 97 rows. It is the tokenizer of another model"):
        prune_vocabulary(tiny_models.bert(), tokenizer, TEXTS)


def test_a_config_that_says_another_size() -> None:
    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer)
    model.config.vocab_size = 160
    with pytest.raises(ShrinkError, match=r"differs in: .*word_embeddings.weight\)\. .*model.resize_token_embeddings"):
        prune_vocabulary(model, tokenizer, TEXTS)


def test_tokenizers_that_are_not_supported() -> None:
    model = tiny_models.bert()
    slow = transformers.ByT5Tokenizer()
    with pytest.raises(ShrinkError, match="ByT5Tokenizer, which has no backend_tokenizer"):
        prune_vocabulary(model, slow, TEXTS)
    dropping = trained_tokenizers.byte_level_bpe()
    dropping.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(ShrinkError, match=r"dropout=0.1.* = None first"):
        prune_vocabulary(vocabulary_models.gpt2(dropping), dropping, TEXTS)


def test_nothing_to_remove() -> None:
    tokenizer = trained_tokenizers.word_level()
    with pytest.raises(ShrinkError, match="nothing would be removed"):
        prune_vocabulary(vocabulary_models.bert(tokenizer), tokenizer, trained_tokenizers.SENTENCES)


def test_models_that_are_compressed_or_wrapped(tmp_path) -> None:
    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer)
    with pytest.raises(ShrinkError, match="PreTrainedModel"):
        prune_vocabulary(nn.Linear(2, 2), tokenizer, TEXTS)
    adapted = vocabulary_models.bert(tokenizer)
    outer = get_peft_model(adapted, LoraConfig(target_modules=["query"]))
    with pytest.raises(ShrinkError, match=r"PeftModel; allowed: .* Merge and unload PEFT adapters first"):
        prune_vocabulary(outer, tokenizer, TEXTS)
    with pytest.raises(ShrinkError, match=r"base_layer.*\. Merge and unload adapters first"):
        prune_vocabulary(adapted, tokenizer, TEXTS)
    masks = {g.name: torch.arange(44) < 20 for g in dimension_groups(model) if g.kind == "ffn"}
    uneven = shrink(model, dict(list(masks.items())[:1]))
    with pytest.raises(ShrinkError, match="before anything that makes layers uneven"):
        prune_vocabulary(uneven, tokenizer, TEXTS)
    pytest.importorskip("torchao")
    export_quantized(model, tmp_path, verify=False)
    quantized = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ShrinkError, match="quantized already"):
        prune_vocabulary(quantized, tokenizer, TEXTS)


def test_models_without_or_with_several_vocabularies() -> None:
    tokenizer = trained_tokenizers.word_piece()
    with pytest.raises(ShrinkError, match="no vocabulary to prune"):
        prune_vocabulary(tiny_models.vit(), tokenizer, TEXTS)
    configs = [
        transformers.BertConfig(
            **{**tiny_models.ENCODER, "vocab_size": len(tokenizer)}, is_decoder=decoder, add_cross_attention=decoder
        )
        for decoder in (False, True)
    ]
    both = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*configs))
    both.config.pad_token_id, both.config.decoder_start_token_id = 0, 2
    with pytest.raises(ShrinkError, match=r"several vocabularies: encoder.* decoder"):
        prune_vocabulary(both, tokenizer, TEXTS)


def test_ids_that_are_computed_with_are_refused() -> None:
    class Odd(transformers.BertForSequenceClassification):
        def forward(self, input_ids, attention_mask=None):
            shift = (input_ids.cumsum(-1) % 3).unsqueeze(-1)
            embedded = self.bert.embeddings(input_ids) + shift
            return super().forward(inputs_embeds=embedded, attention_mask=attention_mask)

    tokenizer = trained_tokenizers.word_piece()
    model = tiny_models.randomize(Odd(vocabulary_models.bert(tokenizer).config))
    with pytest.raises(ShrinkError, match=r"cumsum in .* computes with token ids"):
        prune_vocabulary(model, tokenizer, TEXTS)


def test_an_id_in_the_code_is_refused_if_it_moves() -> None:
    tokenizer = trained_tokenizers.byte_level_bpe()
    number = len(tokenizer) - 2

    class HardCoded(transformers.GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids, attention_mask=attention_mask).logits
            return transformers.modeling_outputs.CausalLMOutput(logits=logits + (input_ids == number)[..., None])

    model = tiny_models.randomize(HardCoded(vocabulary_models.gpt2(tokenizer).config))
    keep = tokenizer.convert_ids_to_tokens([number])
    with pytest.raises(
        ShrinkError, match=rf"compares token ids with {number} .* no config names it, and its new id is"
    ):
        prune_vocabulary(model, tokenizer, TEXTS, keep_tokens=keep)
    with pytest.raises(
        ShrinkError, match=rf"compares token ids with {number} .* no config names it, and this token was dropped"
    ):
        prune_vocabulary(model, tokenizer, TEXTS)


def test_positions_that_count_from_the_padding_id() -> None:
    """RoBERTa's position of the first token is the padding id plus one."""
    tokenizer = trained_tokenizers.byte_level_bpe()  # its padding token is the last one
    config = transformers.RobertaConfig(
        **{**tiny_models.ENCODER, "vocab_size": len(tokenizer), "max_position_embeddings": 400},
        pad_token_id=tokenizer.pad_token_id,
    )
    model = tiny_models.randomize(transformers.RobertaForSequenceClassification(config))
    with pytest.raises(ShrinkError, match=r"position_embeddings counts from the padding token's id 340"):
        prune_vocabulary(model, tokenizer, TEXTS)


def test_verification_catches_wrong_rows(monkeypatch) -> None:
    from hf_compress.vocabulary import cut as cutting

    tokenizer = trained_tokenizers.word_piece()
    model = vocabulary_models.bert(tokenizer)
    original = cutting.slice_in_place

    def swapped(small, plan):
        original(small, plan)
        weight = small.get_input_embeddings().weight.data
        weight[[2, 3]] = weight[[3, 2]]

    monkeypatch.setattr(cutting, "slice_in_place", swapped)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ShrinkError, match="differs from the original by"):
        prune_vocabulary(model, tokenizer, TEXTS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_verification_catches_other_tokens(monkeypatch) -> None:
    from hf_compress.vocabulary.closure import Closure

    tokenizer = trained_tokenizers.byte_level_bpe()
    monkeypatch.setattr(Closure, "_with_parts", lambda self, tokens: tokens)
    with pytest.raises(ShrinkError, match=r"was \[.*\] and is now \["):
        prune_vocabulary(vocabulary_models.gpt2(tokenizer), tokenizer, TEXTS)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=st.sampled_from(CASES),
    texts=st.lists(st.text("abcdefoqu \u00e9!", min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=4),
)
def test_random_corpora(case, texts) -> None:
    build, make = case
    tokenizer = make()
    try:
        small, small_tokenizer = prune_vocabulary(build(tokenizer), tokenizer, texts)
    except ShrinkError as error:  # a word-level vocabulary may know none of the words
        assert "no token but added ones" in str(error)
        return
    assert small.get_input_embeddings().num_embeddings == len(small_tokenizer)
    for text in texts:
        assert small_tokenizer.tokenize(text) == tokenizer.tokenize(text)


def test_the_stored_form_is_plain(tmp_path) -> None:
    tokenizer = trained_tokenizers.unigram()
    small, small_tokenizer = prune_vocabulary(vocabulary_models.t5(tokenizer), tokenizer, TEXTS)
    small_tokenizer.save_pretrained(tmp_path / "pruned")
    tokenizer.save_pretrained(tmp_path / "original")
    names, configs = zip(
        *(
            ({path.name for path in folder.iterdir()}, json.loads((folder / "tokenizer_config.json").read_text()))
            for folder in (tmp_path / "pruned", tmp_path / "original")
        ),
        strict=True,
    )
    assert names[0] == names[1] and configs[0] == configs[1]
    assert make_example_inputs(small)["input_ids"].max() < len(small_tokenizer)
