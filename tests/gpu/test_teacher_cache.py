"""Cached teacher outputs on a GPU: hashes are those of the CPU, and look-ups wait for nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_batches import text_batch, texts
from tiny_models import gpt2, vit

from hf_compress.errors import TrainingError
from hf_compress.teachers.build import cache_teacher_outputs
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.outputs import SparseLogits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() for name, value in batch.items()}


@pytest.mark.parametrize("resident_bytes", [0, 1 << 28], ids=["mapped", "resident"])
def test_a_cache_made_on_the_cpu_is_found_on_the_gpu(tmp_path: Path, resident_bytes: int) -> None:
    rows = texts(5)
    cache_teacher_outputs(gpt2(), [text_batch(rows)], tmp_path, top_k=3, temperature=2.0)
    cache = TeacherCache.open(tmp_path, gpt2().cuda(), resident_bytes=resident_bytes)
    mixed = text_batch([rows[3], rows[0]], 2)
    here, there = cache.logits(mixed), cache.logits(on_gpu(mixed))
    cache.check()
    assert isinstance(here, SparseLogits) and isinstance(there, SparseLogits)
    for name in ("values", "indices", "log_rest"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))


def test_look_ups_wait_for_nothing(tmp_path: Path) -> None:
    rows = texts(5)
    cache = cache_teacher_outputs(gpt2().cuda(), [text_batch(rows)], tmp_path / "texts")
    config = vit().config
    images = torch.randn(4, config.num_channels, config.image_size, config.image_size)
    seen = cache_teacher_outputs(vit(), [{"pixel_values": images}], tmp_path / "images")
    for each, batch in ((cache, on_gpu(text_batch(rows[:3]))), (seen, {"pixel_values": images.cuda()})):
        each.logits(batch)  # copies the cache and the tables of the hashes to the device
        torch.cuda.set_sync_debug_mode("error")
        try:
            each.logits(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        each.check()
    stale = cache.logits(on_gpu(text_batch([[*rows[0], 3]])))
    assert isinstance(stale, torch.Tensor) and stale.isnan().all()
    with pytest.raises(TrainingError, match="1 of the examples"):
        cache.check()
