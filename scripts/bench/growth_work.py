"""One measurement of ``growth.py``, in this process.

usage: growth_work.py bert '{"layers": 4, "width": 256, "length": 16}'      prints the result as JSON
       growth_work.py shape Llama-3-8B
"""

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from graph_work import peak_memory
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from hf_compress import dimension_groups, shrink
from hf_compress.graph.model import ModelGraph
from hf_compress.shrinking.plan import plan_shrink

REPEATS = 3
HEAD = 64
"""Channels of a head."""

BERTS = {
    "BERT-tiny": (2, 128), "BERT-mini": (4, 256), "BERT-small": (4, 512), "BERT-medium": (8, 512),
    "BERT-base": (12, 768), "BERT-large": (24, 1024),
}  # fmt: skip
"""Layers and width, Turc et al. 2019 (arXiv:1908.08962)."""

LLAMAS: dict[str, dict[str, int]] = {
    "Llama-3.2-1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    },
    "Llama-3.2-3B": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    },
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
}  # fmt: skip


def bert(layers: int, width: int, positions: int = 512) -> BertForSequenceClassification:
    """Build a BERT with random weights."""
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=width // HEAD, intermediate_size=4 * width,
        vocab_size=1000, max_position_embeddings=positions,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


def shape(name: str) -> PreTrainedModel:
    """Build a model without weights."""
    with torch.device("meta"):
        if name in BERTS:
            return bert(*BERTS[name])
        return LlamaForCausalLM(LlamaConfig(vocab_size=128256, num_key_value_heads=8, **LLAMAS[name]))


def halves(model: PreTrainedModel, inputs: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Return masks that keep every second head and feed-forward unit."""
    groups = [group for group in dimension_groups(model, inputs) if group.kind in ("heads", "ffn")]
    return {group.name: torch.arange(group.num_units) % 2 == 0 for group in groups if group.frozen is None}


def seconds(work: Callable[[], Any]) -> float:
    """Return the median CPU time of some calls."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return median(found)


def measure_bert(layers: int, width: int, length: int) -> dict[str, float]:
    """Measure a BERT with weights, on two texts of a length."""
    model = bert(layers, width, max(length, 512))
    ids = torch.arange(2 * length).view(2, length) % 900
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    masks = halves(model, inputs)
    with torch.no_grad():
        forward = seconds(lambda: model(**inputs))
    return {
        "graph": seconds(lambda: ModelGraph(model, inputs)),
        "shrink": seconds(lambda: shrink(model, masks, example_inputs=inputs)),
        "forward pass": forward,
        "parameters": model.num_parameters(),
    }


def measure_shape(name: str) -> dict[str, float]:
    """Measure a model without weights: the graph, and the plan, graph included."""
    model = shape(name)
    before = peak_memory()
    masks = halves(model)
    return {
        "graph": seconds(lambda: ModelGraph(model)),
        "plan": seconds(lambda: plan_shrink(model, masks)),
        "memory": peak_memory() - before,
        "parameters": model.num_parameters(),
    }


def main() -> None:
    """Do one measurement in this process and print it."""
    kind, what = sys.argv[1:]
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    dimension_groups(bert(1, HEAD))  # what torch sets up when it is first used is no part of what is measured
    print(json.dumps(measure_bert(**json.loads(what)) if kind == "bert" else measure_shape(what)))


if __name__ == "__main__":
    main()
