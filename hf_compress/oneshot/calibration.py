"""Calibration data, run through a model again and again; nothing is trained."""

import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.utils import logging

from hf_compress.errors import CompressionError, ConfigError, TargetError
from hf_compress.instruments.observe import SeenEnough, reading_changes, reading_inputs
from hf_compress.oneshot.linear import LinearLayer
from hf_compress.shrinking.verify import FORWARD_ERRORS

Batch = dict[str, Any]


class Calibration:
    """Batches of keyword arguments for a model, and what the model makes of them.

    Args:
        model: In eval mode while anything here is called.
        dataloader: Gives mappings; it is read once.
        num_batches: Take no more than so many.
        caller: The function that was called, for messages.

    Raises:
        ConfigError: If the data cannot be read, there are no batches, or one is no mapping with tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        num_batches: int | None = None,
        caller: str = "prune_oneshot",
    ) -> None:
        self.caller = caller
        if num_batches is not None and (type(num_batches) is not int or num_batches < 1):
            raise ConfigError(f"{self.caller}: num_batches={num_batches!r}; allowed: an int >= 1, or None for all.")
        if not isinstance(dataloader, Iterable) and not hasattr(type(dataloader), "__getitem__"):
            raise ConfigError(
                f"{self.caller}: the dataloader is a {type(dataloader).__name__}; allowed: an iterable of batches, "
                "such as a DataLoader or a list."
            )
        self.model = model
        self.batches = [_checked(caller, n, batch) for n, batch in enumerate(itertools.islice(dataloader, num_batches))]
        if not self.batches:
            raise ConfigError(f"{self.caller}: the dataloader gave no batch; allowed: at least one, as in training.")
        self._calls: list[dict[str, int]] = []
        self._encoder = _encoder_of(model)

    def stages(self, layers: Mapping[str, LinearLayer]) -> list[list[str]]:
        """Return the layers in the order in which they run, those that are given the same input together.

        Raises:
            TargetError: If a layer is never called, its inputs are not finite, or all tokens are padding.
        """
        if all(tokens is not None and not tokens.any() for tokens in map(self._tokens, self.batches)):
            raise TargetError(
                f"{self.caller}: attention_mask is 0 everywhere in these batches, so all tokens are padding and "
                "nothing is known about inputs. Set it to 1 where there is text."
            )
        given: dict[str, list[tuple[int, int, int]]] = {}
        self._calls = []
        for number, batch in self.each("Finding layers"):
            seen: list[weakref.ref[Tensor]] = []
            calls = dict.fromkeys(layers, 0)

            def read(
                name: str,
                x: Tensor,
                number: int = number,
                seen: list[weakref.ref[Tensor]] = seen,
                calls: dict[str, int] = calls,
            ) -> None:
                calls[name] += 1
                place = next((i for i, each in enumerate(seen) if each() is x), None)
                if place is None:
                    place = len(seen)
                    seen.append(weakref.ref(x))
                given.setdefault(name, []).append((number, place, x._version))

            with reading_inputs(_modules(layers), read):
                self._forward(number, batch)
            self._calls.append(calls)
        missing = sorted(layers.keys() - given)
        if missing:
            raise TargetError(
                f"{self.caller}: {missing[0]!r} is never called with these batches, so nothing is known about its "
                "inputs. Exclude it, or give batches that reach it."
            )
        stages: dict[tuple[tuple[int, int, int], ...], list[str]] = {}
        for name, inputs in given.items():
            stages.setdefault(tuple(inputs), []).append(name)
        return list(stages.values())

    def inputs_of(
        self, number: int, batch: Batch, layers: Mapping[str, LinearLayer], read: Callable[[str, Tensor], None]
    ) -> None:
        """Run one batch as far as the layers and read their inputs; ``stages`` comes before.

        Args:
            number: Of the batch.
            batch: The batch.
            layers: By name.
            read: Called with the name and with the inputs of all tokens that are no padding, [tokens, inputs].

        Raises:
            TargetError: If the forward pass fails.
        """

        def read_tokens(name: str, x: Tensor) -> None:
            read(name, rows(x, self._tokens(batch, name)))

        calls = {name: self._calls[number].get(name, 0) for name in layers}
        if any(calls.values()):
            with reading_inputs(_modules(layers), read_tokens, calls):
                self._forward(number, batch)

    def grams(self, layers: Mapping[str, LinearLayer], doing: str) -> dict[str, Tensor]:
        """Return the sum of x x^T over the tokens of all batches by layer, [inputs, inputs] in float64.

        Raises:
            TargetError: If a forward pass fails, or inputs are not finite.
        """
        return self._sums(layers, doing, lambda x: x.T @ x)

    def squares(self, layers: Mapping[str, LinearLayer], doing: str) -> dict[str, Tensor]:
        """Return the sum of x^2 over the tokens of all batches by layer, [inputs] in float64.

        Raises:
            TargetError: If a forward pass fails, or inputs are not finite.
        """
        return self._sums(layers, doing, lambda x: x.square().sum(0))

    def _sums(self, layers: Mapping[str, LinearLayer], doing: str, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for number, batch in self.each(doing):

            def read(name: str, x: Tensor, number: int = number) -> None:
                term = of(x if x.dtype == torch.float64 else x.float()).double()
                check_finite(number, name, term, self.caller)
                sums[name] = term if name not in sums else sums[name].add_(term)

            self.inputs_of(number, batch, layers, read)
        return sums

    def changes(self, modules: Mapping[str, nn.Module], read: Callable[[int, str, Tensor, Tensor], None]) -> None:
        """Read what layers are given and what they return.

        Args:
            modules: By name.
            read: Called with the number of the batch, the name, and both hidden states of all tokens, [tokens, width].
        """
        for number, batch in self.each("Comparing layers"):

            def read_tokens(name: str, x: Tensor, y: Tensor, number: int = number, batch: Batch = batch) -> None:
                tokens = self._tokens(batch, name)
                read(number, name, rows(x, tokens), rows(y, tokens))

            with reading_changes(modules, read_tokens):
                self._forward(number, batch)

    def losses(self, doing: str, *, per_example: bool) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the batch and the loss, with its graph, of every batch or of every example.

        Raises:
            TargetError: If the model gives no finite loss, or a batch cannot be taken apart.
        """
        for number, batch in self.each(doing):
            for part in _examples(number, batch) if per_example else [batch]:
                yield number, self._loss(number, part)

    def _loss(self, number: int, batch: Batch) -> Tensor:
        with torch.enable_grad():
            outputs = self._forward(number, batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is None:
            raise TargetError(
                f"{self.caller}: batch {number} gives no loss; this criterion needs gradients of it. Add labels to the "
                "batches, or use a criterion without gradients (l2, wanda, obs)."
            )
        check_finite(number, "the loss", loss.detach(), self.caller)
        result: Tensor = loss
        return result

    def outputs(
        self, doing: str, ready: Callable[[Callable[[str], Tensor | None]], None] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of each batch and what the model returns for it.

        Args:
            doing: What to show beside the progress bar.
            ready: Called before each pass with a function that returns where texts are no padding, bool [batch,
                length], for the name of a layer, or None where it is not said.

        Raises:
            TargetError: If a forward pass fails.
        """
        for number, batch in self.each(doing):
            if ready is not None:
                ready(partial(self._tokens, batch))
            yield number, self._forward(number, batch)

    def _forward(self, number: int, batch: Batch) -> Any:
        """Run one batch; None if the pass ended early because everything had been seen.

        Raises:
            TargetError: If it fails.
        """
        device = next(self.model.parameters()).device
        given = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            given.setdefault("use_cache", False)
        try:
            return self.model(**given)
        except SeenEnough:
            return None
        except (CompressionError, torch.OutOfMemoryError):
            raise
        except FORWARD_ERRORS as error:
            raise TargetError(
                f"{self.caller}: {type(self.model).__name__}.forward failed on batch {number} (with "
                f"{', '.join(batch)}): {type(error).__name__}: {error}. Batches are passed as keyword arguments."
            ) from error

    def each(self, doing: str) -> Iterator[tuple[int, Batch]]:
        """Yield all batches with their numbers, behind a progress bar."""
        bars: Any = logging
        yield from enumerate(bars.tqdm(self.batches, desc=doing, leave=False))

    def _tokens(self, batch: Batch, name: str = "") -> Tensor | None:
        """Return where texts are no padding, bool [batch, length], or None where it is not said.

        An encoder's mask says nothing about its decoder's positions, which may be as many by chance.

        Args:
            batch: The batch.
            name: Of the layer that sees it.
        """
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not f"{name}.".startswith(self._encoder):
            return None
        return mask.bool()


def check_finite(number: int, what: str, values: Tensor, caller: str = "prune_oneshot") -> None:
    """Check numbers that a batch gave.

    Args:
        number: Of the batch.
        what: What they are, for the message.
        values: The numbers.
        caller: The function that was called, for the message.

    Raises:
        TargetError: If any is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise TargetError(
            f"{caller}: batch {number} gives numbers in {what!r} that are not finite (or whose squares are not). "
            "Check the batch and the model's weights; half precision may be too narrow."
        )


def _encoder_of(model: Any) -> str:
    """Return the beginning of the names of what ``attention_mask`` is about: the encoder, if there is a decoder too."""
    if not model.config.is_encoder_decoder:
        return ""
    encoder = model.get_encoder()
    return next((f"{name}." for name, module in model.named_modules() if name and module is encoder), "none.")


def _modules(layers: Mapping[str, LinearLayer]) -> dict[str, nn.Module]:
    return {name: layer.module for name, layer in layers.items()}


def rows(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Return [tokens, width], without padding.

    Args:
        x: [batch, length, width] or, of attention, [batch, heads, length, width]; anything else is taken as a whole.
        tokens: True = no padding, bool [batch, length]; None: there is none.
    """
    if tokens is not None and x.shape[:-1] == tokens.shape:
        return x.detach()[tokens.to(x.device)]
    if tokens is not None and x.dim() == 4 and (x.shape[0], x.shape[2]) == tokens.shape:
        return x.detach().transpose(1, 2)[tokens.to(x.device)].flatten(0, 1)
    return x.detach().reshape(-1, x.shape[-1])


def _checked(caller: str, number: int, batch: Any) -> Batch:
    if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
        raise ConfigError(
            f"{caller}: batch {number} of the dataloader is a {type(batch).__name__}; allowed: a mapping of "
            "forward arguments with tensors, as transformers' data collators make."
        )
    return dict(batch)


def _examples(number: int, batch: Batch) -> Iterator[Batch]:
    """Yield batches of one example."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    sizes = {len(value) for value in tensors.values()}
    if len(sizes) != 1:
        shapes = {key: list(value.shape) for key, value in tensors.items()}
        raise TargetError(
            f"prune_oneshot: batch {number} cannot be taken apart into examples, because its tensors have different "
            f"first sizes: {shapes}. Give batches of one example, in which every tensor has first size 1."
        )
    for i in range(sizes.pop()):
        yield {key: value[i : i + 1] if key in tensors else value for key, value in batch.items()}


@contextmanager
def without_gradients_of(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Keep autograd from computing gradients of parameters; what is in their ``grad`` stays there."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
