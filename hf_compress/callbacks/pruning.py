"""``PruningCallback``: pruning driven by Trainer events."""

import warnings
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.callbacks.access import loss_scale, refuse_prompts
from hf_compress.callbacks.base import CompressionCallback, Run
from hf_compress.callbacks.pruning_budget import budget_of
from hf_compress.callbacks.pruning_facts import left, metrics_of, plan_of, trial_masks
from hf_compress.callbacks.ranks import check_same_on_all_ranks, mean_gradients
from hf_compress.callbacks.score_gradients import distillation_gradients
from hf_compress.callbacks.state import check_moments
from hf_compress.config import PruningConfig
from hf_compress.errors import ConfigError, ShrinkError
from hf_compress.graph.costs import Costs
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.adapters import has_adapters, plain_view
from hf_compress.instruments.attach import suspended
from hf_compress.instruments.pruner import Pruner
from hf_compress.instruments.pruner_state import restore, state_of
from hf_compress.instruments.rewind import Rewinder
from hf_compress.instruments.sharded import unsharded
from hf_compress.latency.budget import LatencyBudget
from hf_compress.latency.masks import MeasuredSpeedup
from hf_compress.pruning.pools import check_decided
from hf_compress.pruning.whole_model import Budget
from hf_compress.schedule import LOTTERY_TICKET
from hf_compress.shrinking.plan import refuse_compressed
from hf_compress.shrinking.shrink import shrink

logger = logging.get_logger(__name__)


class PruningCallback(CompressionCallback):
    """Prunes heads, FFN units, hidden channels, layers, experts or single weights while the Trainer trains.

    Gates at the consumers' inputs switch units off; after training the masks are folded into the weights (zeros), so
    that ``trainer.evaluate()`` and ``trainer.save_model()`` see the pruned model, and ``shrink(trainer)`` removes the
    units for good. Hidden channels, experts and whole layers are seen by norms, routers or the residual stream, which
    zeros in weights do not tell: their gates stay on the model, with a warning, and only ``shrink(trainer)`` gives a
    model that can be saved.

    LoRA adapters of PEFT may be what is trained: masks cover base weights and adapters alike, so that merging them
    stays exact, and ``shrink(trainer)`` merges first.

    Args:
        config: What to prune, how much, when.
        example_inputs: Keyword arguments for one forward pass, only to analyze the model; made from its config by
            default.

    Raises:
        ConfigError: If ``config`` is no ``PruningConfig``.
    """

    section = "pruning"

    def __init__(self, config: PruningConfig, example_inputs: Mapping[str, Any] | None = None) -> None:
        if not isinstance(config, PruningConfig):
            raise ConfigError(f"PruningCallback: config is a {type(config).__name__}; pass a PruningConfig.")
        super().__init__(config)
        self.config: PruningConfig = config
        self.example_inputs = example_inputs
        """Of the recorded forward pass; None: made from the model's config."""

        self._pruner: Pruner | None = None
        self._rewinder: Rewinder | None = None
        self._costs: Costs | None = None
        self._budget: Budget | None = None
        self._final: dict[str, Tensor] | None = None
        self.measured: MeasuredSpeedup | None = None
        """What was measured of the shrunk model after training, if a speed-up or a latency was asked for."""

        self.trial: dict[str, Tensor] | None = None
        """Masks of the final sizes that the last preview shrank a copy with, by group name."""

        self._masked: weakref.ref[PreTrainedModel] | None = None
        self._listening = ExitStack()

    @property
    def masked_model(self) -> PreTrainedModel | None:
        """The model that ``masks`` were made for, without wrappers; None if there are none, or it is gone."""
        return self._masked() if self._masked is not None else None

    def masks(self) -> dict[str, Tensor]:
        """Return the final masks of dimension groups: bool [num_units] by group name, True = keep.

        Raises:
            ShrinkError: If training has not finished, or only single weights were pruned.
        """
        if self._final is None:
            raise ShrinkError(
                "PruningCallback.masks: training has not finished, so there are no final masks. Call "
                "trainer.train() to its end first."
            )
        if not self._final:
            raise ShrinkError(
                "PruningCallback.masks: only single weights were pruned, which makes no matrix smaller. The trained "
                "model has zeros in their places; save it as it is, or prune heads, ffn or other dimension groups."
            )
        return {name: mask.clone() for name, mask in self._final.items()}

    def _start(self, run: Run) -> None:
        refuse_compressed(run.model)
        refuse_prompts(run.trainer.model)
        self._final = self._masked = self.measured = None
        # Adapters and fake quantizers that are there already would only blur the analysis; shapes are enough for it.
        with suspended(run.model), unsharded(run.model, weights=False):
            graph = ModelGraph(plain_view(run.model) if has_adapters(run.model) else run.model, self.example_inputs)
        self._costs = graph.costs
        budget = self._budget = budget_of(run, graph, self.config, self.example_inputs)
        steps, epochs, seed = run.total_steps, run.steps_per_epoch, run.args.seed
        self._pruner = Pruner(run.model, graph, self.config, steps, epochs, seed, budget)
        if self.config.gradients == "distillation":
            self._listening.enter_context(distillation_gradients(run.trainer, self._pruner))
        if self.config.schedule == LOTTERY_TICKET:
            moment = self.config.rewind_step(steps, epochs)
            self._rewinder = Rewinder(run.model, run.trainer.optimizer, moment, self._moments())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read gradients and activations: already summed over accumulation steps, not yet averaged over ranks."""
        if self._pruner is not None and self._run is not None:
            self._pruner.read(state.global_step, mean_gradients, loss_scale(kwargs.get("optimizer")))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tighten the masks when the schedule says so, and let the weights go back where it does."""
        if self._pruner is not None and self._run is not None and self._pruner.update(state.global_step):
            check_same_on_all_ranks(self._pruner.masks, "PruningCallback: masks", args.device)
        if self._rewinder is not None and self._run is not None:
            self._rewinder.after(state.global_step)

    def _metrics(self) -> Mapping[str, float]:
        """Sparsity and lowest score kept by structure, and what the model would have if it were shrunk now."""
        if self._pruner is None or self._costs is None:
            return {}
        return metrics_of(self._pruner) | left(self._costs, self._pruner.group_masks())

    def _preview(self, run: Run) -> Mapping[str, Any]:
        assert self._pruner is not None and self._costs is not None
        masks = trial_masks(self._pruner)
        facts = plan_of(self._pruner, masks, run.total_steps)
        if self._rewinder is not None:
            facts["weights go back to those of step"] = self._rewinder.moment
        groups = {name: masks[name] for name in self._pruner.group_masks()}
        before, after = left(self._costs, {}), left(self._costs, groups)
        facts["parameters"], facts["parameters after shrink"] = before["parameters"], after["parameters"]
        facts["operations kept"] = after["flops_kept"]
        decides = any(pool.budget is None and pool.sparsity is None for pool in self._pruner.pools)
        if decides and all(mask.all() for mask in groups.values()):
            groups = {}
            facts["trial"] = "none: the method decides itself how much goes, so these are the sizes without any removal"
        self.trial = groups or None
        if groups:
            with suspended(run.model):
                shrink(run.trainer, groups, example_inputs=self.example_inputs, quantizers=False)
            facts["trial"] = "a copy was shrunk with masks of these sizes and computes what it computes masked"
        return facts

    def _stop(self, run: Run) -> None:
        assert self._pruner is not None
        after = f"after {run.trainer.state.global_step} steps of a schedule that ends at step {self._moments()[-1]}."
        for pool in self._pruner.pools:
            masks = {name: self._pruner.masks[name] for name in pool.layers}
            pool.check_achieved(masks, f"{after} {self._why_missed(run)}")
        check_decided(self._pruner.pools, self._pruner.masks, after)
        self._final, self._masked = self._pruner.group_masks(), weakref.ref(run.model)
        complete = all(mask.all() for mask in self._pruner.masks.values())
        staying = self._pruner.fold()
        if staying:
            warnings.warn(
                f"PruningCallback: gates stay on the model, because zeros in its weights alone cannot say what is "
                f"gone of {', '.join(repr(name) for name in staying)}. Evaluation sees the pruned model; a saved one "
                "would not be it: save shrink(trainer).",
                stacklevel=2,
            )
        if has_adapters(run.model) and not complete:
            warnings.warn(
                "PruningCallback: units were removed from the base weights as well, which a checkpoint of the adapters "
                "alone does not hold. Save shrink(trainer), or the merged model (merge_and_unload).",
                stacklevel=2,
            )

        if isinstance(self._budget, LatencyBudget):
            self._measure(run, self._budget)

    def _measure(self, run: Run, budget: LatencyBudget) -> None:
        """Time the shrunk model.

        Raises:
            TargetError: If it is not as fast as was asked for. The masks are final all the same.
        """
        small = shrink(run.trainer, self.masks(), example_inputs=self.example_inputs, quantizers=False)
        self.measured = budget.measure(small)
        dense, fast = (1000 * seconds for seconds in self.measured.seconds)
        logger.info(f"PruningCallback: {dense:.4g} ms to {fast:.4g} ms, {self.measured.ratio:.2f} times as fast")
        budget.check(self.measured, "shrink(trainer) returns the model all the same.")

    def _why_missed(self, run: Run) -> str:
        best = run.trainer.state.best_model_checkpoint
        if run.args.load_best_model_at_end and best is not None:
            assert self._pruner is not None
            return (
                f"load_best_model_at_end went back to {best}, from before the schedule's end; later checkpoints are "
                f"where they were. Compare pruned models only: set eval_delay={self._moments()[-1]} (in steps) and "
                "save as late, or load_best_model_at_end=False."
            )
        return "Training stopped early. Set end earlier, or train longer."

    def _remove(self) -> None:
        self._listening.close()
        self._rewinder = None
        if self._pruner is not None:
            self._pruner.remove()
            self._pruner = None

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self._pruner is None:
            return {}, {}
        kept = self._rewinder.state() if self._rewinder is not None else {}
        return state_of(self._pruner) | kept, {
            "window": self._moments(),
            "thresholds": self._pruner.thresholds,
            "budget": dict(self._budget.state()) if self._budget is not None else None,
            "step": self._run.trainer.state.global_step if self._run is not None else 0,
        }

    def _moments(self) -> list[int]:
        assert self._pruner is not None
        return sorted({step for pool in self._pruner.pools for step, _ in pool.timetable.moments})

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        assert self._pruner is not None
        check_moments("PruningCallback", "pruning", facts.get("window"), self._moments())
        if self._budget is not None:
            self._budget.restore(facts["budget"])
        restore(self._pruner, tensors, facts["thresholds"], facts["step"])
        if self._rewinder is not None:
            self._rewinder.restore(tensors, facts["step"])
