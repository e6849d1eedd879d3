"""The three methods: what they do, how much, when."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hf_compress.config.base import Config
from hf_compress.errors import ConfigError, choices
from hf_compress.registry import allocators, criteria, distillation_losses, schemes
from hf_compress.schedule import schedules, to_steps

STRUCTURES = ("heads", "ffn", "hidden", "head_dim", "layers", "experts", "vocab", "other")
"""The kinds of dimension group, see ``hf_compress.graph.groups``."""

TRAINABLE_STRUCTURES = ("heads", "ffn")
"""The structures that can be pruned while training, today."""


@dataclass(frozen=True, kw_only=True)
class PruningConfig(Config):
    """Structured pruning during training: which structures, how much, by which criterion, when."""

    structures: Mapping[str, float]
    """Kind of dimension group -> sparsity in [0, 1): the fraction of its units to remove, e.g. ``{"heads": 0.5}``."""

    criterion: str = "taylor"
    """How units are scored (higher = keep): a name in ``hf_compress.pruning.criteria``."""

    schedule: str = "cubic"
    """How sparsity grows from 0 between ``begin`` and ``end``: a name in ``hf_compress.schedule``."""

    allocation: str = "global"
    """``"per_layer"``: every layer loses the same fraction; ``"global"``: scores compete across layers."""

    begin: float | int = 0.1
    """When pruning starts: optimizer steps (int) or a fraction of the run (float)."""

    end: float | int = 0.6
    """When the final sparsity is reached; what remains of the run heals the model. Same units as ``begin``."""

    update_every: int = 10
    """Optimizer steps between two changes of the masks."""

    score_decay: float = 0.95
    """Exponential moving average of scores that are measured per step: s <- decay * s + (1 - decay) * s_step."""

    min_units: int = 1
    """Units that every layer keeps at least, whatever the scores say."""

    max_layer_sparsity: float = 1.0
    """Upper limit of the sparsity of a single layer under global allocation, in (0, 1]."""

    multiple_of: int = 1
    """Kept FFN widths are multiples of this (8, 16 or 64 suit integer and tensor-core kernels)."""

    exclude: tuple[str, ...] = ()
    """Regular expressions; a dimension group whose name matches one (``re.search``) is left alone."""

    def _validate(self) -> None:
        self._check_patterns("exclude")
        self._check_structures()
        for name, allowed in {"criterion": criteria, "allocation": allocators, "schedule": schedules}.items():
            self._check_choice(name, allowed)
        for name in ("begin", "end"):
            self._check_moment(name)
        if isinstance(self.begin, int) == isinstance(self.end, int) and self.begin > self.end:
            raise self._error("end", self.end, f"at least begin = {self.begin}")
        for name in ("update_every", "min_units", "multiple_of"):
            self._check_count(name)
        self._check_number("score_decay", 0, 1, open_high=True)
        self._check_number("max_layer_sparsity", 0, 1, open_low=True)
        self._check_effects()

    def _check_structures(self) -> None:
        if not isinstance(self.structures, Mapping) or not self.structures:
            raise self._error("structures", self.structures, 'a non-empty mapping such as {"heads": 0.5, "ffn": 0.7}')
        for kind, sparsity in self.structures.items():
            if kind not in TRAINABLE_STRUCTURES:
                known = choices(kind, TRAINABLE_STRUCTURES)
                raise ConfigError(f"PruningConfig.structures: unknown structure {kind!r}; {known}.")
            if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
                raise self._error(f"structures[{kind!r}]", sparsity, "a sparsity (fraction removed) in [0, 1)")
        object.__setattr__(self, "structures", {kind: float(value) for kind, value in self.structures.items()})

    def _check_effects(self) -> None:
        """A setting that cannot change anything is an error, not a comment."""
        per_layer = self.allocation == "per_layer"
        if per_layer and self.max_layer_sparsity != 1.0:
            raise self._error("max_layer_sparsity", self.max_layer_sparsity, 'only 1.0 with allocation="per_layer"')
        if self.multiple_of != 1 and "ffn" not in self.structures:
            raise self._error("multiple_of", self.multiple_of, 'only 1 unless "ffn" is pruned')
        if max(self.structures.values()) > self.max_layer_sparsity:
            raise self._error("max_layer_sparsity", self.max_layer_sparsity, "at least the highest sparsity asked for")

    def window(self, total_steps: int) -> tuple[int, int]:
        """Return the first and the last optimizer step of the schedule.

        Raises:
            ConfigError: If the window does not fit into the run.
        """
        begin, end = to_steps(self.begin, total_steps), to_steps(self.end, total_steps)
        if not 0 <= begin <= end <= total_steps or end < 1:
            raise ConfigError(
                f"PruningConfig.begin/end: {self.begin!r}..{self.end!r} is the window of steps {begin}..{end}, but "
                f"the run has {total_steps} optimizer steps; allowed: 0 <= begin <= end <= {total_steps} and end >= 1."
            )
        return begin, end


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Config):
    """Fake quantization during training, matched to the integer kernel that will run the exported model."""

    scheme: str = "int8_dynamic"
    """``"int8_dynamic"``: int8 symmetric weights per output channel, int8 symmetric inputs per token, scales
    computed from the tensors themselves at every call."""

    method: str = "qat"
    """``"qat"``: straight-through fake quantization (Jacob et al. 2018, arXiv:1712.05877)."""

    begin: float | int = 0.0
    """When fake quantization starts: optimizer steps (int) or a fraction of the run (float)."""

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
    """``"kl"``: T^2 * KL(softmax(teacher / T) || softmax(student / T)) over valid positions."""

    def _validate(self) -> None:
        self._check_number("alpha", 0, 1, open_low=True)
        self._check_number("temperature", 0, 1000, open_low=True)
        self._check_choice("loss", distillation_losses)
