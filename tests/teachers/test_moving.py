"""Padding before an example: served where the teacher says the same, refused where it does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_batches import text_batch, texts
from tiny_models import bert, gpt2, llama, randomize, t5
from transformers import RobertaConfig, RobertaForTokenClassification

from hf_compress import TeacherCache, TrainingError, cache_teacher_outputs

ROWS = texts(6)


def roberta() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
    return randomize(RobertaForTokenClassification(RobertaConfig(vocab_size=50, pad_token_id=1, **sizes)), 0)


def seq2seq_batch(side: str) -> dict[str, Any]:
    return {**text_batch(ROWS, 2, side), "labels": torch.tensor(ROWS[0][:2]).repeat(len(ROWS), 1)}


def plain_batch(side: str) -> dict[str, Any]:
    return text_batch(ROWS, 2, side)


def batch_for_roberta(side: str) -> dict[str, Any]:
    return text_batch(ROWS, 2, side, pad=1)


RELATIVE = {"llama": (llama, plain_batch), "t5": (t5, seq2seq_batch), "roberta": (roberta, batch_for_roberta)}
ABSOLUTE = {"bert": (bert, plain_batch), "gpt2": (gpt2, plain_batch)}


def largest_difference(cache: TeacherCache, teacher: Any, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        live = teacher.eval()(**batch).logits
    found: Any = cache.logits(batch)
    if live.dim() == 3 and "labels" not in batch:
        mask = batch["attention_mask"].bool()
        live, found = live[mask], found[mask]
    return float((found - live).abs().max() / live.abs().max())


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("made_of", ["left", "right"])
def test_either_side_is_served_where_it_makes_no_difference(tmp_path: Path, name: str, made_of: str) -> None:
    make, batch_of = RELATIVE[name]
    teacher = make()
    cache = cache_teacher_outputs(teacher, [batch_of(made_of)], tmp_path)
    assert cache.manifest.content.inputs.moves
    for side in ("left", "right"):
        assert largest_difference(cache, teacher, batch_of(side)) < 1e-4


@pytest.mark.parametrize("name", ABSOLUTE)
def test_padding_before_examples_is_refused_where_it_makes_one(tmp_path: Path, name: str) -> None:
    make, batch_of = ABSOLUTE[name]
    teacher: Any = make()
    cache = cache_teacher_outputs(teacher, [batch_of("right")], tmp_path / "right")
    assert largest_difference(cache, teacher, batch_of("right")) < 1e-4
    with pytest.raises(
        TrainingError, match=r"6 of the examples trained on have padding before them.* Pad on the right"
    ):
        cache.outputs(batch_of("left"))
    with pytest.raises(TrainingError, match=r"a batch has padding before its examples.* Pad on the right"):
        cache_teacher_outputs(teacher, [batch_of("left")], tmp_path / "left")


@pytest.mark.parametrize("make", [bert, llama])
def test_a_row_without_padding_is_on_neither_side(tmp_path: Path, make: Callable[[], Any]) -> None:
    teacher = make()
    cache = cache_teacher_outputs(teacher, [text_batch(ROWS)], tmp_path)
    assert largest_difference(cache, teacher, text_batch([max(ROWS, key=len)], 0, "left")) < 1e-4


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("half", ["weights", "autocast"])
def test_rounding_to_few_bits_is_no_difference(tmp_path: Path, make: Callable[[], Any], half: str) -> None:
    teacher: Any = make()
    settings: dict[str, Any] = {"autocast": torch.bfloat16} if half == "autocast" else {}
    if half == "weights":
        teacher.to(torch.bfloat16)
    cache = cache_teacher_outputs(teacher, [text_batch(ROWS)], tmp_path, **settings)
    assert cache.manifest.content.inputs.moves == (make is llama)


def test_an_accelerator_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_teacher_outputs(bert(), [text_batch(ROWS)], tmp_path)
    monkeypatch.setattr("hf_compress.teachers.cached._waits", lambda device: True)
    cache.outputs(text_batch(ROWS, 1, "left"))
    cache.outputs(text_batch(ROWS, 1, "left"))
    with pytest.raises(TrainingError, match="12 of the examples trained on have padding before them"):
        cache.check()
    cache.check()


def test_what_cannot_be_found_out_is_not_allowed(tmp_path: Path) -> None:
    """A single token leaves nothing to move."""
    cache = cache_teacher_outputs(llama(), [text_batch([[5], [7]])], tmp_path)
    assert not cache.manifest.content.inputs.moves
    with pytest.raises(TrainingError, match="padding before them"):
        cache.outputs(text_batch([[5], [7]], 1, "left"))
