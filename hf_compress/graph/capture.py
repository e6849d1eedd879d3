"""Record one real forward pass as a ``torch.fx.Graph`` of ATen operators.

The model's own Python runs eagerly, so nothing restricts what it may do; what the dispatcher sees is written
down with shapes, the parameter behind each ``get_attr`` and the module that made the call.
"""

import gc
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from transformers import PreTrainedModel

from hf_compress.errors import GraphError
from hf_compress.graph import integer_uses
from hf_compress.graph.fake import FAKE_EXPERTS, VALUE_ERRORS, fake_tensors, has_no_weights
from hf_compress.graph.integers import IntegerTracer, NumericUse, Relation, traced_attributes
from hf_compress.graph.multihead import loosened

assert integer_uses.recorders  # imported for what it registers

MAX_INPUT_NAMES = 12


@dataclass(eq=False)
class ModuleCall:
    """One call of a module: the recorded tensors that went in and came out."""

    module: str
    inputs: list[fx.Node | None]
    """Tensors among the arguments, in order, keyword arguments last; None for one that no recorded operator made."""

    outputs: list[fx.Node | None] = field(default_factory=list)
    """Tensors among the results, in order."""

    length: int | None = None
    """How many results there are in a tuple; None if the result is no tuple."""


@dataclass(frozen=True)
class Capture:
    """A recorded forward pass.

    Every node carries ``meta["shape"]`` (a tuple, or a list of tuples for several outputs) and ``meta["module"]``
    (the module that made the call); ``get_attr`` nodes are named parameters and buffers.
    """

    graph: fx.Graph
    parameters: dict[str, fx.Node]
    """Parameters and buffers that the forward pass read, by full name."""

    outputs: tuple[fx.Node, ...]
    """The model's results; caches are left out."""

    relations: list[Relation]
    """What ties integers of the forward code to sizes of recorded tensors."""

    numeric_uses: list[NumericUse]
    """Integers that the forward code computes with as numbers."""

    calls: list[ModuleCall]
    """Every call of a module, in the order in which they began."""


def capture(model: nn.Module, inputs: Mapping[str, Any], experts: str | None = None) -> Capture:
    """Run ``model(**inputs)`` once in eval mode and record it. The model and the random state stay as they were.

    A model on the meta device runs on fake tensors: only shapes are computed.

    Args:
        model: The model.
        inputs: Keyword arguments for its forward.
        experts: How mixtures of experts compute meanwhile, as ``config._experts_implementation``.

    Raises:
        GraphError: If the forward pass fails on these inputs, or needs weights that the model does not have.
    """
    fake = has_no_weights(model)
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(garbage_collection_paused())
        if fake:
            inputs = stack.enter_context(fake_tensors(model, inputs))
            experts = experts or FAKE_EXPERTS
        recorder = _Recorder(model, inputs)
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(evaluating(model))
        stack.enter_context(_experts_computed(model, experts))
        stack.enter_context(loosened(model.modules()))
        stack.enter_context(recorder.module_stack())
        stack.enter_context(traced_attributes(model))
        stack.enter_context(recorder.integers)
        stack.enter_context(recorder)
        try:
            result = model(**inputs)
        except VALUE_ERRORS as error:
            raise GraphError(
                f"{type(model).__name__} is on the meta device, but its forward pass reads values of tensors, in "
                f"{recorder.running() or type(model).__name__} ({type(error).__name__}: {error}). Load the model with "
                "its weights and analyze that (hf-compress inspect: --load-weights)."
            ) from error
        except Exception as error:
            unless = ", or load its weights" if fake else ""
            given = {
                k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in list(inputs.items())[:MAX_INPUT_NAMES]
            }
            raise GraphError(
                f"{type(model).__name__}.forward failed on the example inputs {given}: "
                f"{type(error).__name__}: {error}. Pass example_inputs that the model runs on{unless}."
            ) from error
    return recorder.finish(main_outputs(result))


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Keep Python from looking for garbage while the context is open.

    Recording makes many small objects that all stay. Python takes that as a reason to search all objects of the
    process for garbage again and again, which takes longer than the recording.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def main_outputs(result: Any) -> list[Tensor]:
    """Return the tensors that count as the model's result: logits and loss if it has them, else plain tensors.

    Caches, hidden states and attention maps are by-products: no one reads them after the model is smaller.
    """
    if isinstance(result, Mapping):
        named = {key: value for key, value in result.items() if isinstance(value, Tensor)}
        chosen = [value for key, value in named.items() if "logits" in key or key == "loss"]
        chosen = chosen or [value for key, value in named.items() if not key.startswith("encoder_")]
        return chosen or [leaf for leaf in tree_leaves(dict(result)) if isinstance(leaf, Tensor)]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def is_hidden_state(value: Any) -> bool:
    """Whether a value is what modules pass on by convention: the first floating-point tensor of several dimensions."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode without gradients while the context is open; each module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), attributes_kept(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes store in modules while the context is open: caches of another size would stay behind."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    caches = [(value, dict(value)) for _, own in before for key, value in own.items() if _is_cache(key, value)]
    for cache, _ in caches:  # what is in there would look like a constant of this size
        cache.clear()
    try:
        yield
    finally:
        for own, saved in before:
            # Flags stay: a model that has changed its own weights (RWKV rescales them) must go on knowing it.
            for key in [key for key, value in own.items() if isinstance(value, Tensor) and not key.startswith("_")]:
                if key not in saved:
                    del own[key]
                elif saved[key] is not own[key]:
                    own[key] = saved[key]
        for cache, content in caches:
            cache.clear()
            cache.update(content)


def forget_caches(model: nn.Module) -> None:
    """Empty what modules have stored of earlier forward passes: it has the sizes of then."""
    for module in model.modules():
        for key, value in vars(module).items():
            if _is_cache(key, value):
                value.clear()


def _is_cache(key: str, value: Any) -> bool:
    return type(value) is dict and "cache" in key and not key.startswith("_")


def mixes_experts(model: nn.Module) -> bool:
    """Return whether the model has mixtures of experts whose implementation can be chosen."""
    return any(isinstance(m, PreTrainedModel) and m._can_set_experts_implementation() for m in model.modules())


def _configs(model: nn.Module) -> list[Any]:
    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


@contextmanager
def _experts_computed(model: nn.Module, implementation: str | None) -> Iterator[None]:
    saved = [(config, getattr(config, "_experts_implementation", None)) for config in _configs(model)]
    changed = [(config, own) for config, own in saved if own is not None and implementation is not None]
    try:
        for config, _ in changed:
            config._experts_implementation = implementation
        yield
    finally:
        for config, own in changed:
            config._experts_implementation = own


def see_without(plain: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    """Have models recorded as they are without what is attached to them, such as fake quantizers.

    Args:
        plain: Returns a context in which a model computes as if it had nothing attached.
    """
    _plain.append(plain)


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Let a model compute as if it had nothing attached, while the context is open."""
    with ExitStack() as stack:
        for plain in _plain:
            stack.enter_context(plain(model))
        yield


_plain: list[Callable[[nn.Module], AbstractContextManager[None]]] = []


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes each dispatched operator into an fx graph."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.graph = fx.Graph()
        self.parameters: dict[str, fx.Node] = {}
        self._names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._nodes: dict[int, fx.Node] = {}
        # Tensors are kept until the end, else Python could reuse their ids. Example inputs are small.
        self._alive: list[Tensor] = []
        self._stack: list[str] = [""]
        self.calls: list[ModuleCall] = []
        self.integers = IntegerTracer(lambda tensor: self._nodes.get(id(tensor)), self.running)
        for key, value in inputs.items():
            if isinstance(value, Tensor):
                self._bind(value, self.graph.placeholder(key))

    def running(self) -> str:
        """Return the name of the module that is running now, or that was when the forward pass failed."""
        return self._stack[-1]

    @contextmanager
    def module_stack(self) -> Iterator[None]:
        """Track which module is running, while the context is open."""
        handles: list[Any] = []
        running: list[ModuleCall] = []

        def enter(name: str, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            running.append(ModuleCall(name, self._known((args, kwargs))))
            self.calls.append(running[-1])

        def leave(_module: Any, _args: Any, result: Any) -> None:
            self._stack.pop()
            call = running.pop()
            call.outputs = self._known(result)
            call.length = len(result) if isinstance(result, tuple) else None

        for name, module in self.model.named_modules():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":
            return result
        node_kwargs = {key: self._with_nodes(value) for key, value in kwargs.items()}
        # Named here: fx would search for a free name, which takes longer than all the rest.
        name = f"{func.overloadpacket.__name__}_{len(self.graph.nodes)}"
        node = self.graph.create_node("call_function", func, self._with_nodes(args), node_kwargs, name)
        node.meta["module"] = self._stack[-1]
        if isinstance(result, Tensor):
            self._bind(result, node)
        else:
            leaves, _ = tree_flatten(result)
            node.meta["shape"] = [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
            for position, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    item = self.graph.create_node("call_function", operator.getitem, (node, position))
                    item.meta["module"] = self._stack[-1]
                    self._bind(leaf, item)
        return result

    def _known(self, values: Any) -> list[fx.Node | None]:
        """Return the nodes of tensors: those of parameters are made, other unknown tensors have None."""
        leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [self._node_of(t) if id(t) in self._names else self._nodes.get(id(t)) for t in leaves]

    def _with_nodes(self, value: Any) -> Any:
        """Replace tensors in arguments of an operator: there are only lists and tuples of them, so no pytree."""
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, list | tuple):
            return tuple([self._with_nodes(item) for item in value])
        return value

    def _bind(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta["shape"] = tuple(tensor.shape)
        node.meta["dtype"] = tensor.dtype
        node.meta["storage"] = tensor.untyped_storage()._cdata
        node.meta.setdefault("module", self._stack[-1])
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node

    def _node_of(self, tensor: Tensor) -> fx.Node:
        node = self._nodes.get(id(tensor))
        if node is not None:
            return node
        name = self._names.get(id(tensor))
        # create_node, not get_attr: the graph has no owning module that could hold constants.
        node = self.graph.create_node("get_attr", name or "constant")
        if name is not None:
            self.parameters[name] = node
        self._bind(tensor, node)
        return node

    def finish(self, outputs: list[Tensor]) -> Capture:
        """Close the graph with the nodes of ``outputs``.

        Raises:
            GraphError: If there is none.
        """
        nodes = tuple(dict.fromkeys(self._nodes[id(t)] for t in outputs if id(t) in self._nodes))
        if not nodes:
            raise GraphError(f"{type(self.model).__name__}.forward returned no tensor; nothing can be analyzed.")
        self.graph.output(nodes)
        self._alive.clear()
        self._nodes.clear()
        return Capture(
            self.graph, self.parameters, nodes, self.integers.relations, self.integers.numeric_uses, self.calls
        )
