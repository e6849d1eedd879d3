"""Which groups and weights of a model a config asks for."""

import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from hf_compress.config import WEIGHTS, PruningConfig, PruningRule
from hf_compress.errors import TargetError, choices
from hf_compress.graph.groups import DimensionGroup, DimensionGroups
from hf_compress.instruments.adapters import base_layer, named_plain_modules
from hf_compress.instruments.attach import find_leaf_kind


@dataclass(frozen=True)
class Selection:
    """What one structure of one part of the config covers."""

    name: str
    """Of the pool: the structure, with the number of the rule where one applies."""

    kind: str
    config: PruningConfig

    groups: tuple[DimensionGroup, ...] = ()
    """Dimension groups to prune."""

    modules: tuple[tuple[str, nn.Module], ...] = ()
    """Modules whose weights are to be pruned, by name."""

    def layers(self) -> tuple[str, ...]:
        """Return the names of what is pruned as one layer each: groups, and weights."""
        return (*(group.name for group in self.groups), *(f"{name}.weight" for name, _ in self.modules))


def select(model: PreTrainedModel, groups: DimensionGroups, config: PruningConfig) -> list[Selection]:
    """Return what the config covers; warn of matrices that masks on single weights do not reach.

    Raises:
        TargetError: If the model lacks a structure, a group that was asked for is frozen, or a pattern matches
            nothing.
    """
    parts = config.parts()
    single = any(WEIGHTS in part.structures for _, part in parts)
    weights = dict(prunable_modules(model, groups.called)) if single else {}
    beyond = _beyond_masks(model, groups, weights) if single else {}
    _check_patterns(config, groups, weights, beyond)
    _warn_of(beyond, weights, config)
    candidates = [(group.kind, group.name) for group in groups] + [(WEIGHTS, name) for name in weights]
    left = [(kind, name) for kind, name in candidates if not _matches(config.exclude, kind, name)]
    by_name = {group.name: group for group in groups}
    found: list[Selection] = []
    for number, (rule, part) in enumerate(parts):
        covered = {kind: _covered(kind, left, rule) for kind in part.structures}
        # Rules may cover all there is of a kind; then the config around them is for none of it.
        inherited = rule is not None and rule.structures is None and any(covered.values())
        ruled = {each.kind for each in found} if rule is None else set()
        for kind, mine in covered.items():
            left = [(each, name) for each, name in left if each != kind or name not in mine]
            if not mine and not inherited and kind not in ruled:
                has = {group.kind for group in groups if group.frozen is None and (group.kind, group.name) in left}
                raise TargetError(_nothing(kind, has | ({WEIGHTS} if weights else set()), number, rule))
            name = kind if rule is None else f"{kind}_rule{number}"
            if mine and kind == WEIGHTS:
                found.append(Selection(name, kind, part, modules=tuple((each, weights[each]) for each in mine)))
            elif mine:
                chosen = tuple(by_name[each] for each in mine)
                _check_groups(kind, chosen)
                found.append(Selection(name, kind, part, groups=chosen))
    return found


def kinds_of(selections: Sequence[Selection]) -> dict[str, tuple[str, ...]]:
    """Return the names of the layers of each structure, under whatever rule."""
    kinds = dict.fromkeys(each.kind for each in selections)
    return {kind: tuple(n for each in selections if each.kind == kind for n in each.layers()) for kind in kinds}


def _covered(kind: str, left: list[tuple[str, str]], rule: PruningRule | None) -> list[str]:
    """Return the names of that kind that no earlier rule took and this one matches."""
    return [name for each, name in left if each == kind and (rule is None or _matches(rule.match, kind, name))]


def prunable_modules(model: PreTrainedModel, called: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of the base model whose weights can be masked: not the task head, not embeddings.

    Nor layers that are never called, because other modules read their weights directly, and layers whose weight is
    computed from other parameters (weight norm): a mask there would do nothing. Nor the output projection inside
    PyTorch's attention, which takes its weight; only the recorded forward pass calls it.

    Args:
        model: The model.
        called: Names of the modules that its forward pass calls.
    """
    for name, module in _inner_modules(model):
        has_weight = base_layer(module)._parameters.get("weight") is not None
        taken = isinstance(module, NonDynamicallyQuantizableLinear)
        if name in called and has_weight and not taken and find_leaf_kind(module) is not None:
            yield name, module


def _inner_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the base model, but not the task head."""
    inside = {id(module) for module in model.base_model.modules()}
    source: Any = model
    head = source.get_output_embeddings()
    for name, module in (("", model), *named_plain_modules(model)):
        if id(module) in inside and module is not head:
            yield name, module


def _beyond_masks(model: PreTrainedModel, groups: DimensionGroups, weights: Collection[str]) -> dict[str, int]:
    """Return the sizes of the base model's matrices that are not in ``weights``, embeddings apart, by name."""
    inner = dict(_inner_modules(model))
    found = {}
    for name, size in groups.matrices.items():
        owner = inner.get(name.rpartition(".")[0])
        if owner is not None and not isinstance(base_layer(owner), nn.Embedding):
            found[name] = size
    for name, module in inner.items():
        if find_leaf_kind(module) is not None:
            parameters = base_layer(module).parameters()
            found[f"{name}.weight"] = sum(each.numel() for each in parameters if each.dim() > 1)
    return {name: size for name, size in found.items() if name.removesuffix(".weight") not in weights}


def _warn_of(beyond: Mapping[str, int], weights: Mapping[str, nn.Module], config: PruningConfig) -> None:
    """Say which matrices keep all their weights, except for those that ``exclude`` names."""
    left = {name: size for name, size in beyond.items() if not _matches(config.exclude, "", name)}
    if not left:
        return
    covered = sum(max(each.numel() for each in base_layer(module).parameters()) for module in weights.values())
    missing, total = sum(left.values()), covered + sum(beyond.values())
    first = ", ".join(repr(name) for name in list(left)[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    warnings.warn(
        f"PruningConfig.structures: {WEIGHTS!r} does not reach {missing:,} of the {total:,} weights in matrices of the "
        f"base model ({missing / total:.1%}): {first}{more}. Only layers (Linear, Conv1D, Conv1d, Conv2d) that are "
        "called themselves and own their weight are masked. The rest stays dense and does not count in the sparsity; "
        "prune its dimension groups, such as experts or ffn, or name it in exclude=(...) if that is intended.",
        stacklevel=2,
    )


def _matches(patterns: Sequence[str], kind: str, name: str) -> bool:
    text = f"{name}.weight" if kind == WEIGHTS else name
    return any(re.search(pattern, text) for pattern in patterns)


def _check_patterns(
    config: PruningConfig, groups: DimensionGroups, weights: Mapping[str, nn.Module], beyond: Collection[str]
) -> None:
    candidates = [(group.kind, group.name) for group in groups] + [(WEIGHTS, name) for name in weights]
    patterns = [("exclude", pattern) for pattern in config.exclude if not any(re.search(pattern, n) for n in beyond)]
    patterns += [(f"rules[{n}].match", pattern) for n, rule in enumerate(config.rules) for pattern in rule.match]
    for where, pattern in patterns:
        if not any(_matches((pattern,), kind, name) for kind, name in candidates):
            asked = [group.name for group in groups if group.kind in config.structures]
            known = ", ".join(repr(name) for name in (*asked, *(f"{name}.weight" for name in weights)))
            raise TargetError(f"PruningConfig.{where}: {pattern!r} matches no dimension group; groups here: {known}.")


def _nothing(kind: str, has: set[str], number: int, rule: PruningRule | None) -> str:
    if rule is not None:
        return (
            f"PruningConfig.rules[{number}]: no {kind!r} is left for it: nothing that it matches and that neither "
            "exclude nor an earlier rule takes."
        )
    return f"PruningConfig.structures: the model has no {kind!r} to prune; {choices(kind, has)}."


def _check_groups(kind: str, groups: tuple[DimensionGroup, ...]) -> None:
    names = {group.name for group in groups}
    for group in groups:
        if group.frozen is not None:
            raise TargetError(
                f"PruningConfig.structures[{kind!r}]: group {group.name!r} cannot be pruned: {group.frozen}. "
                "Leave it out with exclude=(...)."
            )
        missing = [name for name in group.tied_to if name not in names]
        if missing:
            raise TargetError(
                f"PruningConfig.structures[{kind!r}]: group {group.name!r} must keep the same share of its units as "
                f"{missing[0]!r}, which is left out or under another rule. Prune both alike, or exclude both."
            )
