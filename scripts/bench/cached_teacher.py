"""What a cached teacher costs: a distilled training step beside the plain one, and look-ups beside the teacher.

usage: .venv/bin/python scripts/bench/cached_teacher.py [--rounds 12] [--small-rounds 60] [--threads 1] [--shapes ...]

Steps of one model (forward, backward, AdamW) take turns with and without distillation from the cache: look-up, KL
divergence, and its part of the backward pass. Reported is the median over rounds of the ratio of CPU times, with the
quartiles; the target is 1.05. Look-ups are timed on their own too, in memory and mapped from disk, for classes and for
the 64 largest of 30522 token logits, beside one forward pass of a teacher of the same shape, which they save.
Random weights and tokens, no padding, dropout on.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from overhead_work import SHAPES, Shape
from torch.nn.functional import kl_div, log_softmax, softmax
from transformers import BertConfig, BertForMaskedLM

from hf_compress.teachers.build import cache_teacher_outputs
from hf_compress.teachers.cached import TeacherCache

MAX_RATIO = 1.05
WARMUP = 2
NUM_BATCHES = 4
TEMPERATURE = 2.0


def seconds(work: Callable[[], Any]) -> float:
    """Return the CPU time of some work; a GPU's is waited for."""
    start = time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - start


def batches_of(shape: Shape) -> list[dict[str, torch.Tensor]]:
    """Return batches without padding, with the mask that tokenizers give."""
    data = shape.data(NUM_BATCHES)
    texts = torch.stack([row["input_ids"] for row in data]).view(NUM_BATCHES, shape.batch_size, shape.length)
    labels = torch.stack([row["labels"] for row in data]).view(NUM_BATCHES, shape.batch_size)
    parts = zip(texts, labels, strict=True)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y} for x, y in parts]


def step_ratios(shape: Shape, rounds: int, folder: Path) -> list[float]:
    """Return the CPU time of a distilled step / that of a plain one, in each round."""
    batches, model = batches_of(shape), shape.model()
    cache = cache_teacher_outputs(shape.model(seed=1), batches, folder)
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()

    def step(batch: dict[str, torch.Tensor], distill: bool) -> None:
        outputs = model(**batch)
        loss = outputs.loss
        if distill:
            teacher = softmax(cache.logits(batch) / TEMPERATURE, -1)
            loss = loss + kl_div(log_softmax(outputs.logits / TEMPERATURE, -1), teacher, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found = []
    for number in range(rounds + WARMUP):
        batch = batches[number % NUM_BATCHES]
        order = (False, True) if number % 2 else (True, False)
        times = {distill: seconds(partial(step, batch, distill)) for distill in order}
        found.append(times[True] / times[False])
    return found[WARMUP:]


def look_ups(shape: Shape, folder: Path) -> list[tuple[str, float]]:
    """Return the CPU time of one look-up of each kind, and of the teachers' forward passes, by name."""
    batches, found = batches_of(shape), []
    language = BertForMaskedLM(BertConfig(**shape.config))
    for what, teacher, settings in (
        ("classes", shape.model(seed=1), {}),
        ("64 largest of 30522 tokens", language, {"top_k": 64, "temperature": TEMPERATURE}),
    ):
        cache_teacher_outputs(teacher, batches, folder / what, **settings)
        inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
        for kind, size in (("in memory", 1 << 30), ("mapped", 0)):
            cache = TeacherCache.open(folder / what, resident_bytes=size)
            repeated = [seconds(partial(cache.logits, each)) for each in inputs * 10]
            found.append((f"{what}, {kind}", median(repeated[NUM_BATCHES:])))
        with torch.no_grad():
            forward = [seconds(partial(teacher.eval(), **inputs[0])) for _ in range(3)]
        found.append((f"{what}, teacher's forward pass", median(forward)))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of BERT-base (default: 12)")
    parser.add_argument("--small-rounds", type=int, default=60, help="of smaller models (default: 60)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["small", "BERT-base"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.shapes:
        shape, rounds = SHAPES[name], given.rounds if name == "BERT-base" else given.small_rounds
        with tempfile.TemporaryDirectory() as folder:
            ratios = step_ratios(shape, rounds, Path(folder) / "steps")
            low, middle, high = quantiles(ratios, n=4)
            verdict = "reached" if middle <= MAX_RATIO else "missed"
            print(f"## {name}: batch {shape.batch_size}, {shape.length} tokens, {rounds} rounds\n")
            print(
                f"distilled step / plain step: {middle:.3f} ({low:.3f} to {high:.3f}), target {MAX_RATIO}: {verdict}\n"
            )
            for what, each in look_ups(shape, Path(folder)):
                print(f"- {what}: {each * 1e3:.2f} ms")
            print()


if __name__ == "__main__":
    main()
