"""Quantization and distillation: what they do, how much, when."""

from dataclasses import dataclass
from typing import ClassVar

from hf_compress.config.base import Config
from hf_compress.registry import distillation_losses, schemes
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


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Config):
    """Knowledge distillation: loss = (1 - alpha) * task loss + alpha * distillation loss."""

    alpha: float = 0.9
    """Weight of the distillation loss, in (0, 1]."""

    temperature: float = 2.0
    """Softens both distributions; the loss is multiplied by its square (Hinton et al. 2015, arXiv:1503.02531)."""

    loss: str = "kl"
    """``"kl"``: T^2 * KL(softmax(teacher / T) || softmax(student / T)) over valid positions; or another loss of logits,
    see ``hf_compress.distillation.logits``."""

    def _validate(self) -> None:
        self._check_number("alpha", 0, 1, open_low=True)
        self._check_number("temperature", 0, 1000, open_low=True)
        losses = {name: distillation_losses.get(name) for name in distillation_losses}
        # Users may register plain functions, which are given logits.
        self._check_choice(
            "loss", [name for name, loss in losses.items() if getattr(loss, "reads", "logits") == "logits"]
        )
