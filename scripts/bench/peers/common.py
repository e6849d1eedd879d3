"""What all workers share: the data, evaluation, recovery training, timing. Imports no peer, and runs on old torch too.

A worker is called as ``python with_PEER.py JOB.json``. The job says what to do; the answer is written beside it, as
``result.json``. Every worker gets the same files: the dense model, and batches as they were made once.
"""

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

WEIGHT_DECAY, MAX_NORM, WARM_UP = 0.01, 1.0, 0.05
GENTLER = 0.1
"""Times the learning rate of recovery: for training with quantizers."""

HEAD_DIM = 32
"""Of the model that is pruned, MiniLM."""

Inputs = dict[str, Tensor]


class Job:
    """What a worker is asked to do."""

    def __init__(self, path: Path) -> None:
        given = json.loads(path.read_text(encoding="utf-8"))
        self.folder = path.parent
        self.kind: str = given["kind"]
        self.variant: str = given["variant"]
        self.sparsity: float = given.get("sparsity", 0.0)
        self.seed: int = given.get("seed", 0)
        self.settings: dict[str, Any] = given["settings"]
        self._dense: str = given["dense"]
        self._arrays = dict(numpy.load(given["data"])) if given.get("data") else {}

    def dense(self) -> PreTrainedModel:
        """Return a new copy of the model that everybody starts from."""
        return AutoModelForSequenceClassification.from_pretrained(self._dense).eval()

    @property
    def dense_folder(self) -> str:
        """Return where the dense model lies."""
        return self._dense

    def rows(self, part: str) -> list[dict[str, Any]]:
        """Return the examples of ``train`` or ``test``, without padding."""
        arrays = {name[len(part) + 1 :]: each for name, each in self._arrays.items() if name.startswith(f"{part}_")}
        lengths = arrays.pop("lengths")
        labels = arrays.pop("labels")
        return [
            {**{name: each[i, : lengths[i]] for name, each in arrays.items()}, "labels": int(labels[i])}
            for i in range(len(lengths))
        ]

    def batches(self, part: str, count: int | None = None) -> list[Inputs]:
        """Return batches in the order of the examples; those of ``test`` sorted by length first."""
        rows, size = self.rows(part), self.settings["batch_size"]
        if part == "test":
            rows, size = sorted(rows, key=lambda row: len(row["input_ids"])), 64
        starts = list(range(0, len(rows), size))[:count]
        return [collate(rows[start : start + size]) for start in starts]

    def calibration(self) -> list[Inputs]:
        """Return the training batches that importance and ranges may be measured on."""
        return self.batches("train", self.settings["calibration_batches"])


def collate(rows: Sequence[Mapping[str, Any]]) -> Inputs:
    """Return one batch, padded with zeros to its longest example."""
    longest = max(len(row["input_ids"]) for row in rows)
    names = [name for name in rows[0] if name != "labels"]
    batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in names}
    for name in names:
        for i, row in enumerate(rows):
            batch[name][i, : len(row[name])] = torch.as_tensor(row[name], dtype=torch.long)
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def accuracy(predict: Callable[[Inputs], Tensor], batches: Sequence[Inputs]) -> float:
    """Return the share of right answers.

    Args:
        predict: From a batch without labels to logits [examples, classes].
        batches: With labels.
    """
    right = total = 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"]
            right += int((predict(unlabeled(batch)).argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def unlabeled(batch: Inputs) -> Inputs:
    """Return a batch without labels."""
    return {name: each for name, each in batch.items() if name != "labels"}


def logits_of(model: nn.Module) -> Callable[[Inputs], Tensor]:
    """Return what ``accuracy`` and ``interleaved`` call."""

    def predict(batch: Inputs) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**batch).logits
        return found

    return predict


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW as the Trainer makes it: no decay of biases and norms."""
    plain = [each for each in model.parameters() if each.requires_grad and each.ndim < 2]
    decayed = [each for each in model.parameters() if each.requires_grad and each.ndim >= 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate)


def loss_of(model: nn.Module, batch: Inputs) -> Tensor:
    """Return the task loss; computed here, since not every peer's model takes labels."""
    logits = model(**unlabeled(batch)).logits
    return nn.functional.cross_entropy(logits, batch["labels"])


def train(
    model: nn.Module,
    batches: Sequence[Inputs],
    settings: Mapping[str, Any],
    loss: Callable[[nn.Module, Inputs], Tensor] = loss_of,
) -> list[float]:
    """Train on the batches, one optimizer step each: AdamW, warm-up, linear decay, clipping.

    Returns:
        CPU seconds of every step.
    """
    model.train()
    optimizer = optimizer_of(model, settings["learning_rate"])
    warm_up = warm_up_steps(len(batches))

    def scale(step: int) -> float:
        return min(step / warm_up, (len(batches) - step) / max(len(batches) - warm_up, 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    seconds = []
    for batch in batches:
        start = time.process_time()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    model.eval()
    return seconds


def warm_up_steps(steps: int) -> int:
    """Return in how many steps the learning rate rises."""
    return max(round(WARM_UP * steps), 1)


def plain_seconds(job: Job) -> list[float]:
    """Return CPU seconds of plain training steps of the dense model; the first, which sets up, is left out."""
    count = job.settings["plain_steps"] + 1
    return train(job.dense(), job.batches("train", count), job.settings)[1:]


def interleaved(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time functions in turns; return milliseconds per call of wall and of CPU time, one number a round."""
    for function in functions.values():
        for _ in range(2):
            function()
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter(), time.process_time()
            function()
            wall[name].append((time.perf_counter() - start[0]) * 1000)
            cpu[name].append((time.process_time() - start[1]) * 1000)
    return {"milliseconds": wall, "cpu_milliseconds": cpu}


def latency(job: Job, ways: Mapping[str, Callable[[Inputs], Tensor]]) -> dict[str, dict[str, list[float]]]:
    """Time ways to run a model on one batch of test examples."""
    batch = unlabeled(collate(job.rows("test")[: job.settings["batch_size"]]))
    return interleaved({name: lambda run=run: run(batch) for name, run in ways.items()}, job.settings["rounds"])


def encoder_parameters(model: nn.Module) -> int:
    """Return how many numbers the encoder's layers have."""
    return sum(each.numel() for name, each in model.named_parameters() if ".encoder.layer." in name)


def bytes_of(folder: Path) -> int:
    """Return the size of all files that a model needs."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def targets(sparsity: float, heads: int = 12, units: int = 1536) -> tuple[int, int]:
    """Return how many heads and feed-forward units of a layer stay, so that together the encoder is that sparse.

    A layer keeps at least one head; what that is off from the sparsity, the feed-forward units make up for, which have
    two thirds of the weights.
    """
    kept = max(round(heads * (1 - sparsity)), 1)
    return kept, max(round(units * ((1 - sparsity) * 3 - kept / heads) / 2), 1)


def probe(job: Job) -> Inputs:
    """Return the few examples by which a loaded model is compared with what was saved."""
    return unlabeled(collate(job.rows("test")[:8]))


Small = Callable[[Job, PreTrainedModel], "Pruned"]


class Pruned:
    """What pruning at once gives back."""

    def __init__(self, model: PreTrainedModel, seconds: float, about: str = "") -> None:
        self.model = model
        self.seconds = seconds
        self.about = about


def prune_job(job: Job, prune: Small) -> dict[str, Any]:
    """Prune at once, train what is left, and measure everything that the tables show."""
    torch.manual_seed(job.seed)
    start = time.process_time()
    pruned = prune(job, job.dense())
    total = time.process_time() - start
    model, test = pruned.model.eval(), job.batches("test")
    before = accuracy(logits_of(model), test)
    for each in model.parameters():
        each.requires_grad_(True)
    torch.manual_seed(job.seed)
    steps = train(model, job.batches("train", job.settings["steps"]), job.settings)
    found = {"before": before, "prune_seconds": pruned.seconds, "choose_seconds": total - pruned.seconds}
    return {**found, **measured(job, model, steps), "about": pruned.about}


def measured(job: Job, model: PreTrainedModel, steps: Sequence[float]) -> dict[str, Any]:
    """Return what is measured of every pruned and trained model; it is saved, too.

    Args:
        job: The job.
        model: After recovery.
        steps: CPU seconds of its training steps.
    """
    peak = peak_bytes()  # before anything else of this function needs memory
    saved = saved_by(job, model)
    dense = job.dense()
    return {
        "after": accuracy(logits_of(model), job.batches("test")),
        "encoder_parameters": encoder_parameters(model),
        "dense_encoder_parameters": encoder_parameters(dense),
        **latency(job, {"dense": logits_of(dense), "pruned": logits_of(model)}),
        "step_seconds": {"method": median(steps[1:] or steps), "plain": median(plain_seconds(job))},
        "peak_bytes": peak,
        **saved,
    }


def saved_by(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    """Save as the documentation of Transformers says, with logits to compare what is loaded with."""
    target = job.folder / "model"
    try:
        model.save_pretrained(target)
    except Exception as error:  # noqa: BLE001 (that it cannot be saved is a result)
        return {"bytes": None, "unsaved": short(error)}
    write_probe(job, logits_of(model))
    return {"bytes": bytes_of(target)}


def write_probe(job: Job, predict: Callable[[Inputs], Tensor]) -> None:
    """Store inputs and logits for ``reload.py``."""
    inputs = probe(job)
    arrays = {name: each.numpy() for name, each in inputs.items()}
    numpy.savez(job.folder / "probe.npz", **arrays, logits=predict(inputs).detach().float().numpy())


def plain_job(job: Job) -> dict[str, Any]:
    """Train the dense model on, without any peer at work: what memory and accuracy are compared with."""
    torch.manual_seed(job.seed)
    model = job.dense()
    before = accuracy(logits_of(model), job.batches("test")) if job.variant == "dense" else None
    count = job.settings["steps"] if job.variant == "dense" else job.settings["plain_steps"]
    steps = train(model, job.batches("train", count), job.settings)
    found = {"peak_bytes": peak_bytes(), "step_seconds": {"plain": median(steps[1:] or steps)}}
    if job.variant != "dense":
        return found
    after = accuracy(logits_of(model), job.batches("test"))
    return {**found, "before": before, "after": after, "examples": len(job.rows("test"))}


def quantized(
    job: Job, ways: Mapping[str, Callable[[Inputs], Tensor]], *, folder: Path, reload_by: str, about: str = ""
) -> dict[str, Any]:
    """Return what is measured of every quantized model.

    Args:
        job: The job.
        ways: Ways to run it; the first gives the accuracy. The dense model in fp32 is timed beside them.
        folder: Where it was saved.
        reload_by: Code that loads it.
        about: What else should be known.
    """
    first = next(iter(ways.values()))
    write_probe(job, first)
    return {
        "after": accuracy(first, job.batches("test")),
        **latency(job, {"fp32 eager": logits_of(job.dense()), **ways}),
        "bytes": bytes_of(folder),
        "reload_by": reload_by,
        "about": about,
    }


def compiled(model: nn.Module, example: Inputs) -> Callable[[Inputs], Tensor] | None:
    """Return the model under ``torch.compile``, or None where that does not work."""
    try:
        fast = torch.compile(copy.deepcopy(model))
        run = logits_of(fast)
        run(example)
    except Exception:  # noqa: BLE001 (no compiler, most of all)
        return None
    return run


def short(error: BaseException | str) -> str:
    """Return an error as one line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages that are installed."""
    return dict(_versions(("torch", "transformers", *names)))


def _versions(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def main(packages: Sequence[str], kinds: Mapping[str, Callable[[Job], Any]]) -> None:
    """Do the job that the command line names, and write its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    job = Job(parser.parse_args().job)
    torch.set_num_threads(job.settings["threads"])
    start = time.process_time()
    result = {**kinds, "plain": plain_job}[job.kind](job)
    result = {**result, "versions": versions(packages), "cpu_seconds": round(time.process_time() - start, 1)}
    (job.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
