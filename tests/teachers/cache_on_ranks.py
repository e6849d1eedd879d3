"""Several processes make a cache together and train with it; ``test_build.py`` starts this and reads what is left."""

import sys
from pathlib import Path
from typing import Any

import rank_runs
import torch

from hf_compress.errors import CompressionError
from hf_compress.teachers.build import cache_teacher_outputs


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    student, teacher = rank_runs.MODELS["bert"](), rank_runs.MODELS["bert"]()
    calls: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    examples = rank_runs.examples("bert")
    trainer, _ = rank_runs.make_trainer(student, examples, [], folder / "run")
    cache = cache_teacher_outputs(teacher, trainer, folder / "cache", batch_size=-(-len(examples) // 4))
    steps: list[int] = []

    def look_up(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        logits = cache.logits(kwargs)
        assert isinstance(logits, torch.Tensor) and logits.isfinite().all()
        steps.append(1)

    student.register_forward_pre_hook(look_up, with_kwargs=True)
    trainer.train()
    try:
        cache_teacher_outputs(teacher, [{"input_ids": torch.full((1, 3), 7)}], folder / "cache")
    except CompressionError as error:
        failed = type(error).__name__
    told = f"calls {len(calls)}, steps {len(steps)}, other data: {failed}"
    (folder / f"rank{rank_runs.rank()}").write_text(told)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
