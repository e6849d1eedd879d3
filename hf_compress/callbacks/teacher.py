"""Where a teacher comes from, whether it can teach this student, and how it is called."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME, find_adapter_config_file

from hf_compress.callbacks.same_task import Task, check_same_task
from hf_compress.errors import TrainingError
from hf_compress.instruments.attach import own_class
from hf_compress.instruments.sharded import whole
from hf_compress.latency.key import config_digest
from hf_compress.loading import SAFE, check_weights
from hf_compress.teachers.hashing import row_hashes
from hf_compress.teachers.inputs import LABELS, named_arguments, without_own_loss

_PART = 1 << 20
"""Values that are hashed at once; each takes 8 bytes meanwhile."""

COMPUTED_INPUTS = ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "past_key_values")
"""Arguments of a model that are usually made by layers of a model."""


def load_teacher(name: str, student: PreTrainedModel, dtype: str | None = None) -> PreTrainedModel:
    """Load a teacher with the same kind of head as the student.

    Args:
        name: Hub name or folder; that of a PEFT adapter too, whose base model is loaded with it.
        student: The model to be taught.
        dtype: Name of the dtype of its weights; None: as they are stored.

    Raises:
        TrainingError: If it cannot be loaded, has no such head, or its checkpoint lacks weights, which would
            leave it with random ones.
    """
    try:
        # Adapters are made with random numbers before theirs are loaded; the student's dropout goes on as without.
        with torch.random.fork_rng(devices=[]):
            teacher, missing = _load(name, student, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"teacher {name!r} cannot be loaded as {type(student).__name__}'s kind of model: {error} "
            "Check the name and that it has the student's labels, or pass a loaded model as teacher."
        ) from error
    if missing:
        raise TrainingError(
            f"teacher {name!r}: its checkpoint has no weights for {', '.join(missing)}, which would be random. "
            "Use a checkpoint that was fine-tuned for the student's task."
        )
    return teacher


def base_of(name: str) -> str:
    """Return the model that an adapter is for, or the name itself if it is none of an adapter."""
    return str(_adapter_of(name).get("base_model_name_or_path", name))


def check_teacher(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: Any,
    source: str,
    *,
    same_task: bool = True,
    padded: bool = False,
) -> None:
    """Check that what the teacher says means the same to the student.

    Args:
        teacher: The teacher, without wrappers.
        student: The student, without wrappers.
        tokenizer: The Trainer's tokenizer; anything else is ignored.
        source: Hub name or folder of the teacher's tokenizer, which is compared with the student's; "" if unknown.
        same_task: Whether both must have the same labels.
        padded: Whether their vocabularies may be of different sizes.

    Raises:
        TrainingError: If inputs, labels or vocabulary differ, or if both share parameters.
    """
    _check_apart(teacher, student)
    if teacher.main_input_name != student.main_input_name:
        raise TrainingError(
            f"the teacher reads {teacher.main_input_name!r}, the student {student.main_input_name!r}; "
            "use a teacher that reads the same inputs."
        )
    check_same_task(Task.of(teacher.config), student, labels=same_task, padded=padded)
    if source and isinstance(tokenizer, PreTrainedTokenizerBase):
        _check_tokenizer(source, tokenizer)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode without gradients; on leaving, give back the modes and flags it had."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def digest(model: PreTrainedModel) -> str:
    """Return a digest that tells models apart by what decides over their outputs.

    That is their class, their config, and names, shapes, dtypes and all values of parameters and buffers. Values are
    hashed where they are, with the same result on every device. Those that are offloaded, sharded or packed are not.
    """
    found = hashlib.sha256(f"{own_class(model).__name__} {config_digest(model.config.to_dict())}".encode())
    hashes = []
    for name, tensor in _tensors(model):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        values = tensor.data
        if type(values) is Tensor and not values.is_meta:
            hashes += [
                row_hashes(part.unsqueeze(0), None, "values").cpu() for part in torch.split(values.reshape(-1), _PART)
            ]
    if hashes:
        found.update(torch.cat(hashes).numpy().tobytes())
    return found.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, and those buffers that are saved; the others follow from the config."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def check_inputs(teacher: PreTrainedModel, student: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Check that inputs that layers have made mean the same to the teacher.

    Embeddings do if they are frozen and the teacher has the same, as where LoRA trains a copy of the teacher.

    Args:
        teacher: The teacher, without wrappers.
        student: The student.
        inputs: Those of ``COMPUTED_INPUTS`` that the student was called with.

    Raises:
        TrainingError: If they do not: the teacher would read what the student thinks of the tokens.
    """
    for name, value in inputs.items():
        is_frozen = isinstance(value, Tensor) and not value.requires_grad
        if not (is_frozen and _same_embeddings(teacher, student)):
            raise TrainingError(
                f"distillation: the student was called with {name!r}, which the student's own layers made and the "
                "teacher's would not. Call the model with input_ids in your compute_loss, or freeze the student's "
                "input embeddings and use a teacher that has the same."
            )


def taught_inputs(teacher: PreTrainedModel, student: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a teacher is called with.

    Args:
        teacher: The teacher, without wrappers.
        student: The student.
        inputs: Keyword arguments that the student was called with; those the teacher does not know are left out.
    """
    known = named_arguments(type(teacher), inputs)
    taken = {name: value for name, value in inputs.items() if name in known or type(teacher) is own_class(student)}
    taken.pop("num_items_in_batch", None)
    if not teacher.config.is_encoder_decoder:
        for name in LABELS:
            taken.pop(name, None)
    if "use_cache" in known:
        taken["use_cache"] = False
    sizes = [Task.of(model.config).vocab_size for model in (teacher, student)]
    has_fewer_tokens = sizes[0] is not None and sizes[1] is not None and sizes[0] < sizes[1]
    return without_own_loss(teacher, taken) if has_fewer_tokens else taken


def _same_embeddings(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    weights = []
    for model in (teacher, student):
        embeddings: Any = model.get_input_embeddings()
        weights.append(whole(embeddings.weight.detach()))
    return torch.equal(weights[0].to(weights[1].device), weights[1])


def _load(name: str, student: PreTrainedModel, dtype: str | None) -> tuple[PreTrainedModel, list[str]]:
    """Return a model, its adapter included, and the names of weights that no file had."""
    adapter = _adapter_of(name)
    base = adapter.get("base_model_name_or_path", name)
    for each in {name, base}:
        check_weights(each)
    if adapter and cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False) is None:
        raise ValueError(f"{name}: it has no {ADAPTER_SAFE_WEIGHTS_NAME}, and pickled adapters are not loaded.")
    options: dict[str, Any] = {"output_loading_info": True, "dtype": dtype or "auto", **SAFE}
    in_adapter = set(adapter.get("modules_to_save") or ())
    if in_adapter and student.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        # The head is in the adapter; the base model has none, or one for other labels.
        options |= {"num_labels": student.config.num_labels, "ignore_mismatched_sizes": True}
    # Given the adapter, from_pretrained reports what the adapter lacks, and not what its base model does.
    teacher, report = _loader(AutoConfig.from_pretrained(base), student).from_pretrained(base, **options)
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    missing = {key for key in absent if in_adapter.isdisjoint(key.split("."))}
    if adapter:
        missing |= teacher.load_adapter(name).missing_keys
    if dtype is not None:
        teacher.to(getattr(torch, dtype))
    return teacher, sorted(missing)


def _adapter_of(name: str) -> dict[str, Any]:
    """Return the config of a PEFT adapter; empty if it is none."""
    file = find_adapter_config_file(name)
    found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return found


def _loader(teacher_config: Any, student: PreTrainedModel) -> Any:
    """Return the Auto class whose models have the student's kind of head, or the student's own class."""
    own: Any = own_class(student)
    for name, auto in vars(modeling_auto).items():
        # AutoModelForPreTraining mixes heads of all kinds.
        if not name.startswith("AutoModelFor") or name == "AutoModelForPreTraining":
            continue
        heads = auto._model_mapping
        if own in _classes(heads, own.config_class) and _classes(heads, type(teacher_config)):
            return auto
    return own


def _classes(heads: Any, config_class: Any) -> tuple[type, ...]:
    found = heads.get(config_class, ())
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _check_apart(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    own = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if shared:
        raise TrainingError(
            f"the teacher shares {len(shared)} parameters with the student (first: {shared[0]}); it must be another "
            "model. Pass a copy made before training: copy.deepcopy(model)."
        )


def _check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare vocabularies where the teacher's can be had; two of the same size may still differ."""
    try:
        cached_file(source, "tokenizer_config.json")
        theirs, own = AutoTokenizer.from_pretrained(source).get_vocab(), tokenizer.get_vocab()
    except (OSError, ValueError):
        return
    if theirs != own:
        differing = sorted(token for token in {*theirs, *own} if theirs.get(token) != own.get(token))
        raise TrainingError(
            f"the teacher's tokenizer ({source}) gives other ids than the student's to {len(differing)} tokens, "
            f"such as {differing[:3]}. Use a teacher with the student's tokenizer."
        )
