"""See what modules are given and what they return, and stop a forward pass once all has been seen."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from hf_compress.graph.capture import is_hidden_state

InputReader = Callable[[str, Tensor], None]
"""(module name, its input)."""

ChangeReader = Callable[[str, Tensor, Tensor], None]
"""(module name, its input, its output)."""


class SeenEnough(Exception):  # noqa: N818 - it ends a forward pass, nothing has gone wrong
    """Raised inside a forward pass when every watched module has got all its inputs."""


@contextmanager
def reading_inputs(
    modules: Mapping[str, nn.Module], read: InputReader, calls: Mapping[str, int] | None = None
) -> Iterator[None]:
    """Have ``read`` called with the first tensor that each module is given, before it runs.

    Args:
        modules: By name.
        read: What to call.
        calls: How often each module is called in the one forward pass that the context is open for; after the last of
            them, ``SeenEnough`` ends the pass. None lets passes run to their end.
    """
    left = dict(calls or {})

    def reader(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            read(name, next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))
            if calls is not None:
                left[name] -= 1
                if not any(left.values()):
                    raise SeenEnough

        return hook

    with _hooked(module.register_forward_pre_hook(reader(name), with_kwargs=True) for name, module in modules.items()):
        yield


@contextmanager
def reading_changes(modules: Mapping[str, nn.Module], read: ChangeReader) -> Iterator[None]:
    """Have ``read`` called with the hidden states that each module is given and that it returns.

    Args:
        modules: Layers by name.
        read: What to call.
    """

    def reader(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            before = next(x for x in tree_leaves((args, kwargs)) if is_hidden_state(x))
            after = next(x for x in tree_leaves(result) if is_hidden_state(x))
            read(name, before, after)

        return hook

    with _hooked(module.register_forward_hook(reader(name), with_kwargs=True) for name, module in modules.items()):
        yield


@contextmanager
def _hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Take hooks off in the end."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
