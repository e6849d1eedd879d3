"""Labels for any head, made from what the head returns without them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import GraphError
from hf_compress.graph.input_facts import ModelFacts, decodes, integers
from hf_compress.graph.input_text import MEDIA_TYPES, placeholder_id, takes_choices
from hf_compress.graph.inputs import RUNTIME_ERRORS, undisturbed

IGNORED = -100
"""The label that losses leave out."""

OBJECTS = 2
"""Labeled objects per image."""

FRAMES_PER_LABEL = 4
"""CTC needs fewer labels than frames."""

Labels = dict[str, Any]


def make_labels(model: nn.Module, inputs: Mapping[str, Any], seed: int = 0) -> Labels:
    """Return keyword arguments with which ``model(**inputs, **labels)`` returns a finite loss.

    The model is run without labels, and the shape of what its head returns says what a label is: a class, a number,
    a token or class per position, a position, a mask... Then it is run with them, to be sure.

    Args:
        model: A transformers model.
        inputs: What ``make_example_inputs`` returned, or inputs of your own.
        seed: Seed of a private generator: the global random state stays as it was.

    Returns:
        Labels by forward argument; empty if the model returns a loss without any.

    Raises:
        GraphError: If the head has no loss, or none that labels made from its outputs give.
    """
    outputs = _outputs(model, inputs)
    if isinstance(outputs.get("loss"), Tensor):
        return {}
    maker = _LabelMaker(model, inputs, outputs, seed)
    failures = []
    for labels in maker.candidates():
        try:
            loss = _outputs(model, {**inputs, **labels}).get("loss")
        except (NotImplementedError, ImportError, *RUNTIME_ERRORS) as error:
            failures.append(f"{type(error).__name__}: {error}")
            continue
        if isinstance(loss, Tensor) and bool(torch.isfinite(loss).all()):
            return labels
        failures.append(f"with {', '.join(labels)} the loss is {loss}")
    given = {name: tuple(value.shape) for name, value in outputs.items() if isinstance(value, Tensor)}
    raise GraphError(
        f"{type(model).__name__}: no labels known that give a loss for a head that returns {given}"
        f"{' (' + failures[0] + ')' if failures else ''}. Pass labels of your own; a model without a head has no loss."
    )


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        with undisturbed(model, inputs) as usable:
            result = model(**usable)
    finally:
        if config is not None and getattr(config, "problem_type", None) != problem:
            config.problem_type = problem  # the loss writes down what kind of labels it saw
    return result if isinstance(result, Mapping) else {}


class _LabelMaker:
    """Makes labels that fit the outputs of one forward pass."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Mapping[str, Any], seed: int) -> None:
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        self.facts = ModelFacts(model, batch_size=len(tensors[0]) if tensors else 1, length=1, seed=seed)
        self.inputs = inputs
        self.outputs = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
        named = [value for word in ("logits", "score") for name, value in self.outputs.items() if word in name]
        self.logits = named[0] if named else None
        if self.logits is not None:
            self.facts.batch_size = len(self.logits)

    def candidates(self) -> Iterator[Labels]:
        """Yield labels, the likeliest first. None is out of range: on a GPU that would be a crash."""
        facts = self.facts
        if facts.takes("return_loss"):
            yield {"return_loss": True}
        extra = {name: self._classes(2) for name in _PAIR_LABELS if facts.takes(name)}
        if facts.takes("start_positions"):
            yield from self._spans()
        if facts.takes("sampled_negative_indices") and "projected_states" in self.outputs:
            yield self._contrasts()
        if facts.takes("mask_labels"):
            yield from self._segments()
        for name in ("future_values", "target_values"):
            if facts.takes(name) and name not in self.inputs:
                yield from ({name: target} for target in self._targets())
        if facts.takes("labels"):
            yield from ({"labels": labels, **extra} for labels in self._labels())
        if extra:
            yield extra

    def _labels(self) -> Iterator[Any]:
        if "pred_boxes" in self.outputs:
            yield self._objects()
        for target in (self.outputs.get(name) for name in ("predicted_depth", "reconstruction")):
            if target is not None:
                yield torch.rand(target.shape, generator=self.facts.generator).to(target) + 0.5
        if self.logits is not None:
            yield from _BY_DIMENSIONS.get(self.logits.dim(), _none)(self)
        elif isinstance(self._tokens(), Tensor):  # heads that run their decoder on the labels only
            tokens = self._tokens()
            high = self.facts.vocabulary(decoder=decodes(self.facts)) or 1
            yield self._ignoring(integers(self.facts, high, *tokens.shape).to(tokens.device), tokens)

    def by_example(self) -> Iterator[Tensor]:
        """Yield labels for logits [batch, classes]."""
        logits = self._logits()
        size, config = logits.shape[-1], self.facts.config
        num_labels = getattr(config, "num_labels", None) or size
        tokens = self.inputs.get("input_ids")
        if takes_choices(self.facts):
            yield self._classes(size)
        if isinstance(tokens, Tensor) and logits.shape == tokens.shape and size != num_labels:
            yield self._ignoring(integers(self.facts, 2, *tokens.shape).to(logits.device), tokens)
        problem = getattr(config, "problem_type", None)
        if problem == "regression" or (problem is None and num_labels == 1):
            yield torch.randn(logits.shape, generator=self.facts.generator).to(logits).squeeze(-1)
        if problem != "multi_label_classification":
            yield self._classes(min(size, num_labels))
        yield integers(self.facts, 2, *logits.shape).to(logits)

    def by_position(self) -> Iterator[Tensor]:
        """Yield labels for logits [batch, positions, classes]."""
        logits, facts = self._logits(), self.facts
        _, positions, size = logits.shape
        tokens = self._tokens()
        hidden = self.inputs.get("bool_masked_pos")
        if isinstance(tokens, Tensor):
            labels = integers(facts, size, *tokens.shape).to(logits.device)
            yield self._ignoring(labels, tokens)
            yield integers(facts, size, *logits.shape[:2]).to(logits.device)
            yield integers(facts, 2, *logits.shape).to(logits)
        elif isinstance(hidden, Tensor):
            yield integers(facts, size, int(hidden.sum())).to(logits.device)
            yield integers(facts, size, *hidden.shape).to(logits.device)
        else:
            if size == facts.vocabulary():
                yield self._transcript(max(positions // FRAMES_PER_LABEL, 1))
            one_hot = nn.functional.one_hot(integers(facts, size, facts.batch_size, positions), size)
            yield one_hot.to(logits)
            yield integers(facts, size, facts.batch_size, positions).to(logits.device)

    def by_pixel(self) -> Iterator[Tensor]:
        """Yield labels for logits [batch, classes, height, width]."""
        logits, pixels = self._logits(), self.inputs.get("pixel_values")
        size = pixels.shape[-2:] if isinstance(pixels, Tensor) else logits.shape[-2:]
        yield integers(self.facts, logits.shape[1], len(logits), *size).to(logits.device)

    def _tokens(self) -> Any:
        return self.inputs.get("decoder_input_ids", self.inputs.get("input_ids"))

    def _logits(self) -> Tensor:
        assert self.logits is not None
        return self.logits

    def _device(self) -> torch.device:
        return next(iter(self.outputs.values())).device if self.outputs else torch.device("cpu")

    def _num_labels(self) -> int:
        return max(getattr(self.facts.config, "num_labels", 1), 1)

    def _classes(self, high: int) -> Tensor:
        return integers(self.facts, high, self.facts.batch_size).to(self._device())

    def _ignoring(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Mark the trailing padding and the placeholders: no loss is taken there."""
        padding = self.facts.token_id("pad", decoder="decoder_input_ids" in self.inputs)
        if padding is not None:
            trailing = (tokens == padding).flip(-1).cumprod(dim=-1).flip(-1).bool()
            trailing[..., 0] = False
            labels = labels.masked_fill(trailing, IGNORED)
        mask = self.inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape and "decoder_input_ids" not in self.inputs:
            labels = labels.masked_fill(mask == 0, IGNORED)
        for placeholder in (placeholder_id(self.facts, kind) for kind in MEDIA_TYPES):
            if placeholder is not None:
                labels = labels.masked_fill(tokens == placeholder, IGNORED)
        return labels

    def _transcript(self, length: int) -> Tensor:
        """Return CTC targets, which hold no blank; the last one is shorter."""
        size = self._logits().shape[-1]
        plain = [i for i in range(size) if i not in self.facts.special_ids] or list(range(size))
        labels = torch.tensor(plain)[integers(self.facts, len(plain), self.facts.batch_size, length)]
        if length > 1:
            labels[-1, -1] = IGNORED
        return labels.to(self._device())

    def _spans(self) -> Iterator[Labels]:
        """Yield where an answer starts and ends, if there is a text."""
        logits = self.outputs.get("start_logits", self.inputs.get("input_ids"))
        if logits is None:
            return
        half, shape = max(logits.shape[-1] // 2, 1), logits.shape[:-1]
        start = integers(self.facts, half, *shape)
        end = start + integers(self.facts, max(half // 2, 1), *shape)
        yield {"start_positions": start.to(logits.device), "end_positions": end.to(logits.device)}

    def _objects(self) -> list[dict[str, Tensor]]:
        """Return classes and boxes (center and size, relative) for each image, and masks if the head makes masks."""
        num_labels, device = self._num_labels(), self._device()
        labels = []
        for _ in range(len(self.outputs["pred_boxes"])):
            boxes = torch.rand(OBJECTS, 4, generator=self.facts.generator) * 0.3 + 0.3
            label = {"class_labels": integers(self.facts, num_labels, OBJECTS), "boxes": boxes}
            if "pred_masks" in self.outputs:
                label["masks"] = integers(self.facts, 2, OBJECTS, *self.inputs["pixel_values"].shape[-2:]).float()
            labels.append({name: value.to(device) for name, value in label.items()})
        return labels

    def _segments(self) -> Iterator[Labels]:
        """Yield a class and a mask for each segment of each image, if there is one."""
        objects = []
        pixels = self.inputs.get("pixel_values", self.inputs.get("pixel_values_videos"))
        if pixels is None:
            return
        size = pixels.shape[-2:]
        num_labels, device = self._num_labels(), self._device()
        for _ in range(len(pixels)):
            masks = integers(self.facts, 2, OBJECTS, *size).float().to(device)
            objects.append((masks, integers(self.facts, num_labels, OBJECTS).to(device)))
        yield {"mask_labels": [m for m, _ in objects], "class_labels": [c for _, c in objects]}

    def _contrasts(self) -> Labels:
        """Return which frames to predict, and for each frame others of the same example to tell it from."""
        batch, frames, _ = self.outputs["projected_states"].shape
        hidden = integers(self.facts, 2, batch, frames).bool()
        hidden[:, 0] = True
        others = integers(self.facts, frames, batch, frames, self.facts.number("num_negatives", default=1))
        others += frames * torch.arange(batch).view(-1, 1, 1)
        device = self._device()
        return {"mask_time_indices": hidden.to(device), "sampled_negative_indices": others.to(device)}

    def _targets(self) -> Iterator[Tensor]:
        """Yield the future of a time series: what the head predicts has its shape, or the number of its classes."""
        for name, value in self.outputs.items():
            if value.is_floating_point() and name.startswith(("prediction", "regression", "forecast")):
                self.facts.batch_size = len(value)
                if "logits" in name:
                    yield self._classes(value.shape[-1])
                yield torch.randn(value.shape, generator=self.facts.generator).to(value)


def _none(maker: _LabelMaker) -> Iterator[Tensor]:
    return iter(())


_PAIR_LABELS = ("next_sentence_label", "sentence_order_label")
_BY_DIMENSIONS: dict[int, Callable[[_LabelMaker], Iterator[Tensor]]] = {
    1: _LabelMaker.by_example,
    2: _LabelMaker.by_example,
    3: _LabelMaker.by_position,
    4: _LabelMaker.by_pixel,
}
