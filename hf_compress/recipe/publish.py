"""Upload what a run made to the Hub, if its recipe says so."""

from dataclasses import replace

from hf_compress.config import Recipe
from hf_compress.errors import ExportError
from hf_compress.export.hub import push_to_hub
from hf_compress.recipe.result import RunResult
from hf_compress.recipe.stages import SMALL


def publish(recipe: Recipe, result: RunResult) -> RunResult:
    """Upload the compressed model, and an exported format to the branch that is called like it.

    Args:
        recipe: Says where to.
        result: Of the finished run, saved already.

    Returns:
        The result, with a note for every upload.

    Raises:
        ExportError: If an upload failed; the others have been tried as well.
    """
    if recipe.hub_model_id is None:
        return result
    branches = {SMALL: None, f"{SMALL}-{recipe.export}": recipe.export}
    notes, errors = [], []
    for name in [name for name in branches if name in result.folders]:
        try:
            commit = push_to_hub(
                result.folders[name],
                recipe.hub_model_id,
                private=True if recipe.hub_private else None,
                revision=branches[name],
            )
            notes.append(f"{name} is on the Hub: {commit.commit_url}")
        except ExportError as error:
            errors.append(str(error))
    if errors:
        raise ExportError(f"the run is complete and saved in {result.output}, but: {' '.join(errors)}")
    return replace(result, notes=(*result.notes, *notes))
