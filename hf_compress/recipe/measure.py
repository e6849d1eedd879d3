"""The dense model beside what a run made of it: one table, and a model card in each folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.config.recipe import DENSE
from hf_compress.export.card import write_card
from hf_compress.export.formats.table import FORMATS
from hf_compress.export.license import license_of
from hf_compress.loading import loading
from hf_compress.recipe.models import load_student
from hf_compress.recipe.stages import Facts
from hf_compress.recipe.trainer import Prepared
from hf_compress.report.compare import DEFAULT_LENGTH, Comparison, compare
from hf_compress.report.results import Results


def measure(prepared: Prepared, dense: str, folders: Mapping[str, Path], facts: Mapping[str, Facts]) -> Comparison:
    """Compare the dense model with what lies in the folders, and write the folders' model cards.

    Args:
        prepared: What was trained.
        dense: Hub name or folder of the model before compression.
        folders: Name -> folder of a model.
        facts: The same names -> what is known about the training run that made it.
    """
    models, new = _load(prepared, dense, folders)
    notes = ["dense is the model that the run began with"]
    if dense != prepared.recipe.model:
        notes = ["dense is the model that the run trained before it began to compress"]
    if new:
        notes[0] += f"; it is not evaluated, since its checkpoint has no {new[0]}"
    if any(getattr(model, "is_quantized", False) for model in models.values()):
        notes.append("integers are fast under torch.compile only: hf-compress compare DENSE COMPRESSED --compile")
    scores: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        if name != DENSE or not new:
            for metric, value in prepared.task.evaluate(model, prepared.evaluation()).items():
                scores.setdefault(metric, {})[name] = value
    first, *others = folders
    table = compare(
        models[DENSE],
        models[first],
        others={name: models[name] for name in others},
        names=(DENSE, first),
        length=min(DEFAULT_LENGTH, prepared.task.length(prepared.splits) or DEFAULT_LENGTH),
        directories={name: str(folder) for name, folder in folders.items()},
        notes=notes,
    )
    for metric, values in scores.items():
        table = table.with_metric(metric, values)
    inherited = license_of(str(prepared.recipe.model))
    for name, folder in folders.items():
        write_card(folder, _results(prepared, name, table, facts[name], inherited))
    return table


def _load(
    prepared: Prepared, dense: str, folders: Mapping[str, Path]
) -> tuple[dict[str, PreTrainedModel], tuple[str, ...]]:
    """Load everything from disk, as others will; also return what the dense checkpoint lacks."""
    loaded = load_student(dense, prepared.task, prepared.processor, prepared.labels)
    models: dict[str, Any] = {DENSE: loaded.model}
    for name, folder in folders.items():
        with loading(str(folder)):
            models[name] = prepared.task.auto_class.from_pretrained(folder)
    return models, loaded.new


def _requirement(export: str | None, name: str) -> str:
    """Return what has to be installed to load a result of the run."""
    extra = FORMATS[export].extra if export is not None and _is_exported(export, name) else None
    return "hf-compress" if extra is None else f"hf-compress[{extra}]"


def _is_exported(export: str | None, name: str) -> bool:
    """Return whether a model of the run is the one that was exported, and not the one that it was exported from."""
    return export is not None and name.endswith(f"-{export}")


def _results(prepared: Prepared, name: str, table: Comparison, facts: Facts, inherited: Mapping[str, Any]) -> Results:
    recipe, splits = prepared.recipe, prepared.splits
    assert recipe.model is not None and recipe.dataset is not None
    own_model, own_data = Path(recipe.model).exists(), Path(recipe.dataset.path).exists()
    short = Path(recipe.model).name
    is_text = isinstance(prepared.processor, PreTrainedTokenizerBase)
    return Results(
        name=f"{short} {name}",
        model=name,
        base_model=short if own_model else recipe.model,
        base_model_on_hub=not own_model,
        base_model_relation="quantized" if _is_exported(recipe.export, name) else "finetune",
        auto_class=prepared.task.auto_class.__name__,
        processor_class="AutoTokenizer" if is_text else "AutoImageProcessor",
        requires=_requirement(recipe.export, name),
        task=prepared.task.hub_name,
        dataset=Path(recipe.dataset.path).name if own_data else recipe.dataset.path,
        dataset_id=None if own_data else recipe.dataset.path,
        evaluation_split=splits.evaluation_name,
        num_evaluation_examples=len(splits.evaluation),
        **inherited,
        comparison=table.to_dict(),
        kept=facts.kept_units(),
        recipe=recipe.to_dict(),
        training={
            "optimizer_steps": facts.optimizer_steps,
            "training_examples": len(splits.train),
            "seed": prepared.args.seed,
        },
    )
