"""A shrink plan: pure data that says which positions of which parameters stay."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_compress.errors import ShrinkError
from hf_compress.graph.accept import check_model
from hf_compress.graph.groups import DimensionGroup, ParameterSlice, within
from hf_compress.graph.model import ModelGraph
from hf_compress.reading import are_positions, is_count, parse_json
from hf_compress.shrinking.depth import inherited_integers, renamed
from hf_compress.shrinking.masks import unit_masks
from hf_compress.shrinking.sizes import METHOD, stored_sizes

Positions = dict[str, dict[int, list[int]]]
"""Parameter or buffer name -> dimension -> positions along it, ascending."""


@dataclass(frozen=True)
class AttributeValue:
    """A new value for an integer of a module or of its config."""

    module: str
    """Name of the module."""

    path: tuple[str | int, ...]
    """Attribute names from the module on; an int is a position in a tuple or list."""

    value: int
    """What it becomes."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What becomes of one dimension group."""

    kind: str
    """Kind of the group."""

    num_units: int
    """Units before."""

    kept: tuple[int, ...]
    """Units that stay, ascending."""

    silenced: tuple[int, ...] = ()
    """Masked units that stay to make sizes even; their consumers' weights become zero."""

    parameters_per_unit: int = 0
    """Weights that go with one unit."""


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan:
    """Everything ``shrink`` will do; nothing in it refers to a live model."""

    model_class: str
    """Class of the model that the plan was made for."""

    groups: dict[str, GroupPlan]
    """The groups that lose units, by name."""

    keep: Positions
    """Positions that stay, for every parameter and buffer that shrinks."""

    zero: Positions
    """Positions of weights that the masks silence, in the original numbering: consumers, and producers of what two
    activations contract with each other."""

    num_parameters: tuple[int, int]
    """Parameters before and after."""

    emptied: dict[str, tuple[str | None, int | None]] = dataclasses.field(default_factory=dict)
    """Attention modules that lose all heads: name -> name of the output projection within, and number of results."""

    layers: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Lists of layers that lose some: name of the module list -> layers that stay. All other parts of the plan speak of
    the model before that."""

    attributes: tuple[AttributeValue, ...] = ()
    """Integers that forward code reads and that must change with the sizes."""

    def summary(self) -> str:
        """Say what goes and what it saves, one line a group."""
        before, after = self.num_parameters
        lines = [f"{self.model_class}: {before:,} -> {after:,} parameters ({1 - after / before:.1%} removed)"]
        for name, group in self.groups.items():
            removed = group.num_units - len(group.kept)
            padded = f", {len(group.silenced)} silenced" if group.silenced else ""
            lines.append(f"  {name}: keeps {len(group.kept)} of {group.num_units} (removes {removed}{padded})")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build a plan from ``to_json()`` output.

        Raises:
            ShrinkError: If the text is no plan.
        """
        try:
            return cls(**_fields(parse_json(text)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShrinkError(f"ShrinkPlan.from_json: not a plan written by to_json(): {error!r}") from error


def _fields(data: Any) -> dict[str, Any]:
    """Return the fields of a plan that was read.

    Raises:
        ValueError: If a value cannot be one of a plan; of another type, some raise a KeyError, TypeError or
            AttributeError.
    """
    before, after = data["num_parameters"]
    model_class = data["model_class"]
    _require(type(model_class) is str and is_count(before) and is_count(after) and after <= before, "num_parameters")
    layers = {name: tuple(kept) for name, kept in data["layers"].items()}
    _require(all(map(are_positions, layers.values())), "layers")
    return {
        "model_class": model_class,
        "groups": {name: _group(name, group) for name, group in data["groups"].items()},
        "keep": _positions("keep", data["keep"]),
        "zero": _positions("zero", data["zero"]),
        "num_parameters": (before, after),
        "emptied": {name: _emptied(*how) for name, how in data["emptied"].items()},
        "layers": layers,
        "attributes": tuple(_attribute(**each) for each in data["attributes"]),
    }


def _group(name: str, data: Mapping[str, Any]) -> GroupPlan:
    group = GroupPlan(**{**data, "kept": tuple(data["kept"]), "silenced": tuple(data["silenced"])})
    good = type(group.kind) is str and is_count(group.num_units) and is_count(group.parameters_per_unit)
    parts = all(are_positions(part, group.num_units) for part in (group.kept, group.silenced))
    _require(good and parts, f"groups: {name!r}")
    return group


def _positions(where: str, data: Mapping[str, Any]) -> Positions:
    found = {name: {int(dim): where for dim, where in dims.items()} for name, dims in data.items()}
    for name, dims in found.items():
        _require(all(dim >= 0 and are_positions(kept) for dim, kept in dims.items()), f"{where}: {name!r}")
    return found


def _emptied(output: Any, length: Any) -> tuple[str | None, int | None]:
    _require(isinstance(output, str | None) and (length is None or is_count(length)), "emptied")
    return output, length


def _attribute(module: Any, path: Any, value: Any) -> AttributeValue:
    good = isinstance(path, list) and bool(path) and all(type(part) in (str, int) for part in path)
    _require(type(module) is str and type(value) is int and good, "attributes")
    return AttributeValue(module, tuple(path), value)


def _require(condition: bool, where: str) -> None:
    if not condition:
        raise ValueError(f"{where}: numbers are whole and not negative, positions ascend, none is there twice")


def plan_shrink(
    model: PreTrainedModel,
    masks: Mapping[str, Tensor] | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    uniform: bool = False,
    multiple_of: int = 1,
) -> ShrinkPlan:
    """Turn masks into a plan. The model is analyzed, not changed.

    Args:
        model: The model to shrink later.
        masks: By group name, a bool tensor [num_units], True = keep; or by parameter name, a bool tensor of the
            parameter's shape: a unit goes if one of its slices in such a parameter is masked entirely.
        example_inputs: Keyword arguments for the forward pass that is recorded; made from the config by default.
        uniform: Keep the same number of units in every group of a kind, so that a stock config can describe the
            result. Layers that would keep fewer also keep silenced units.
        multiple_of: Keep multiples of this many units in groups of single rows (FFN widths), for fast kernels.

    Raises:
        ShrinkError: If masks are missing, malformed, remove nothing or remove everything of a group.
        TargetError: If a mask names no group or parameter, or asks for units of a frozen group.
    """
    check_model(model, example_inputs)
    refuse_compressed(model)
    check_request(masks, multiple_of)
    return plan_on(ModelGraph(model, example_inputs), masks or {}, uniform=uniform, multiple_of=multiple_of)


def check_request(masks: Any, multiple_of: Any) -> None:
    """Check what can be checked without looking at the model.

    Raises:
        ShrinkError: If there are no masks, or ``multiple_of`` is no count.
    """
    if not isinstance(masks, Mapping | None):
        raise ShrinkError(f"plan_shrink: masks is a {type(masks).__name__}; pass a dict of group name: bool tensor.")
    if not masks:
        raise ShrinkError(
            "plan_shrink: no masks given, so there is nothing to remove. Train with a PruningCallback and pass the "
            "trainer to shrink(), or pass masks={group name: bool tensor}; dimension_groups(model) lists the groups."
        )
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ShrinkError(f"plan_shrink: multiple_of={multiple_of!r}; allowed: an int >= 1.")


def plan_on(
    graph: ModelGraph, masks: Mapping[str, Tensor], *, uniform: bool = False, multiple_of: int = 1
) -> ShrinkPlan:
    """Turn masks into a plan for a model that is analyzed already; see ``plan_shrink``."""
    groups = {group.name: group for group in graph.groups}
    wanted = unit_masks(graph.model, groups, masks)
    sizes = _kept_counts(groups, wanted, uniform, multiple_of)
    if uniform:
        _check_uniform(graph.model, groups, sizes)
    plans = {name: _group_plan(groups[name], mask, sizes[name]) for name, mask in wanted.items()}
    if all(len(plan.kept) == plan.num_units for plan in plans.values()):
        raise ShrinkError("plan_shrink: the masks (after uniform / multiple_of) keep every unit; nothing would change.")
    emptied = {name for name, plan in plans.items() if groups[name].block is not None and not plan.kept}
    new = graph.attributes_after({name: len(plan.kept) for name, plan in plans.items() if name not in emptied})
    plan = _build(graph.model, groups, plans)
    inherited = inherited_integers(graph, plan.layers, new)
    found = ((a, value) for a, value in (new | inherited).items() if not _goes_with_block(a.module, plan))
    attributes = tuple(AttributeValue(a.module, a.path, value) for a, value in found)
    return replace(plan, attributes=attributes)


def _goes_with_block(module: str, plan: ShrinkPlan) -> bool:
    """Whether a module lies in one that loses all of its units and keeps its output projection at most."""
    return any(
        module.startswith(f"{block}.") and (output is None or not f"{module}.".startswith(f"{block}.{output}."))
        for block, (output, _) in plan.emptied.items()
    )


def refuse_compressed(model: PreTrainedModel) -> None:
    """Refuse models whose weights are compressed already; fewer of them are none the worse.

    Raises:
        ShrinkError: If the model carries a ``quantization_config`` of anything but uneven sizes.
    """
    config = getattr(model.config, "quantization_config", None)
    data = config if isinstance(config, Mapping) else vars(config) if config is not None else {}
    method = data.get("quant_method", "unknown")
    if method == METHOD:
        method = (data.get("inner") or {}).get("quant_method")
    if not getattr(model, "is_quantized", False) and (config is None or method is None):
        return
    raise ShrinkError(
        f"{type(model).__name__} is quantized already (quant_method {method}); shrinking needs floating-point weights. "
        "Shrink the original checkpoint first and quantize the result."
    )


def _kept_counts(
    groups: Mapping[str, DimensionGroup], wanted: Mapping[str, Tensor], uniform: bool, multiple_of: int
) -> dict[str, int]:
    sizes = {}
    for name, keep in wanted.items():
        size = int(keep.sum())
        group = groups[name]
        single_rows = group.kind in ("ffn", "hidden") and all(part.index.shape[1] == 1 for part in group.gates)
        step = math.lcm(multiple_of if single_rows else 1, group.multiple_of)
        sizes[name] = min(-(-size // step) * step, group.num_units)
    if uniform:
        largest: dict[str, int] = {}
        for group in groups.values():
            size = sizes.get(group.name, group.num_units)
            if any(groups[name].kind == group.kind for name in wanted):
                largest[group.kind] = max(largest.get(group.kind, 0), size)
        sizes = {name: min(largest[groups[name].kind], groups[name].num_units) for name in sizes}
    return sizes


def _check_uniform(model: nn.Module, groups: Mapping[str, DimensionGroup], sizes: Mapping[str, int]) -> None:
    """Refuse sizes that cannot become the same, since an earlier shrink has left less of a layer.

    Groups of one unit are none any more, so the config is asked.
    """
    wanted: dict[str, int] = {}
    for name, size in sizes.items():
        wanted[groups[name].kind] = max(size, wanted.get(groups[name].kind, 0))
    for name, entry in stored_sizes(model).get("units", {}).items():
        kind = groups[name].kind if name in groups else name.rpartition(".")[2]
        left = sizes.get(name, entry["kept"])
        if left < wanted.get(kind, 0) <= entry["of"]:
            raise ShrinkError(
                f"plan_shrink: uniform=True asks for {wanted[kind]} units in every group of kind {kind!r}, but an "
                f"earlier shrink has left {left} of {name!r}. Use masks that keep {left} everywhere, or uniform=True "
                "from the first shrink on."
            )


def _fewer(kept: int, wanted: int, group: DimensionGroup) -> str:
    """Say which number of units below ``wanted`` the group's own alignment takes, if there is one."""
    fewer = kept // group.multiple_of * group.multiple_of
    return f" or {fewer}" if group.multiple_of > 1 and 0 < fewer < wanted and fewer >= group.min_units else ""


def _group_plan(group: DimensionGroup, keep: Tensor, size: int) -> GroupPlan:
    kept = keep.nonzero().flatten().tolist()
    silenced = (~keep).nonzero().flatten().tolist()[: size - len(kept)]
    if silenced and group.kind == "layers":
        raise ShrinkError(
            f"masks[{group.name!r}]: keeps {len(kept)} layers, but uniform=True asks for {size}, as many as "
            "another list keeps. Keep equal numbers, or shrink without uniform."
        )
    if silenced and group.subsets:
        raise ShrinkError(
            f"masks[{group.name!r}]: keeps {len(kept)} units, but {size} are needed (uniform, multiple_of or the "
            f"alignment {group.multiple_of} of its kernels), and units that {group.subsets[0].module!r} sees cannot "
            f"stay without effect. Keep {size}{_fewer(len(kept), size, group)} units by the mask itself."
        )
    return GroupPlan(
        kind=group.kind,
        num_units=group.num_units,
        kept=tuple(sorted(kept + silenced)),
        silenced=tuple(silenced),
        parameters_per_unit=group.parameters_per_unit,
    )


def _build(model: nn.Module, groups: Mapping[str, DimensionGroup], plans: dict[str, GroupPlan]) -> ShrinkPlan:
    tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    stays = _Marks(tensors)
    speaks = _Marks(tensors)
    for name, plan in plans.items():
        group = groups[name]
        kept = torch.zeros(group.num_units, dtype=torch.bool)
        kept[list(plan.kept)] = True
        gone = (~kept).nonzero().flatten()
        kept[list(plan.silenced)] = False
        silent = (~kept).nonzero().flatten()
        for part in (*group.slices, *group.buffers):
            stays.clear(part, gone)
        for part in (*group.gates, *group.sources):
            speaks.clear(part, silent)
    keep = stays.positions(True)
    layers = {
        groups[name].modules[0].rpartition(".")[0]: plan.kept
        for name, plan in plans.items()
        if groups[name].modules and len(plan.kept) < plan.num_units
    }
    blocks = [block for name, plan in plans.items() if (block := groups[name].block) is not None and not plan.kept]
    before = sum(p.numel() for p in model.parameters())
    moving = {module for group in groups.values() for module in group.handed_on}
    staying = ((n, p) for n, p in model.named_parameters() if within(n, moving) or renamed(n, layers) is not None)
    after = sum(_kept_numel(parameter, keep.get(name, {})) for name, parameter in staying)
    return ShrinkPlan(
        model_class=type(model).__name__,
        groups={name: plan for name, plan in plans.items() if len(plan.kept) < plan.num_units or plan.silenced},
        keep=keep,
        zero=speaks.positions(False),
        num_parameters=(before, after),
        layers=layers,
        emptied={block.module: (block.output, block.length) for block in blocks},
    )


class _Marks:
    """One mark per position along some dimensions of some tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.marks: dict[str, dict[int, Tensor]] = {}

    def clear(self, part: ParameterSlice, units: Tensor) -> None:
        """Take the mark from all positions that units of a slice own."""
        if len(units):
            dims = self.marks.setdefault(part.parameter, {})
            if part.dim not in dims:
                dims[part.dim] = torch.ones(self.tensors[part.parameter].shape[part.dim], dtype=torch.bool)
            dims[part.dim][part.index[units].flatten()] = False

    def positions(self, marked: bool) -> Positions:
        """Return the positions that have a mark, or those that have none."""
        return {
            name: {dim: (mark if marked else ~mark).nonzero().flatten().tolist() for dim, mark in dims.items()}
            for name, dims in self.marks.items()
        }


def _kept_numel(parameter: Tensor, keep: Mapping[int, list[int]]) -> int:
    numel = 1
    for dim, size in enumerate(parameter.shape):
        numel *= len(keep[dim]) if dim in keep else size
    return numel
