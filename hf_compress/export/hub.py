"""Upload a finished model folder to the Hugging Face Hub, in one commit."""

import json
import re
import shlex
import warnings
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_compress.errors import ExportError
from hf_compress.export.card import CARD, naming_repository
from hf_compress.export.contents import Contents, contents_of, is_stale

_BRANCH = re.compile(r"(?!refs/|[0-9a-f]{40}$|.*(\.\.|//|/\.|\.lock(/|$)))\w[\w./+-]*(?<![./])", re.ASCII)
"""Names that git takes for a branch, and not for a commit."""

_PULL_REQUEST = re.compile(r"refs/pr/\d+")
_ADVICE = {
    401: "Log in with `hf auth login`, set HF_TOKEN, or pass token='hf_...'.",
    403: "The token may not write there: check the name, and use a token with write permission.",
}


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a model folder: weights, config, tokenizer or processor, model card and its pictures, recipe, results.

    Everything goes in one commit, so the repository never holds half of it; files that are there already are not sent
    again. Weights of an earlier model under other names are deleted in the same commit. Checkpoints, optimizer states,
    pickled files, hidden ones and whatever is not known to belong to a model stay behind, the last with a warning. The
    uploaded card names the repository in its example; the folder itself is not changed.

    Args:
        directory: The folder, as ``save_pretrained``, ``export_quantized`` or a recipe's run writes it.
        repo_id: ``"name"`` or ``"owner/name"``; made if it does not exist.
        private: Whether a new repository is private; None: as the account is set. An existing one has to agree.
        revision: Branch to upload to, made from ``main`` if it does not exist, or ``"refs/pr/N"``; None: ``main``.
        commit_message: First line of the commit's message.
        token: Instead of the one that ``hf auth login`` or ``HF_TOKEN`` gave.
        create_pr: Open a pull request instead of changing the branch.

    Returns:
        The commit: a text, its URL. The newest one that was there if nothing has changed.

    Raises:
        ExportError: If the folder could not be loaded by others, the card's metadata or a name is not valid, or the Hub
            cannot be reached or refuses. Then the folder is as it was, and so is the branch.
    """
    directory = Path(directory)
    _check_names(repo_id, revision, commit_message)
    contents = contents_of(directory)
    if contents.unknown:
        warnings.warn(
            f"{directory}: not uploaded, as not known to belong to a model: {', '.join(contents.unknown)}.",
            stacklevel=2,
        )
    card = _checked_card(directory) if CARD in contents.files else None
    api = HfApi(token=token)
    sent = False
    try:
        if card is not None:
            _ask_about(card)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not _PULL_REQUEST.fullmatch(revision):
            _make_branch(api, name, revision, create_pr)
        operations = _operations(directory, contents, card, name, revision)
        operations += _deletions(api, contents, name, revision, private)
        sent = True
        return api.create_commit(
            name,
            operations,
            commit_message=commit_message or f"Upload {directory.resolve().name}",
            revision=revision,
            create_pr=create_pr,
        )
    except ExportError as error:
        raise ExportError(f"{directory}: {error}") from error.__cause__
    except Exception as error:  # of the Hub, of two HTTP libraries and of the network: no common class, one remedy
        command = push_command(directory, repo_id, private=private, revision=revision, create_pr=create_pr)
        outcome = "was not uploaded"
        if sent and not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled):
            outcome = "the answer got lost, so it is not known whether it was uploaded"
        raise ExportError(
            f"{directory}: {outcome} to {repo_id}: {_reason(error)} {_advice(error)}The folder is unchanged, and "
            f"uploads are all or nothing; what is there already is not sent again. Try again: {command}"
        ) from error


def push_command(
    directory: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None, create_pr: bool = False
) -> str:
    """Return the command line that uploads a folder."""
    options = ["--private"] * bool(private) + ["--create-pr"] * create_pr
    options += ["--revision", revision] if revision is not None else []
    return shlex.join(["hf-compress", "push", str(directory), repo_id, *options])


def _check_names(repo_id: str, revision: str | None, commit_message: str | None) -> None:
    try:
        if not repo_id:
            raise HFValidationError("It is empty.")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(
            f"push_to_hub: repo_id: got {repo_id!r}; allowed: 'name' or 'owner/name' on the Hub. {error}"
        ) from error
    if revision is not None and not (_BRANCH.fullmatch(revision) or _PULL_REQUEST.fullmatch(revision)):
        raise ExportError(
            f"push_to_hub: revision: got {revision!r}; allowed: the name of a branch, such as 'main' or 'int8', or "
            "'refs/pr/N'. A commit cannot be changed."
        )
    if commit_message is not None and not commit_message.strip():
        raise ExportError(f"push_to_hub: commit_message: got {commit_message!r}; allowed: a text, or None.")


def _checked_card(directory: Path) -> str:
    """Return the card, whose metadata the Hub's own classes can read."""
    path = directory / CARD
    try:
        text = path.read_bytes().decode("utf-8")
        ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # YAML's, Unicode's, the card classes' own, and TypeErrors of wrong values
        raise ExportError(
            f"{path}: the card's metadata is not valid: {_reason(error)} {_card_remedy(directory)}"
        ) from error
    return text


def _ask_about(card: str) -> None:
    """Let the Hub check the metadata before there is a repository."""
    try:
        ModelCard(card).validate()
    except ValueError as error:
        raise ExportError(
            f"the Hub refuses the metadata of {CARD}: {_complaints(str(error))}. Mend it and push again."
        ) from error


def _complaints(answer: str) -> str:
    try:
        return "; ".join(str(error["message"]) for error in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):  # an answer of another form is shown as it is
        return answer


def _card_remedy(directory: Path) -> str:
    return f"Mend it, or write it again: {shlex.join(['hf-compress', 'card', str(directory)])}"


def _make_branch(api: HfApi, name: str, revision: str, create_pr: bool) -> None:
    try:
        api.create_branch(name, branch=revision, exist_ok=True)
    except HfHubHTTPError as error:
        # Who may only propose changes cannot make branches; the commit fails if there is none.
        if not (create_pr and error.response.status_code == 403):
            raise


def _operations(
    directory: Path, contents: Contents, card: str | None, name: str, revision: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    found: list[CommitOperationAdd | CommitOperationDelete] = []
    for file in contents.files:
        data: str | bytes = str(directory / file)
        if file == CARD and card is not None:
            data = naming_repository(card, name, revision).encode("utf-8")
        found.append(CommitOperationAdd(path_in_repo=file, path_or_fileobj=data))
    return found


def _deletions(
    api: HfApi, contents: Contents, name: str, revision: str | None, private: bool | None
) -> list[CommitOperationDelete]:
    """Return what has to go from the repository, which is as private as it is asked to be."""
    info = api.model_info(name, revision=revision)
    if private is not None and bool(info.private) != private:
        raise ExportError(
            f"private: got {private}, but {name} exists and is {'private' if info.private else 'public'}. Change that "
            "in its settings on the Hub, or leave private out."
        )
    there = [sibling.rfilename for sibling in info.siblings or ()]
    return [CommitOperationDelete(path_in_repo=file) for file in there if is_stale(file, contents.files)]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyError | AttributeError | TypeError):  # of an answer that the client did not expect
        text = f"an answer of the Hub has another form than expected ({type(error).__name__}: {text})"
    text = text or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _advice(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "Unset HF_HUB_OFFLINE. "
    if isinstance(error, HfHubHTTPError) and error.response.status_code in _ADVICE:
        return f"{_ADVICE[error.response.status_code]} "
    return ""
