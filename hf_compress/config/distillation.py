"""Distillation: which losses, between which layers, how much, when."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hf_compress.config.base import Config, Settings
from hf_compress.errors import ConfigError, choices
from hf_compress.registry import distillation_losses
from hf_compress.schedule import Moment, schedules

AUTO = "auto"
"""The loss of logits that suits the task."""

PAIRINGS = ("same", "uniform", "last", "dynamic")
"""Rules that pair layers; the last makes new pairs in every batch."""

DYNAMIC = PAIRINGS[-1]

TEMPERATURE = 2.0
"""Used unless another is asked for."""

_HEADS = "relation_heads"
"""The one option of a loss of ours."""

_NUMBER = re.compile(r"-?[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Ramp(Settings):
    """A number that changes while training runs, from ``start`` to ``stop``."""

    start: float
    """Value until ``begin``."""

    stop: float
    """Value from the last step before ``end`` on."""

    begin: Moment = 0.0
    """When it begins to change: a step (int), a fraction of the run (float) or ``"1.5 epochs"``."""

    end: Moment = 1.0
    """When it has changed. The last optimizer step before it is the first to use ``stop``: with ``begin=2, end=6`` the
    third step of the run uses ``start`` and the sixth ``stop``, with 1.0 the last step of the run does."""

    schedule: str = "linear"
    """How it changes in between: a name in ``hf_compress.schedule``."""

    def _validate(self) -> None:
        for name in ("start", "stop"):
            self._check_number(name, 0, 1e6)
        for name in ("begin", "end"):
            self._check_moment(name)
        self._check_order("begin", "end")
        self._check_choice("schedule", schedules)
        if self.start == self.stop:
            raise self._error("stop", self.stop, f"another number than start={self.start}", "Or give the number alone.")


class _WithRamps(Settings):
    """Settings some of whose numbers may be ramps."""

    def _check_scheduled(self, name: str, low: float, high: float) -> None:
        """Check a number in (low, high], or a ramp between two such numbers; a mapping becomes a ramp."""
        value = getattr(self, name)
        if isinstance(value, Mapping):
            value = Ramp.from_dict(value)
            object.__setattr__(self, name, value)
        if not isinstance(value, Ramp):
            self._check_number(name, low, high, open_low=True)
            return
        for end in ("start", "stop"):
            number = getattr(value, end)
            if not low < number <= high:
                raise self._error(f"{name}.{end}", number, f"a number in ({low}, {high}]")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(_WithRamps):
    """A loss between what is inside of student and teacher: hidden states, attention maps, or their relations."""

    loss: str
    """A name in ``distillation_losses`` that reads features, such as ``"hidden_mse"``, ``"attention_kl"`` or
    ``"relations"``."""

    weight: float | Ramp = 1.0
    """Factor of this loss beside that of the logits, > 0: a number, or a ``Ramp``."""

    layers: str | Mapping[int, int] = "same"
    """Which layer learns from which: ``"same"`` (models of equal depth), ``"uniform"`` (equally spaced ones of a
    deeper teacher), ``"last"``, a mapping {student layer: teacher layer} (negative ones count from the end), or
    ``"dynamic"``: those that cost least, in every batch anew. Layers that pruning has taken out learn nothing."""

    candidates: str | Mapping[int, Sequence[int]] = "all"
    """With ``"dynamic"``: what may be paired. ``"all"``; ``"later"``, student layer i with teacher layers i, i + 1,
    ...; or a mapping {student layer: [teacher layer, ...]}."""

    ordered: bool = False
    """With ``"dynamic"``: whether a later layer may not choose an earlier one than the layer before it did."""

    chosen_by: Literal["student", "teacher"] = "student"
    """With ``"dynamic"``: who chooses. ``"student"``: each student layer takes the teacher layer that costs least
    (NNI); ``"teacher"``: each teacher layer takes a student layer (Xia et al. 2022, CoFi, arXiv:2204.00408)."""

    teacher_layers: tuple[int, ...] | None = None
    """With ``"dynamic"``: the only teacher layers that take part; None for all."""

    stack: Literal["encoder", "decoder"] | None = None
    """Which layers of an encoder-decoder model; None for both. Other models have one stack."""

    projection: Literal["where needed", "always"] = "where needed"
    """Whether a trained linear map brings the student's width to the teacher's: only where the loss needs equal widths
    and they are not, or always (adaptive distillation). Maps belong to the callback: each layer has its own, training
    starts from the least-squares fit on the first batch, and checkpoints hold them."""

    learning_rate: float = 1e-3
    """Of the maps, by Adam; > 0."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the loss, such as ``{"relation_heads": 12}`` for ``"relations"``."""

    of: tuple[str, ...] = ("query", "key", "value")
    """With losses of relations: which of them."""

    def _validate(self) -> None:
        loss = self._checked_loss()
        self._check_scheduled("weight", 0, 1e6)
        self._check_layers()
        self._check_choice("stack", (None, "encoder", "decoder"))
        self._check_choice("projection", ("where needed", "always"))
        self._check_number("learning_rate", 0, 10, open_low=True)
        if not loss.needs_equal_width:
            for name in ("projection", "learning_rate"):
                self._only_default(name, f"where the loss is {self.loss!r}, which compares any widths")
        self._check_relations(loss)
        self._check_options(loss)

    def _check_options(self, loss: Any) -> None:
        if not isinstance(self.options, Mapping):
            raise self._error("options", self.options, "a mapping of settings of the loss")
        known = [name for name in loss.options if name != "key_mask"]
        for name in self.options:
            if name not in known:
                named = choices(name, known) if known else "it has none"
                raise ConfigError(f"FeatureConfig.options: unknown key {name!r} for {self.loss!r}; {named}.")
        heads = self.options.get(_HEADS, 1)
        if not _is_int(heads) or heads < 1:
            raise self._error(f"options[{_HEADS!r}]", heads, "an int >= 1")

    def _checked_loss(self) -> Any:
        self._check_choice("loss", [name for name in distillation_losses if not _reads_logits(name)])
        return distillation_losses.get(self.loss)

    def _check_relations(self, loss: Any) -> None:
        if isinstance(self.of, list):
            object.__setattr__(self, "of", tuple(self.of))
        if loss.reads != "relations":
            self._only_default("of", f"where the loss is {self.loss!r}")
        allowed = ("query", "key", "value")
        if not isinstance(self.of, tuple) or not self.of or not all(each in allowed for each in self.of):
            raise self._error("of", self.of, "a list of some of 'query', 'key', 'value'")
        if _repeats(self.of):
            raise self._error("of", self.of, "each of them once", "Twice would compare the same twice.")

    def _check_layers(self) -> None:
        for name in ("layers", "candidates"):
            object.__setattr__(self, name, self._with_int_keys(name))
        if isinstance(self.layers, Mapping):
            if not self.layers or not all(_is_int(i) for pair in self.layers.items() for i in pair):
                raise self._error("layers", self.layers, "a mapping {student layer: teacher layer} that is not empty")
        else:
            self._check_choice("layers", PAIRINGS)
        if distillation_losses.get(self.loss).successive and (self.layers in ("last", DYNAMIC) or len(self.layers) < 2):
            raise self._error(
                "layers", self.layers, f"at least two fixed pairs where the loss is {self.loss!r}, of two layers each"
            )
        if self.layers != DYNAMIC:
            for name in ("candidates", "ordered", "chosen_by", "teacher_layers"):
                self._only_default(name, f'unless layers="{DYNAMIC}"')
            return
        self._check_dynamic()

    def _check_dynamic(self) -> None:
        if not isinstance(self.candidates, Mapping):
            self._check_choice("candidates", ("all", "later"))
        elif self.teacher_layers is not None:
            raise self._error("teacher_layers", self.teacher_layers, "None where candidates list them already")
        else:
            lists = self.candidates.values()
            if not lists or not all(_is_int(key) for key in self.candidates) or not all(map(_are_layers, lists)):
                raise self._error("candidates", self.candidates, "a mapping {student layer: [teacher layer, ...]}")
            for key, each in self.candidates.items():
                if _repeats(each):
                    raise self._error(f"candidates[{key}]", each, "each layer once")
            object.__setattr__(self, "candidates", {key: tuple(each) for key, each in self.candidates.items()})
        self._check_choice("chosen_by", ("student", "teacher"))
        self._check_bool("ordered")
        if self.teacher_layers is not None:
            if not _are_layers(self.teacher_layers):
                raise self._error("teacher_layers", self.teacher_layers, "a list of layers that is not empty, or None")
            if _repeats(self.teacher_layers):
                raise self._error("teacher_layers", self.teacher_layers, "each layer once")
            object.__setattr__(self, "teacher_layers", tuple(self.teacher_layers))

    def _with_int_keys(self, name: str) -> Any:
        """Return a mapping with numbers as keys, which JSON turns into texts; anything else as it is."""
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            return value
        keys = [int(key) if isinstance(key, str) and _NUMBER.fullmatch(key) else key for key in value]
        if _repeats(keys):
            raise self._error(name, value, "each student layer once", "A text and a number name the same layer.")
        return dict(zip(keys, value.values(), strict=True))

    def _only_default(self, name: str, when: str) -> None:
        default = next(field for field in dataclasses.fields(self) if field.name == name).default
        if getattr(self, name) != default:
            raise self._error(name, getattr(self, name), f"{default!r} {when}, where it would have no effect")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(_WithRamps, Config):
    """Knowledge distillation: loss = (1 - alpha) * task + alpha * (logits + sum of weight * feature loss)."""

    alpha: float | Ramp = 0.9
    """Weight of the distillation loss, in (0, 1]: a number, or a ``Ramp``."""

    temperature: float | Ramp = TEMPERATURE
    """Softens both distributions; the loss is multiplied by its square (Hinton et al. 2015, arXiv:1503.02531). A
    number, or a ``Ramp``."""

    loss: str | None = AUTO
    """What compares logits at the positions that the task loss counts, in question answering at both ends of every
    example, also where the text lacks the answer: ``"auto"`` (``"kl"``; ``"mse"`` where the task is regression,
    ``"binary_kl"`` where each label is a yes or no of its own), a name in ``distillation_losses`` that reads logits, or
    None: features alone."""

    features: tuple[FeatureConfig, ...] = ()
    """Losses between layers."""

    teacher_dtype: str | None = None
    """``"bfloat16"``, ``"float16"`` or ``"float32"``: what a teacher that is given by name, or ``"self"``, is loaded
    or copied in. None: as it is stored."""

    teacher_device: str | None = None
    """Where the teacher computes, such as ``"cuda:1"`` or ``"cpu"``; None: where the student does."""

    padded_vocabulary: bool = False
    """True: the sizes of the vocabularies may differ, because one table is padded; logits of the tokens that both have
    are compared. The tokenizer must be the same. Of a cache with ``top_k``, what the teacher gives to padding that is
    not among the k largest counts as a part of the rest. False: the sizes must be equal."""

    def _validate(self) -> None:
        self._check_scheduled("alpha", 0, 1)
        self._check_scheduled("temperature", 0, 1000)
        self._check_features()
        if self.loss is None:
            if not self.features:
                raise self._error("loss", None, "a loss of logits unless there are features")
        elif self.loss != AUTO:
            reading = [name for name in distillation_losses if _reads_logits(name)]
            self._check_choice("loss", (AUTO, *reading))
        if not self.uses_temperature() and self.temperature != TEMPERATURE:
            allowed = f"{TEMPERATURE} where the loss is {self.loss!r}, which has no temperature"
            raise self._error("temperature", self.temperature, allowed)
        self._check_choice("teacher_dtype", (None, "float32", "bfloat16", "float16"))
        if self.teacher_device is not None:
            self._check_device()
        self._check_bool("padded_vocabulary")

    def _check_device(self) -> None:
        self._check_text("teacher_device")
        allowed = "a device such as 'cuda:1' or 'cpu'"
        try:
            kind = torch.device(str(self.teacher_device)).type
        except RuntimeError as error:
            raise self._error("teacher_device", self.teacher_device, allowed) from error
        if kind == "meta":
            raise self._error("teacher_device", self.teacher_device, f"{allowed}; meta tensors have no values")

    def uses_temperature(self) -> bool:
        """Return whether the loss of logits has a temperature; ``"auto"`` may."""
        if self.loss is None:
            return False
        return self.loss == AUTO or bool(getattr(distillation_losses.get(self.loss), "uses_temperature", True))

    def _check_features(self) -> None:
        given = self.features
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
            raise self._error("features", given, "a list of FeatureConfig or of mappings of their fields")
        made = [FeatureConfig.from_dict(each) if isinstance(each, Mapping) else each for each in given]
        for each in made:
            if not isinstance(each, FeatureConfig):
                raise self._error("features", each, "FeatureConfig or mappings of their fields")
        object.__setattr__(self, "features", tuple(made))


def _reads_logits(name: str) -> bool:
    """Users may register plain functions, which are given logits."""
    return bool(getattr(distillation_losses.get(name), "reads", "logits") == "logits")


def _repeats(values: Sequence[Any]) -> bool:
    return len(set(values)) < len(values)


def _are_layers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_int, value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
