"""``profile``: what a model weighs and costs, counted rather than guessed."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_compress.errors import ConfigError, shown
from hf_compress.graph.capture import evaluating
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.latency.timing import median, run_once, time_interleaved, unwrap
from hf_compress.reading import is_count, is_line, is_number

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.onnx")


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """Sizes and costs of one model on one set of inputs."""

    model_class: str
    """Class of the model."""

    parameters: int
    """Number of weights; tied ones count once."""

    encoder_parameters: int | None
    """Weights of the stacks of layers: no embeddings, no pooler, no task head. None if there is no stack."""

    embedding_parameters: int
    """Weights of the lookup tables outside the stacks."""

    flops: int
    """Floating-point or integer operations of the matrix products, attention included, in one forward pass; a
    multiplication and its addition are two."""

    bytes_on_disk: int
    """Bytes of the weights as they are saved: tied ones once, quantized ones as integers and scales."""

    measured_bytes: int | None
    """Bytes of the weight files in the folder that was given, or None."""

    peak_memory: int
    """Bytes of weights, inputs and intermediate tensors alive at the same time in one forward pass without
    gradients; the kernels' own scratch space is not included."""

    latency_ms: float | None
    """Median wall time of one forward pass in milliseconds, or None if it was not asked for."""

    inputs: dict[str, tuple[int, ...]]
    """Shapes of the inputs behind ``flops``, ``peak_memory`` and ``latency_ms``."""

    num_threads: int
    """CPU threads that torch used."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, numbers and strings."""
        return {
            **dataclasses.asdict(self),
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelProfile":
        """Build a profile from ``to_dict()`` output.

        Raises:
            ConfigError: If keys are missing or unknown.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) != known:
            if not isinstance(data, Mapping):
                raise ConfigError(f"ModelProfile.from_dict: got {shown(data)}; allowed: a mapping.")
            wrong = sorted(set(data) ^ known)
            raise ConfigError(f"ModelProfile.from_dict: keys {wrong} are unknown or missing; allowed: {sorted(known)}.")
        for name, value in data.items():
            if not _FIELDS.get(name, _is_count_or_none)(value):
                raise ConfigError(f"ModelProfile.from_dict: {name}: got {shown(value)}; allowed: {_ALLOWED}.")
        return cls(**{**data, "inputs": {name: tuple(shape) for name, shape in data["inputs"].items()}})

    def __str__(self) -> str:
        encoder = "none found" if self.encoder_parameters is None else f"{self.encoder_parameters:,}"
        rows = {
            "model": self.model_class,
            "parameters": f"{self.parameters:,}",
            "encoder parameters": encoder,
            "embedding parameters": f"{self.embedding_parameters:,}",
            "operations": f"{self.flops:,} (a forward pass)",
            "weights on disk": f"{self.bytes_on_disk:,} bytes",
            "peak memory": f"{self.peak_memory:,} bytes",
            "inputs": ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items()),
        }
        if self.latency_ms is not None:
            rows["latency"] = f"{self.latency_ms:.2f} ms ({self.num_threads} threads)"
        if self.measured_bytes is not None:
            rows["weight files"] = f"{self.measured_bytes:,} bytes"
        width = max(map(len, rows))
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())


def _is_count_or_none(value: Any) -> bool:
    return value is None or is_count(value)


def _is_time_or_none(value: Any) -> bool:
    return value is None or (is_number(value) and math.isfinite(value) and value >= 0)


def _are_shapes(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(shape, list | tuple) and all(map(is_count, shape)) for shape in value.values()
    )


_ALLOWED = "what to_dict() returns: whole numbers that are not negative, shapes of inputs, a class's name"
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "model_class": is_line,
    "latency_ms": _is_time_or_none,
    "inputs": _are_shapes,
    **dict.fromkeys(("parameters", "embedding_parameters", "flops", "bytes_on_disk", "peak_memory"), is_count),
    "num_threads": is_count,
}
"""What each stored value has to be, where it is no number that may be missing."""


def profile(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    latency: bool = True,
    directory: str | Path | None = None,
) -> ModelProfile:
    """Count and measure a model. It is run in eval mode and left as it was.

    Args:
        model: A transformers model; of a ``torch.compile`` wrapper the model inside is counted.
        example_inputs: Keyword arguments for ``model.forward``; made from the config by default.
        latency: Also time the forward pass.
        directory: Folder into which the model was saved, for the real size of its weight files.

    Raises:
        GraphError: If the model does not run on the inputs.
        ConfigError: If ``directory`` holds no weight files.
    """
    plain = unwrap(model)
    inputs = make_example_inputs(plain) if example_inputs is None else dict(example_inputs)
    with evaluating(plain):
        memory = _peak_memory(plain, inputs)
        flops = _flops(plain, inputs)
        times = time_interleaved({"model": lambda: model(**inputs)})["model"] if latency else []
    return ModelProfile(
        model_class=type(plain).__name__,
        parameters=sum(p.numel() for p in plain.parameters()),
        encoder_parameters=_encoder_parameters(plain),
        embedding_parameters=_embedding_parameters(plain),
        flops=flops,
        bytes_on_disk=weight_bytes(plain),
        measured_bytes=None if directory is None else file_bytes(directory),
        peak_memory=memory,
        latency_ms=median(times) if latency else None,
        inputs={name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)},
        num_threads=torch.get_num_threads(),
    )


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of layers by name.

    A stack is an ``nn.ModuleList`` whose members have parts of their own, as transformer layers, stages and blocks
    do; lists of plain Linears or Embeddings are heads and lookup tables.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and len(module) > 0:
            composite = all(next(member.children(), None) is not None for member in module)
            if composite and any(True for _ in module.parameters()):
                found[name] = module
    return found


def _encoder_parameters(model: nn.Module) -> int | None:
    stacks = layer_stacks(model)
    unique = {id(p): p.numel() for stack in stacks.values() for p in stack.parameters()}
    return sum(unique.values()) if stacks else None


def _embedding_parameters(model: nn.Module) -> int:
    inside = {id(module) for stack in layer_stacks(model).values() for module in stack.modules()}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in inside]
    return sum({id(table.weight): table.weight.numel() for table in tables}.values())


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the state dict's tensors; tensors that are stored under several names count once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return sum(_tensor_bytes(tensor) for tensor in tensors.values())


def _tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of a quantized tensor subclass, of the plain tensors that it is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    names, _ = flatten()
    return sum(_tensor_bytes(getattr(tensor, name)) for name in names)


def file_bytes(directory: str | Path) -> int:
    """Return the size of the weight files in a folder.

    Raises:
        ConfigError: If there are none.
    """
    files = [path for pattern in WEIGHT_FILES for path in Path(directory).glob(pattern)]
    if not files:
        raise ConfigError(f"{directory}: holds no weight files; expected one of {', '.join(WEIGHT_FILES)}.")
    return sum(path.stat().st_size for path in files)


def _flops(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    # The fused attention kernels of CPUs are not in torch's table; the plain backend runs as matrix products.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._int_mm: _integer_product})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)  # the counter cannot watch modules that are called with a parameter (DeBERTa)
    try:
        with sdpa_kernel([SDPBackend.MATH]), counter:
            run_once(model, inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops())


def _integer_product(
    left: tuple[int, ...],
    right: tuple[int, ...],
    *_: Any,
    out_shape: tuple[int, ...] | None = None,
    **__: Any,
) -> int:
    """Operations of an int8 matrix product [m, k] x [k, n]."""
    return 2 * prod(left) * right[1]


def _peak_memory(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    tracker = _LiveStorages()
    for tensor in [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]:
        tracker.add(tensor)
    with tracker:
        run_once(model, inputs)
    return tracker.peak


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that are alive; a storage leaves the sum when its last tensor dies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def add(self, value: Any) -> None:
        """Count the storages of a tensor that are not counted yet."""
        if not isinstance(value, Tensor):
            return
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is not None:
            for name in flatten()[0]:
                self.add(getattr(value, name))
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            size = storage.nbytes()
            self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.current += size
            self.peak = max(self.peak, self.current)

    def _forget(self, key: int, size: int) -> None:
        if self._alive.pop(key, None) is not None:
            self.current -= size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.add(leaf)
        return result
