"""Stages of a recipe: prune, shrink and heal a model several times instead of once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_compress.config.base import Config
from hf_compress.config.distillation import DistillationConfig
from hf_compress.config.lora import LoraSection
from hf_compress.config.pruning import PruningConfig
from hf_compress.config.quantization import QuantizationConfig
from hf_compress.config.sections import METHODS, build_sections, check_sections
from hf_compress.config.structures import WEIGHTS

MAX_REPEATS = 1_000
"""More are a mistake; every one is a training run, which takes memory and checks before the first begins."""


@dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """One stage: a training run that begins with the smaller model that the stage before it left.

    One without pruning, quantization and distillation just trains: as the first of all it makes the dense model, which
    later stages can have for ``teacher: dense``, after others it heals.

    Sparsities and moments speak of the stage alone: 0.25 removes a quarter of the units that are there when the stage
    begins.
    """

    pruning: PruningConfig | None = None
    """Structured pruning, or None."""

    quantization: QuantizationConfig | None = None
    """Fake quantization, or None; for the last stage, since later training would not keep to it."""

    distillation: DistillationConfig | None = None
    """Distillation from the recipe's teacher, or None."""

    oneshot_batches: int | None = None
    """Prune before training, by ``prune_oneshot`` on so many batches of training data; ``None``: while it trains."""

    lora: LoraSection | None = None
    """Train adapters instead of all weights, and merge them afterwards; ``None``: all weights."""

    training: Mapping[str, Any] | None = None
    """Training arguments of this stage; they take the place of the recipe's. ``num_train_epochs`` takes that of
    ``max_steps`` as well."""

    repeat: int = 1
    """How often the stage runs in a row. Every run removes its share of what the one before left: three times a
    sparsity of 0.2 leaves 0.8^3 = 51%. At most 1,000."""

    def _validate(self) -> None:
        build_sections(self, {**METHODS, "lora": LoraSection})
        check_sections(self)
        self._check_count("repeat")
        if self.repeat > MAX_REPEATS:
            raise self._error("repeat", self.repeat, f"an int in [1, {MAX_REPEATS}]", "Every repeat is a training run.")

    def is_plain(self) -> bool:
        """Return whether the stage trains without any of the methods."""
        return all(getattr(self, name) is None for name in METHODS)

    def forgotten(self) -> str | None:
        """Return what of the stage later training would not keep to, or None."""
        if self.quantization is not None:
            return "quantization"
        return "pruning of single weights" if self.pruning is not None and WEIGHTS in self.pruning.structures else None

    def arguments(self, common: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Return the training arguments of the stage, or None if there are none.

        Args:
            common: The recipe's.
        """
        own, merged = dict(self.training or {}), dict(common or {})
        if "num_train_epochs" in own and "max_steps" not in own:
            merged.pop("max_steps", None)  # it would win, and the stage's epochs would say nothing
        return (merged | own) or None
