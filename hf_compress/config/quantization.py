"""Quantization: what it does, when."""

from dataclasses import dataclass
from typing import ClassVar

from hf_compress.config.base import Config
from hf_compress.registry import schemes
from hf_compress.schedule import Moment


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Config):
    """Fake quantization during training, matched to the integer kernel that will run the exported model."""

    scheme: str = "int8_dynamic"
    """``"int8_dynamic"``: int8 symmetric weights per output channel, int8 symmetric inputs per token, scales
    computed from the tensors themselves at every call."""

    method: str = "qat"
    """``"qat"``: straight-through fake quantization (Jacob et al. 2018, arXiv:1712.05877)."""

    begin: Moment = 0.0
    """When fake quantization starts: a step (int), a fraction of the run (float) or ``"1.5 epochs"``."""

    exclude: tuple[str, ...] | None = None
    """Regular expressions; a Linear whose module name matches one (``re.search``) stays in floating point.
    ``None`` leaves out every Linear outside the base model: the task head."""

    METHODS: ClassVar[tuple[str, ...]] = ("qat",)

    def _validate(self) -> None:
        if self.exclude is not None:
            self._check_patterns("exclude")
        self._check_choice("scheme", schemes)
        self._check_choice("method", self.METHODS)
        self._check_moment("begin")
