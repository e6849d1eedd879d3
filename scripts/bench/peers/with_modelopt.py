"""NVIDIA ModelOpt: int8 fake quantizers, calibrated, or trained through with its distillation."""

import copy
from statistics import median
from typing import Any

import modelopt.torch.distill as distill
import modelopt.torch.opt as opt
import modelopt.torch.quantization as quantization
import torch
from common import (
    GENTLER,
    Inputs,
    Job,
    bytes_of,
    logits_of,
    loss_of,
    main,
    peak_bytes,
    plain_seconds,
    quantized,
    train,
    unlabeled,
)
from torch import Tensor, nn

KD_WEIGHT, TEMPERATURE = 0.9, 2.0


def calibrated(job: Job) -> nn.Module:
    """Return the model with quantizers whose ranges are those of training data; not of the task head."""
    smooth = job.variant == "smoothquant"
    config = copy.deepcopy(quantization.INT8_SMOOTHQUANT_CFG if smooth else quantization.INT8_DEFAULT_CFG)

    def run(model: nn.Module) -> None:
        for batch in job.calibration():
            model(**unlabeled(batch))

    model = job.dense()
    quantization.quantize(model, config, run)
    quantization.disable_quantizer(model, "*classifier*")
    return model


def taught(job: Job, model: nn.Module) -> tuple[nn.Module, list[float]]:
    """Train with the quantizers in place, the dense model as teacher; return CPU seconds of every step, too."""
    settings = {**job.settings, "learning_rate": job.settings["learning_rate"] * GENTLER}
    batches = job.batches("train", job.settings["steps"])
    pairs = {("classifier", "classifier"): distill.LogitsDistillationLoss(temperature=TEMPERATURE)}
    balance = distill.StaticLossBalancer(kd_loss_weight=KD_WEIGHT)
    mode = {"teacher_model": job.dense(), "criterion": pairs, "loss_balancer": balance}
    pupil = distill.convert(model, mode=[("kd_loss", mode)])

    def loss(student: nn.Module, batch: Inputs) -> Tensor:
        found: Tensor = student.compute_kd_loss(student_loss=loss_of(student, batch))
        return found

    seconds = train(pupil, batches, settings, loss)
    return distill.export(pupil), seconds


def int8(job: Job) -> dict[str, Any]:
    """Simulate int8; what is saved are floating-point weights and the ranges."""
    torch.manual_seed(job.seed)
    opt.enable_huggingface_checkpointing()
    model = calibrated(job)
    extra: dict[str, Any] = {}
    if job.variant == "qat":
        model, seconds = taught(job, model)
        peak = peak_bytes()
        steps = {"method": median(seconds[1:] or seconds), "plain": median(plain_seconds(job))}
        extra = {"step_seconds": steps, "peak_bytes": peak}
    model.eval()
    model.save_pretrained(job.folder / "model")
    about = "simulated: integers only after export to ONNX, for TensorRT on GPUs"
    found = quantized(
        job, {"int8 simulated": logits_of(model)}, folder=job.folder / "model", reload_by="from_pretrained", about=about
    )
    return {**found, **extra, "bytes": bytes_of(job.folder / "model")}


if __name__ == "__main__":
    main(["nvidia-modelopt"], {"quantize": int8})
