"""Training by low-rank adapters instead of all weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.config.base import Config


@dataclass(frozen=True, kw_only=True)
class LoraSection(Config):
    """Adapters that are trained in place of the model, and merged into it afterwards (Hu et al. 2021, "LoRA").

    Needs less memory than training all weights, and is how one-shot pruning is often healed.
    """

    r: int = 16
    """Rank of the adapters."""

    alpha: float = 32.0
    """What they add is scaled by ``alpha / r``."""

    dropout: float = 0.0
    """Before the adapters, in [0, 1)."""

    target_modules: str | Sequence[str] = "all-linear"
    """Layers that get adapters, see ``peft.LoraConfig``."""

    def _validate(self) -> None:
        self._check_count("r")
        self._check_number("alpha", 0, 1e6, open_low=True)
        self._check_number("dropout", 0, 1, open_high=True)
        given: Any = self.target_modules
        if isinstance(given, list | tuple) and given and all(isinstance(each, str) and each for each in given):
            object.__setattr__(self, "target_modules", tuple(given))
        elif not isinstance(given, str) or not given:
            raise self._error("target_modules", given, "'all-linear', the end of a name, or a list of these")
