"""Tiny models, tiny data and a Trainer on the CPU; nothing is downloaded."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

VOCAB_SIZE = 50
NUM_LABELS = 3

Example = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Tiny tensors gain nothing from threads, which wait for each other on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage() -> None:
    # Every train() collects garbage, which takes most of a second with all of torch and transformers to look through.
    gc.collect()
    gc.freeze()


def _tiny_bert(*, seed: int = 0, **overrides: Any) -> BertForSequenceClassification:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "num_labels": NUM_LABELS,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**{**sizes, **overrides}))


def _tiny_llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


@pytest.fixture
def tiny_bert() -> Callable[..., BertForSequenceClassification]:
    """``tiny_bert(seed=0, **config)``: 2 layers, 4 heads, 3 labels, in training mode with dropout 0.1."""
    return _tiny_bert


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """``tiny_llama(seed=0, **config)``: 2 layers, 4 query heads on 2 key-value heads, no dropout."""
    return _tiny_llama


@pytest.fixture
def classification_data() -> Callable[..., list[Example]]:
    """``classification_data(num_examples=8)``: padded token ids with a label that depends on the first token."""

    def make(num_examples: int = 8, length: int = 10, seed: int = 0) -> list[Example]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, VOCAB_SIZE, (num_examples, length), generator=generator)
        lengths = torch.randint(3, length + 1, (num_examples, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        ids = ids * mask
        return [
            {"input_ids": row, "attention_mask": keep, "labels": row[0] % NUM_LABELS}
            for row, keep in zip(ids, mask, strict=True)
        ]

    return make


@pytest.fixture
def language_data(classification_data: Callable[..., list[Example]]) -> Callable[..., list[Example]]:
    """``language_data(num_examples=8)``: ragged texts; labels are the ids, -100 at padding."""

    def make(num_examples: int = 8, length: int = 10, seed: int = 0) -> list[Example]:
        return [
            {**example, "labels": example["input_ids"].masked_fill(example["attention_mask"] == 0, -100)}
            for example in classification_data(num_examples, length, seed)
        ]

    return make


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., Trainer]:
    """``make_trainer(model, data, callbacks, trainer_class=Trainer, trainer_options={}, **args)`` on the CPU.

    Checkpoints go to ``tmp_path / "run"``; nothing is saved, logged or evaluated unless ``args`` ask for it.
    """

    def make(
        model: Any,
        data: list[Example],
        callbacks: Any = None,
        *,
        trainer_class: type[Trainer] = Trainer,
        trainer_options: dict[str, Any] | None = None,
        **args: Any,
    ) -> Trainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "seed": 0,
        }
        return trainer_class(
            model=model,
            args=TrainingArguments(**{**defaults, **args}),
            train_dataset=data,
            eval_dataset=data,
            callbacks=callbacks,
            **(trainer_options or {}),
        )

    return make
