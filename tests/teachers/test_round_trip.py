"""What comes back is what the teacher says, for every kind of output."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from teacher_batches import padded, text_batch, texts
from tiny_models import ZOO, bart, gpt2, llama, t5, vit
from torch import Tensor

from hf_compress.distillation.sparse import sparse_kl
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.teachers.build import cache_teacher_outputs
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.outputs import SparseLogits

WITHOUT_PLACE = {
    "wav2vec2": "cannot be told which outputs are padding",
    "clip": "which has no logits",
    "siglip": "which has no logits",
}
"""Architectures whose outputs cannot be cached, and why."""

RESIDENT = pytest.mark.parametrize("resident_bytes", [0, 1 << 28], ids=["mapped", "resident"])


def said(teacher: Any, inputs: dict[str, Any], name: str = "logits") -> Tensor:
    """The model's own answer, asked for as its documentation says."""
    with torch.no_grad():
        answer: Tensor = teacher.eval()(**inputs)[name]
    return answer


def bert_with(head: str, **changes: Any) -> Any:
    model_class = getattr(transformers, f"BertFor{head}")
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**ZOO["bert"].sizes, "vocab_size": 50, "initializer_range": 0.2, **changes})
    return model_class(config).train()


def opened(teacher: Any, batches: Any, folder: Path, resident_bytes: int, **settings: Any) -> TeacherCache:
    cache_teacher_outputs(teacher, batches, folder, **settings)
    return TeacherCache.open(folder, teacher, resident_bytes=resident_bytes)


@RESIDENT
def test_classification(tmp_path: Path, resident_bytes: int) -> None:
    teacher, rows = bert_with("SequenceClassification", num_labels=3), texts(7)
    batches = [text_batch(rows[:3], 2), text_batch(rows[3:])]
    cache = opened(teacher, batches, tmp_path, resident_bytes, shard_bytes=1)
    assert len(cache.manifest.shards) == 2
    assert teacher.training
    order = [6, 0, 3, 3, 1]
    mixed = text_batch([rows[index] for index in order], 1)
    found = cache.logits(mixed)
    assert isinstance(found, Tensor) and found.dtype == torch.float32
    torch.testing.assert_close(found, said(teacher, mixed), rtol=1e-5, atol=1e-6)
    assert cache.outputs(mixed).counts is None


@RESIDENT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_token_classification(tmp_path: Path, resident_bytes: int, dtype: torch.dtype) -> None:
    teacher, rows = bert_with("TokenClassification", num_labels=5), texts(7)
    cache = opened(teacher, [text_batch(rows[:4]), text_batch(rows[4:], 3)], tmp_path, resident_bytes, dtype=dtype)
    mixed = text_batch([rows[5], rows[2], rows[6]], 2)
    found = cache.outputs(mixed)
    logits, live, mask = found.outputs["logits"], said(teacher, mixed), mixed["attention_mask"].bool()
    assert found.counts is not None and torch.equal(found.counts, mask)
    assert isinstance(logits, Tensor) and logits.shape == live.shape
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(logits[mask], live[mask], rtol=error, atol=error)
    assert not logits[~mask].any()
    stored = sum(shard.num_positions for shard in cache.manifest.shards)
    assert stored == sum(len(row) for row in rows)


@RESIDENT
def test_question_answering(tmp_path: Path, resident_bytes: int) -> None:
    teacher, rows = bert_with("QuestionAnswering", num_labels=2), texts(4)
    answers = {"start_positions": torch.arange(4), "end_positions": torch.arange(4)}
    cache = opened(teacher, [{**text_batch(rows), **answers}], tmp_path, resident_bytes)
    assert cache.manifest.content.inputs.hashed == ("attention_mask", "input_ids")
    mixed = text_batch([rows[3], rows[0]], 1)
    found, mask = cache.logits(mixed), mixed["attention_mask"].bool()
    assert isinstance(found, dict) and set(found) == {"start_logits", "end_logits"}
    for name, logits in found.items():
        assert isinstance(logits, Tensor)
        torch.testing.assert_close(logits[mask], said(teacher, mixed, name)[mask], rtol=1e-5, atol=1e-6)
        assert logits.shape == mask.shape


def test_as_many_classes_as_positions(tmp_path: Path) -> None:
    teacher, rows = bert_with("SequenceClassification", num_labels=3), [[5, 6, 7], [8, 9, 10]]
    cache = cache_teacher_outputs(teacher, [text_batch(rows)], tmp_path)
    assert not cache.manifest.content.outputs[0].per_position
    torch.testing.assert_close(cache.logits(text_batch(rows, 4)), said(teacher, text_batch(rows)))


@RESIDENT
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_language_model(tmp_path: Path, resident_bytes: int, side: str) -> None:
    teacher, rows = llama(), texts(5)
    cache = opened(teacher, [text_batch(rows, 0, side)], tmp_path, resident_bytes)
    mixed = text_batch([rows[4], rows[1]], 2, side)
    logits, mask = cache.logits(mixed), mixed["attention_mask"].bool()
    assert isinstance(logits, Tensor)
    # Rotary positions are relative, so that padding on the left moves nothing but rounding.
    torch.testing.assert_close(logits[mask], said(teacher, mixed)[mask], rtol=1e-4, atol=1e-5)


@RESIDENT
def test_the_largest_logits_and_the_rest(tmp_path: Path, resident_bytes: int) -> None:
    teacher, rows = gpt2(), texts(5)
    cache = opened(teacher, [text_batch(rows)], tmp_path, resident_bytes, top_k=4, temperature=[1.0, 2.5])
    mixed = text_batch([rows[2], rows[0]], 1)
    live, mask = said(teacher, mixed), mixed["attention_mask"].bool()
    for temperature in (1.0, 2.5):
        sparse = cache.logits(mixed, temperature=temperature)
        assert isinstance(sparse, SparseLogits)
        assert (sparse.temperature, sparse.num_classes) == (temperature, live.shape[-1])
        assert sparse.values.shape == sparse.indices.shape == (*mask.shape, 4)
        torch.testing.assert_close(sparse.values[mask], live.sort(dim=-1, descending=True)[0][mask][:, :4])
        torch.testing.assert_close(live.gather(-1, sparse.indices)[mask], sparse.values[mask])
        # The coarsened distribution is the softmax over all classes, the classes left out taken together.
        everything = torch.cat([sparse.values / temperature, sparse.log_rest.unsqueeze(-1)], -1).softmax(-1)
        dense = (live / temperature).softmax(-1)
        torch.testing.assert_close(everything[..., :4][mask], dense.gather(-1, sparse.indices)[mask])
        given = (live[mask] / 3, sparse.indices[mask], sparse.values[mask], sparse.log_rest[mask])
        student = (live[mask] / 3 / temperature).softmax(-1)
        theirs = everything[mask]
        chosen = student.gather(-1, sparse.indices[mask])
        own = torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)
        expected = temperature**2 * (theirs * (theirs.log() - own.log())).sum(-1)
        torch.testing.assert_close(sparse_kl(*given, temperature), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ConfigError, match=r"at temperature 1.0, 2.5, not 2.0"):
        cache.logits(mixed, temperature=2.0)
    with pytest.raises(ConfigError, match="not None"):
        cache.logits(mixed)


def test_the_largest_logits_of_classes(tmp_path: Path) -> None:
    teacher, rows = bert_with("SequenceClassification", num_labels=6), texts(3)
    cache = cache_teacher_outputs(teacher, [text_batch(rows)], tmp_path, top_k=2, temperature=3)
    sparse, live = cache.logits(text_batch(rows)), said(teacher, text_batch(rows))
    assert isinstance(sparse, SparseLogits) and sparse.log_rest.shape == (3,)
    rest = live.exp().pow(1 / 3).sum(-1) - live.topk(2)[0].exp().pow(1 / 3).sum(-1)
    torch.testing.assert_close(sparse.log_rest, rest.log(), rtol=1e-4, atol=1e-5)


@RESIDENT
@pytest.mark.parametrize("make", [t5, bart])
def test_sequence_to_sequence(tmp_path: Path, resident_bytes: int, make: Any) -> None:
    teacher, rows, targets = make(), texts(5), texts(5, seed=1)
    labels = padded(targets, value=-100)
    cache = opened(teacher, [{**text_batch(rows), "labels": labels}], tmp_path, resident_bytes)
    order = [3, 0]
    inputs = text_batch([rows[index] for index in order], 1)
    wanted = padded([targets[index] for index in order], 2, value=-100)
    live, mask = said(teacher, {**inputs, "labels": wanted}), wanted != -100
    for logits in (cache.logits({**inputs, "labels": wanted}), cache.logits(inputs, labels=wanted)):
        assert isinstance(logits, Tensor) and logits.shape == live.shape
        torch.testing.assert_close(logits[mask], live[mask], rtol=1e-4, atol=1e-5)
        assert not logits[~mask].any()


def test_sequence_to_sequence_with_decoder_inputs(tmp_path: Path) -> None:
    teacher, rows, targets = t5(), texts(4), texts(4, seed=1)

    def batch(order: list[int], extra: int) -> dict[str, Tensor]:
        labels = padded([targets[index] for index in order], extra, value=-100)
        shifted = teacher.prepare_decoder_input_ids_from_labels(labels)
        return {**text_batch([rows[index] for index in order]), "labels": labels, "decoder_input_ids": shifted}

    cache = cache_teacher_outputs(teacher, [batch([0, 1, 2, 3], 0)], tmp_path)
    mixed = batch([2, 1], 3)
    popped = {name: value for name, value in mixed.items() if name != "labels"}
    logits, mask = cache.logits(popped, labels=mixed["labels"]), mixed["labels"] != -100
    assert isinstance(logits, Tensor)
    torch.testing.assert_close(logits[mask], said(teacher, popped)[mask], rtol=1e-4, atol=1e-5)


@RESIDENT
def test_images(tmp_path: Path, resident_bytes: int) -> None:
    teacher = vit()
    size = teacher.config.image_size
    images = torch.randn(4, teacher.config.num_channels, size, size)
    cache = opened(teacher, [{"pixel_values": images}], tmp_path, resident_bytes)
    order = torch.tensor([2, 0, 2])
    found = cache.logits({"pixel_values": images[order], "labels": order})
    torch.testing.assert_close(found, said(teacher, {"pixel_values": images[order]}), rtol=1e-5, atol=1e-6)


def test_texts_without_a_mask(tmp_path: Path) -> None:
    teacher, ids = gpt2(), torch.arange(3, 27).view(4, 6)
    cache = cache_teacher_outputs(teacher, [{"input_ids": ids}, {"input_ids": ids[:, :4]}], tmp_path)
    torch.testing.assert_close(cache.logits({"input_ids": ids[1:3]}), said(teacher, {"input_ids": ids[1:3]}))
    torch.testing.assert_close(cache.logits({"input_ids": ids[:, :4]}), said(teacher, {"input_ids": ids[:, :4]}))


def test_choices(tmp_path: Path) -> None:
    teacher, rows = bert_with("MultipleChoice"), texts(6)
    short, long = ({k: v.view(3, 2, -1) for k, v in text_batch(rows, extra).items()} for extra in (0, 2))
    cache = cache_teacher_outputs(teacher, [short], tmp_path)
    torch.testing.assert_close(cache.logits(long), said(teacher, short), rtol=1e-5, atol=1e-6)


def test_autocast_is_that_of_the_trainer(tmp_path: Path) -> None:
    teacher, rows = bert_with("SequenceClassification"), texts(3)
    cache = cache_teacher_outputs(teacher, [text_batch(rows)], tmp_path, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        live = said(teacher, text_batch(rows))
    assert torch.equal(cache.logits(text_batch(rows)), live.float())


@pytest.mark.parametrize("make", ZOO.values(), ids=list(ZOO))
def test_architectures(tmp_path: Path, make: Any) -> None:
    teacher = make().eval()
    inputs = dict(make.example_inputs(teacher) or make_example_inputs(teacher))
    if make.name in WITHOUT_PLACE:
        with pytest.raises(TrainingError, match=WITHOUT_PLACE[make.name]):
            cache_teacher_outputs(teacher, [inputs], tmp_path)
        return
    cache = cache_teacher_outputs(teacher, [inputs], tmp_path)
    found, live = cache.outputs(inputs), said(teacher, inputs)
    logits = found.outputs["logits"]
    assert isinstance(logits, Tensor) and logits.shape == live.shape
    counts = torch.ones(len(live), dtype=torch.bool) if found.counts is None else found.counts
    torch.testing.assert_close(logits[counts], live[counts].float(), rtol=1e-4, atol=1e-5)
