"""What a user writes: frozen, validated on construction, stored as JSON or YAML."""

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from hf_compress.errors import ConfigError, choices
from hf_compress.registry import allocators, criteria, distillation_losses, schemes
from hf_compress.schedule import schedules, to_steps

SCHEMA_VERSION = 1

STRUCTURES = ("heads", "ffn", "hidden", "head_dim", "layers", "experts", "vocab", "other")
"""The kinds of dimension group, see ``hf_compress.graph.groups``."""

TRAINABLE_STRUCTURES = ("heads", "ffn")
"""The structures that can be pruned while training, today."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shared by every config: strict keys, JSON and YAML both ways."""

    schema_version: int = SCHEMA_VERSION
    """Version of the stored form; a file written by a newer version is refused."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise self._error("schema_version", self.schema_version, f"{SCHEMA_VERSION}", "Upgrade hf-compress.")
        self._validate()

    def _validate(self) -> None:
        """Check every field; overridden by each config."""

    def _error(self, name: str, given: object, allowed: str, remedy: str = "") -> ConfigError:
        text = f"{type(self).__name__}.{name}: got {given!r}; allowed: {allowed}."
        return ConfigError(f"{text} {remedy}".rstrip())

    def _check_number(
        self, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
    ) -> None:
        value = getattr(self, name)
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or value < low or value > high or (open_low and value == low) or (open_high and value == high):
            interval = f"a number in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"
            raise self._error(name, value, interval)

    def _check_choice(self, name: str, allowed: Any) -> None:
        value = getattr(self, name)
        if value not in tuple(allowed):
            raise ConfigError(f"{type(self).__name__}.{name}: unknown value {value!r}; {choices(value, allowed)}.")

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(name, value, "an int >= 1")

    def _check_moment(self, name: str) -> None:
        """A moment is an int (optimizer steps) or a float (fraction of the run)."""
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value < 0
            or (isinstance(value, float) and value > 1)
        ):
            raise self._error(name, value, "an int >= 0 (optimizer steps) or a float in [0, 1] (fraction of the run)")

    def _check_patterns(self, name: str) -> None:
        """Patterns are a list of regular expressions; a lone string would be taken apart into characters."""
        value = getattr(self, name)
        if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
            raise self._error(name, value, "a tuple or list of regular expressions")
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self._error(name, pattern, "regular expressions", f"This one is none: {error}.") from error
        object.__setattr__(self, name, tuple(value))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build a config from ``to_dict()`` output.

        Raises:
            ConfigError: For an unknown key or a value that the config does not allow.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise ConfigError(f"{cls.__name__}: unknown key {key!r}; {choices(key, known)}.")
        return cls(**data)

    def to_json(self) -> str:
        """Return the config as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """Return the config as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: str | Path) -> None:
        """Write the config to a ``.json``, ``.yaml`` or ``.yml`` file."""
        path = Path(path)
        path.write_text(self.to_json() if _suffix(path) == "json" else self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a config from a ``.json``, ``.yaml`` or ``.yml`` file.

        Raises:
            ConfigError: If the file cannot be parsed or holds anything but a valid config.
        """
        path = Path(path)
        suffix = _suffix(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if suffix == "json" else yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as {suffix}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of {cls.__name__} fields, got {type(data).__name__}.")
        return cls.from_dict(data)


def _suffix(path: Path) -> str:
    kinds = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}
    if path.suffix not in kinds:
        raise ConfigError(f"{path}: unknown file type {path.suffix!r}; allowed: .json, .yaml, .yml.")
    return kinds[path.suffix]


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


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


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """What one training run does: any subset of the three methods."""

    pruning: PruningConfig | None = None
    """Structured pruning, or None."""

    quantization: QuantizationConfig | None = None
    """Fake quantization, or None."""

    distillation: DistillationConfig | None = None
    """Distillation, or None."""

    teacher: str | None = field(default=None)
    """Hub name or path of the teacher, for runs started from a recipe file."""

    def _validate(self) -> None:
        kinds: dict[str, type[Config]] = {
            "pruning": PruningConfig,
            "quantization": QuantizationConfig,
            "distillation": DistillationConfig,
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, kind.from_dict(value))
            elif value is not None and not isinstance(value, kind):
                raise self._error(name, value, f"a {kind.__name__}, a mapping of its fields, or None")
        if all(getattr(self, name) is None for name in kinds):
            raise ConfigError("Recipe: nothing to do; give at least one of pruning, quantization, distillation.")
        if self.teacher is not None and self.distillation is None:
            raise self._error("teacher", self.teacher, "None without a distillation section")
