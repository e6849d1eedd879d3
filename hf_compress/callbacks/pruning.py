"""``PruningCallback``: structured pruning driven by Trainer events."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.callbacks.access import refuse_prompts
from hf_compress.callbacks.base import CompressionCallback, Run
from hf_compress.callbacks.ranks import check_same_on_all_ranks, mean_gradients
from hf_compress.callbacks.state import check_moments
from hf_compress.config import PruningConfig
from hf_compress.errors import ConfigError, ShrinkError, TargetError, TrainingError, choices
from hf_compress.graph.costs import Costs
from hf_compress.graph.groups import DimensionGroup, DimensionGroups
from hf_compress.graph.model import ModelGraph
from hf_compress.instruments.adapters import has_adapters, plain_view
from hf_compress.instruments.attach import suspended
from hf_compress.instruments.gate import Gate, check_gateable, unit_weights
from hf_compress.instruments.sharded import unsharded
from hf_compress.pruning.allocate import Allocator, Limits, achieved_sparsity, check_reachable, tolerance
from hf_compress.pruning.criteria import Criterion
from hf_compress.registry import allocators, criteria
from hf_compress.schedule import progress_at, schedules
from hf_compress.shrinking.plan import refuse_compressed
from hf_compress.shrinking.shrink import shrink

MOMENTS_SHOWN = 12
"""Changes of the masks that a preview lists."""


class PruningCallback(CompressionCallback):
    """Prunes heads and FFN units while the Trainer trains.

    Gates at the consumers' inputs switch units off; after training the masks are folded into the consumers'
    weights (zeros), so that ``trainer.evaluate()`` and ``trainer.save_model()`` see the pruned model, and
    ``shrink(trainer)`` removes the units for good.

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
        self._criterion: Criterion = criteria.get(config.criterion)
        self._allocate: Allocator = allocators.get(config.allocation)
        self._gates: dict[str, Gate] = {}
        self._masks: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}
        self._kinds: dict[str, list[str]] = {}
        self._thresholds: dict[str, float] = {}
        self._costs: Costs | None = None
        self._window = (0, 1)
        self._finished = False

    def masks(self) -> dict[str, Tensor]:
        """Return the final masks: bool [num_units] by group name, True = keep.

        Raises:
            ShrinkError: If training has not finished.
        """
        if not self._finished:
            raise ShrinkError(
                "PruningCallback.masks: training has not finished, so there are no final masks. Call "
                "trainer.train() to its end first."
            )
        return {name: mask.clone() for name, mask in self._masks.items()}

    def _start(self, run: Run) -> None:
        refuse_compressed(run.model)
        refuse_prompts(run.trainer.model)
        self._finished = False
        # Adapters and fake quantizers that are there already would only blur the analysis; shapes are enough for it.
        with suspended(run.model), unsharded(run.model, weights=False):
            graph = ModelGraph(plain_view(run.model) if has_adapters(run.model) else run.model, self.example_inputs)
        groups = self._select(graph.groups)
        self._costs = graph.costs
        check_gateable(run.model, groups)
        self._window = self.config.window(run.total_steps)
        needs_gradient = self._criterion.needs == "gate_gradients"
        self._gates = {group.name: Gate(group, run.model, needs_gradient=needs_gradient) for group in groups}
        self._thresholds = {}
        self._masks = {group.name: torch.ones(group.num_units, dtype=torch.bool) for group in groups}
        self._scores = {name: torch.zeros_like(gate.value, requires_grad=False) for name, gate in self._gates.items()}

    def _select(self, groups: DimensionGroups) -> list[DimensionGroup]:
        """Return the groups that the config asks for.

        Raises:
            TargetError: If the model lacks a structure, a group that was asked for is frozen, a pattern matches
                nothing, or the limits forbid the sparsity.
        """
        unused = [p for p in self.config.exclude if not any(re.search(p, g.name) for g in groups)]
        if unused:
            known = ", ".join(repr(g.name) for g in groups if g.kind in self.config.structures)
            raise TargetError(f"PruningConfig.exclude: {unused[0]!r} matches no dimension group; groups here: {known}.")
        wanted = [g for g in groups if not any(re.search(p, g.name) for p in self.config.exclude)]
        self._kinds = {}
        for kind, sparsity in self.config.structures.items():
            found = [group for group in wanted if group.kind == kind]
            if not found:
                has = choices(kind, {group.kind for group in wanted if group.frozen is None})
                raise TargetError(f"PruningConfig.structures: the model has no {kind!r} to prune; {has}.")
            for group in found:
                if group.frozen is not None:
                    raise TargetError(
                        f"PruningConfig.structures[{kind!r}]: group {group.name!r} cannot be pruned: {group.frozen}. "
                        "Leave it out with exclude=(...)."
                    )
                if group.subsets:  # zeros folded into the weights would still enter the norm's statistics
                    raise TargetError(
                        f"PruningConfig.structures[{kind!r}]: group {group.name!r} passes through "
                        f"{group.subsets[0].module!r}, which sees all units together, so it cannot be pruned while "
                        "training. Leave it out with exclude=(...), or remove units with shrink(model, masks) and "
                        "train the result."
                    )
            check_reachable(kind, {g.name: g.num_units for g in found}, sparsity, self._limits(kind))
            self._kinds[kind] = [group.name for group in found]
        return [group for group in wanted if group.kind in self._kinds]

    def _limits(self, kind: str) -> Limits:
        return Limits(
            min_units=self.config.min_units,
            max_sparsity=self.config.max_layer_sparsity,
            multiple_of=self.config.multiple_of if kind == "ffn" else 1,
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the gates' gradients: already summed over accumulation steps, not yet averaged over ranks."""
        if self._criterion.needs != "gate_gradients":
            return
        decay = self.config.score_decay
        scale = _loss_scale(kwargs.get("optimizer"))
        gradients = {name: gate.take_gradient() for name, gate in self._gates.items()}
        means = mean_gradients(gradients, {name: gate.value for name, gate in self._gates.items()})
        for name, gradient in means.items():
            if gradient is None:
                raise TrainingError(
                    f"PruningCallback: the gates of {name!r} got no gradient in step {state.global_step + 1}, so "
                    f"criterion {self.config.criterion!r} has nothing to go by. Is that part of the model frozen or "
                    "skipped in training?"
                )
            evidence = gradient / scale
            if torch.isfinite(evidence).all():  # a step with overflow is skipped by the optimizer too
                self._scores[name].mul_(decay).add_(self._criterion.score(evidence), alpha=1 - decay)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tighten the masks when the schedule says so."""
        step = state.global_step
        if self._is_due(step) and self._gates:
            progress = schedules.get(self.config.schedule)(progress_at(step, *self._window))
            for kind, final in self.config.structures.items():
                self._prune(kind, final * progress)
            check_same_on_all_ranks(self._masks, "PruningCallback: masks", args.device)

    def _is_due(self, step: int) -> bool:
        begin, end = self._window
        return step == end or (begin < step < end and (step - begin) % self.config.update_every == 0)

    def _prune(self, kind: str, sparsity: float) -> None:
        names = self._kinds[kind]
        scores = {name: self._score(name) for name in names}
        if sparsity > 0 and not any(bool((scores[name][self._masks[name]] != 0).any()) for name in names):
            raise TrainingError(
                f"PruningCallback: the scores of all {kind!r} are 0 when the first are to go, so nothing says which. "
                "Were all gradients zero or not finite so far? Check the loss and its precision, or begin later."
            )
        for name, mask in self._allocate(scores, sparsity, self._limits(kind)).items():
            self._masks[name] = mask
            self._gates[name].set_mask(mask)
        kept = [scores[name][self._masks[name]].min() for name in names if self._masks[name].any()]
        self._thresholds[kind] = float(torch.stack(kept).min()) if kept else 0.0

    def _score(self, name: str) -> Tensor:
        """Return the scores of a group; what is pruned stays pruned."""
        if self._criterion.needs == "weights":
            gate = self._gates[name]
            score = self._criterion.score(unit_weights(gate.model, gate.group))
        else:
            score = self._scores[name]
        return score.cpu().masked_fill(~self._masks[name], -1.0)

    def _metrics(self) -> Mapping[str, float]:
        """Sparsity and lowest score kept by structure, and what the model would have if it were shrunk now."""
        found: dict[str, float] = {}
        for kind, names in self._kinds.items():
            found[f"{kind}_sparsity"] = round(achieved_sparsity({name: self._masks[name] for name in names}), 4)
            if kind in self._thresholds:
                found[f"{kind}_threshold"] = self._thresholds[kind]
        return found | self._left(self._masks)

    def _left(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        if self._costs is None:
            return {}
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        return {
            "parameters": self._costs.parameters(kept),
            "flops_kept": round(self._costs.flops(kept) / max(self._costs.flops({}), 1), 4),
        }

    def _preview(self, run: Run) -> Mapping[str, Any]:
        begin, end = self._window
        grow = schedules.get(self.config.schedule)
        moments = [step for step in range(begin, end + 1) if self._is_due(step)]
        shown = moments if len(moments) <= MOMENTS_SHOWN else [*moments[: MOMENTS_SHOWN - 1], moments[-1]]
        masks = self._trial_masks()
        before, after = self._left({}), self._left(masks)
        facts: dict[str, Any] = {
            kind: {
                "units": sum(len(masks[name]) for name in names),
                "removed": sum(int((~masks[name]).sum()) for name in names),
                "layers": len(names),
            }
            for kind, names in self._kinds.items()
        }
        facts["criterion"], facts["allocation"] = self.config.criterion, self.config.allocation
        facts["share of the removal by step"] = {
            f"step {step:,}": round(grow(progress_at(step, begin, end)), 4) for step in shown
        }
        facts["steps after it"] = run.total_steps - end
        facts["parameters"], facts["parameters after shrink"] = before["parameters"], after["parameters"]
        facts["operations kept"] = after["flops_kept"]
        with suspended(run.model):
            shrink(run.trainer, masks, example_inputs=self.example_inputs)
        facts["trial"] = "a copy was shrunk with masks of these sizes and computes what it computes masked"
        return facts

    def _trial_masks(self) -> dict[str, Tensor]:
        """Return masks of the final sparsity, by the size of the weights as they are."""
        masks: dict[str, Tensor] = {}
        for kind, sparsity in self.config.structures.items():
            gates = [self._gates[name] for name in self._kinds[kind]]
            scores = {g.group.name: unit_weights(g.model, g.group).norm(dim=1).cpu() for g in gates}
            masks |= self._allocate(scores, sparsity, self._limits(kind))
        return masks

    def _stop(self, run: Run) -> None:
        for kind, asked in self.config.structures.items():
            masks = {name: self._masks[name] for name in self._kinds[kind]}
            got = achieved_sparsity(masks)
            allowed = tolerance({name: mask.numel() for name, mask in masks.items()}, self._limits(kind))
            if abs(got - asked) > allowed + 1e-9:
                raise TargetError(
                    f"PruningConfig.structures[{kind!r}]: asked for sparsity {asked}, reached {got:.4f} (tolerance "
                    f"{allowed:.4f}) after {run.trainer.state.global_step} steps of a schedule that ends at step "
                    f"{self._window[1]}. {self._why_missed(run)}"
                )
        for name, gate in self._gates.items():
            gate.fold(self._masks[name])
        if has_adapters(run.model) and not all(mask.all() for mask in self._masks.values()):
            warnings.warn(
                "PruningCallback: units were removed from the base weights as well, which a checkpoint of the adapters "
                "alone does not hold. Save shrink(trainer), or the merged model (merge_and_unload).",
                stacklevel=2,
            )
        self._remove()
        self._finished = True

    def _why_missed(self, run: Run) -> str:
        best = run.trainer.state.best_model_checkpoint
        if run.args.load_best_model_at_end and best is not None:
            return (
                f"load_best_model_at_end went back to {best}, from before the schedule's end; later checkpoints are "
                f"where they were. Compare pruned models only: set eval_delay={self._window[1]} (in steps) and save as "
                "late, or load_best_model_at_end=False."
            )
        return "Training stopped early. Set end earlier, or train longer."

    def _remove(self) -> None:
        for gate in self._gates.values():
            gate.remove()
        self._gates = {}

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"mask.{name}": mask for name, mask in self._masks.items()}
        tensors |= {f"score.{name}": score for name, score in self._scores.items()}
        return tensors, {"window": list(self._window), "thresholds": self._thresholds}

    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        check_moments("PruningCallback", "pruning", facts.get("window"), list(self._window))
        expected = {f"{kind}.{name}" for name in self._masks for kind in ("mask", "score")}
        if expected != set(tensors):
            different = sorted(expected ^ set(tensors))
            raise TrainingError(
                f"PruningCallback: the checkpoint's masks belong to other groups (first difference: {different[0]!r}); "
                "resume with the model that the checkpoint was written for."
            )
        self._thresholds = dict(facts["thresholds"])
        for name, gate in self._gates.items():
            self._masks[name] = tensors[f"mask.{name}"].cpu().bool()
            self._scores[name] = tensors[f"score.{name}"].to(gate.value.device)
            gate.set_mask(self._masks[name].to(gate.value.device))


def _loss_scale(optimizer: Any) -> float:
    """Return the fp16 loss scale: the Trainer unscales its own parameters' gradients only."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0
