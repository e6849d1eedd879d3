"""Whole layers as units: lists of modules through which one tensor of unchanged shape passes."""

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from transformers import PreTrainedModel

from hf_compress.graph.analysis import live_nodes
from hf_compress.graph.capture import Capture, ModuleCall
from hf_compress.graph.depth import Shallower, build_empty, find_shallower, misfit
from hf_compress.graph.groups import DimensionGroup


def layer_groups(model: nn.Module, recorded: Capture) -> list[DimensionGroup]:
    """Return one group for every list of layers that runs in order; a unit is a layer.

    A layer that is removed passes its input on. Lists from which nothing can be removed carry the reason.
    """
    calls: dict[str, list[ModuleCall]] = defaultdict(list)
    for call in recorded.calls:
        calls[call.module].append(call)
    live = live_nodes(recorded)
    groups = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        names = [f"{name}.{key}" for key, _ in module.named_children()]
        if len({type(child) for child in module}) > 1 or any(len(calls[child]) != 1 for child in names):
            continue
        chain = _Chain(recorded, live, [calls[child][0] for child in names])
        if not chain.is_sequence():
            continue
        sizes = [sum(p.numel() for p in child.parameters()) for child in module]
        if not any(sizes):
            continue
        reason = chain.reason()
        fixed: tuple[int, ...] = ()
        handed_on: tuple[str, ...] = ()
        if reason is None:
            provides = chain.second_result(chain.calls[0]) is not None
            reason, fixed, handed_on = _removable(model, name, len(names), provides=provides)
        groups.append(
            DimensionGroup(
                kind="layers",
                name=f"{name}.layers" if not name.endswith("layers") else name,
                num_units=len(names),
                modules=tuple(names),
                handed_on=tuple(f"{names[0]}.{inner}" for inner in handed_on),
                frozen=reason,
                fixed_units=fixed,
                parameters_per_unit=max(sizes),
            )
        )
    return groups


def _removable(
    model: nn.Module, name: str, count: int, *, provides: bool
) -> tuple[str | None, tuple[int, ...], tuple[str, ...]]:
    """Return why no layer can go (or None), the layers that must stay, and what the first hands on if it goes.

    Args:
        model: The model.
        name: Name of the list of layers.
        count: How many there are.
        provides: Whether the first layer makes something for all others; it can go only if the next one then does.
    """
    if not isinstance(model, PreTrainedModel):
        return "the model has no config that could say how many layers there are", (), ()
    # As the architecture builds it: forward passes may have changed integers of the model at hand (Swin's windows).
    full = build_empty(type(model), model.config)
    without_first = find_shallower(full, {name: range(1, count)}) if full is not None else None
    if full is None or without_first is None:
        return f"no field of {type(model.config).__name__} says that {name} has fewer layers", (), ()
    second, first = full.get_submodule(f"{name}.1"), without_first.model.get_submodule(f"{name}.0")
    handed_on = tuple(_gained(second, first)) if provides else ()
    ends = (range(1, count), without_first), (range(count - 1), find_shallower(full, {name: range(count - 1)}))
    if all(_misfits(full, name, kept, shallower, provides) is None for kept, shallower in ends):
        return None, (0,) if provides and not handed_on else (), handed_on
    # Layers differ from place to place: each has to be tried.
    reasons = {}
    for i in range(count):
        kept = [k for k in range(count) if k != i]
        reasons[i] = _misfits(full, name, kept, find_shallower(full, {name: kept}), provides)
    fixed = tuple(i for i, reason in reasons.items() if reason is not None)
    return reasons[0] if len(fixed) == count else None, fixed, () if 0 in fixed else handed_on


def _gained(before: nn.Module, after: nn.Module) -> list[str]:
    """Return the modules inside of ``after`` that ``before`` lacks."""
    present = {inner for inner, _ in before.named_modules()}
    return [inner for inner, _ in after.named_modules() if inner not in present]


def _misfits(
    model: PreTrainedModel, name: str, kept: Sequence[int], shallower: Shallower | None, provides: bool
) -> str | None:
    if shallower is None:
        return f"{type(model.config).__name__} cannot describe it without them"
    for place, index in enumerate(kept):
        # Compared even where the place stays: a layer may be built otherwise because it is the last.
        before, after = (m.get_submodule(f"{name}.{i}") for m, i in ((model, index), (shallower.model, place)))
        reason = misfit(before, after, index, place)
        if reason is not None:
            return reason
        gained = _gained(before, after)
        if gained and not (provides and place == 0):  # a cross-attention in every other layer
            return f"layer {index} lacks {gained[0]!r}, which a layer at place {place} has"
    return None


class _Chain:
    """The recorded calls of one list of layers."""

    def __init__(self, recorded: Capture, live: set[fx.Node], calls: list[ModuleCall]) -> None:
        self.recorded = recorded
        self.live = live
        self.calls = calls
        self.inputs = [_main(call.inputs) for call in calls]
        self.outputs = [_main(call.outputs) for call in calls]

    def is_sequence(self) -> bool:
        """Whether each layer reads what the one before returns."""
        links = zip(self.inputs[1:], self.outputs, strict=False)
        return None not in self.inputs + self.outputs and any(read is given for read, given in links)

    def reason(self) -> str | None:
        """Return why no layer can go, or None."""
        for i, call in enumerate(self.calls):
            before, after = self.inputs[i], self.outputs[i]
            assert before is not None and after is not None
            if before.meta["shape"] != after.meta["shape"]:
                return f"{call.module} turns {before.meta['shape']} into {after.meta['shape']}"
            if i and before is not self.outputs[i - 1]:
                return f"{call.module} does not read what {self.calls[i - 1].module} returns"
        return self._read_elsewhere()

    def _read_elsewhere(self) -> str | None:
        for call in self.calls[1:]:
            second = self.second_result(call)
            if second is not None:
                return f"{_describe(second)} reads a second result of {call.module}, which would be missing"
        following = dict(zip(self.outputs[:-1], (call.module for call in self.calls[1:]), strict=True))
        for node, reader in following.items():
            for user in node.users:  # type: ignore[union-attr]
                if user in self.live and not _within(user, reader):
                    where = user.meta.get("module") or "the model"
                    return f"{_describe(user)} in {where} reads what a layer before {reader} returns"
        return None

    def second_result(self, call: ModuleCall) -> fx.Node | None:
        """Return what reads, outside of the layer, anything else that it computes than its main result.

        Of the first layer this is allowed: what it makes for all others (T5's position bias) moves to the next one.
        """
        main = _main(call.outputs)
        for node in self.recorded.graph.nodes:
            if node is not main and node.op == "call_function" and _within(node, call.module):
                outside: list[fx.Node] = [user for user in node.users if not _within(user, call.module)]
                if any(user in self.live for user in outside):
                    return outside[0]
        return None


def _main(nodes: list[fx.Node | None]) -> fx.Node | None:
    """Return the first floating-point tensor: by convention the hidden states."""
    for node in nodes:
        if node is not None and node.meta["dtype"].is_floating_point and len(node.meta["shape"]) > 1:
            return node
    return None


def _within(node: fx.Node, module: str) -> bool:
    where = str(node.meta.get("module", ""))
    return where == module or where.startswith(f"{module}.")


def _describe(node: fx.Node) -> str:
    target: Any = node.target
    return "the model's output" if node.op == "output" else "getitem" if target is operator.getitem else str(target)
