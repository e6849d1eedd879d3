"""OpenVINO: converted from ONNX; int8 by NNCF's post-training quantization, ranges from training data."""

from typing import Any

import nncf
import openvino
import torch
from common import Inputs, Job, main, quantized, unlabeled
from onnx_file import to_onnx
from torch import Tensor


def runner(core: Any, model: Any, threads: int) -> Any:
    """Return the model as a function from a batch to logits."""
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)

    def run(batch: Inputs) -> Tensor:
        return torch.from_numpy(compiled({name: each.numpy() for name, each in batch.items()})[0].copy())

    return run


def int8(job: Job) -> dict[str, Any]:
    """Quantize weights and inputs with observed ranges."""
    dense, target = job.folder / "model.onnx", job.folder / "model"
    target.mkdir()
    to_onnx(job, dense)
    core = openvino.Core()
    batches = [{name: each.numpy() for name, each in unlabeled(batch).items()} for batch in job.calibration()]
    integer = nncf.quantize(core.read_model(dense), nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(integer, target / "openvino_model.xml")
    threads = job.settings["threads"]
    ways = {
        "int8": runner(core, target / "openvino_model.xml", threads),
        "fp32": runner(core, core.read_model(dense), threads),
    }
    return quantized(job, ways, folder=target, reload_by="openvino.Core().read_model")


if __name__ == "__main__":
    main(["openvino", "nncf"], {"quantize": int8})
