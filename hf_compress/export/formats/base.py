"""What an export format is, and the integers of a weight, which most formats store."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_compress.config.formats import LayerFormats
from hf_compress.errors import ExportError
from hf_compress.graph.capture import main_outputs
from hf_compress.instruments.quantize import QuantizedLayer
from hf_compress.instruments.targets import oriented_weight
from hf_compress.quantization.fake import to_integers
from hf_compress.quantization.granularity import Granularity
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.quantizers import RangeQuantizer
from hf_compress.shrinking.verify import FORWARD_ERRORS


class Format(ABC):
    """One way to store a quantized model."""

    name: ClassVar[str]

    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that loading needs besides transformers."""

    extra: ClassVar[str | None] = None
    """The extra of this package that installs them."""

    needed_to_write: ClassVar[bool] = True
    """Whether writing needs the packages, too."""

    acting: ClassVar[tuple[str, ...]] = LayerFormats.ROLES
    """Which tensors are rounded when the stored model runs."""

    records: ClassVar[bool] = False
    """Whether writing runs the model."""

    runtime: ClassVar[str] = "transformers"
    """What loads the folder, see ``hf_compress.export.verification``."""

    @abstractmethod
    def refusal(self, layer: QuantizedLayer) -> str | None:
        """Return why the format cannot store a layer exactly as it was trained, or None if it can."""

    @abstractmethod
    def write(
        self, model: PreTrainedModel, layers: list[QuantizedLayer], folder: Path, inputs: Mapping[str, Any] | None
    ) -> None:
        """Write a model.

        Args:
            model: A copy that may be changed; nothing is attached to it.
            layers: Its quantized layers.
            folder: An empty folder.
            inputs: Keyword arguments on which the model runs, for formats that record it.

        Raises:
            ExportError: If the model cannot be stored.
        """

    def check_installed(self) -> None:
        """Check that what loading needs is installed.

        Raises:
            ExportError: If not.
        """
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise ExportError(self.installation(missing[0]))

    @classmethod
    def installation(cls, package: str) -> str:
        """Return what to do about a missing package."""
        return (
            f"export_quantized: format {cls.name!r} needs the {package.replace('_', '-')} package. Install it with: "
            f"pip install 'hf-compress[{cls.extra}]'; or use format='dense'."
        )


@dataclass(frozen=True)
class StoredWeight:
    """A weight as integers."""

    integers: Tensor
    """int8 [outputs, inputs...]."""

    scale: Tensor
    """float32 [blocks], in the order of ``Granularity.blocks``."""

    zero_point: Tensor | None
    """int32 [blocks]; None: 0."""

    grid: Grid
    granularity: Granularity

    def per_row(self, parameters: Tensor) -> Tensor:
        """Return scales or zero points as [outputs, blocks of a row], or [1] if the whole weight shares one."""
        return parameters if self.granularity.kind == "tensor" else parameters.view(len(self.integers), -1)


@torch.no_grad()
def stored_weight(layer: QuantizedLayer) -> StoredWeight:
    """Return the integers of a layer's weight, on the CPU: those that its quantizer computes with."""
    quantizer = layer.weights
    assert quantizer is not None and quantizer.grid is not None
    weight = oriented_weight(layer.name, layer.module).detach()
    granularity, grid = quantizer.granularity, quantizer.grid
    scale, zero_point = quantizer.parameters(weight)
    steps = granularity.spread(scale.detach(), weight.shape)
    zeros = None if zero_point is None else granularity.spread(zero_point, weight.shape)
    integers = granularity.restore(to_integers(granularity.view(weight), grid, steps, zeros))
    kept = None if zero_point is None else zero_point.cpu()
    return StoredWeight(integers.cpu().contiguous(), scale.detach().cpu(), kept, grid, granularity)


def progress(layers: list[QuantizedLayer]) -> Any:
    """Show a bar where transformers would, see ``transformers.utils.logging.disable_progress_bar``."""
    bars: Any = logging
    return bars.tqdm(layers, desc="Quantizing layers")


def without_grid(layer: QuantizedLayer) -> str | None:
    """Return which tensor of a layer has values that are no integers times a step, or None."""
    return next((role for role, each in layer.quantizers() if each.grid is None), None)


def range_of_its_own(layer: QuantizedLayer) -> str | None:
    """Return why the ranges that are computed at every call are not those of a format, or None: minimum and maximum."""
    for role, each in layer.quantizers():
        if role != "weights" and isinstance(each, RangeQuantizer) and each.observer != "min_max":
            return (
                f"computes the range of its {role} at every call by observer {each.observer!r}, where the format takes "
                "minimum and maximum"
            )
    return None


def run_example(model: PreTrainedModel, inputs: Mapping[str, Any], remedy: str) -> dict[str, Tensor]:
    """Return the outputs that count, by name.

    Args:
        model: Any model.
        inputs: Keyword arguments on which it should run.
        remedy: The end of the message if it does not.

    Raises:
        ExportError: If it does not run.
    """
    try:
        result = model(**inputs, return_dict=True)
    except FORWARD_ERRORS as error:
        raise ExportError(
            f"export_quantized: {type(model).__name__} does not run on example inputs ({error!r}), {remedy}"
        ) from error
    main = {id(each) for each in main_outputs(result)}
    return {name: each for name, each in result.items() if id(each) in main}
