"""Tokenizers of all algorithms, trained in milliseconds on a few sentences."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "how vexingly quick daft zebras jump",
    "sphinx of black quartz, judge my vow!",
    "the five boxing wizards jump quickly; the wizards judge quickly",
    "banana bandana cabana ananas nanas",
    "na\u00efve caf\u00e9s in Z\u00fcrich: 3.14 or 2718?",
    "tokenization tokenizes tokens; untokenized tokens are not tokens",
] * 3
CLS_SEP = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SENTENCE = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def word_piece(size: int = 150) -> PreTrainedTokenizerFast:
    """As BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(CLS_SEP.values()), show_progress=False),
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **CLS_SEP)


def word_level(size: int = 40) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.WordLevelTrainer(vocab_size=size, special_tokens=list(CLS_SEP.values()), show_progress=False),
    )
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **CLS_SEP)


def byte_level_bpe(size: int = 340) -> PreTrainedTokenizerFast:
    """As GPT-2's, with the end-of-text token last and padding by it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end)


def byte_fallback_bpe(size: int = 130) -> PreTrainedTokenizerFast:
    """As Llama's: whole texts with metaspaces, unknown characters as bytes, beginning-of-sequence token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=size, special_tokens=list(SENTENCE.values()), show_progress=False)
    )
    data = json.loads(tokenizer.to_str())
    tokens = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    tokens[4:4] = [f"<0x{byte:02X}>" for byte in range(256)]
    data["model"].update(vocab={token: i for i, token in enumerate(tokens)}, byte_fallback=True)
    data["pre_tokenizer"]["split"] = False
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SENTENCE)


def suffix_bpe(size: int = 150) -> PreTrainedTokenizerFast:
    """As CLIP's: the last symbol of a word is marked."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SENTENCE.values()), end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SENTENCE)


def prefix_bpe(size: int = 150) -> PreTrainedTokenizerFast:
    """Symbols inside a word are marked, as in WordPiece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SENTENCE.values()), continuing_subword_prefix="##", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SENTENCE)


def unigram(size: int = 90, *, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """As T5's, with sentinels that are added tokens behind the pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    first = ["<pad>", "</s>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256) if byte_fallback]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(
            vocab_size=size + len(first), special_tokens=first[:3], unk_token="<unk>", show_progress=False
        ),
    )
    data = json.loads(tokenizer.to_str())
    data["model"]["vocab"][3:3] = [[piece, 0.0] for piece in first[3:]]
    data["model"]["byte_fallback"] = byte_fallback
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<extra_1>", "<extra_0>"]})
    return fast


def unigram_with_bytes(size: int = 90) -> PreTrainedTokenizerFast:
    return unigram(size, byte_fallback=True)


ALL = [
    word_piece, word_level, byte_level_bpe, byte_fallback_bpe, suffix_bpe, prefix_bpe, unigram, unigram_with_bytes,
]  # fmt: skip
