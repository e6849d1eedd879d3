"""What a run leaves behind."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from hf_compress.callbacks.preview import Preview
from hf_compress.errors import ConfigError
from hf_compress.reading import are_texts, inside, read_json
from hf_compress.report.compare import Comparison, comparison_of_runs

RECIPE_FILE = "recipe.yaml"
RESULT_FILE = "run.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Where everything is, and how good and small it is; prints as a summary."""

    output: Path
    """The recipe's output folder."""

    folders: Mapping[str, Path] = field(default_factory=dict)
    """Name of a model in ``comparison`` -> its folder, tokenizer and model card included."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """What ``trainer.evaluate()`` returned after training."""

    comparison: Comparison | None = None
    """The dense model beside the compressed ones; None after a dry run, and in all processes but the first."""

    preview: Preview | None = None
    """What the run would do, after a dry run; None for a recipe with stages."""

    stages: Mapping[str, Preview] = field(default_factory=dict)
    """What each stage would do, after a dry run of a recipe with stages."""

    notes: tuple[str, ...] = ()
    """Facts about model and data."""

    def save(self) -> None:
        """Write the result into the output folder, which is what makes a run finished."""
        assert self.comparison is not None
        data = {
            "folders": {name: folder.relative_to(self.output).as_posix() for name, folder in self.folders.items()},
            "metrics": dict(self.metrics),
            "comparison": self.comparison.to_dict(),
            "notes": list(self.notes),
        }
        (self.output / RESULT_FILE).write_text(json.dumps(data, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, output: Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            ConfigError: If it is damaged.
        """
        path = output / RESULT_FILE
        try:
            data = read_json(path)
            if not are_texts(data["notes"]) or not isinstance(data["metrics"], Mapping):
                raise TypeError("notes are no list of texts, or metrics no mapping")
            return cls(
                output=output,
                folders={name: inside(output, folder) for name, folder in data["folders"].items()},
                metrics=data["metrics"],
                comparison=comparison_of_runs(data["comparison"]),
                notes=tuple(data["notes"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: is damaged ({error!r}). Delete it and resume to measure again.") from error

    def __str__(self) -> str:
        lines = list(self.notes)
        previews = {"": self.preview} if self.preview is not None else self.stages
        for name, each in previews.items():
            lines += [f"== {name} =="] * bool(name) + [str(each)]
        if previews:
            lines.append("dry run: nothing was trained, nothing was saved")
        if self.comparison is not None:
            lines += ["", str(self.comparison), ""]
        lines += [f"{name}: {folder}" for name, folder in self.folders.items()]
        return "\n".join(lines)
