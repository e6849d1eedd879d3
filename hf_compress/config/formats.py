"""Number formats: which values a tensor may have once it is quantized, and the presets that schemes are."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_compress.config.base import Settings
from hf_compress.errors import ConfigError
from hf_compress.registry import observers, schemes


@dataclass(frozen=True, kw_only=True)
class TensorFormat(Settings):
    """The numbers of one tensor: bits, what shares a step, and how its range is found."""

    num_bits: int = 8
    """1 to 8; 1 with method ``"bnn"`` only."""

    granularity: str = "tensor"
    """What shares a step. ``"tensor"``: all values. ``"channel"`` (weights): those of one output. ``"group"``
    (weights): ``group_size`` neighboring inputs of one output. ``"token"`` (inputs and outputs): those of a row."""

    group_size: int | None = None
    """Of granularity ``"group"``; must divide the inputs of every layer."""

    symmetric: bool = True
    """Whether the zero point is 0. False: the grid covers ranges that do not lie evenly around zero."""

    dynamic: bool = False
    """Inputs and outputs: whether the range is that of the tensor itself, computed at every call. Otherwise it is
    observed while training or calibrating, and fixed then. Weights have the range of the weight, always."""

    observer: str | None = None
    """Which range is chosen, by registry name: ``"min_max"``, ``"ema"``, ``"percentile"``, ``"mse"`` or
    ``"entropy"``. None: ``"ema"`` for ranges that are observed in training, else ``"min_max"``."""

    observer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the observer, e.g. ``{"percentile": 99.9}`` or ``{"momentum": 0.9}``."""

    GRANULARITIES: ClassVar[tuple[str, ...]] = ("tensor", "channel", "group", "token")
    """What ``granularity`` may be."""

    def _validate(self) -> None:
        if not isinstance(self.num_bits, int) or isinstance(self.num_bits, bool) or not 1 <= self.num_bits <= 8:
            raise self._error("num_bits", self.num_bits, "an int from 1 to 8")
        self._check_choice("granularity", self.GRANULARITIES)
        if self.granularity == "group":
            self._check_count_of_group()
        elif self.group_size is not None:
            raise self._error("group_size", self.group_size, "None unless granularity is 'group'")
        for name in ("symmetric", "dynamic"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, getattr(self, name), "True or False")
        if self.observer is not None:
            self._check_choice("observer", observers)
        if not isinstance(self.observer_options, Mapping):
            raise self._error("observer_options", self.observer_options, "a mapping of the observer's arguments")
        if self.observer_options and self.observer is None:
            raise self._error("observer_options", self.observer_options, "{} without an observer", "Name the observer.")
        object.__setattr__(self, "observer_options", dict(self.observer_options))

    def _check_count_of_group(self) -> None:
        if self.group_size is None:
            raise self._error("group_size", None, "an int >= 1 with granularity 'group'")
        self._check_count("group_size")

    def changed(self, changes: Mapping[str, Any]) -> "TensorFormat":
        """Return the format with some fields changed.

        Raises:
            ConfigError: For an unknown field, or a value that is not allowed.
        """
        if "granularity" in changes and changes["granularity"] != "group":
            changes = {"group_size": None, **changes}
        return type(self).from_dict({**self.to_dict(), **changes})


@dataclass(frozen=True, kw_only=True)
class LayerFormats(Settings):
    """The formats of a layer's tensors; None stays in floating point."""

    weights: TensorFormat | None = None
    """Of the weight."""

    inputs: TensorFormat | None = None
    """Of what comes in."""

    outputs: TensorFormat | None = None
    """Of what goes out."""

    ROLES: ClassVar[tuple[str, ...]] = ("weights", "inputs", "outputs")
    """Names of the fields."""

    def _validate(self) -> None:
        for role in self.ROLES:
            value = getattr(self, role)
            if isinstance(value, Mapping):  # stored form
                value = TensorFormat.from_dict(value)
                object.__setattr__(self, role, value)
            if value is not None and not isinstance(value, TensorFormat):
                raise self._error(role, value, "a TensorFormat or None")
            if value is not None:
                self._check_role(role, value)

    def _check_role(self, role: str, value: TensorFormat) -> None:
        if role == "weights":
            allowed: tuple[str, ...] = ("tensor", "channel", "group")
            if value.dynamic:
                raise ConfigError("weights.dynamic: got True; allowed: False. A weight always has its own range.")
        else:
            allowed = ("tensor", "token") if value.dynamic else ("tensor",)
        if value.granularity not in allowed:
            remedy = " Set dynamic=True: tokens have no range that lasts." if value.granularity == "token" else ""
            raise ConfigError(
                f"{role}.granularity: got {value.granularity!r}; allowed: {', '.join(map(repr, allowed))}.{remedy}"
            )
        if value.granularity == "token" and value.observer not in (None, "min_max"):
            raise ConfigError(
                f"{role}.observer: got {value.observer!r} with granularity 'token'; allowed: None or 'min_max'. A "
                "token has too few values for another range."
            )
        if value.observer == "ema" and (role == "weights" or value.dynamic):
            raise ConfigError(
                f"{role}.observer: got 'ema'; allowed: others, as this range is that of the tensor itself."
            )

    def is_empty(self) -> bool:
        """Return whether nothing is quantized."""
        return not any(getattr(self, role) for role in self.ROLES)

    def has_observed(self) -> bool:
        """Return whether there is a range that has to be observed."""
        return any(each is not None and not each.dynamic for each in (self.inputs, self.outputs))

    def changed(self, owner: str, changes: Mapping[str, Any]) -> "LayerFormats":
        """Return the formats with changes.

        Args:
            owner: Which config asks, for messages.
            changes: For roles: None (as it is), False (not quantized), or a mapping of fields to change; a tensor
                that was not quantized starts from ``TensorFormat()``.

        Raises:
            ConfigError: If a change is something else, or is none.
        """
        result = {role: getattr(self, role) for role in self.ROLES}
        for role, change in changes.items():
            before = result[role]
            if change is None:
                continue
            if change is False:
                if before is None:
                    raise ConfigError(f"{owner}.{role}: got False, but they are not quantized anyway; leave it out.")
                result[role] = None
            else:
                try:
                    result[role] = (before or TensorFormat()).changed(change)
                except ConfigError as error:
                    raise ConfigError(f"{owner}.{role}: {error}") from error
        return LayerFormats(**result)


for _name, _formats in {
    "int8_dynamic": LayerFormats(
        weights=TensorFormat(granularity="channel"), inputs=TensorFormat(granularity="token", dynamic=True)
    ),
    "int8_static": LayerFormats(weights=TensorFormat(granularity="channel"), inputs=TensorFormat(symmetric=False)),
    "int8_weight_only": LayerFormats(weights=TensorFormat(granularity="channel")),
    "int4_weight_only": LayerFormats(weights=TensorFormat(num_bits=4, granularity="group", group_size=32)),
}.items():
    schemes.register(_name)(_formats)
