"""``calibrate``: from a trained model and a few batches to a quantized model, without training."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_compress.callbacks.ranks import elementwise, fail_together
from hf_compress.config import QuantizationConfig
from hf_compress.errors import ConfigError, TargetError
from hf_compress.graph.capture import evaluating
from hf_compress.instruments.attach import attachment_of
from hf_compress.instruments.fake_quantize import check_fake_quantizable, quantizable_layers
from hf_compress.instruments.quantize import Quantized, make_quantizers
from hf_compress.instruments.sharded import first_not_finite
from hf_compress.oneshot.calibration import Calibration, rows
from hf_compress.oneshot.linear import all_or_nothing
from hf_compress.oneshot.prune import check_prunable
from hf_compress.ptq.weights import Work, prepare_weights, round_weights
from hf_compress.quantization.methods import PtqOptions
from hf_compress.quantization.observers import Observer


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """What was quantized."""

    layers: tuple[str, ...]
    """Names of the layers that have quantizers now."""

    changed: tuple[str, ...] = ()
    """Names of the parameters that were changed in place: by GPTQ, smoothing, equalization or bias correction."""

    notes: tuple[str, ...] = ()
    """What was left out, and why."""

    quantized: Quantized = field(default_factory=Quantized, repr=False)
    """The quantizers."""

    def detach(self) -> None:
        """Take the quantizers off: the model computes in floating point again, with the weights that it has now."""
        self.quantized.remove()

    def summary(self) -> str:
        """Say what was done, in a few lines."""
        roles = Counter(role for layer in self.quantized.layers for role, _ in layer.quantizers())
        found = ", ".join(f"{count} {role}" for role, count in roles.items())
        lines = [f"{len(self.layers)} layers are quantized ({found})", *self.notes]
        return "\n".join([*lines, *([f"{len(self.changed)} parameters were changed"] if self.changed else [])])


def calibrate(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, Any]] | None,
    config: QuantizationConfig,
    *,
    num_batches: int | None = None,
) -> CalibrationResult:
    """Quantize a trained model without training it.

    The floating-point model runs over the data in eval mode, and observers choose the ranges of inputs and outputs that
    have one range for all calls; weights are rounded as the config's options say. Afterwards quantizers are on the
    model and act, so that evaluation sees the quantized model and ``export_quantized`` stores it. ``shrink`` takes them
    over to the smaller model. Training with a callback of this package takes them off, as
    ``CalibrationResult.detach`` does.

    Positions that a two-dimensional ``attention_mask`` calls padding do not count, where a layer sees
    [batch, length, width]; in a decoder that has an encoder all positions count. Several processes may calibrate
    together, each on data of its own: all have the same ranges then.

    If anything fails, the model is as it was.

    Args:
        model: Wherever it is, in whatever mode; without adapters and gates.
        dataloader: Gives mappings of forward arguments; a few hundred examples are enough. None if the config needs no
            data: ranges that are those of the tensors themselves (``dynamic``), weights rounded to nearest. It is not
            read then.
        config: With method ``"ptq"``.
        num_batches: Take no more batches than these.

    Returns:
        What was done, and what was left out.

    Raises:
        ConfigError: For a config of another method, data that are missing, or batches that are none.
        TargetError: If there is nothing to quantize, data do not reach a layer or give numbers that are not finite, or
            an option has no effect on this model.
        GraphError: If ``smooth`` or ``equalize`` need to know the model and it cannot be analyzed.
    """
    _check_config(config)
    check_prunable("calibrate", model, None)
    modules = quantizable_layers(model, config.exclude, config.targets)
    check_fake_quantizable(modules)
    _check_plain(model)
    _check_finite(model)
    quantized = make_quantizers(config, modules)
    options: PtqOptions = config.method_options()
    calibration = _data(model, dataloader, num_batches, _needs_data(quantized, options))
    with all_or_nothing() as undo, evaluating(model):
        work = Work(model, quantized, options, calibration, undo, [])
        facts = prepare_weights(work)
        _observe(work)
        round_weights(work, facts)
        quantized.enable(True)
        quantized.install()
    names = tuple(layer.name for layer in quantized.layers)
    return CalibrationResult(names, undo.names(model), tuple(work.notes), quantized)


def _check_config(config: Any) -> None:
    if not isinstance(config, QuantizationConfig):
        raise ConfigError(f"calibrate: config is a {type(config).__name__}; pass a QuantizationConfig.")
    if config.method != "ptq":
        raise ConfigError(
            f"calibrate: QuantizationConfig.method is {config.method!r}; allowed: 'ptq'. Other methods train: use a "
            "QuantizationCallback."
        )


def _check_plain(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        attachment = attachment_of(module)
        if attachment is not None and not attachment.is_empty():
            raise TargetError(
                f"calibrate: gates, masks or quantizers are attached to {name!r}. Call shrink() first, or detach() on "
                "what attached them."
            )


def _check_finite(model: PreTrainedModel) -> None:
    broken = first_not_finite(model)
    if broken is not None:
        raise TargetError(f"calibrate: {broken!r} has entries that are not finite. Load or train the model again.")


def _needs_data(quantized: Quantized, options: PtqOptions) -> str | None:
    """Return what needs data, or None."""
    if quantized.observed():
        return "ranges of inputs or outputs that are observed"
    if options.rounding == "gptq":
        return "rounding='gptq'"
    if options.smooth is not None:
        return "smooth"
    return "bias_correction" if options.bias_correction else None


def _data(model: PreTrainedModel, dataloader: Any, num_batches: int | None, why: str | None) -> Calibration | None:
    if why is None:
        if num_batches is not None:
            raise ConfigError(f"calibrate: num_batches={num_batches!r}, but this config needs no data; allowed: None.")
        return None
    if dataloader is None:
        raise ConfigError(f"calibrate: the config needs data, for {why}, and dataloader is None. Give a few batches.")
    return Calibration(model, dataloader, num_batches, "calibrate")


class _TokenCollector:
    """Lets an observer see tokens alone, no padding."""

    while_evaluating = True

    def __init__(self, observer: Observer) -> None:
        self.tokens: Tensor | None = None
        self._observer = observer

    @property
    def state(self) -> dict[str, Tensor]:
        """Return what the observer knows."""
        return self._observer.state

    def observe(self, x: Tensor) -> None:
        """Pass the tokens of a batch on."""
        self._observer.observe(rows(x, self.tokens))


def _observe(work: Work) -> None:
    """Find the ranges that are observed, on the floating-point model.

    Raises:
        TargetError: If a layer is not reached, or what comes is not finite.
    """
    observed = work.quantized.observed()
    if not observed:
        return
    collectors = {name: _TokenCollector(quantizer.observer) for name, quantizer in observed.items()}

    def ready(tokens_of: Callable[[str], Tensor | None]) -> None:
        for name, collector in collectors.items():
            collector.tokens = tokens_of(name.partition("|")[0])

    with fail_together(work.device()):
        for name, quantizer in observed.items():
            quantizer.collector = collectors[name]
        with _installed(work.quantized):
            for _ in work.data().outputs("Observing ranges", ready):
                pass
        for quantizer in observed.values():
            quantizer.collector = None
        missing = {name.partition("|")[0]: None for name, each in observed.items() if not each.observer.state}
        if missing:
            names = ", ".join(map(repr, list(missing)[:3])) + (", ..." if len(missing) > 3 else "")
            raise TargetError(
                f"calibrate: {len(missing)} layers are never called with these batches, so nothing is known about "
                f"their ranges: {names}. Exclude them, or give batches that reach them."
            )
    for name, quantizer in observed.items():
        quantizer.observer.merge(elementwise)
        quantizer.settle()
        assert quantizer.limits is not None
        if not all(bool(torch.isfinite(end).all()) for end in quantizer.limits):
            raise TargetError(
                f"calibrate: the {name.partition('|')[2]} of {name.partition('|')[0]!r} are not finite. Check the data "
                "and the model's weights; half precision may be too narrow."
            )


@contextmanager
def _installed(quantized: Quantized) -> Iterator[None]:
    """Have quantizers on the model, which watch and do not act, while the context is open."""
    quantized.enable(False)
    quantized.install()
    try:
        yield
    finally:
        quantized.remove()
