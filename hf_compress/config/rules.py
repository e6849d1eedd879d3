"""Other pruning settings for parts of a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_compress.config.base import Settings
from hf_compress.schedule import Moment


@dataclass(frozen=True, kw_only=True)
class PruningRule(Settings):
    """Other settings for a part of the model. What is left out is as in the config around it."""

    match: tuple[str, ...]
    """Regular expressions; the rule is for dimension groups (with ``weights``: parameters) whose name matches one
    (``re.search``) and whose kind is in ``structures``. The first such rule decides."""

    structures: Mapping[str, float] | Sequence[str] | None = None
    """Structure -> sparsity, or the structures alone; see ``PruningConfig.structures``."""

    criterion: str | None = None
    """See ``PruningConfig.criterion``."""

    options: Mapping[str, Any] | None = None
    """Of the criterion, see ``PruningConfig.options``."""

    allocation: str | None = None
    """Between the layers of this rule, see ``PruningConfig.allocation``."""

    begin: Moment | None = None
    """See ``PruningConfig.begin``."""

    end: Moment | None = None
    """See ``PruningConfig.end``."""

    min_units: int | None = None
    """See ``PruningConfig.min_units``."""

    max_layer_sparsity: float | None = None
    """See ``PruningConfig.max_layer_sparsity``."""

    multiple_of: int | None = None
    """See ``PruningConfig.multiple_of``."""

    def _validate(self) -> None:
        self._check_patterns("match")
        if not self.match:
            raise self._error("match", self.match, "at least one regular expression")
        if not self.changes():
            raise self._error("match", self.match, "a rule that sets something else, too", "This one has no effect.")

    def changes(self) -> dict[str, Any]:
        """Return what the rule sets."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["match"]
        return {name: value for name, value in values.items() if value is not None}
