"""The criteria that work without training, and which settings each of them can carry out."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_compress.config import WEIGHTS, PruningConfig
from hf_compress.errors import ConfigError, choices
from hf_compress.oneshot import kwon, obs, scores, weights
from hf_compress.oneshot.request import Found, Job
from hf_compress.pruning.criteria.oneshot import ObsOptions

LINEAR = ("heads", "ffn", "hidden", "head_dim", "other")
"""Structures whose units linear layers may read."""

GATED = (*LINEAR, "layers")
"""Structures whose units can be gated; experts act through a router alone."""

WHOLE = (*GATED, "experts")
"""All structures of units."""


@dataclass(frozen=True)
class Criterion:
    """How one criterion works on units, or on single weights."""

    units: Callable[[Job], Found] | None = None
    structures: tuple[str, ...] = ()
    """What ``units`` works on."""

    weights: Callable[[Job], Found] | None = None

    def works_on(self) -> tuple[str, ...]:
        """Return all structures that it works on."""
        return self.structures if self.weights is None else (*self.structures, WEIGHTS)


CRITERIA = {
    "level": Criterion(scores.by_weights, WHOLE, weights.remove_by_weights),
    "l1": Criterion(scores.by_weights, WHOLE, weights.remove_by_weights),
    "l2": Criterion(scores.by_weights, WHOLE, weights.remove_by_weights),
    "random": Criterion(scores.by_weights, WHOLE, weights.remove_by_weights),
    "fpgm": Criterion(scores.by_weights, WHOLE),
    "wanda": Criterion(scores.wanda, LINEAR, weights.remove_by_inputs),
    "obs": Criterion(obs.remove_units, LINEAR, weights.remove_and_update),
    "kwon": Criterion(kwon.search_and_tune, ("heads", "ffn")),
    "taylor": Criterion(scores.gate_gradients, GATED),
    "taylor2": Criterion(scores.gate_gradients, GATED),
    "fisher": Criterion(scores.gate_gradients, GATED),
    "block_influence": Criterion(scores.block_influence, ("layers",)),
}
"""The criteria that need no training."""

WHILE_TRAINING = (
    "schedule",
    "power",
    "milestones",
    "initial_sparsity",
    "begin",
    "end",
    "update_every",
    "score_decay",
    "gradients",
    "regrow",
)
"""Settings that have no effect without training."""

LIMITS = ("min_units", "max_layer_sparsity")
"""What rules may change where all units of the model compete with each other."""


def check_config(config: Any, seed: int) -> None:
    """Check that the criteria can do what is asked for, and that no setting is without effect.

    Raises:
        ConfigError: If not.
    """
    if not isinstance(config, PruningConfig):
        raise ConfigError(f"prune_oneshot: config is a {type(config).__name__}; pass a PruningConfig.")
    parts = config.parts()
    for number, (rule, part) in enumerate(parts):
        where = "PruningConfig" if rule is None else f"PruningConfig.rules[{number}]"
        _check_criterion(part, where)
        _check_effects(part, where)
        if WEIGHTS in part.structures:
            _check_weights(part, where)
    structures = dict.fromkeys(kind for _, part in parts for kind in part.structures)
    if WEIGHTS in structures and len(structures) > 1:
        raise ConfigError(
            "PruningConfig.structures: 'weights' beside other structures, which would remove what is zeroed. Remove "
            "units first, shrink, then prune the weights of the result."
        )
    _check_flops(config)
    if type(seed) is not int:
        raise ConfigError(f"prune_oneshot: seed={seed!r}; allowed: an int.")
    if seed != 0 and not any(part.criterion == "random" for _, part in parts):
        raise ConfigError(f"prune_oneshot: seed={seed!r}; allowed: 0 unless the criterion is 'random'.")


def _check_criterion(config: PruningConfig, where: str) -> None:
    if config.criterion not in CRITERIA:
        known = choices(config.criterion, CRITERIA)
        raise ConfigError(f"{where}.criterion: {config.criterion!r} needs training; without, {known}.")
    works_on = CRITERIA[config.criterion].works_on()
    for kind in config.structures:
        if kind not in works_on:
            raise ConfigError(
                f"{where}.structures: {config.criterion!r} does not work on {kind!r} without training; "
                f"{choices(kind, works_on)}."
            )


def _check_effects(config: PruningConfig, where: str) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    useless = next((name for name in WHILE_TRAINING if getattr(config, name) != defaults[name]), None)
    if useless is not None:
        raise ConfigError(
            f"{where}.{useless}: got {getattr(config, useless)!r}, which has no effect without training; allowed: the "
            f"default {defaults[useless]!r}."
        )
    options = config.method_options()
    in_blocks = WEIGHTS not in config.structures or config.granularity in ("row", "column", "block")
    if isinstance(options, ObsOptions) and in_blocks and options.block_size != ObsOptions.block_size:
        raise ConfigError(
            f"{where}.options: block_size={options.block_size} is of single weights, and has no effect on "
            f"{', '.join(config.structures)} by {config.granularity!r}; allowed: {ObsOptions.block_size}."
        )


def _check_weights(config: PruningConfig, where: str) -> None:
    if config.criterion == "wanda" and config.granularity == "element" and config.allocation != "per_layer":
        raise ConfigError(
            f"{where}.allocation: {config.allocation!r}, but 'wanda' compares single weights within each output, so "
            "that layers do not compete; allowed: 'per_layer'."
        )


def _check_flops(config: PruningConfig) -> None:
    """Where ``kwon`` is told a share of the operations, that alone says how much goes of all units."""
    if not any(part.method_options().decides for _, part in config.parts()):
        return
    for number, rule in enumerate(config.rules):
        changed = next((name for name in rule.changes() if name not in LIMITS), None)
        if changed is not None:
            raise ConfigError(
                f"PruningConfig.rules[{number}].{changed}: with flops, all units of the model compete for one budget; "
                f"allowed in rules: {', '.join(LIMITS)}."
            )
    if any(part.multiple_of != 1 for _, part in config.parts()):
        raise ConfigError(
            "PruningConfig.multiple_of: kwon's search for a share of the operations goes by single units; allowed: 1 "
            "with flops. target_flops keeps multiples."
        )
    if config.allocation != "global":
        raise ConfigError(
            f"PruningConfig.allocation: {config.allocation!r}, but with flops all units compete; allowed: 'global'."
        )
