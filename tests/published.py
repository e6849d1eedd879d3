"""Published recipes on tiny models and stub data, whose splits and columns are those that the recipes name."""

from pathlib import Path
from typing import Any

import numpy
import torch
import trained_tokenizers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Picture
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_compress import Recipe

RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"
SENTENCES = trained_tokenizers.SENTENCES
SIZES = {"hidden_size": 24, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 24}
"""As many layers and heads as the base models have."""

NUM_EXAMPLES = {"train": 8, "eval": 4}


def stubs(recipe: Recipe, root: Path) -> dict[str, str]:
    """Save a tiny model and data for a recipe; return their folders as settings."""
    make_model, make_row = {
        "text-classification": (_bert, _texts),
        "question-answering": (_bert, _question),
        "image-classification": (_vit, _image),
        "causal-lm": (_llama, _texts),
        "seq2seq-lm": (_t5, _translation),
    }[str(recipe.task)]
    torch.manual_seed(0)
    model, processor = make_model(recipe)
    for part in (model, processor):
        part.save_pretrained(root / "model")
    data = recipe.dataset
    names = {"train": data.train_split, "eval": data.eval_split}
    splits = {
        names[part]: Dataset.from_list([make_row(recipe, i) for i in range(count)], features=_features(recipe))
        for part, count in NUM_EXAMPLES.items()
    }
    DatasetDict(splits).save_to_disk(root / "data")
    return {"model": str(root / "model"), "dataset.path": str(root / "data")}


def _features(recipe: Recipe) -> Features | None:
    label = {"label": ClassLabel(names=["no", "yes"])}
    if recipe.task == "text-classification":
        return Features({**{name: Value("string") for name in recipe.dataset.text_columns}, **label})
    return Features({"img": Image(), **label}) if recipe.task == "image-classification" else None


def _bert(recipe: Recipe) -> Any:
    tokenizer = trained_tokenizers.word_piece()
    config = BertConfig(**SIZES, vocab_size=len(tokenizer), max_position_embeddings=512)
    kind = BertForQuestionAnswering if recipe.task == "question-answering" else BertForSequenceClassification
    return kind(config), tokenizer


def _vit(recipe: Recipe) -> Any:
    size = {"height": 8, "width": 8}
    config = ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=1000)  # as of ImageNet
    return ViTForImageClassification(config), ViTImageProcessor(size=size)


def _llama(recipe: Recipe) -> Any:
    tokenizer = trained_tokenizers.byte_level_bpe()
    sizes = {**SIZES, "num_hidden_layers": 6, "intermediate_size": 96, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=512)), tokenizer


def _t5(recipe: Recipe) -> Any:
    tokenizer = trained_tokenizers.unigram()
    special = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    special["eos_token_id"] = tokenizer.eos_token_id
    sizes = {"d_model": 24, "d_kv": 3, "num_heads": 8, "d_ff": 24, "num_layers": 6}
    return T5ForConditionalGeneration(T5Config(**sizes, **special, vocab_size=len(tokenizer))), tokenizer


def _texts(recipe: Recipe, number: int) -> dict[str, Any]:
    columns = recipe.dataset.text_columns
    row: dict[str, Any] = {name: SENTENCES[(number + shift) % 7] for shift, name in enumerate(columns)}
    return row if recipe.task == "causal-lm" else {**row, "label": number % 2}


def _question(recipe: Recipe, number: int) -> dict[str, Any]:
    context = SENTENCES[number % 7]
    word = context.split()[-1]
    return {
        "question": f"which word {number}",
        "context": context,
        "answers": {"text": [word], "answer_start": [context.rindex(word)]},
    }


def _image(recipe: Recipe, number: int) -> dict[str, Any]:
    pixels = numpy.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype="uint8")
    return {"img": Picture.fromarray(pixels), "label": number % 2}


def _translation(recipe: Recipe, number: int) -> dict[str, Any]:
    return {"translation": {"en": SENTENCES[number % 7], "ro": SENTENCES[(number + 1) % 7]}}
