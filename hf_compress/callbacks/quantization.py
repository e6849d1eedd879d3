"""Quantization-aware training from Trainer events."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.base import CompressionCallback, Run
from hf_compress.callbacks.state import check_moments
from hf_compress.config import QuantizationConfig
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.instruments.adapters import effective_weight
from hf_compress.instruments.fake_quantize import (
    check_fake_quantizable,
    install_fake_quantizers,
    quantizable_linears,
    remove_fake_quantizers,
)
from hf_compress.instruments.sharded import whole
from hf_compress.quantization.quantizers import Scheme
from hf_compress.registry import schemes
from hf_compress.schedule import to_steps


class QuantizationCallback(CompressionCallback):
    """Trains the model with the rounding errors that the exported integer model will have.

    The weights stay in floating point, in the model and in every checkpoint; ``export_quantized`` makes integers
    of them. Where PEFT trains LoRA adapters, the merged weight is what is quantized; merge before exporting.

    After training the fake quantizers stay on, so that evaluation sees the model that will be deployed; ``detach``
    takes them off, as does the next training with compression callbacks.

    Args:
        config: Which numbers, which layers, from when on.
    """

    section = "quantization"

    def __init__(self, config: QuantizationConfig) -> None:
        if not isinstance(config, QuantizationConfig):
            raise ConfigError(f"QuantizationCallback: config is a {type(config).__name__}; pass a QuantizationConfig.")
        super().__init__(config)
        self.config: QuantizationConfig = config
        self._scheme: Scheme = schemes.get(config.scheme)()
        self._linears: dict[str, nn.Module] = {}
        self._begin = 0
        self._installed = False
        self._trained = False

    def detach(self) -> None:
        """Take the fake quantizers off: from now on the model computes in floating point again."""
        self._remove()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to quantize when its time has come."""
        super().on_step_begin(args, state, control, **kwargs)
        if self._run is not None and state.global_step >= self._begin:
            self._install()
            self._trained = True

    def _start(self, run: Run) -> None:
        self._remove()  # what the last run left on, see _stop
        self._begin = to_steps(self.config.begin, run.total_steps, run.steps_per_epoch)
        if self._begin >= run.total_steps:
            raise ConfigError(
                f"QuantizationConfig.begin: {self.config.begin!r} is step {self._begin}, but the run has "
                f"{run.total_steps} optimizer steps, so nothing would be trained with quantization; allowed: less than "
                f"{run.total_steps} (int) or 1.0 (float)."
            )
        self._linears = quantizable_linears(run.model, self.config.exclude)
        check_fake_quantizable(self._linears)
        self._trained = False
        if run.trainer.state.global_step >= self._begin:
            self._install()

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

    def _preview(self, run: Run) -> Mapping[str, Any]:
        weights = [self._weight(module) for module in self._linears.values()]
        numbers, rows = sum(w.numel() for w in weights), sum(w.shape[0] for w in weights)
        return {
            "scheme": self.config.scheme,
            "layers": len(weights),
            "first and last": [next(iter(self._linears)), next(reversed(self._linears))],
            "weights in them": numbers,
            "share of all parameters": numbers / sum(p.numel() for p in run.model.parameters()),
            "bytes of these weights": sum(w.numel() * w.element_size() for w in weights),
            "bytes as integers": numbers + 4 * rows,
            "begins at step": self._begin,
        }

    def _metrics(self) -> Mapping[str, float]:
        """The largest step of the weights' grids, and by how much rounding changes the weights."""
        if not self._installed:
            return {}
        with torch.no_grad():
            pairs = [(w, self._scheme.fake_quantize_weight(w, None)) for w in map(self._weight, self._linears.values())]
            squares = torch.stack([torch.stack([(w - q).pow(2).sum(), w.pow(2).sum()]) for w, q in pairs]).sum(dim=0)
            largest = torch.stack([self._scheme.weight_scale(w).max() for w, _ in pairs]).max()
            error, scale = torch.stack([(squares[0] / squares[1].clamp_min(1e-30)).sqrt(), largest]).tolist()
        return {"weight_rounding_error": error, "largest_weight_scale": scale}

    @staticmethod
    def _weight(module: nn.Module) -> Tensor:
        return whole(effective_weight(module).detach())

    def _install(self) -> None:
        if not self._installed:
            install_fake_quantizers(self._scheme, self._linears)
            self._installed = True

    def _remove(self) -> None:
        if self._installed:
            for module in self._linears.values():
                remove_fake_quantizers(module)
            self._installed = False

    def _state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return {}, {"trained": self._trained, "modules": list(self._linears), "begin": [self._begin]}

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        check_moments("QuantizationCallback", "quantization", facts.get("begin"), [self._begin])
        if facts["modules"] != list(self._linears):
            different = sorted({*facts["modules"]} ^ {*self._linears})
            raise TrainingError(
                "QuantizationCallback: the checkpoint was written with other layers quantized "
                f"(first difference: {different[:1]}); resume with the model that it was written for."
            )
        self._trained = facts["trained"]
