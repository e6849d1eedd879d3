"""What a teacher is asked: inputs on its device, in its precision."""

from typing import Any

import pytest
import torch
from features_by_hand import examples
from zoo import ZOO

from hf_compress import DistillationCallback, DistillationConfig, cache_teacher_outputs

STEP = {"max_steps": 1, "logging_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 2}


def sounds() -> Any:
    generator = torch.Generator().manual_seed(0)
    return [{"input_values": torch.randn(400, generator=generator), "labels": torch.tensor([3, 4])} for _ in range(2)]


@pytest.mark.parametrize("kind", ["wav2vec2", "swin", "vit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_teachers_in_half_precision_read_images_and_sounds(make_trainer: Any, kind: str, dtype: str) -> None:
    student = ZOO[kind]().train()
    data = sounds() if kind == "wav2vec2" else examples("vit", 2)
    if kind == "swin":
        size = student.config.image_size
        data = [{**each, "pixel_values": torch.randn(3, size, size), "labels": torch.tensor(1)} for each in data]
    config = DistillationConfig(alpha=0.5, loss="auto", teacher_dtype=dtype)
    trainer = make_trainer(student, data, [DistillationCallback(config, "self")], **STEP)
    trainer.train()
    losses = [each["distillation_loss"] for each in trainer.state.log_history if "distillation_loss" in each]
    assert losses and losses[0] < 0.5  # dropout and rounding are all that sets the two apart


def test_a_cache_of_a_teacher_in_half_precision_reads_images(make_trainer: Any, tmp_path: Any) -> None:
    student, data = ZOO["vit"]().train(), examples("vit", 2)
    teacher = ZOO["vit"]().to(torch.bfloat16)
    cache = cache_teacher_outputs(teacher, make_trainer(student, data, **STEP), tmp_path / "cache")
    losses = []
    for source in (teacher, cache):
        trainer = make_trainer(ZOO["vit"]().train(), data, [DistillationCallback(DistillationConfig(), source)], **STEP)
        trainer.train()
        losses += [each["distillation_loss"] for each in trainer.state.log_history if "distillation_loss" in each]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-5)
