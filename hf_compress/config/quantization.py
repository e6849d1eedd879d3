"""Quantization: which numbers, which layers, how they are found, when."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hf_compress.config.base import Config, Settings
from hf_compress.config.formats import LayerFormats
from hf_compress.errors import ConfigError
from hf_compress.registry import quantization_methods, schemes
from hf_compress.schedule import Moment

Change = Mapping[str, Any] | Literal[False] | None
"""Of a tensor's format: fields of ``TensorFormat`` that differ; False = not quantized; None = as it is."""

TARGETS: Mapping[str, tuple[str, ...]] = {
    "linear": LayerFormats.ROLES,
    "convolution": LayerFormats.ROLES,
    "embedding": ("weights",),
    "experts": ("weights",),
    "attention": ("inputs",),
    "probabilities": ("inputs",),
}
"""Kind of layers -> which of their tensors can be quantized."""


@dataclass(frozen=True, kw_only=True)
class QuantizationRule(Settings):
    """Other number formats for a part of the model. What is left out is as in the config around it."""

    match: Sequence[str]
    """Regular expressions; the rule is for the quantized layers whose name matches one (``re.search``). The first such
    rule decides."""

    weights: Change = None
    """What differs from the scheme, see ``QuantizationConfig.weights``."""

    inputs: Change = None
    """The same for inputs."""

    outputs: Change = None
    """The same for outputs."""

    def _validate(self) -> None:
        self._check_patterns("match")
        if not self.match:
            raise self._error("match", self.match, "at least one regular expression")
        _check_changes(self)
        if all(change is None for change in changes_of(self).values()):
            raise self._error("match", self.match, "a rule that sets something else, too", "This one has no effect.")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Config):
    """Which tensors get integer values, in training (``QuantizationCallback``) or after it (``calibrate``)."""

    scheme: str = "int8_dynamic"
    """Where the formats start from, by registry name. ``"int8_dynamic"``: int8 symmetric weights per output channel,
    int8 symmetric inputs per token, scales computed from the tensors themselves at every call. ``"int8_static"``: the
    same weights, int8 affine inputs whose one range is observed. ``"int8_weight_only"``; ``"int4_weight_only"``: int4
    symmetric weights in groups of 32 inputs."""

    weights: Change = None
    """What differs from the scheme: fields of ``TensorFormat``, e.g. ``{"num_bits": 4}``; False: not quantized."""

    inputs: Change = None
    """The same for inputs."""

    outputs: Change = None
    """The same for outputs, which no scheme quantizes by itself."""

    method: str = "qat"
    """By registry name. ``"qat"``: straight-through fake quantization (Jacob et al. 2018, arXiv:1712.05877);
    ``"lsq"``, ``"lsq_plus"``: learned steps; ``"dorefa"``; ``"bnn"``: weights of one bit. ``"ptq"``: after training,
    see ``calibrate``."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the method, see the README's table."""

    begin: Moment = 0.0
    """When fake quantization starts: a step (int), a fraction of the run (float) or ``"1.5 epochs"``."""

    observe: Moment | None = None
    """When observed ranges begin to be watched; None: from ``begin`` on."""

    freeze: Moment | None = None
    """From when on observed ranges and learned steps stay as they are; None: never."""

    targets: Sequence[str] = ("linear",)
    """Kinds of layers. ``"linear"``: ``nn.Linear`` and GPT-2's ``Conv1D``. ``"convolution"``: ``nn.Conv1d``,
    ``nn.Conv2d``. ``"embedding"``: weights of ``nn.Embedding``, whose outputs are the rows. ``"experts"``: weights of
    mixtures of experts, an output of one expert is a channel. ``"attention"``: ``inputs`` is about queries, keys and
    values as they are multiplied, a token being that of one head. ``"probabilities"``: ``inputs`` is about attention
    maps as values are multiplied with them, a token being a query's row; maps are then computed one by one, which takes
    the time and the memory of eager attention."""

    exclude: Sequence[str] | None = None
    """Regular expressions; a module whose name matches one (``re.search``) stays in floating point. ``None`` leaves
    out whatever lies outside the base model: the task head."""

    rules: Sequence[QuantizationRule | Mapping[str, Any]] = ()
    """Other formats for parts of the model: mixed precision."""

    def _validate(self) -> None:
        if self.exclude is not None:
            self._check_patterns("exclude")
        self._check_choice("scheme", schemes)
        self._check_choice("method", quantization_methods)
        self._check_targets()
        self._check_rules()
        for name in ("begin", "observe", "freeze"):
            if name == "begin" or getattr(self, name) is not None:
                self._check_moment(name)
        _check_changes(self)
        if not isinstance(self.options, Mapping):
            raise self._error("options", self.options, "a mapping of the method's settings")
        object.__setattr__(self, "options", dict(self.options))
        self._check_method()

    def formats(self) -> LayerFormats:
        """Return the formats of layers that no rule is for."""
        start: LayerFormats = schemes.get(self.scheme)
        return start.changed("QuantizationConfig", changes_of(self))

    def rule_formats(self) -> list[LayerFormats]:
        """Return the formats of each rule."""
        return [self.formats().changed("QuantizationRule", changes_of(rule)) for rule in self.parsed_rules()]

    def parsed_rules(self) -> tuple[QuantizationRule, ...]:
        """Return the rules as objects."""
        return tuple(each for each in self.rules if isinstance(each, QuantizationRule))

    def method_options(self) -> Any:
        """Return the method's settings, defaults filled in."""
        return quantization_methods.get(self.method).options.from_dict(self.options)

    def _check_targets(self) -> None:
        if isinstance(self.targets, str) or not isinstance(self.targets, Sequence) or not self.targets:
            raise self._error("targets", self.targets, f"a list of some of {', '.join(map(repr, TARGETS))}")
        for each in self.targets:
            if each not in TARGETS:
                raise self._error("targets", each, ", ".join(map(repr, TARGETS)))
        object.__setattr__(self, "targets", tuple(self.targets))

    def _check_roles(self, every: Sequence[LayerFormats]) -> None:
        """Check that no target is there for nothing."""
        for target in self.targets:
            roles = TARGETS[target]
            if not any(getattr(formats, role) is not None for formats in every for role in roles):
                names = " and ".join(roles)
                raise self._error(
                    "targets", target, f"targets with something to quantize, and {names} are not: leave it out"
                )

    def _check_rules(self) -> None:
        if isinstance(self.rules, str | Mapping) or not isinstance(self.rules, Sequence):
            raise self._error("rules", self.rules, "a list of rules, e.g. [{'match': ['query'], 'weights': False}]")
        kind = QuantizationRule
        rules = tuple(each if isinstance(each, kind) else kind.from_dict(each) for each in self.rules)
        object.__setattr__(self, "rules", rules)

    def _check_method(self) -> None:
        method = quantization_methods.get(self.method)
        try:
            options = self.method_options()
        except ConfigError as error:
            raise ConfigError(f"QuantizationConfig.options for method {self.method!r}: {error}") from error
        every = [self.formats(), *self.rule_formats()]
        if all(formats.is_empty() for formats in every):
            raise ConfigError("QuantizationConfig: weights, inputs and outputs are all False, so nothing is quantized.")
        self._check_roles(every)
        for formats in every:
            method(options).check(formats)
        method(options).check_together(every)
        observed = any(formats.has_observed() for formats in every)
        for name in ("observe", "freeze"):
            if getattr(self, name) is not None and not (observed or (name == "freeze" and method.learns)):
                raise self._error(name, getattr(self, name), "None", "All ranges are computed at every call.")
        if not method.trains:
            for name, default in (("begin", 0.0), ("observe", None), ("freeze", None)):
                if getattr(self, name) != default:
                    raise self._error(name, getattr(self, name), f"{default!r} with method {self.method!r}")


def changes_of(settings: QuantizationConfig | QuantizationRule) -> dict[str, Any]:
    """Return what is said of each role."""
    return {role: getattr(settings, role) for role in LayerFormats.ROLES}


def _check_changes(settings: QuantizationConfig | QuantizationRule) -> None:
    for role, change in changes_of(settings).items():
        if change is None or change is False:
            continue
        if not isinstance(change, Mapping) or not change:
            raise ConfigError(
                f"{type(settings).__name__}.{role}: got {change!r}; allowed: None (as in the scheme), False (not "
                'quantized), or a mapping of what differs, e.g. {"num_bits": 4}.'
            )
        object.__setattr__(settings, role, dict(change))
