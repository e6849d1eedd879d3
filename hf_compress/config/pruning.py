"""Pruning: what goes, how much of it, by which criterion, when."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.config.budgets import Budgets
from hf_compress.config.effects import N_OF_M, decides, without_effect
from hf_compress.config.milestones import PAIRS, are_milestones
from hf_compress.config.rules import PruningRule
from hf_compress.config.structures import TRAINABLE_STRUCTURES, WEIGHTS, WIDTHS
from hf_compress.errors import ConfigError, choices
from hf_compress.registry import allocators, criteria
from hf_compress.schedule import LOTTERY_TICKET, POLYNOMIAL, STEPS, Moment, schedules, ticket_rounds, to_steps

GRANULARITIES = ("element", "row", "column", "block")
"""What is pruned of a weight as one, besides N:M patterns."""


@dataclass(frozen=True, kw_only=True)
class PruningConfig(Budgets):
    """Pruning during training: which structures, how much, by which criterion, when."""

    structures: Mapping[str, float] | Sequence[str]
    """Structure -> sparsity in [0, 1): the fraction to remove, e.g. ``{"heads": 0.5}``. A list of structures where
    a budget says how much (``target_params`` and the others), or the criterion itself finds out (``movement`` with
    ``mode="soft"``)."""

    criterion: str = "taylor"
    """What units are scored by (higher = keep): a name in ``hf_compress.pruning.criteria``."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the criterion, see its own documentation."""

    schedule: str = "cubic"
    """How sparsity grows between ``begin`` and ``end``: a name in ``hf_compress.schedule``, ``"polynomial"`` (see
    ``power``), ``"steps"`` (see ``milestones``) or ``"lottery_ticket"`` (see ``rounds``)."""

    power: float = 3.0
    """Exponent of the ``polynomial`` schedule, > 0: 1 is linear, 3 is cubic."""

    milestones: tuple[tuple[Moment, float], ...] = ()
    """For ``schedule="steps"``: moments, each with the share in (0, 1] of the final sparsity that is reached then,
    e.g. ``((0.2, 0.5), (0.4, 1.0))``. They replace ``begin`` and ``end``. With ``initial_sparsity`` s, nothing goes
    before the first one, and a share q stands for the sparsity s + q * (final - s)."""

    rounds: int = 5
    """For ``schedule="lottery_ticket"`` (Frankle and Carbin 2019, arXiv:1803.03635): into how many equal parts the
    window is cut. At the end of each, the same fraction of what is left goes, all weights that training changes go
    back to what they were at ``rewind_to``, and the optimizer forgets them. The learning rate's schedule goes on:
    ``"cosine_with_restarts"`` with as many cycles suits. What remains of the run after ``end`` trains the ticket."""

    rewind_to: Moment = 0
    """For ``schedule="lottery_ticket"``: the moment to whose weights every round goes back; an early one instead of 0
    is what large models need (Frankle et al. 2020, arXiv:1912.05671)."""

    initial_sparsity: float = 0.0
    """Sparsity at ``begin``, in [0, 1); structures with a lower final sparsity start there."""

    allocation: str = "global"
    """``"per_layer"``: every layer loses the same fraction; ``"global"``: scores compete across layers;
    ``"isomorphic"``: they compete among layers of the same sizes, each such class loses the same fraction."""

    begin: Moment = 0.1
    """When pruning starts: an optimizer step (int), a fraction of the run (float) or ``"1.5 epochs"``."""

    end: Moment = 0.6
    """When the final sparsity is reached; what remains of the run heals the model."""

    update_every: int = 10
    """Optimizer steps between two changes of the masks."""

    score_decay: float = 0.95
    """Exponential moving average of what is measured per step: s <- decay * s + (1 - decay) * s_step."""

    gradients: str = "training"
    """Whose gradients gates get, for criteria that read them: ``"training"``, the loss that is trained with; or
    ``"distillation"``, the part of it that compares logits with the teacher's (Yang et al. 2023, GRAIN,
    arXiv:2212.00098). The latter needs a ``DistillationCallback`` and a second backward pass through the model."""

    regrow: bool = False
    """Whether what was pruned may come back while the schedule runs, if it scores better than what is there."""

    min_units: int = 1
    """Units that every layer keeps at least, whatever the scores say."""

    max_layer_sparsity: float = 1.0
    """Upper limit of the sparsity of a single layer, in (0, 1]."""

    multiple_of: int = 1
    """Kept widths (ffn, hidden, head_dim, other) are multiples of this: 8, 16 or 64 suit integer and tensor-core
    kernels."""

    granularity: str = "element"
    """For ``weights``, what goes as one: ``"element"``, ``"row"`` (an output), ``"column"`` (an input), ``"block"``
    (see ``block_size``), or a pattern such as ``"2:4"``: two of four neighbours along the inputs stay."""

    block_size: tuple[int, int] = (32, 32)
    """Outputs and inputs of a block."""

    exclude: tuple[str, ...] = ()
    """Regular expressions; a dimension group or parameter whose name matches one (``re.search``) is left alone."""

    rules: tuple[PruningRule, ...] = ()
    """Other settings for parts of the model. With a budget, limits only: there all units of the model compete with each
    other, which takes scores of one criterion, and one schedule."""

    def _validate(self) -> None:
        self._check_patterns("exclude")
        self._check_choice("criterion", criteria)
        self._check_choice("allocation", allocators)
        self._check_choice("schedule", {*schedules, POLYNOMIAL, STEPS, LOTTERY_TICKET})
        for name in ("update_every", "min_units", "multiple_of", "rounds"):
            self._check_count(name)
        self._check_bool("regrow")
        self._check_choice("gradients", ("training", "distillation"))
        self._check_number("score_decay", 0, 1, open_high=True)
        self._check_number("initial_sparsity", 0, 1, open_high=True)
        self._check_number("max_layer_sparsity", 0, 1, open_low=True)
        self._check_number("power", 0, 100, open_low=True)
        self._check_options()
        self._check_structures()
        self._check_budget(self.structures)
        self._check_gradients()
        self._check_budget_alone()
        self._check_window()
        self._check_lottery_ticket()
        self._check_weights()
        self._check_effects()
        self._check_rules()

    def _check_gradients(self) -> None:
        if self.gradients != "training" and "gate_gradients" not in criteria.get(self.criterion).reads:
            raise self._error("gradients", self.gradients, f"'training' with {self.criterion!r}, which reads no gates")
        if self.gradients != "training" and WEIGHTS in self.structures:
            raise self._error("gradients", self.gradients, "'training' for single weights, which have no gates")

    def _check_options(self) -> None:
        if not isinstance(self.options, Mapping):
            raise self._error("options", self.options, "a mapping of the criterion's settings")
        object.__setattr__(self, "options", dict(self.options))
        try:
            self.method_options()
        except ConfigError as error:
            raise ConfigError(f"PruningConfig.options for criterion {self.criterion!r}: {error}") from error

    def method_options(self) -> Any:
        """Return the criterion's own settings, checked."""
        return criteria.get(self.criterion).options.from_dict(self.options)

    def _check_structures(self) -> None:
        given = self.structures
        decides, target = self.method_options().decides, self.target()
        as_list = decides or target is not None
        wanted = 'list such as ["heads", "ffn"]' if as_list else 'mapping such as {"heads": 0.5, "ffn": 0.7}'
        is_list = isinstance(given, Sequence) and not isinstance(given, str)
        if not given or not (is_list if as_list else isinstance(given, Mapping)):
            why = f"{self.criterion!r} finds out itself how much goes." if decides else ""
            why = why if target is None else f"{target[0]} says how much goes."
            raise self._error("structures", given, f"a non-empty {wanted}", why)
        for kind in given:
            if kind not in TRAINABLE_STRUCTURES:
                known = choices(kind, TRAINABLE_STRUCTURES)
                raise ConfigError(f"PruningConfig.structures: unknown structure {kind!r}; {known}.")
            works_on = criteria.get(self.criterion).structures
            if kind not in works_on:
                allowed = ", ".join(repr(each) for each in TRAINABLE_STRUCTURES if each in works_on)
                raise self._error("structures", kind, f"{allowed} with criterion {self.criterion!r}")
        if isinstance(given, Mapping):
            for kind, sparsity in given.items():
                if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
                    raise self._error(f"structures[{kind!r}]", sparsity, "a sparsity (fraction removed) in [0, 1)")
            object.__setattr__(self, "structures", {kind: float(value) for kind, value in given.items()})
        else:
            if len(set(given)) != len(given):
                raise self._error("structures", given, "each structure once")
            object.__setattr__(self, "structures", tuple(given))

    def _check_budget_alone(self) -> None:
        """With a budget, what says otherwise how much goes has no effect."""
        target = self.target()
        if target is None:
            return
        for field, default in {"allocation": "global", "initial_sparsity": 0.0}.items():
            if getattr(self, field) != default:
                raise self._error(field, getattr(self, field), f"{default!r} with {target[0]}")
        if self.method_options().decides:
            raise self._error(target[0], target[1], f"None with these options of {self.criterion!r}, which find out")
        if criteria.get(self.criterion).needs_sparsity:
            why = "A budget is met by different sparsities; this one learns towards one. Give each structure its own."
            raise self._error(target[0], target[1], f"None with criterion {self.criterion!r}", why)
        limits = {"min_units", "max_layer_sparsity", "multiple_of"}
        for number, rule in enumerate(self.rules):
            changed = rule.changes() if isinstance(rule, PruningRule) else {**rule, "match": None}
            for field in sorted(changed.keys() - limits - {"match"}):
                allowed = f"only limits ({', '.join(sorted(limits))}) with {target[0]}"
                why = "All units compete for it, by scores of one criterion, on one schedule. Exclude what is to stay."
                raise self._error(f"rules[{number}].{field}", changed[field], allowed, why)

    def _check_window(self) -> None:
        for name in ("begin", "end", "rewind_to"):
            self._check_moment(name)
        self._check_order("begin", "end")
        if (self.schedule == STEPS) != bool(self.milestones):
            allowed = "moments with shares" if self.schedule == STEPS else 'none without schedule="steps"'
            raise self._error("milestones", self.milestones, allowed)
        self._check_milestones()

    def _check_milestones(self) -> None:
        pairs = self.milestones
        if not are_milestones(pairs):
            raise self._error("milestones", pairs, PAIRS)
        if pairs and (self.begin, self.end) != (PruningConfig.begin, PruningConfig.end):
            raise self._error("begin/end", (self.begin, self.end), 'the defaults with schedule="steps"')
        object.__setattr__(self, "milestones", tuple((when, float(share)) for when, share in pairs))

    def _check_lottery_ticket(self) -> None:
        """What only the lottery ticket's rounds read is for them; what they do not read is not."""
        if self.schedule != LOTTERY_TICKET:
            for name in ("rounds", "rewind_to"):
                if getattr(self, name) != getattr(PruningConfig, name):
                    allowed = f'{getattr(PruningConfig, name)} unless schedule is "{LOTTERY_TICKET}"'
                    raise self._error(name, getattr(self, name), allowed)
            return
        for name in ("update_every", "initial_sparsity"):
            if getattr(self, name) != getattr(PruningConfig, name):
                raise self._error(name, getattr(self, name), f'{getattr(PruningConfig, name)} with "{LOTTERY_TICKET}"')
        target = self.target()
        if target is not None:
            raise self._error(target[0], target[1], f'None with schedule="{LOTTERY_TICKET}", which needs sparsities')
        if criteria.get(self.criterion).defers or self.method_options().decides:
            why = "This one removes nothing before the end, or finds out itself how much goes."
            allowed = f'a criterion that changes masks in every round of "{LOTTERY_TICKET}", such as "l2" or "taylor"'
            raise self._error("criterion", self.criterion, allowed, why)

    def _check_weights(self) -> None:
        pattern = N_OF_M.fullmatch(self.granularity) if isinstance(self.granularity, str) else None
        if self.granularity not in GRANULARITIES and (pattern is None or not 0 < int(pattern[1]) < int(pattern[2])):
            raise self._error("granularity", self.granularity, f"{', '.join(GRANULARITIES)}, or N:M such as 2:4")
        size = self.block_size
        whole = isinstance(size, Sequence) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)
        if not whole:
            raise self._error("block_size", size, "two ints >= 1: outputs and inputs of a block")
        object.__setattr__(self, "block_size", tuple(size))
        if WEIGHTS not in self.structures and self.granularity != "element":
            raise self._error("granularity", self.granularity, f'"element" unless {WEIGHTS!r} is pruned')
        if self.granularity != "block" and self.block_size != PruningConfig.block_size:
            raise self._error("block_size", size, f'{PruningConfig.block_size} unless granularity is "block"')
        if pattern is not None and decides(self.criterion, self.options):
            why = "A pattern removes exact numbers; this one finds out itself how much goes."
            raise self._error("granularity", self.granularity, f"one of {', '.join(GRANULARITIES)}", why)
        if pattern is not None and isinstance(self.structures, Mapping):
            final = 1 - int(pattern[1]) / int(pattern[2])
            given = self.structures[WEIGHTS]
            if abs(given - final) > 1e-9:
                raise self._error(f"structures[{WEIGHTS!r}]", given, f"{final}, which is what the pattern removes")

    def _check_effects(self) -> None:
        """A setting that cannot change anything is an error, not a comment."""
        if self.power != PruningConfig.power and self.schedule != POLYNOMIAL:
            raise self._error("power", self.power, f'{PruningConfig.power} unless schedule is "polynomial"')
        if self.update_every != PruningConfig.update_every and self.schedule == STEPS:
            raise self._error("update_every", self.update_every, f'{PruningConfig.update_every} with schedule="steps"')
        if self.initial_sparsity != 0 and self.schedule == "one_shot":
            raise self._error("initial_sparsity", self.initial_sparsity, '0.0 with schedule="one_shot"')
        if self.multiple_of != 1 and not set(WIDTHS) & set(self.structures):
            raise self._error("multiple_of", self.multiple_of, f"only 1 unless one of {', '.join(WIDTHS)} is pruned")
        useless = without_effect(self.criterion, self.options, self.structures, self.granularity)
        for field, why in useless.items():
            if getattr(self, field) != getattr(PruningConfig, field):
                raise self._error(field, getattr(self, field), f"{getattr(PruningConfig, field)!r} with {why}")
        if not isinstance(self.structures, Mapping):
            return
        if self.allocation == "per_layer" and self.max_layer_sparsity != 1.0:
            raise self._error("max_layer_sparsity", self.max_layer_sparsity, 'only 1.0 with allocation="per_layer"')
        if max(self.structures.values()) > self.max_layer_sparsity:
            raise self._error("max_layer_sparsity", self.max_layer_sparsity, "at least the highest sparsity asked for")

    def _check_rules(self) -> None:
        given = self.rules
        if (
            isinstance(given, str)
            or not isinstance(given, Sequence)
            or not all(isinstance(rule, PruningRule | Mapping) for rule in given)
        ):
            raise self._error("rules", given, "a list of PruningRule or of mappings of its fields")
        rules = tuple(PruningRule.from_dict(rule) if isinstance(rule, Mapping) else rule for rule in given)
        object.__setattr__(self, "rules", rules)
        for number, rule in enumerate(rules):
            for name in {"begin", "end"} & rule.changes().keys() if self.schedule == LOTTERY_TICKET else ():
                allowed = f'none with "{LOTTERY_TICKET}": all weights go back at the same moments'
                raise self._error(f"rules[{number}].{name}", getattr(rule, name), allowed)
        self.parts()

    def parts(self) -> "list[tuple[PruningRule | None, PruningConfig]]":
        """Return each rule with the config that holds for what it matches, and last this config without rules.

        Raises:
            ConfigError: If a rule asks for what does not go together.
        """
        found: list[tuple[PruningRule | None, PruningConfig]] = []
        for number, rule in enumerate(self.rules):
            try:
                found.append((rule, self._under(rule)))
            except ConfigError as error:
                raise ConfigError(f"PruningConfig.rules[{number}]: {error}") from error
        return [*found, (None, dataclasses.replace(self, rules=()) if self.rules else self)]

    def _under(self, rule: PruningRule) -> "PruningConfig":
        """Return the config under a rule; what is inherited and means nothing there goes back to its default."""
        changes = rule.changes()
        structures = changes.get("structures", self.structures)
        neutral: dict[str, Any] = {"rules": ()}
        if "criterion" in changes:
            neutral |= {"options": {}, "score_decay": PruningConfig.score_decay}
        if not set(WIDTHS) & set(structures):
            neutral["multiple_of"] = 1
        if WEIGHTS not in structures:
            neutral |= {"granularity": "element", "block_size": PruningConfig.block_size}
        if changes.get("allocation") == "per_layer":
            neutral["max_layer_sparsity"] = 1.0
        criterion, granularity = changes.get("criterion", self.criterion), neutral.get("granularity", self.granularity)
        if criterion in criteria:
            options = changes.get("options", neutral.get("options", self.options))
            useless = without_effect(criterion, options, structures, granularity)
            neutral |= {field: getattr(PruningConfig, field) for field in useless}
        return dataclasses.replace(self, **(neutral | changes))

    def pattern(self) -> tuple[int, int] | None:
        """Return N and M of an N:M granularity, or None."""
        found = N_OF_M.fullmatch(self.granularity)
        return None if found is None else (int(found[1]), int(found[2]))

    def window(self, total_steps: int, steps_per_epoch: Callable[[], int] | None = None) -> tuple[int, int]:
        """Return the first and the last optimizer step of the schedule.

        Args:
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Says how many of them an epoch has; asked only if epochs are given.

        Raises:
            ConfigError: If the window does not fit into the run.
        """
        moments = self.moments(total_steps, steps_per_epoch)
        return moments[0][0], moments[-1][0]

    def moments(self, total_steps: int, steps_per_epoch: Callable[[], int] | None = None) -> list[tuple[int, float]]:
        """Return the milestones in optimizer steps; without any, the first and the last step of the window.

        Args:
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Says how many of them an epoch has; asked only if epochs are given.

        Raises:
            ConfigError: If they do not fit into the run.
        """
        given = self.milestones or ((self.begin, 0.0), (self.end, 1.0))
        steps = [to_steps(when, total_steps, steps_per_epoch) for when, _ in given]
        begin, end = steps[0], steps[-1]
        if sorted(steps) != steps or begin < 0 or not 1 <= end <= total_steps:
            name = "milestones" if self.milestones else "begin/end"
            raise ConfigError(
                f"PruningConfig.{name}: {given[0][0]!r}..{given[-1][0]!r} is the window of steps {begin}..{end}, but "
                f"the run has {total_steps} optimizer steps; allowed: 0 <= begin <= end <= {total_steps} and end >= 1. "
                "Train longer, or move the window; moments from 0 to 1 are fractions of any run."
            )
        if self.milestones and len(set(steps)) != len(steps):
            raise ConfigError(
                f"PruningConfig.milestones: in a run of {total_steps} optimizer steps they are at steps "
                f"{', '.join(map(str, steps))}; allowed: each at a step of its own. Move them apart, or train longer."
            )
        if self.schedule == LOTTERY_TICKET and not (end - begin >= self.rounds and end < total_steps):
            raise ConfigError(
                f"PruningConfig.begin/end: {begin}..{end} for {self.rounds} rounds in a run of {total_steps} "
                f'optimizer steps; allowed with schedule="{LOTTERY_TICKET}": a step at least for each round, and steps '
                "left after end, where the ticket is trained."
            )
        return [(step, share) for step, (_, share) in zip(steps, given, strict=True)]

    def rewind_step(self, total_steps: int, steps_per_epoch: Callable[[], int] | None = None) -> int:
        """Return the optimizer step after which the weights are kept that every round goes back to.

        Args:
            total_steps: Optimizer steps of the run.
            steps_per_epoch: Says how many of them an epoch has; asked only if epochs are given.

        Raises:
            ConfigError: If the first round is over by then.
        """
        begin, end = self.window(total_steps, steps_per_epoch)
        first, _ = ticket_rounds(begin, end, self.rounds, 0.0)[0]
        step = to_steps(self.rewind_to, total_steps, steps_per_epoch)
        if step >= first:
            raise ConfigError(
                f"PruningConfig.rewind_to: {self.rewind_to!r} is step {step}, but the first of {self.rounds} rounds of "
                f"the window {begin}..{end} ends at step {first}; allowed: an earlier moment."
            )
        return step
