"""Upload what a run made to the Hub, if its recipe says so."""

import shlex
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, get_token

from hf_compress.config import Recipe
from hf_compress.errors import ConfigError, ExportError
from hf_compress.export.hub import push_to_hub
from hf_compress.recipe.result import RunResult
from hf_compress.recipe.stages import SMALL


def check_upload(recipe: Recipe) -> None:
    """Check, before anything is trained, what can be known of the upload without the network; nothing is sent.

    Raises:
        ConfigError: If the recipe asks for an upload that this process cannot make.
    """
    if recipe.hub_model_id is None:
        return
    reasons = {
        "HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it": constants.HF_HUB_OFFLINE,
        "there is no token of the Hub. Log in with `hf auth login` or set HF_TOKEN": get_token() is None,
    }
    for reason in [reason for reason, is_so in reasons.items() if is_so]:
        later = shlex.join(["hf-compress", "push", str(Path(recipe.output or "") / SMALL), recipe.hub_model_id])
        raise ConfigError(
            f"Recipe.hub_model_id: got {recipe.hub_model_id!r}, but {reason}, or leave hub_model_id out and upload "
            f"later: {later}"
        )


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
