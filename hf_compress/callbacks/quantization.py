"""Quantization-aware training from Trainer events."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.access import loss_scale
from hf_compress.callbacks.base import CompressionCallback, Run
from hf_compress.callbacks.state import check_moments
from hf_compress.callbacks.step_sizes import StepSizes
from hf_compress.config import QuantizationConfig
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.fake_quantize import check_fake_quantizable, quantizable_layers
from hf_compress.instruments.quantize import Quantized, QuantizedLayer, make_quantizers
from hf_compress.instruments.sharded import clamp, whole
from hf_compress.instruments.targets import oriented_weight, owned_parameter
from hf_compress.quantization.own_grids import SignQuantizer
from hf_compress.registry import quantization_methods
from hf_compress.schedule import to_steps


class QuantizationCallback(CompressionCallback):
    """Trains the model with the rounding errors that the exported integer model will have.

    The weights stay in floating point, in the model and in every checkpoint; ``export_quantized`` makes integers
    of them. Where PEFT trains LoRA adapters, the merged weight is what is quantized; merge before exporting.

    After training the fake quantizers stay on, so that evaluation sees the model that will be deployed; ``detach``
    takes them off, as does the next training with compression callbacks. So it is with what ``calibrate`` has left:
    the callback makes quantizers of its own, and trains the weights as they are.

    Args:
        config: Which numbers, which layers, from when on.

    Raises:
        ConfigError: If the config is another, or its method needs no training.
    """

    section = "quantization"

    def __init__(self, config: QuantizationConfig) -> None:
        if not isinstance(config, QuantizationConfig):
            raise ConfigError(f"QuantizationCallback: config is a {type(config).__name__}; pass a QuantizationConfig.")
        if not quantization_methods.get(config.method).trains:
            raise ConfigError(
                f"QuantizationCallback: method {config.method!r} does not train; allowed here: others. Call "
                "hf_compress.calibrate(model, dataloader, config) after training instead."
            )
        super().__init__(config)
        self.config: QuantizationConfig = config
        self._quantized = Quantized()
        self._steps: StepSizes | None = None
        self._begin = self._observe = self._freeze = 0
        self._installed = False
        self._trained = False

    def detach(self) -> None:
        """Take the fake quantizers off: from now on the model computes in floating point again."""
        self._remove()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to observe, to quantize, or to freeze when its time has come."""
        super().on_step_begin(args, state, control, **kwargs)
        if self._run is not None:
            self._proceed(state.global_step)
            self._trained = self._trained or state.global_step >= self._begin

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update ranges and learned steps by what this optimizer step has shown."""
        if self._run is not None and self._installed and self._steps is not None:
            self._steps.update(loss_scale(kwargs.get("optimizer")))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the latent weights of binary layers where they get gradients."""
        if self._run is None or not self._installed:
            return
        for layer in self._quantized.weighted():
            weight: Any = owned_parameter(layer.name, layer.module)
            if isinstance(layer.weights, SignQuantizer) and layer.weights.enabled and weight.requires_grad:
                clamp(weight, -1.0, 1.0)

    def _start(self, run: Run) -> None:
        self._remove()  # what the last run left on, see _stop
        self._set_moments(run)
        modules = quantizable_layers(run.model, self.config.exclude, self.config.targets)
        check_fake_quantizable(modules)
        self._quantized = make_quantizers(self.config, modules)
        self._steps = None
        self._trained = False
        self._proceed(run.trainer.state.global_step)

    def _set_moments(self, run: Run) -> None:
        def step_of(name: str, default: int) -> int:
            moment = getattr(self.config, name)
            return default if moment is None else to_steps(moment, run.total_steps, run.steps_per_epoch)

        self._begin = step_of("begin", 0)
        if self._begin >= run.total_steps:
            raise ConfigError(
                f"QuantizationConfig.begin: {self.config.begin!r} is step {self._begin}, but the run has "
                f"{run.total_steps} optimizer steps, so nothing would be trained with quantization; allowed: less than "
                f"{run.total_steps} (int) or 1.0 (float)."
            )
        self._observe = step_of("observe", self._begin)
        self._freeze = step_of("freeze", run.total_steps)
        if self._observe > self._begin:
            raise ConfigError(
                f"QuantizationConfig.observe: {self.config.observe!r} is step {self._observe}, after begin, which is "
                f"step {self._begin}; allowed: at most that, or None."
            )
        if self.config.freeze is not None and not self._begin < self._freeze < run.total_steps:
            raise ConfigError(
                f"QuantizationConfig.freeze: {self.config.freeze!r} is step {self._freeze}; allowed: after begin, "
                f"which is step {self._begin}, and before the end, step {run.total_steps}."
            )

    def _proceed(self, step: int) -> None:
        """Be in the state that a step needs."""
        if step < min(self._observe, self._begin):
            return
        if not self._installed:
            self._install()
        assert self._steps is not None
        self._quantized.enable(step >= self._begin)
        if step >= self._freeze:
            self._steps.freeze()
        else:
            self._steps.collect()

    def _stop(self, run: Run) -> None:
        # The fake quantizers stay on, so that trainer.evaluate() and trainer.predict() after training measure the
        # quantized model, the one that will be deployed, and not a floating-point model that nobody trained.
        # Saving and shrinking do not see them: they change no parameter and no key.
        if not self._trained:
            raise TrainingError(
                f"QuantizationCallback: the final weights were never trained with quantization, which begins at step "
                f"{self._begin} of {run.total_steps}. Training stopped before it, or load_best_model_at_end went back "
                "to a checkpoint before it. Set begin earlier."
            )
        assert self._steps is not None
        missing = self._steps.missing()
        if missing:
            names = ", ".join(repr(name.replace("|", ": ")) for name in missing[:3])
            raise TrainingError(
                f"QuantizationCallback: {len(missing)} tensors have no range, because nothing came through their layer "
                f"in training ({names}). Exclude these layers."
            )
        self._steps.freeze()

    def _preview(self, run: Run) -> Mapping[str, Any]:
        layers = self._quantized.weighted()
        weights = [self._weight(layer) for layer in layers]
        numbers = sum(w.numel() for w in weights)
        facts: dict[str, Any] = {
            "scheme": self.config.scheme,
            "method": self.config.method,
            "layers": len(self._quantized.layers),
            "first and last": [self._quantized.layers[0].name, self._quantized.layers[-1].name],
            "weights in them": numbers,
            "share of all parameters": numbers / sum(p.numel() for p in run.model.parameters()),
            "bytes of these weights": sum(w.numel() * w.element_size() for w in weights),
            "bytes as integers": sum(_stored_bytes(layer) for layer in layers),
            "begins at step": self._begin,
        }
        if self._quantized.observed():
            facts["observes from step"] = self._observe
        if self.config.freeze is not None:
            facts["frozen from step"] = self._freeze
        return facts

    def _metrics(self) -> Mapping[str, float]:
        """The largest step of the weights' grids, and by how much rounding changes the weights."""
        layers = self._quantized.weighted()
        if not self._installed or not layers or not layers[0].weights.enabled:  # type: ignore[union-attr]
            return {}
        squares, scales = [], []
        with torch.no_grad():
            for layer in layers:
                weight, quantizer = self._weight(layer), layer.weights
                assert quantizer is not None
                values = quantizer.quantize_weight(weight)
                squares.append(torch.stack([(weight - values).pow(2).sum(), weight.pow(2).sum()]))
                if quantizer.grid is not None:
                    scales.append(quantizer.parameters(weight)[0].max())
            total = torch.stack(squares).sum(dim=0)
            found = [(total[0] / total[1].clamp_min(1e-30)).sqrt(), *([torch.stack(scales).max()] if scales else [])]
            numbers = torch.stack(found).tolist()
        return dict(zip(("weight_rounding_error", "largest_weight_scale"), numbers, strict=False))

    @staticmethod
    def _weight(layer: QuantizedLayer) -> Tensor:
        return whole(oriented_weight(layer.name, layer.module).detach())

    def _install(self) -> None:
        options = self.config.method_options()
        device = next(self._quantized.layers[0].module.parameters()).device
        self._steps = StepSizes(self._quantized, device, getattr(options, "learning_rate", None))
        self._quantized.install()
        self._installed = True

    def _remove(self) -> None:
        if self._installed:
            self._quantized.remove()
            self._installed = False

    def _run_failed(self) -> None:
        self._remove()  # they would round a model whose other compression never came about

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        facts = {
            "trained": self._trained,
            "modules": [layer.name for layer in self._quantized.layers],
            "moments": self._moments(),
        }
        if self._steps is None:
            return {}, {**facts, "steps": None}
        tensors, more = self._steps.state()
        return tensors, {**facts, "steps": more}

    def _moments(self) -> list[int]:
        return [self._begin, self._observe, *([] if self.config.freeze is None else [self._freeze])]

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        check_moments("QuantizationCallback", "quantization", facts.get("moments"), self._moments())
        names = [layer.name for layer in self._quantized.layers]
        if facts["modules"] != names:
            different = sorted({*facts["modules"]} ^ {*names})
            raise TrainingError(
                "QuantizationCallback: the checkpoint was written with other layers quantized "
                f"(first difference: {different[:1]}); resume with the model that it was written for."
            )
        self._trained = facts["trained"]
        if facts["steps"] is not None:
            if not self._installed:
                self._install()
            assert self._steps is not None
            self._steps.restore(tensors, facts["steps"])


def _stored_bytes(layer: QuantizedLayer) -> int:
    """Return the bytes of a layer's weight as integers, with its steps in float32."""
    if layer.weights is None:
        return 0
    weight = oriented_weight(layer.name, layer.module)
    steps = layer.weights.granularity.num_blocks(weight.shape)
    return -(-weight.numel() * layer.weights.num_bits // 8) + 4 * steps
