"""This package: gradual pruning with a teacher, pruning at once, and int8."""

import tempfile
import time
from statistics import median
from typing import Any

import torch
from architectures import Request, architectures_job
from common import (
    GENTLER,
    Job,
    Pruned,
    collate,
    compiled,
    logits_of,
    main,
    measured,
    peak_bytes,
    plain_seconds,
    prune_job,
    quantized,
    targets,
    unlabeled,
    warm_up_steps,
)
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    dimension_groups,
    export_quantized,
    prune_oneshot,
    shrink,
)

TEACHING = DistillationConfig(alpha=0.9, temperature=2.0)
"""As in the README and the demo."""


class StepClock(TrainerCallback):
    """CPU seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds.append(time.process_time() - self._start)


def trainer_of(job: Job, model: PreTrainedModel, callbacks: list[TrainerCallback], rate: float = 1.0) -> Trainer:
    """Return a Trainer that does the same steps on the same batches in the same order as everybody else."""
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="peers-"),
        max_steps=job.settings["steps"],
        per_device_train_batch_size=job.settings["batch_size"],
        learning_rate=rate * job.settings["learning_rate"],
        warmup_steps=warm_up_steps(job.settings["steps"]),
        lr_scheduler_type="linear",
        weight_decay=0.01,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=job.seed,
    )
    return Trainer(model, args, train_dataset=job.rows("train"), data_collator=collate, callbacks=callbacks)


def at_once(job: Job, model: PreTrainedModel) -> Pruned:
    """Prune without training, by the criterion that the variant names; ``even``: all layers alike, as the peers do."""
    criterion = "l2" if job.variant == "l2" else "taylor"
    config = PruningConfig(structures={"heads": job.sparsity, "ffn": job.sparsity}, criterion=criterion)
    if job.variant == "even":
        heads, units = targets(job.sparsity)
        structures = {"heads": 1 - heads / 12, "ffn": 1 - units / 1536}
        config = PruningConfig(structures=structures, criterion=criterion, allocation="per_layer")
    result = prune_oneshot(model, job.calibration(), config)
    start = time.process_time()
    small = shrink(model, result.masks)
    return Pruned(small, time.process_time() - start)


def gradually(job: Job) -> dict[str, Any]:
    """Prune while training, the dense model as teacher: what the README advises."""
    model = job.dense()
    structures = {"heads": job.sparsity, "ffn": job.sparsity}
    pruning = PruningCallback(PruningConfig(structures=structures, criterion="taylor", begin=0.02, end=0.5))
    clock = StepClock()
    callbacks = [pruning, DistillationCallback(TEACHING, teacher=job.dense()), clock]
    trainer = trainer_of(job, model, callbacks)
    torch.manual_seed(job.seed)
    trainer.train()
    start = time.process_time()
    small = shrink(trainer)
    spent = time.process_time() - start
    found = {"before": None, "prune_seconds": spent, "choose_seconds": None}
    return {**found, **measured(job, small, clock.seconds), "about": "prunes while it trains, with a teacher"}


def pruning(job: Job) -> dict[str, Any]:
    """Do one of the ways of pruning."""
    return gradually(job) if job.variant == "default" else prune_job(job, at_once)


def int8(job: Job) -> dict[str, Any]:
    """Export int8 weights, after quantization-aware training with a teacher or without training."""
    model = job.dense()
    extra: dict[str, Any] = {}
    if job.variant == "qat":
        clock = StepClock()
        callbacks = [QuantizationCallback(QuantizationConfig()), DistillationCallback(TEACHING, job.dense()), clock]
        torch.manual_seed(job.seed)
        trainer_of(job, model, callbacks, GENTLER).train()
        peak = peak_bytes()
        steps = {"method": median(clock.seconds[1:] or clock.seconds), "plain": median(plain_seconds(job))}
        extra = {"step_seconds": steps, "peak_bytes": peak}
    folder = export_quantized(model, job.folder / "model", verify=False)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ways = {"int8 eager": logits_of(loaded)}
    fast = compiled(loaded, unlabeled(collate(job.rows("test")[: job.settings["batch_size"]])))
    if fast is not None:
        ways["int8 compiled"] = fast
    return {**quantized(job, ways, folder=job.folder / "model", reload_by="from_pretrained"), **extra}


def cut(request: Request) -> Any:
    """Remove what is asked for: the first half of every group of heads and feed-forward units."""
    masks = {}
    for group in dimension_groups(request.model, request.inputs):
        if group.kind in ("heads", "ffn"):
            masks[group.name] = torch.arange(group.num_units) >= group.num_units // 2
    return shrink(request.model, masks, example_inputs=request.inputs)


if __name__ == "__main__":
    main(
        ["hf-compress", "torchao"],
        {"prune": pruning, "quantize": int8, "architectures": lambda job: architectures_job(job, cut)},
    )
