"""ONNX Runtime: exported by torch, weights of 8 bits per channel, inputs quantized as they come."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from common import Inputs, Job, main, quantized
from onnx_file import to_onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor


def runner(path: Path, threads: int) -> Any:
    """Return the model as a function from a batch to logits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: Inputs) -> Tensor:
        return torch.from_numpy(session.run(None, {name: each.numpy() for name, each in batch.items()})[0])

    return run


def int8(job: Job) -> dict[str, Any]:
    """Quantize weights and, while it runs, inputs."""
    dense, target = job.folder / "model.onnx", job.folder / "model"
    target.mkdir()
    to_onnx(job, dense)
    quantize_dynamic(dense, target / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    threads = job.settings["threads"]
    ways = {"int8": runner(target / "model.onnx", threads), "fp32": runner(dense, threads)}
    return quantized(job, ways, folder=target, reload_by="onnxruntime.InferenceSession")


if __name__ == "__main__":
    main(["onnx", "onnxruntime"], {"quantize": int8})
