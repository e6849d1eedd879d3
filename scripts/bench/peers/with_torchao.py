"""torchao: its own ``quantize_``, int8 weights per channel and dynamic int8 inputs per token; saved by Transformers."""

from typing import Any

from common import Job, collate, compiled, logits_of, main, quantized, unlabeled
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import AutoModelForSequenceClassification, TorchAoConfig


def int8(job: Job) -> dict[str, Any]:
    """Quantize all linear layers but the task head, as Transformers' documentation does it."""
    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=["classifier"])
    model = AutoModelForSequenceClassification.from_pretrained(job.dense_folder, quantization_config=config).eval()
    model.save_pretrained(job.folder / "model")
    ways = {"int8 eager": logits_of(model)}
    fast = compiled(model, unlabeled(collate(job.rows("test")[: job.settings["batch_size"]])))
    if fast is not None:
        ways["int8 compiled"] = fast
    return quantized(job, ways, folder=job.folder / "model", reload_by="from_pretrained")


if __name__ == "__main__":
    main(["torchao"], {"quantize": int8})
