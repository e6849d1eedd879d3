"""Model cards, generated from ``results.json`` and never typed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_compress.config import Recipe
from hf_compress.errors import ExportError
from hf_compress.report.compare import Comparison
from hf_compress.report.plots import plot_kept_units
from hf_compress.report.results import Results
from hf_compress.report.wording import UNNAMED, literal, loading_code, measured_on, needs

PICTURE = "kept_units.png"
CARD = "README.md"
RECIPE = "recipe.yaml"
TAGS = ("hf-compress", "model-compression")

METRIC_TYPES = {"accuracy", "perplexity", "exact_match", "f1", "bleu"}
"""What the Hub calls the metrics of recipes."""

SECTION_TAGS = {"pruning": "pruning", "quantization": "quantization", "distillation": "distillation"}


def write_card(directory: str | Path, results: Results | None = None) -> Path:
    """Write the model card, the picture of what every layer kept, the recipe and ``results.json`` into a model folder.

    An earlier card of a compressed model is replaced, a ``README.md`` of somebody else's is not.

    Args:
        directory: The model's folder.
        results: What to write; read from the folder's ``results.json`` by default.

    Returns:
        The path of the card.

    Raises:
        ExportError: If there is no folder, no ``results.json`` to write the card from, or another card.
        ConfigError: If ``results.json`` is damaged.
    """
    directory = Path(directory)
    stored = directory / Results.FILE_NAME
    if not directory.is_dir():
        raise ExportError(f"{directory}: is no folder; give the folder of a saved model.")
    for name in (CARD, PICTURE, RECIPE):
        _check_no_link(directory / name)
    _check_own(directory / CARD)
    if results is None:
        if not stored.is_file():
            raise ExportError(
                f"{directory}: holds no {Results.FILE_NAME}, so there is nothing to write a card from. A compression "
                "run writes it; or pass results=Results(...)."
            )
        results = Results.load(stored)
    else:
        results.save(stored)
    has_picture = any(results.kept_units().values())
    if has_picture:
        plot_kept_units(results.kept_units(), directory / PICTURE)
    if results.recipe is not None:
        Recipe.from_dict(results.recipe).save(directory / RECIPE)
    card = ModelCard(f"---\n{_metadata(results).to_yaml()}\n---\n\n{_body(results, has_picture)}")
    path = directory / CARD
    card.save(path)
    return path


def _check_own(path: Path) -> None:
    """Check that a card that is there is one of a compressed model."""
    if path.is_file() and f"- {TAGS[0]}\n".encode() not in path.read_bytes():
        raise ExportError(
            f"{path}: is there already, and without the tag {TAGS[0]!r}, which every card of a compressed model has, "
            "so it is not overwritten. Give it another name, or add the tag to its metadata."
        )


def _check_no_link(path: Path) -> None:
    """A folder from elsewhere may have links: to write through one would change a file that is not in it."""
    if path.is_symlink():
        raise ExportError(f"{path}: is a link, so nothing is written there. Delete it, or copy the folder's files.")


def naming_repository(card: str, repo_id: str, revision: str | None = None) -> str:
    """Return a card whose example loads the model from a repository on the Hub; one without the example stays."""
    place = f'"{repo_id}"' if revision is None else f'"{repo_id}", revision="{revision}"'
    return card.replace(json.dumps(UNNAMED), place)


def _metadata(results: Results) -> ModelCardData:
    runs = Recipe.from_dict(results.recipe).runs() if results.recipe is not None else ()
    sections = [name for name in SECTION_TAGS if any(getattr(run, name) is not None for run in runs)]
    return ModelCardData(
        model_name=results.name,
        base_model=results.base_model if results.base_model_on_hub else None,
        base_model_relation=results.base_model_relation if results.base_model_on_hub else None,
        datasets=results.dataset_id,
        language=results.language,
        library_name="transformers",
        license=results.license,
        license_name=results.license_name,
        license_link=results.license_link,
        pipeline_tag=results.task,
        tags=[*TAGS, *(SECTION_TAGS[name] for name in sections)],
        eval_results=_eval_results(results) or None,
        ignore_metadata_errors=False,
    )


def _eval_results(results: Results) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=results.task,
            dataset_type=results.dataset_id or "local",
            dataset_name=results.dataset,
            dataset_split=results.evaluation_split,
            metric_type=_metric_type(metric),
            metric_name=metric,
            metric_value=round(values[results.model], 4),
        )
        for metric, values in results.table().metrics.items()
        if results.model in values
    ]


def _metric_type(metric: str) -> str:
    """Return the Hub's name of a metric, such as ``"f1"`` for ``"macro F1 (%)"``."""
    words = metric.lower().replace("exact match", "exact_match").split()
    return next((word for word in words if word in METRIC_TYPES), words[0])


def _body(results: Results, has_picture: bool) -> str:
    table = results.table()
    parts = [
        f"# {literal(results.name)}",
        _summary(results, table),
        "## Results",
        measured_on(results),
        table.to_markdown(),
    ]
    if has_picture:
        parts += ["## What every layer kept", f"![Units kept per layer]({PICTURE})"]
    parts += ["## Load it", _load_snippet(results)]
    if results.checks:
        parts += ["## Verified by the run", "\n".join(f"- {check}" for check in results.checks)]
    if results.recipe is not None:
        parts += ["## Recipe", f"```yaml\n{Recipe.from_dict(results.recipe).to_yaml()}```"]
    if results.training:
        parts += ["## Training", _facts(results.training)]
    parts += ["## Measured with", _facts(table.environment)]
    return "\n\n".join(parts) + "\n"


def _summary(results: Results, table: Comparison) -> str:
    reference, own = next(iter(table.profiles.values())), table.profiles[results.model]
    share = f"{own.parameters / reference.parameters:.0%} of the parameters"
    if own.encoder_parameters is not None and reference.encoder_parameters:
        share += f" ({own.encoder_parameters / reference.encoder_parameters:.0%} of those in the encoder)"
    faster = ", ".join(
        f"{ratios[results.model]:.1f} times as fast at {label}"
        for label, ratios in table.speedup.items()
        if results.model in ratios
    )
    base = literal(results.base_model)
    if results.base_model_on_hub:
        base = f"[{base}](https://huggingface.co/{quote(results.base_model)})"
    return (
        f"{base}, fine-tuned on {literal(results.dataset)} and compressed "
        f"with hf-compress: {share}{', ' if faster else ''}{faster}, against the dense model in the same run."
    )


def _load_snippet(results: Results) -> str:
    code = loading_code(results.auto_class, processor_class=results.processor_class)
    return f"{literal(needs(results.requires))}\n\n```python\n{code}\n```"


def _facts(facts: Mapping[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(dict(facts), sort_keys=False)}```"
