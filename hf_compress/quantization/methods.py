"""Quantization methods: which quantizer each tensor gets, given its format."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hf_compress.config.base import Settings
from hf_compress.config.formats import LayerFormats, TensorFormat
from hf_compress.errors import ConfigError
from hf_compress.quantization.granularity import PER_TENSOR, PER_TOKEN, Granularity, per_channel, per_group
from hf_compress.quantization.grid import Grid
from hf_compress.quantization.own_grids import (
    DorefaGradientQuantizer,
    DorefaInputQuantizer,
    DorefaWeightQuantizer,
    SignQuantizer,
)
from hf_compress.quantization.quantizers import LearnedQuantizer, ObservedQuantizer, Quantizer, RangeQuantizer
from hf_compress.registry import observers, quantization_methods


@dataclass(frozen=True, kw_only=True)
class NoOptions(Settings):
    """Of methods without settings."""


class Method(ABC):
    """Makes the quantizers of a model.

    Args:
        options: An instance of the class's ``options``.
    """

    options: ClassVar[type[Settings]] = NoOptions

    trains: ClassVar[bool] = True
    """Whether it works while a model trains."""

    learns: ClassVar[bool] = False
    """Whether steps get gradients."""

    integer: ClassVar[bool] = True
    """Whether what it makes can be stored as integers."""

    fewest_bits: ClassVar[int] = 2
    most_bits: ClassVar[int] = 8

    def __init__(self, options: Any) -> None:
        self.settings = options

    @abstractmethod
    def weight(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer for one weight."""

    @abstractmethod
    def activation(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer for the inputs, or the outputs, of one layer."""

    def output_gradient(self) -> Quantizer | None:
        """Return what acts on the output of each layer whose weight is quantized, for the sake of its gradient."""
        return None

    def check(self, formats: LayerFormats) -> None:
        """Check that the method can do what the formats say.

        Raises:
            ConfigError: If not.
        """
        for role in LayerFormats.ROLES:
            wanted = getattr(formats, role)
            if wanted is None:
                continue
            if not self.fewest_bits <= wanted.num_bits <= self.most_bits:
                raise self._refusal(role, "num_bits", wanted.num_bits, f"{self.fewest_bits} to {self.most_bits}")
            self._check(role, wanted)
            if self.integer:
                _check_observer(role, wanted)

    def _check(self, role: str, wanted: TensorFormat) -> None:  # noqa: B027 - most have nothing to check
        """Check what else the method cannot do."""

    def check_together(self, every: Sequence[LayerFormats]) -> None:  # noqa: B027 - most have nothing to check
        """Check what concerns the formats of all layers of a model.

        Raises:
            ConfigError: If the method's settings do not suit them.
        """

    @classmethod
    def _refusal(cls, role: str, name: str, given: object, allowed: str) -> ConfigError:
        method = next(each for each in quantization_methods if quantization_methods.get(each) is cls)
        return ConfigError(f"{role}.{name}: got {given!r} with method {method!r}; allowed: {allowed}.")


class _Ranges(Method):
    """Ranges are computed or observed."""

    default_observer: ClassVar[str]
    """Of observed ranges, by registry name."""

    def weight(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer with the weight's own range."""
        observer = wanted.observer or "min_max"
        return RangeQuantizer(grid_of(wanted), granularity_of(wanted), observer, wanted.observer_options)

    def activation(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer with the tensor's own range, or an observed one."""
        if wanted.dynamic:
            return self.weight(wanted)
        observer = observers.get(wanted.observer or self.default_observer)
        return ObservedQuantizer(grid_of(wanted), observer(grid_of(wanted), PER_TENSOR, **wanted.observer_options))


@quantization_methods.register("qat")
class Qat(_Ranges):
    """Straight-through fake quantization.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.
    """

    default_observer = "ema"

    def _check(self, role: str, wanted: TensorFormat) -> None:
        observed = role != "weights" and not wanted.dynamic
        if observed and wanted.observer not in (None, "ema", "min_max"):
            raise self._refusal(role, "observer", wanted.observer, "None, 'ema' or 'min_max' in training")


@dataclass(frozen=True, kw_only=True)
class PtqOptions(Settings):
    """Settings of ``"ptq"``."""

    rounding: str = "nearest"
    """Of weights. ``"nearest"``; or ``"gptq"``: column by column, so that later columns make up for each error, which
    needs data and changes the weights to those on the grid."""

    damping: float = 0.01
    """Of ``"gptq"``: what is added to the Hessian, relative to the mean of its diagonal."""

    smooth: float | None = None
    """Move outliers from the inputs of layers to their weights (SmoothQuant): the exponent alpha in [0, 1], usually
    0.5; needs data. None: do not. Only where a norm alone feeds the layers, so that its weight can take the inverse
    factors."""

    equalize: bool = False
    """Give channels between two linear layers the same range on both sides, where what lies between is linear or
    ReLU (cross-layer equalization)."""

    bias_correction: bool = False
    """Take the mean error that rounded weights make out of the bias; needs data, and layers with a bias."""

    ROUNDINGS: ClassVar[tuple[str, ...]] = ("nearest", "gptq")

    def _validate(self) -> None:
        self._check_choice("rounding", self.ROUNDINGS)
        self._check_number("damping", 0, 1)
        if self.rounding != "gptq" and self.damping != PtqOptions.damping:
            raise self._error("damping", self.damping, f"{PtqOptions.damping} unless rounding is 'gptq'")
        if self.smooth is not None:
            self._check_number("smooth", 0, 1)
        for name in ("equalize", "bias_correction"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, getattr(self, name), "True or False")


@quantization_methods.register("ptq")
class Ptq(_Ranges):
    """After training: ranges observed on a few batches, weights rounded; nothing is trained.

    Source: ``rounding="gptq"``: Frantar et al. 2022, arXiv:2210.17323; ``smooth``: Xiao et al. 2022, arXiv:2211.10438;
    ``equalize`` and ``bias_correction``: Nagel et al. 2019, arXiv:1906.04721.
    """

    options = PtqOptions
    trains = False
    default_observer = "min_max"

    def _check(self, role: str, wanted: TensorFormat) -> None:
        if wanted.observer == "ema":
            raise self._refusal(role, "observer", "ema", "others: a model that does not change has no moving average")
        if role == "weights" and wanted.granularity == "tensor" and self.settings.rounding == "gptq":
            raise self._refusal(role, "granularity", "tensor", "'channel' or 'group' with rounding='gptq'")

    def check_together(self, every: Sequence[LayerFormats]) -> None:
        """Check that no setting is without effect on all formats of a model.

        Raises:
            ConfigError: If one is.
        """
        settings = self.settings
        if settings.smooth is not None and not any(each.weights and each.inputs for each in every):
            raise self._refusal("inputs", "smooth", settings.smooth, "None unless weights and inputs are quantized")
        if any(each.weights for each in every):
            return
        for name in ("rounding", "equalize", "bias_correction"):
            default = getattr(PtqOptions, name)
            if getattr(settings, name) != default:
                raise self._refusal("weights", name, getattr(settings, name), f"{default!r} without weights")


@dataclass(frozen=True, kw_only=True)
class LearnedOptions(Settings):
    """Settings of ``"lsq"`` and ``"lsq_plus"``."""

    learning_rate: float = 1e-3
    """By which share of its first value a step may move in one optimizer step (Adam)."""

    def _validate(self) -> None:
        self._check_number("learning_rate", 0, 1, open_low=True)


@quantization_methods.register("lsq")
class Lsq(Method):
    """Learned step size quantization: weights and observed inputs have steps that are trained.

    Dynamic inputs keep the range of the tensor.

    Source: Esser et al. 2020, arXiv:1902.08153.
    """

    options = LearnedOptions
    learns = True

    def weight(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer with learned steps."""
        return LearnedQuantizer(grid_of(wanted), granularity_of(wanted), is_weight=True)

    def activation(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer with one learned step, or with the tensor's own range."""
        if wanted.dynamic:
            observer = wanted.observer or "min_max"
            return RangeQuantizer(grid_of(wanted), granularity_of(wanted), observer, wanted.observer_options)
        return LearnedQuantizer(grid_of(wanted), PER_TENSOR, is_weight=False)

    def _check(self, role: str, wanted: TensorFormat) -> None:
        if wanted.observer is not None and not wanted.dynamic:
            raise self._refusal(role, "observer", wanted.observer, "None, as the step is learned")
        if not wanted.symmetric and not wanted.dynamic:
            raise self._refusal(role, "symmetric", False, "True; or method 'lsq_plus', which learns an offset, too")


@quantization_methods.register("lsq_plus")
class LsqPlus(Lsq):
    """LSQ with a learned offset for inputs and outputs; weights as in LSQ.

    At the end of training the offset becomes a multiple of the step, as an integer zero point is.

    Source: Bhalgat et al. 2020, arXiv:2004.09576.
    """

    def _check(self, role: str, wanted: TensorFormat) -> None:
        if wanted.observer is not None and not wanted.dynamic:
            raise self._refusal(role, "observer", wanted.observer, "None, as the step is learned")
        if role == "weights" and not wanted.symmetric:
            raise self._refusal(role, "symmetric", False, "True: weights have no offset")
        if role != "weights" and (wanted.symmetric or wanted.dynamic):
            raise self._refusal(
                role, "symmetric", wanted.symmetric, "False, with dynamic=False, so that there is an offset to learn"
            )

    def check(self, formats: LayerFormats) -> None:
        """Check that the method can do what the formats say.

        Raises:
            ConfigError: If not, or if nothing has an offset.
        """
        super().check(formats)
        if formats.inputs is None and formats.outputs is None and formats.weights is not None:
            raise self._refusal("inputs", "symmetric", None, "False: without inputs or outputs use method 'lsq'")


@dataclass(frozen=True, kw_only=True)
class DorefaOptions(Settings):
    """Settings of ``"dorefa"``."""

    gradient_bits: int | None = None
    """Round the gradients that come into each layer to so many bits, too; None: leave them."""

    scaled: bool = True
    """Give weights their magnitude back. False: weights in [-1, 1], as in the paper, for networks from scratch."""

    def _validate(self) -> None:
        bits = self.gradient_bits
        if bits is not None and (not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8):
            raise self._error("gradient_bits", bits, "None or an int from 2 to 8")
        if not isinstance(self.scaled, bool):
            raise self._error("scaled", self.scaled, "True or False")


class _OwnGrids(Method):
    """Values that are no integers times a step."""

    integer = False

    def _check(self, role: str, wanted: TensorFormat) -> None:
        if wanted.observer is not None:
            raise self._refusal(role, "observer", wanted.observer, "None, as there is no range")
        if not wanted.symmetric:
            raise self._refusal(role, "symmetric", False, "True, as there is no zero point")


@quantization_methods.register("dorefa")
class Dorefa(_OwnGrids):
    """DoReFa-Net: weights through tanh, inputs clipped to [0, 1], gradients at random if wanted.

    Source: Zhou et al. 2016, arXiv:1606.06160.
    """

    options = DorefaOptions

    def weight(self, wanted: TensorFormat) -> Quantizer:
        """Return the paper's quantizer of weights."""
        return DorefaWeightQuantizer(wanted.num_bits, scaled=self.settings.scaled)

    def activation(self, wanted: TensorFormat) -> Quantizer:
        """Return the paper's quantizer of activations."""
        return DorefaInputQuantizer(wanted.num_bits)

    def output_gradient(self) -> Quantizer | None:
        """Return the paper's quantizer of gradients."""
        bits = self.settings.gradient_bits
        return None if bits is None else DorefaGradientQuantizer(bits)

    def _check(self, role: str, wanted: TensorFormat) -> None:
        super()._check(role, wanted)
        if role == "weights" and wanted.granularity != "tensor":
            raise self._refusal(role, "granularity", wanted.granularity, "'tensor': the maximum is the whole weight's")
        if role != "weights" and (wanted.granularity != "tensor" or wanted.dynamic):
            raise self._refusal(role, "granularity", wanted.granularity, "'tensor' with dynamic=False: [0, 1] for all")


@dataclass(frozen=True, kw_only=True)
class BnnOptions(Settings):
    """Settings of ``"bnn"``."""

    scaled: bool = True
    """Multiply signs by the mean magnitude (XNOR-Net). False: +1 and -1, as in the paper, for networks from scratch."""

    def _validate(self) -> None:
        if not isinstance(self.scaled, bool):
            raise self._error("scaled", self.scaled, "True or False")


@quantization_methods.register("bnn")
class Bnn(_OwnGrids):
    """Binary weights, and inputs if wanted; the latent weights stay within [-1, 1].

    Source: Courbariaux et al. 2016, arXiv:1602.02830; scaled: Rastegari et al. 2016, arXiv:1603.05279.
    """

    options = BnnOptions
    fewest_bits = most_bits = 1

    def weight(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer to signs."""
        return SignQuantizer(granularity_of(wanted), scaled=self.settings.scaled)

    def activation(self, wanted: TensorFormat) -> Quantizer:
        """Return a quantizer to signs."""
        return SignQuantizer(granularity_of(wanted), scaled=self.settings.scaled)


def granularity_of(wanted: TensorFormat) -> Granularity:
    """Return what shares a step, of a weight [outputs, inputs...] or of activations [..., channels]."""
    if wanted.granularity == "group":
        assert wanted.group_size is not None
        return per_group(wanted.group_size)
    return {"tensor": PER_TENSOR, "channel": per_channel(0), "token": PER_TOKEN}[wanted.granularity]


def grid_of(wanted: TensorFormat) -> Grid:
    """Return the integers of a format."""
    return Grid(num_bits=wanted.num_bits, symmetric=wanted.symmetric)


def _check_observer(role: str, wanted: TensorFormat) -> None:
    """Have the observer check its options now, not at the first layer.

    Raises:
        ConfigError: If it does not take them.
    """
    if wanted.observer is None:
        return
    try:
        observers.get(wanted.observer)(grid_of(wanted), PER_TENSOR, **wanted.observer_options)
    except TypeError as error:
        parameters = inspect.signature(observers.get(wanted.observer)).parameters
        allowed = [name for name in parameters if name not in ("grid", "granularity")]
        raise ConfigError(
            f"{role}.observer_options: got {dict(wanted.observer_options)}; allowed with {wanted.observer!r}: "
            f"{', '.join(allowed) or 'none'}."
        ) from error
