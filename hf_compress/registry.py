"""Name -> implementation, for the open sets only (criteria, allocators, observers, quantizers, losses, op rules)."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from hf_compress.errors import ConfigError, choices

T = TypeVar("T")


class Registry(Generic[T]):
    """A named set of implementations. Names are stored in users' configs, so they are never reused."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, *names: str) -> Callable[[T], T]:
        """Return a decorator that adds an implementation under ``names``.

        Raises:
            ConfigError: If a name is taken already.
        """

        def add(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ConfigError(f"{self.kind} {name!r} is registered already; choose another name.")
                self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the implementation called ``name``.

        Raises:
            ConfigError: If there is none; the message lists the known names, the closest first.
        """
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind} {name!r}; {choices(name, self._entries)}.")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


criteria: Registry[Any] = Registry("criterion")
"""Pruning criteria, filled by ``hf_compress.pruning.criteria``."""

allocators: Registry[Any] = Registry("allocation")
"""Ways to spread a sparsity over layers, filled by ``hf_compress.pruning.allocate``."""

schemes: Registry[Any] = Registry("quantization scheme")
"""Number formats of weights and inputs (``LayerFormats``), filled by ``hf_compress.config.formats``."""

quantization_methods: Registry[Any] = Registry("quantization method")
"""How steps and values are found, filled by ``hf_compress.quantization.methods``."""

observers: Registry[Any] = Registry("observer")
"""Ways to choose a quantization range from tensors, filled by ``hf_compress.quantization.observers``."""

distillation_losses: Registry[Any] = Registry("distillation loss")
"""Losses between student and teacher, filled by ``hf_compress.distillation``."""

op_rules: Registry[Any] = Registry("op rule")
"""What an operator ties together, filled by ``hf_compress.graph.op_rules`` and by users."""
