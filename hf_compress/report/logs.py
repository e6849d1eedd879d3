"""What a Trainer logged, stage by stage, as curves over the optimizer steps of the whole run."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from hf_compress.config import Recipe
from hf_compress.errors import ConfigError
from hf_compress.reading import is_count, is_number, read_json

HISTORY_FILE = "log_history.json"
FACTS_FILE = "stage.json"
STATE_FILE = "trainer_state.json"
STATE_KEY = "log_history"

Point = tuple[float, float]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StageLog:
    """The log of one training run."""

    name: str
    """Of the stage."""

    entries: Sequence[Mapping[str, Any]]
    """As the Trainer keeps them; each has a ``step``."""

    steps: int
    """Optimizer steps of the stage."""

    targets: Mapping[str, float]
    """Logged quantity -> where it is to be in the end, for those to which the recipe gives a target."""

    def points(self, key: str, offset: int = 0) -> list[Point]:
        """Return what was logged of a quantity, over steps of the whole run; what is no finite number is left out.

        Args:
            key: The quantity.
            offset: Steps of the stages before.
        """
        found = ((entry["step"] + offset, entry.get(key)) for entry in self.entries)
        numbers = ((step, value) for step, value in found if isinstance(value, int | float) and _is_number(value))
        return [(step, value) for step, value in numbers if math.isfinite(value)]


def read_history(name: str, folder: Path, checkpoints: Path | None, recipe: Recipe | None) -> StageLog | None:
    """Return the log of a stage, or None if nothing kept one.

    Args:
        name: Of the stage.
        folder: What the stage left, if it is over.
        checkpoints: Where the Trainer saved; the newest checkpoint has the log as well.
        recipe: Of the stage, for its targets.

    Raises:
        ConfigError: If a file is damaged.
    """
    entries = _entries(folder, checkpoints)
    if not entries:
        return None
    steps = max(entry["step"] for entry in entries)
    facts = folder / FACTS_FILE
    if facts.is_file():
        steps = max(steps, _read(facts, _steps))
    return StageLog(name=name, entries=entries, steps=steps, targets={} if recipe is None else targets_of(recipe))


def offsets(history: Iterable[StageLog]) -> list[int]:
    """Return at which optimizer step of the whole run every stage begins, and at the end their sum."""
    return list(accumulate((log.steps for log in history), initial=0))


def quantities(history: Iterable[StageLog]) -> list[str]:
    """Return the names of all numbers that were logged, in the order in which they come up."""
    keys = (key for log in history for entry in log.entries for key, value in entry.items() if _is_number(value))
    return list(dict.fromkeys(keys))


def targets_of(recipe: Recipe) -> dict[str, float]:
    """Return where logged quantities are to be at the end of a run without stages."""
    pruning = recipe.pruning
    if pruning is None:
        return {}
    pools: dict[str, Any] = {"": pruning.structures}
    pools |= {f"_rule{number}": rule.structures or pruning.structures for number, rule in enumerate(pruning.rules)}
    found = {
        f"{kind}{suffix}_sparsity": value
        for suffix, structures in pools.items()
        if isinstance(structures, Mapping)
        for kind, value in structures.items()
    }
    name, value = pruning.target() or (None, 0)
    if name == "target_params" and isinstance(value, int):
        found["parameters"] = value
    if name == "target_flops" and isinstance(value, float):
        found["flops_kept"] = value
    return found


def _entries(folder: Path, checkpoints: Path | None) -> list[dict[str, Any]]:
    stored = folder / HISTORY_FILE
    if stored.is_file():
        return _read(stored, _checked)
    states = [] if checkpoints is None else list(checkpoints.glob(f"checkpoint-*/{STATE_FILE}"))
    numbered = {int(path.parent.name.rpartition("-")[2]): path for path in states if _has_number(path.parent)}
    if not numbered:
        return []
    return _read(numbered[max(numbered)], lambda data: _checked(data[STATE_KEY]))


def _has_number(checkpoint: Path) -> bool:
    return checkpoint.name.rpartition("-")[2].isdecimal()


def _checked(entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        raise TypeError(f"got {type(entries).__name__}, not a list of entries")
    for entry in entries:
        if not isinstance(entry, dict) or not is_count(entry.get("step")):
            raise TypeError("an entry has no step")
    return entries


def _steps(data: Any) -> int:
    if not is_count(data["optimizer_steps"]):
        raise TypeError("optimizer_steps is no whole number")
    return int(data["optimizer_steps"])


def _read(path: Path, convert: Callable[[Any], T]) -> T:
    try:
        return convert(read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({type(error).__name__}: {error}); allowed: what training writes there. Restore the "
            "file, or delete it and do without the curves of this stage."
        ) from error


def _is_number(value: object) -> bool:
    return is_number(value)
