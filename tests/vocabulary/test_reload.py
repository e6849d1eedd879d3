"""What a user does: save here, load there, with nothing but transformers."""

import json
import os
import subprocess
import sys

import pytest
import tiny_models
import torch
import trained_tokenizers
import transformers
import vocabulary_models
from safetensors.torch import load_file
from tokenizers import processors

from hf_compress import prune_vocabulary

TEXTS = ["the quick fox jumps", "banana box", "judge my vow! caf\u00e9"]
LOAD = """
import json
import sys
import torch
import transformers
from safetensors.torch import save_file
torch.set_num_threads(1)
scratch, cases = sys.argv[1], json.loads(sys.argv[2])
report = {}
for name, (folder, auto, texts) in cases.items():
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder)
    inputs = {"input_ids": torch.tensor([tokenizer(texts[0])["input_ids"]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        save_file({"logits": model(**inputs).logits}, f"{scratch}/{name}.safetensors")
    report[name] = {
        "class": type(tokenizer).__name__,
        "tokens": [tokenizer(text).tokens() for text in texts],
        "pairs": tokenizer(texts[0], texts[1]).tokens(),
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts],
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "kept": [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template],
        "vocab": tokenizer.get_vocab(),
        "pad": [tokenizer.pad_token_id, model.config.pad_token_id],
    }
report["modules"] = sorted(sys.modules)
with open(scratch + "/report.json", "w") as file:
    json.dump(report, file)
"""


def section(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def pieces(*first):
    rest = [(piece, score) for piece, score in section(trained_tokenizers.unigram())["vocab"] if score < 0]
    return [*((piece, 0.0) for piece in first), *rest]


def stock_bert():
    return transformers.BertTokenizer(vocab=section(trained_tokenizers.word_piece())["vocab"])


def stock_gpt2():
    model = section(trained_tokenizers.byte_level_bpe())
    vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges, pad_token="<|endoftext|>")


def stock_llama():
    model = section(trained_tokenizers.byte_fallback_bpe())
    first = ["<unk>", "<s>", "</s>"]
    tokens = first + [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in first]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)


def stock_t5():
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in range(3, -1, -1)]
    return transformers.T5Tokenizer(vocab=pieces("<pad>", "</s>", "<unk>") + sentinels, extra_ids=4)


def stock_xlm_roberta():
    return transformers.XLMRobertaTokenizer(vocab=[*pieces("<s>", "<pad>", "</s>", "<unk>"), ("<mask>", 0.0)])


SEQUENCE, CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
CASES = {
    "bert": (stock_bert, vocabulary_models.bert, SEQUENCE),
    "gpt2": (stock_gpt2, vocabulary_models.gpt2, CAUSAL),
    "llama": (stock_llama, vocabulary_models.llama, CAUSAL),
    "t5": (stock_t5, vocabulary_models.t5, "AutoModelForSeq2SeqLM"),
    "xlm_roberta": (stock_xlm_roberta, vocabulary_models.roberta, SEQUENCE),
    "bart": (trained_tokenizers.byte_fallback_bpe, vocabulary_models.bart, "AutoModelForSeq2SeqLM"),
    "mlm": (trained_tokenizers.word_piece, vocabulary_models.bert_mlm, "AutoModelForMaskedLM"),
}


def prepared(folder, name):
    make, build, auto = CASES[name]
    tokenizer = make()
    tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template = 33, "left", "{{ messages }}"
    model = build(tokenizer)
    small, small_tokenizer = prune_vocabulary(model, tokenizer, TEXTS)
    small.save_pretrained(folder / name)
    small_tokenizer.save_pretrained(folder / name)
    return tokenizer, small, small_tokenizer, (str(folder / name), auto, TEXTS)


@torch.no_grad()
def logits(model, tokenizer):
    inputs = {"input_ids": torch.tensor([tokenizer(TEXTS[0])["input_ids"]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs).logits


def test_a_fresh_process_loads_the_same_without_the_package(tmp_path) -> None:
    made = {name: prepared(tmp_path, name) for name in CASES}
    arguments = json.dumps({name: case for name, (*_, case) in made.items()})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path), arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "were not" not in done.stderr and "MISSING" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert "hf_compress" not in report["modules"]
    for name, (tokenizer, small, small_tokenizer, _) in made.items():
        loaded = report[name]
        assert loaded["class"] == type(tokenizer).__name__
        assert loaded["tokens"] == [tokenizer(text).tokens() for text in TEXTS]
        assert loaded["pairs"] == tokenizer(TEXTS[0], TEXTS[1]).tokens()
        assert loaded["decoded"] == [tokenizer.decode(tokenizer(text)["input_ids"]) for text in TEXTS]
        assert loaded["special"] == {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
        assert loaded["kept"] == [33, "left", "{{ messages }}"]
        assert loaded["vocab"] == small_tokenizer.get_vocab() and len(loaded["vocab"]) < len(tokenizer)
        assert loaded["pad"] == [small_tokenizer.pad_token_id, small.config.pad_token_id]
        found = load_file(tmp_path / f"{name}.safetensors")["logits"]
        # Mapped weights lie at other addresses, which may pick another kernel.
        assert tiny_models.relative_error(logits(small, small_tokenizer), found) < 1e-6, name
        stored = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(tensor, small.state_dict()[key]) for key, tensor in stored.items())


def template(cls, sep):
    return processors.TemplateProcessing(
        single="<first> $A <last>",
        pair="<first> $A <last> $B:1 <last>:1",
        special_tokens=[("<first>", cls), ("<last>", sep)],
    )


@pytest.mark.parametrize(
    "processor",
    [
        template,
        lambda cls, sep: processors.BertProcessing(("<last>", sep), ("<first>", cls)),
        lambda cls, sep: processors.RobertaProcessing(("<last>", sep), ("<first>", cls)),
        lambda cls, sep: processors.Sequence([processors.ByteLevel(), template(cls, sep)]),
    ],
)
def test_ids_in_all_sections_move(processor, tmp_path) -> None:
    """The special tokens come last, so that no id can stay."""
    tokenizer = trained_tokenizers.byte_level_bpe()
    tokenizer.add_special_tokens({"cls_token": "<first>", "sep_token": "<last>"})
    tokenizer.add_tokens(["quick brown"])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processor(tokenizer.cls_token_id, tokenizer.sep_token_id)
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    backend.enable_truncation(12)
    model = vocabulary_models.gpt2(tokenizer)
    _, small = prune_vocabulary(model, tokenizer, ["the quick brown fox"], verify=False)
    assert small.cls_token_id != tokenizer.cls_token_id
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    assert data["padding"]["pad_id"] == loaded.pad_token_id == small.pad_token_id
    assert data["truncation"]["max_length"] == 12
    assert [token["id"] for token in data["added_tokens"]] == sorted(small.added_tokens_decoder)
    for each in (small, loaded):
        encoded = each("the quick brown fox")
        assert encoded.tokens() == tokenizer("the quick brown fox").tokens()
        assert (encoded["input_ids"][0], encoded["input_ids"][-1]) == (small.cls_token_id, small.sep_token_id)
        assert "quick brown" in encoded.tokens()


def test_the_adapted_model_is_pruned_again_after_reloading(tmp_path) -> None:
    """Nothing of the first pruning is left behind that would stand in the way of a second."""
    _, small, _, (folder, *_) = prepared(tmp_path, "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    again, _ = prune_vocabulary(model, tokenizer, TEXTS[:1])
    assert again.config.vocab_size < small.config.vocab_size
