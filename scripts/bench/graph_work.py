"""One measurement of ``graph.py``, in this process.

usage: graph_work.py hf_compress|torch-pruning|pruner|llama [THREADS]      prints the result as JSON
"""

import functools
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

REPEATS = 3
HEADS, HEAD_DIM, FFN, LAYERS = 12, 64, 3072, 12

Seconds = dict[str, float]
"""Wall time by phase."""


@contextmanager
def clock(seconds: Seconds, phase: str) -> Iterator[None]:
    """Add the wall time of the context to a phase."""
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@contextmanager
def timed_calls(owner: Any, name: str, seconds: Seconds) -> Iterator[None]:
    """Add the wall time of all calls of ``owner.name`` to the phase of that name."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock(seconds, name):
            return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def bert() -> Any:
    """Build BERT-base, always with the same random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig()).eval()


def bert_inputs() -> dict[str, Any]:
    """Return two short texts, as ``make_example_inputs`` makes them."""
    import torch

    ids = torch.arange(22).view(2, 11) + 1000
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def plan_seconds(model: Any, masks: dict[str, Any], inputs: dict[str, Any] | None) -> tuple[Any, Seconds]:
    """Plan, and split the time into capture, analysis and plan."""
    from hf_compress.graph import model as graph
    from hf_compress.shrinking import plan

    spent: Seconds = {}
    with clock(spent, "all"), timed_calls(graph, "capture", spent), timed_calls(plan, "ModelGraph", spent):
        planned = plan.plan_shrink(model, masks, example_inputs=inputs)
    return planned, {
        "capture": spent["capture"],
        "analysis": spent["ModelGraph"] - spent["capture"],
        "plan": spent["all"] - spent["ModelGraph"],
    }


def cut_with_hf_compress(model: Any) -> Seconds:
    """Cut BERT in place."""
    import torch

    from hf_compress.shrinking.apply import slice_in_place

    masks = {}
    for layer in range(LAYERS):
        masks[f"bert.encoder.layer.{layer}.attention.heads"] = torch.arange(HEADS) % 2 == 0
        masks[f"bert.encoder.layer.{layer}.ffn"] = torch.arange(FFN) % 2 == 0
    planned, seconds = plan_seconds(model, masks, bert_inputs())
    with clock(seconds, "apply"):
        slice_in_place(model, planned)
    return seconds


def cut_with_torch_pruning(model: Any) -> Seconds:
    """Cut BERT in place, by the dependency graph."""
    import torch_pruning

    seconds: Seconds = {}
    with clock(seconds, "graph"):
        graph = torch_pruning.DependencyGraph().build_dependency(
            model, example_inputs=bert_inputs(), output_transform=lambda output: output.logits.sum()
        )
    head_rows = [head * HEAD_DIM + row for head in range(1, HEADS, 2) for row in range(HEAD_DIM)]
    for layer in model.bert.encoder.layer:
        targets = ((layer.attention.self.query, head_rows), (layer.intermediate.dense, list(range(1, FFN, 2))))
        for module, rows in targets:
            with clock(seconds, "plan"):
                group = graph.get_pruning_group(module, torch_pruning.prune_linear_out_channels, rows)
            with clock(seconds, "apply"):
                group.prune()
    return seconds


def cut_with_pruner(model: Any) -> Seconds:
    """Cut BERT in place, by the pruner."""
    import torch_pruning

    layers = model.bert.encoder.layer
    attention = [getattr(layer.attention.self, name) for layer in layers for name in ("query", "key", "value")]
    ignored = [model.bert.embeddings, model.bert.pooler, model.classifier]
    ignored += [module.output.dense for layer in layers for module in (layer, layer.attention)]
    seconds: Seconds = {}
    with clock(seconds, "graph"):
        pruner = torch_pruning.pruner.BasePruner(
            model,
            bert_inputs(),
            torch_pruning.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            num_heads=dict.fromkeys(attention, HEADS),
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.5,
            ignored_layers=ignored,
            output_transform=lambda output: output.logits.sum(),
        )
    with clock(seconds, "plan and apply"):
        pruner.step()
    return seconds


def timed(work: Callable[[], Seconds]) -> dict[str, Any]:
    """Do something whose phases are timed; add the sum and the CPU time."""
    start = time.process_time()
    phases = work()
    return {**phases, "all": sum(phases.values()), "CPU time": time.process_time() - start}


def measure_bert(cut: Callable[[Any], Seconds]) -> dict[str, Any]:
    """Cut BERT several times; report the first time, the later ones and the outcome."""
    import torch

    model = bert()
    before, base = sum(p.numel() for p in model.parameters()), peak_memory()
    first = timed(lambda: cut(model))
    memory = peak_memory()
    with torch.no_grad():
        logits = model(**bert_inputs()).logits.flatten().tolist()
    after = sum(p.numel() for p in model.parameters())
    again = [timed(functools.partial(cut, bert())) for _ in range(REPEATS)]
    return {
        "first": first,
        "again": {name: median(each[name] for each in again) for name in first},
        "peak_memory": memory,
        "memory_before": base,
        "parameters": [before, after],
        "logits": logits,
    }


def measure_llama() -> dict[str, Any]:
    """Plan a Llama of 8 billion parameters without weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    masks = {}
    for layer in range(config.num_hidden_layers):
        masks[f"model.layers.{layer}.self_attn.heads"] = torch.arange(config.num_key_value_heads) % 2 == 0
        masks[f"model.layers.{layer}.mlp.ffn"] = torch.arange(config.intermediate_size) % 2 == 0
    base = peak_memory()
    plans = []

    def plan() -> Seconds:
        planned, seconds = plan_seconds(model, masks, None)
        plans.append(planned)
        return seconds

    first = timed(plan)
    memory = peak_memory()
    again = [timed(plan) for _ in range(REPEATS)]
    return {
        "first": first,
        "again": {name: median(each[name] for each in again) for name in first},
        "peak_memory": memory,
        "memory_before": base,
        "parameters": list(plans[0].num_parameters),
    }


MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "hf_compress": lambda: measure_bert(cut_with_hf_compress),
    "torch-pruning": lambda: measure_bert(cut_with_torch_pruning),
    "pruner": lambda: measure_bert(cut_with_pruner),
    "llama": measure_llama,
}


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had so far."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def work(name: str, threads: int) -> None:
    """Do one measurement in this process and print it."""
    import torch

    torch.set_num_threads(threads)
    import transformers

    transformers.logging.set_verbosity_error()
    if name in ("hf_compress", "llama"):
        import hf_compress  # noqa: F401 - imported before the clock starts
    else:
        import torch_pruning  # noqa: F401
    print(json.dumps(MEASUREMENTS[name]()))


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
