"""``footprint``: how large and how fast models are."""

from collections.abc import Sequence
from pathlib import Path

import evaluate
from datasets import Features, Value

from hf_compress.graph.inputs import make_example_inputs
from hf_compress.loading import load_model
from hf_compress.report.profile import profile

MEASURED = ("parameters", "encoder_parameters", "flops", "bytes_on_disk", "peak_memory", "latency_ms")
"""Fields of ``ModelProfile`` that are numbers to compare."""


class Footprint(evaluate.Measurement):  # type: ignore[misc]
    """Weights, operations, bytes, memory and latency of models by their Hub names or folders, see ``profile``."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            description="Size and cost of one forward pass.",
            citation="",
            inputs_description="data: Hub names or folders of models; batch_size and length of the made-up inputs.",
            features=Features({"data": Value("string")}),
            module_type="measurement",
        )

    def _compute(
        self, data: Sequence[str], batch_size: int = 1, length: int = 128, latency: bool = True
    ) -> dict[str, list[float | None]]:
        found: dict[str, list[float | None]] = {name: [] for name in MEASURED}
        for name in data:
            model = load_model(name)
            inputs = make_example_inputs(model, batch_size, length)
            one = profile(model, inputs, latency=latency, directory=name if Path(name).is_dir() else None)
            for field, values in found.items():
                values.append(getattr(one, field))
        return found
