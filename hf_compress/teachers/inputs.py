"""Which inputs of a batch a teacher reads, which of their positions count, and what an example is known by."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from hf_compress.errors import TrainingError
from hf_compress.instruments.adapters import without_wrapper
from hf_compress.teachers.hashing import combine, row_hashes

IGNORED_LABEL = -100
"""Labels at padding; collators of Transformers put it there."""

LABELS = ("labels", "start_positions", "end_positions")
"""Arguments that only the task loss reads; an encoder-decoder model makes the decoder's input of the first."""

_NOT_READ = ("num_items_in_batch", "use_cache", "return_dict", "output_attentions", "output_hidden_states")
_DECODER_MASKS = ("decoder_attention_mask", "labels", "decoder_input_ids")


def read_inputs(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a teacher reads, labels only where a decoder needs them.

    Args:
        teacher: The teacher, wrappers included.
        inputs: Keyword arguments for a model.
    """
    known = _arguments(teacher, inputs)
    taken = {name: value for name, value in inputs.items() if name in known and value is not None}
    labels = inputs.get("labels")
    if _has_decoder(teacher) and _is_text(labels) and taken.get("decoder_input_ids") is None:
        taken["labels"] = labels
    return taken


def without_own_loss(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with what a decoder reads in place of the labels that it is made of, where a teacher says how.

    Its loss is not wanted, and would fail at labels beyond a vocabulary that is smaller than the student's.

    Args:
        teacher: The teacher, wrappers included.
        inputs: What it reads.
    """
    taken, plain = dict(inputs), without_wrapper(teacher)
    shift: Any = getattr(plain, "prepare_decoder_input_ids_from_labels", None)
    has_tokens = plain.get_output_embeddings() is not None  # some heads of other tasks inherit the method
    if shift is None or not has_tokens or not _is_text(taken.get("labels")):
        return taken
    labels = taken.pop("labels")
    if taken.get("decoder_input_ids") is None and taken.get("decoder_inputs_embeds") is None:
        taken["decoder_input_ids"] = shift(labels=labels)
    return taken


def in_precision_of(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with images and sounds in the precision of a teacher whose weights are in half precision."""
    dtype = getattr(without_wrapper(teacher), "dtype", None)
    if dtype not in (torch.float16, torch.bfloat16):
        return dict(inputs)
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def named_arguments(kind: type[nn.Module], inputs: Mapping[str, Any]) -> set[str]:
    """Return what may be given to the forward of a class.

    Models name what they read, and many choke on more, whatever ``**kwargs`` say; one that names neither its main
    input nor any tensor of a batch takes all of it.

    Args:
        kind: Class of the model.
        inputs: Keyword arguments for a model.
    """
    arguments = inspect.signature(kind.forward).parameters.values()
    collecting = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {each.name for each in arguments if each.kind not in collecting}
    reads = {getattr(kind, "main_input_name", ""), *(name for name in inputs if isinstance(inputs[name], Tensor))}
    if named.isdisjoint(reads) and any(each.kind is each.VAR_KEYWORD for each in arguments):
        named |= set(inputs)
    return named


@dataclass(frozen=True)
class InputSpec:
    """What an example is known by: the contents of some inputs, padding left out."""

    hashed: tuple[str, ...]
    """Names of the inputs that are hashed; every batch must have all of them."""

    padded: tuple[str, ...]
    """Those whose second dimension is padded like the mask of their side, encoder or decoder."""

    read: tuple[str, ...]
    """Arguments of the teacher: another tensor of one of these names may change what it says, so it is refused."""

    decoder_mask: str
    """Input that shows which decoder positions count, one of ``decoder_attention_mask``, ``labels`` and
    ``decoder_input_ids``; empty if there is no decoder or nothing shows it."""

    pad_token_id: int | None
    """Ends of ``decoder_input_ids`` with this token do not count, if they are the decoder mask."""

    moves: bool = False
    """Whether padding before an example changes nothing of what the teacher says; where it does, none is allowed."""

    @classmethod
    def of(cls, teacher: nn.Module, inputs: Mapping[str, Any]) -> "InputSpec":
        """Read it off a batch.

        Args:
            teacher: The teacher, wrappers included.
            inputs: Keyword arguments for a model, one batch.

        Raises:
            TrainingError: If the teacher reads none of them.
        """
        taken = {name: value for name, value in read_inputs(teacher, inputs).items() if isinstance(value, Tensor)}
        if not taken:
            raise TrainingError(
                f"teacher cache: {type(without_wrapper(teacher)).__name__} reads none of the tensors of the batch, "
                f"{sorted(inputs)}. Give batches as the collator of the Trainer makes them."
            )
        config: Any = without_wrapper(teacher).config
        pad = getattr(config, "pad_token_id", None)
        masks = [name for name in _DECODER_MASKS if _is_text(inputs.get(name))]
        found = masks[0] if _has_decoder(teacher) and masks else ""
        if found == "decoder_input_ids" and pad is None:
            found = ""
        if found != "decoder_input_ids":
            pad = None
        bare = cls(tuple(sorted(taken)), (), tuple(sorted(_arguments(teacher, inputs))), found, pad)
        padded = [name for name, value in taken.items() if _fits(name, value, bare.counts(inputs, _is_decoder(name)))]
        return cls(bare.hashed, tuple(sorted(padded)), bare.read, found, pad)

    def counts(self, inputs: Mapping[str, Any], decoder: bool, labels: Tensor | None = None) -> Tensor | None:
        """Return which positions count, bool, [batch, length] ([batch, choices, length] with multiple choice).

        Args:
            inputs: One batch.
            decoder: Those of the decoder, else of the encoder or the only part.
            labels: Where they are not in ``inputs``.

        Returns:
            None if nothing shows it: all do.

        Raises:
            TrainingError: If the decoder mask is missing or a mask has another form.
        """
        if not decoder:
            mask = inputs.get("attention_mask")
            return None if mask is None else _checked("attention_mask", mask).bool()
        if not self.decoder_mask:
            return None
        given = inputs.get(self.decoder_mask)
        if given is None and self.decoder_mask == "labels":
            given = labels
        if given is None:
            raise TrainingError(
                f"teacher cache: the batch has no {self.decoder_mask!r}, which showed where the decoder's padding is "
                "when the cache was made. Use the same collator, or give labels where the Trainer took them out."
            )
        mask = _checked(self.decoder_mask, given)
        if self.decoder_mask == "decoder_attention_mask":
            return mask.bool()
        return _through_last(mask.ne(IGNORED_LABEL if self.decoder_mask == "labels" else self.pad_token_id or 0))

    def moved(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return which examples begin elsewhere than the teacher allows, bool, [batch]; None if none can.

        Raises:
            TrainingError: See ``counts``.
        """
        mask = None if self.moves else self.counts(inputs, False)
        if mask is None:
            return None
        return (mask.any(-1) & ~mask[..., 0]).flatten(1).any(1) if mask.dim() == 3 else mask.any(1) & ~mask[:, 0]

    def output_counts(self, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor | None:
        """Return which positions of token-level outputs count, bool, [batch, length]; None if there are no positions.

        Args:
            inputs: One batch.
            labels: Where they are not in ``inputs``.

        Raises:
            TrainingError: See ``counts``.
        """
        if self.decoder_mask:
            return self.counts(inputs, True, labels)
        counts = self.counts(inputs, False)
        ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        if counts is None and isinstance(ids, Tensor):
            counts = torch.ones_like(ids, dtype=torch.bool)
        return counts if counts is not None and counts.dim() == 2 else None

    def keys(self, inputs: Mapping[str, Any], labels: Tensor | None = None) -> Tensor:
        """Return what the examples of a batch are known by, int64, [batch, 2].

        Args:
            inputs: Keyword arguments that a model is called with.
            labels: Where they are not in ``inputs``.

        Raises:
            TrainingError: If an input is missing or there is one that the cache knows nothing of.
        """
        given = self._checked_inputs(inputs, labels)
        counts = {decoder: self.counts(inputs, decoder, labels) for decoder in (False, True)}
        total: Tensor | None = None
        for name in self.hashed:
            mask = counts[_is_decoder(name)] if name in self.padded else None
            if name in self.padded and not _fits(name, given[name], mask):
                raise TrainingError(
                    f"teacher cache: {name} has shape {list(given[name].shape)}, which does not fit its mask "
                    f"({'none' if mask is None else list(mask.shape)}), as it did when the cache was made. Use the "
                    "same collator, or make the cache anew."
                )
            hashes = _input_hashes(given[name], mask, name)
            total = hashes if total is None else total + hashes
        assert total is not None
        return total

    def _checked_inputs(self, inputs: Mapping[str, Any], labels: Tensor | None) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name in self.hashed}
        if labels is not None and "labels" in self.hashed:
            given.setdefault("labels", labels)
        missing = sorted(set(self.hashed) - set(given))
        if missing:
            raise TrainingError(
                f"teacher cache: the batch has no {_listed(missing)}, which the teacher read when the cache was made "
                f"from {_listed(self.hashed)}. Use the same collator and columns, or make the cache anew."
            )
        tensors = {name for name, value in inputs.items() if isinstance(value, Tensor)}
        unknown = sorted((tensors & set(self.read)) - set(self.hashed))
        if unknown:
            raise TrainingError(
                f"teacher cache: the batch has {_listed(unknown)}, which the teacher would read but did not get when "
                f"the cache was made from {_listed(self.hashed)}. Use the same collator and columns, or make the "
                "cache anew."
            )
        if inputs.get("logits_to_keep") is not None and not _is_zero(inputs["logits_to_keep"]):
            raise TrainingError("teacher cache: logits_to_keep cuts the logits; call the model without it.")
        sizes = {name: len(value) if value.dim() else 0 for name, value in given.items()}
        if len(set(sizes.values())) > 1:
            raise TrainingError(
                f"teacher cache: inputs must have one row per example, but their numbers of rows are {sizes}. "
                "Teachers whose inputs are packed over the batch cannot be cached; use the live teacher."
            )
        return given


def _input_hashes(tensor: Tensor, mask: Tensor | None, name: str) -> Tensor:
    if mask is None or mask.dim() == 2:
        return row_hashes(tensor, mask, name)
    leading = mask.dim() - 1
    rows = row_hashes(tensor.flatten(0, leading - 1), mask.flatten(0, leading - 1), name)
    return combine(rows.view(len(tensor), -1, 2))


def _fits(name: str, tensor: Tensor, mask: Tensor | None) -> bool:
    """Return whether an input is padded like a mask; images never are, whatever their size."""
    return mask is not None and tensor.shape[: mask.dim()] == mask.shape and not name.startswith("pixel_")


def _is_text(value: Any) -> bool:
    """Return whether an input has one integer for every position; labels of classes are no such input."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _is_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "labels"


def _checked(name: str, mask: Tensor) -> Tensor:
    if mask.dim() not in (2, 3):
        raise TrainingError(
            f"teacher cache: {name} has shape {list(mask.shape)}; allowed: [batch, length] or [batch, choices, length]."
        )
    return mask


def _through_last(present: Tensor) -> Tensor:
    """Return everything up to the last True of each row; the first position always counts."""
    after = present.flip(-1).long().cumsum(-1).flip(-1) > 0
    return torch.cat([torch.ones_like(after[..., :1]), after[..., 1:]], dim=-1)


def _has_decoder(teacher: nn.Module) -> bool:
    config: Any = without_wrapper(teacher).config
    return bool(config.is_encoder_decoder)


def _arguments(teacher: nn.Module, inputs: Mapping[str, Any]) -> set[str]:
    """Return the names of a teacher's inputs, without labels of any kind."""
    kind = type(without_wrapper(teacher))
    labels = find_labels(kind)  # type: ignore[no-untyped-call]
    return named_arguments(kind, inputs) - {"self", *_NOT_READ, *labels, *LABELS}


def _is_zero(number: Any) -> bool:
    return isinstance(number, int) and number == 0


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
