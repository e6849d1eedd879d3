"""What feature distillation compares, taken from ordinary forward passes of a student or a teacher."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_compress.errors import ConfigError, TrainingError, choices
from hf_compress.instruments.attention_tap import AttentionWatch, SelfAttention, self_attention
from hf_compress.instruments.stacks import Place, places, pretrained, recorded, stacks_of

WANTS = frozenset({"hidden_states", "attentions", "queries", "keys", "values"})
"""What a tap can take: outputs of layers, what attention maps are computed from, and inputs of attention."""

_REENTRANT = (
    "under activation checkpointing with use_reentrant=True it would get no gradient. Set "
    'gradient_checkpointing_kwargs={"use_reentrant": False} in TrainingArguments.'
)


@dataclass(eq=False)
class Stack:
    """Features of the layers of one stack, first layer first.

    None stands for what was not wanted, and for a layer that did not run (LayerDrop) or has no attention.
    """

    hidden: list[Tensor | None] = field(default_factory=list)
    """What each layer returns, [batch, length, width]; models that end with a norm apply it to the last. Feature
    maps of images, [batch, channels, height, width], become [batch, height * width, channels]."""

    attention: list[SelfAttention | None] = field(default_factory=list)
    """What the self-attention of each layer computes with."""

    @property
    def num_layers(self) -> int:
        """Number of layers, those included that did not run."""
        return max(len(self.hidden), len(self.attention))


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one forward pass."""

    stacks: dict[str, Stack]
    """"encoder", "decoder" or both."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield everything that was taken."""
        for stack in self.stacks.values():
            yield from (each for each in stack.hidden if each is not None)
            for each in stack.attention:
                if each is not None:
                    yield from (x for x in (each.query, each.key, each.value) if x is not None)


class FeatureTap:
    """Takes features from forward passes of a model; works the same for students and teachers.

    For each pass: call the model with what ``prepare`` returns, then ``read`` its outputs; ``close`` where a pass
    may fail between the two, as in a hook registered with ``always_call=True``. Nothing is kept after that, and outputs
    are the same bits, with hidden states added. Tensors are those of the pass itself: not copied, in its precision,
    and part of its graph. What checkpointing repeats in backward is not taken.

    Hidden states are those of ``output_hidden_states=True``, attention comes from ``AttentionInterface``: eager or
    sdpa, of every model that uses it. Windows (Swin) and models with attention code of their own are errors.

    Under torch.compile hidden states come out of the graphs; attention is taken between graphs, which breaks them at
    each layer. Wrap the hooks that call ``prepare`` and ``read`` in ``torch.compiler.disable``.

    Args:
        model: A PreTrainedModel, or a wrapper such as those of PEFT, DDP or torch.compile.
        wants: Any of ``WANTS``.
        layers: Which layers to take, by stack; None: all. May be replaced at any time.

    Raises:
        ConfigError: If ``wants`` holds something else or nothing.
        TrainingError: If the model cannot give hidden states.
    """

    def __init__(
        self, model: nn.Module, wants: Collection[str], layers: Mapping[str, Collection[int]] | None = None
    ) -> None:
        for want in wants:
            if want not in WANTS:
                raise ConfigError(f"FeatureTap wants: {want!r} is unknown; {choices(want, WANTS)}.")
        if not wants:
            raise ConfigError(f"FeatureTap wants: nothing was given; allowed: {sorted(WANTS)}.")
        self.model = model
        self.wants = frozenset(wants)
        self.layers = layers
        self._plain = pretrained(model)
        self._stacks = tuple(stacks_of(model))
        self._places = places(model)
        self._runs = LayerRuns(model, self._places)
        self._watch = AttentionWatch(_self_attention_modules(model, self._places), self._take)
        self._calls: dict[str, list[tuple[int, SelfAttention | None]]] = defaultdict(list)
        self._with_gradient = False
        if "hidden_states" in wants:
            _check_accepts_request(self._plain)

    def prepare(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to watch, and return the arguments to call the model with.

        Raises:
            TrainingError: If the arguments keep hidden states from being returned.
        """
        self.close()
        if "hidden_states" in self.wants:
            returns = kwargs.get("return_dict")
            if (self._plain.config.return_dict if returns is None else returns) is False:
                raise TrainingError(
                    f"distillation: {type(self._plain).__name__} was called with return_dict=False, so its hidden "
                    "states have no names. Leave return_dict out, and set model.config.return_dict = True."
                )
            kwargs = {**kwargs, "output_hidden_states": True}
            self._runs.open()
        self._with_gradient = torch.is_grad_enabled()
        if self.wants != {"hidden_states"}:
            self._watch.open()
        return dict(kwargs)

    def read(self, outputs: Any) -> Features:
        """Stop watching, and return the features of the pass.

        Args:
            outputs: What the model returned.

        Raises:
            TrainingError: If a feature is missing, or would get no gradient because of how the pass ran.
        """
        calls, ran = self._calls, self._runs.ran
        self.close()
        stacks = {name: Stack() for name in self._stacks}
        if "hidden_states" in self.wants:
            for name, stack in stacks.items():
                stack.hidden = self._hidden_states(name, outputs, ran)
            self._require(any(stack.hidden for stack in stacks.values()), "returned no hidden states")
        if self.wants != {"hidden_states"}:
            for name, stack in stacks.items():
                stack.attention = self._attention(name, calls[name])
            self._require(
                any(stack.attention for stack in stacks.values()),
                "has no attention, or computes it in code of its own (as DeBERTa, MPNet and BLOOM do), which cannot be "
                "watched",
            )
        for name, stack in stacks.items():
            if stack.hidden and stack.attention and len(stack.hidden) != len(stack.attention):
                raise TrainingError(
                    f"distillation: the {name} of {type(self._plain).__name__} returns {len(stack.hidden)} hidden "
                    f"states, but has {len(stack.attention)} layers with attention. Match one or the other."
                )
        return Features({name: stack for name, stack in stacks.items() if stack.num_layers})

    def check_checkpointing(self) -> None:
        """Check that attention gets gradients when the model trains as it is set up now.

        Raises:
            TrainingError: If its layers are checkpointed with ``use_reentrant=True``.
        """
        if self.wants != {"hidden_states"} and self._is_reentrant():
            raise TrainingError(
                f"distillation: attention of the {next(iter(self._stacks))} is wanted, but {_REENTRANT}"
            )

    def close(self) -> None:
        """Stop watching and forget what was seen; does nothing after ``read``."""
        self._watch.close()
        self._runs.close()
        self._calls = defaultdict(list)

    def _require(self, found: bool, otherwise: str) -> None:
        if not found:
            raise TrainingError(
                f"distillation: {type(self._plain).__name__} {otherwise}. Ask for other features, or distill logits "
                "only."
            )

    def _chosen(self, stack: str, index: int) -> bool:
        return self.layers is None or index in self.layers.get(stack, ())

    def _take(self, module: nn.Module, implementation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, place = self._places[id(module)]
        seen: SelfAttention | None = None
        own_layer = place.count == getattr(self._plain.config, "num_hidden_layers", None)
        if not own_layer or self._chosen(place.stack, place.index):  # else the layer is known only afterwards
            try:
                seen = self_attention(module, name, implementation, args, kwargs, self.wants)
            except TrainingError:
                self.close()
                raise
        self._calls[place.stack].append((id(module), seen))

    def _attention(self, stack: str, calls: list[tuple[int, SelfAttention | None]]) -> list[SelfAttention | None]:
        if not calls:
            lists = self._runs.lists(stack)
            return [None] * next(iter(lists.values())) if len(lists) == 1 and self._runs.may_drop() else []
        modules = [module for module, _ in calls]
        lists = {place.layers: place.count for place in (self._places[module][1] for module in modules)}
        lists.update(self._runs.lists(stack))
        if len(lists) > 1:
            raise self._ambiguous(stack, f"may be in several lists of layers: {', '.join(map(repr, sorted(lists)))}")
        taken: list[SelfAttention | None] = [None] * next(iter(lists.values()))
        seen_at = [self._places[module][1].index for module in modules]
        if len(set(modules)) < len(modules):  # ALBERT's layers share one module
            taken = [seen for _, seen in calls]
            if len(taken) != getattr(self._plain.config, "num_hidden_layers", None):
                raise self._ambiguous(stack, f"ran {len(taken)} times for {len(set(modules))} modules")
        elif len(set(seen_at)) < len(seen_at):
            raise self._ambiguous(stack, "ran several times in one layer")
        else:
            for index, (_, seen) in zip(seen_at, calls, strict=True):
                taken[index] = seen
        taken = [each if self._chosen(stack, index) else None for index, each in enumerate(taken)]
        if self._with_gradient and any(each is not None and not each.has_gradient for each in taken):
            raise TrainingError(f"distillation: attention of the {stack} was computed without gradients: {_REENTRANT}")
        return taken

    def _ambiguous(self, stack: str, what: str) -> TrainingError:
        return TrainingError(
            f"distillation: self-attention in the {stack} of {type(self._plain).__name__} {what}, so it cannot be "
            "told which layer it belongs to. Match hidden states instead."
        )

    def _hidden_states(self, stack: str, outputs: Any, ran: Mapping[str, list[int]]) -> list[Tensor | None]:
        given = outputs if isinstance(outputs, Mapping) else {}
        found = given.get(f"{stack}_hidden_states" if len(self._stacks) > 1 else "hidden_states")
        if found is None and stack == "encoder":  # an encoder-decoder's encoder alone
            found = given.get("hidden_states")
        if found is None:
            return []
        states: list[Tensor | None] = list(found[self._runs.num_initial(stack) :])
        untied = states[:-1]  # the last may come from a norm after all layers
        if self._with_gradient and untied and not any(_has_gradient(each) for each in untied) and self._is_reentrant():
            raise TrainingError(f"distillation: a hidden state of the {stack} has no gradient: {_REENTRANT}")
        states = self._runs.spread(stack, states, ran)
        return [
            _positions(each) if each is not None and self._chosen(stack, index) else None
            for index, each in enumerate(states)
        ]

    def _is_reentrant(self) -> bool:
        modules = [module for module in self._plain.modules() if getattr(module, "gradient_checkpointing", False)]
        functions = [getattr(module, "_gradient_checkpointing_func", None) for module in modules]
        return any(getattr(each, "keywords", {}).get("use_reentrant") for each in functions)


class LayerRuns:
    """Which layers ran in a pass, where LayerDrop may leave some out of what the model records."""

    def __init__(self, model: nn.Module, known: Mapping[int, tuple[str, Place]]) -> None:
        self.ran: dict[str, list[int]] = defaultdict(list)
        """Numbers of the layers of each stack that ran, in order."""
        self._handles: list[RemovableHandle] = []
        self._model = model
        self._config = pretrained(model).config
        declared = recorded(model, "hidden_states")
        self._initial = {known[key][1].stack: int(first) for key, first in declared.items() if key in known}
        self._layers = {
            known[id(module)][1]: module for module in model.modules() if id(module) in declared and id(module) in known
        }

    def may_drop(self) -> bool:
        """Return whether a pass may leave layers out."""
        dropped = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
        return self._model.training and any(getattr(self._config, name, None) for name in dropped)

    def open(self) -> None:
        """Begin to watch, if layers may be dropped at all."""
        if self.may_drop():
            for place, layer in self._layers.items():
                self._handles.append(layer.register_forward_pre_hook(partial(self._note, place)))

    def _note(self, place: Place, module: nn.Module, args: Any) -> None:
        self.ran[place.stack].append(place.index)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.ran = defaultdict(list)

    def lists(self, stack: str) -> dict[str, int]:
        """Return the lists of layers that give hidden states, and how many layers each has."""
        return {place.layers: place.count for place in self._layers if place.stack == stack}

    def num_initial(self, stack: str) -> int:
        """Return how many hidden states a model returns before those of layers."""
        return self._initial.get(stack, 1)

    def spread(self, stack: str, states: list[Tensor | None], ran: Mapping[str, list[int]]) -> list[Tensor | None]:
        """Return hidden states of those layers that ``ran`` at the places of their layers."""
        numbers = ran.get(stack, [])
        places_of = [place for place in self._layers if place.stack == stack]
        if len(numbers) != len(states) or not places_of:
            return states
        result: list[Tensor | None] = [None] * places_of[0].count
        for index, state in zip(numbers, states, strict=True):
            result[index] = state
        return result


def _self_attention_modules(model: nn.Module, known: Mapping[int, tuple[str, Place]]) -> set[int]:
    """Return the modules inside of layers that give hidden states, except those that attend to another stack."""
    lists = {known[key][1].layers for key in recorded(model, "hidden_states") if key in known}
    chosen = {key for key, (_, place) in known.items() if not lists or place.layers in lists}
    cross = recorded(model, "cross_attentions")
    for module in model.modules():
        if id(module) in cross:
            chosen -= {id(inner) for inner in module.modules()}
    return chosen


def _check_accepts_request(plain: PreTrainedModel) -> None:
    parameters = signature(type(plain).forward).parameters
    if "output_hidden_states" in parameters or any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    raise TrainingError(
        f"distillation: {type(plain).__name__} cannot return hidden states: its forward takes no "
        "output_hidden_states. Match attention instead, or distill logits only."
    )


def _has_gradient(state: Any) -> bool:
    return isinstance(state, Tensor) and state.requires_grad


def _positions(state: Any) -> Tensor:
    """Return a hidden state as [batch, length, width]."""
    if isinstance(state, Tensor) and state.dim() == 4:
        return state.flatten(2).transpose(1, 2)
    if isinstance(state, Tensor) and state.dim() == 3:
        return state
    given = f"has shape {list(state.shape)}" if isinstance(state, Tensor) else f"is a {type(state).__name__}"
    raise TrainingError(
        f"distillation: a hidden state {given}, but a tensor [batch, length, width] or [batch, channels, height, "
        "width] is needed. Match attention instead, or distill logits only."
    )
