"""Which architectures a pruner handles: half of the heads and of the feed-forward units of tiny random models.

The first half of every attention layer and feed-forward block is to go. What is left must run, have lost the
parameters of those units, and compute what the dense model computes when the weights that read them are zero.
Every model is pruned in a process of its own, which is ended after a while.
"""

import copy
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from queue import Empty
from typing import Any

import torch
import transformers
from common import Job, short
from torch import Tensor, nn

TOLERANCE = 1e-4
LIMIT_SECONDS = 90
LENGTH = 12

_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
_IMAGE = {"image_size": 16, "num_labels": 3}
_PAD = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99, "decoder_start_token_id": 1, **_PAD,
}  # fmt: skip
_GQA = {**_TEXT, "num_key_value_heads": 2, **_PAD}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertConfig", "BertForSequenceClassification", _TEXT),
    "DistilBERT": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99},
    ),
    "RoBERTa": ("RobertaConfig", "RobertaForSequenceClassification", {**_TEXT, "pad_token_id": 0}),
    "DeBERTa-v2": (
        "DebertaV2Config", "DebertaV2ForSequenceClassification",
        {**_TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "ViT": ("ViTConfig", "ViTForImageClassification", {**_TEXT, **_IMAGE, "patch_size": 4}),
    "Swin": (
        "SwinConfig", "SwinForImageClassification",
        {**_IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "mlp_ratio": 2.0},
    ),
    "GPT-2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "vocab_size": 99, **_PAD},
    ),
    "Llama (GQA)": ("LlamaConfig", "LlamaForCausalLM", _GQA),
    "Mistral (GQA)": ("MistralConfig", "MistralForCausalLM", _GQA),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_GQA, "num_local_experts": 4}),
    "T5": (
        "T5Config", "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
         "decoder_start_token_id": 1, **_PAD},
    ),
    "BART": ("BartConfig", "BartForConditionalGeneration", _SEQ2SEQ),
    "Whisper": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": LENGTH, "max_target_positions": LENGTH},
    ),
}  # fmt: skip
"""Name -> config class, model class, sizes; every head has 8 channels."""

ATTENTION = (
    ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"),
    ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
    ("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o"),
    ("attn.c_attn", "attn.c_proj"),
)
"""Names of layers in one parent: queries, keys, values, or all of them in one; then what reads them."""

FEED_FORWARD = (
    ("intermediate.dense", "output.dense"),
    ("lin1", "lin2"),
    ("fc1", "fc2"),
    ("DenseReluDense.wi", "DenseReluDense.wo"),
    ("mlp.c_fc", "mlp.c_proj"),
    ("gate_proj", "up_proj", "down_proj"),
)

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads", "all_head_size", "inner_dim",
               "split_size")  # fmt: skip
"""What attention layers call how many heads or channels they have."""


def layouts(model: nn.Module, known: tuple[tuple[str, ...], ...]) -> Iterator[list[str]]:
    """Yield the names of the layers that belong together; the last reads what the others compute."""
    names = dict(model.named_modules())
    for suffixes in known:
        for name in names:
            prefix = name[: len(name) - len(suffixes[0])]
            if name.endswith(suffixes[0]) and prefix[-1:] in ("", ".") and all(prefix + s in names for s in suffixes):
                yield [prefix + suffix for suffix in suffixes]


class Request:
    """A tiny model, and what is to go."""

    def __init__(self, name: str) -> None:
        config_class, model_class, sizes = ARCHITECTURES[name]
        missing = [each for each in (config_class, model_class) if not hasattr(transformers, each)]
        if missing:
            raise LookupError(f"transformers {transformers.__version__} has no {missing[0]}")
        torch.manual_seed(0)
        self.name = name
        self.model: Any = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).eval()
        with torch.no_grad():  # biases of zero and norms of one would hide errors
            for each in self.model.parameters():
                each.add_(0.1 * torch.randn_like(each))
        self.attention = list(layouts(self.model, ATTENTION))
        self.feed_forward = list(layouts(self.model, FEED_FORWARD))
        self.inputs = self._inputs()
        self.expected = self._masked()

    def _inputs(self) -> dict[str, Tensor]:
        ids = torch.arange(2 * LENGTH).view(2, LENGTH) + 5
        if self.name in ("ViT", "Swin"):
            return {"pixel_values": torch.randn(2, 3, 16, 16)}
        if self.name == "Whisper":
            return {"input_features": torch.randn(2, 8, 2 * LENGTH), "decoder_input_ids": ids}
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.name == "BERT":  # without pairs of texts, NNI takes the embedding of their kinds for a constant
            found["token_type_ids"] = (torch.arange(LENGTH) >= LENGTH // 2).long().repeat(2, 1)
        return {**found, "decoder_input_ids": ids} if self.name in ("T5", "BART") else found

    @staticmethod
    def tensor(output: Any) -> Tensor:
        """Return what is compared."""
        found: Tensor = output.logits
        return found

    def outputs(self) -> Iterator[tuple[list[str], list[int]]]:
        """Yield layers whose outputs go together, and which outputs of the first of them go."""
        for *inner, _ in (*self.attention, *self.feed_forward):
            positions = list(range(width(self.model.get_submodule(inner[0]))))
            parts = 3 if inner[0].endswith("c_attn") else 1
            size = len(positions) // parts
            yield inner, [p for p in positions if p % size < size // 2]

    def readers(self) -> list[str]:
        """Return the layers whose first half of inputs goes."""
        return [names[-1] for names in (*self.attention, *self.feed_forward)]

    def set_head_counts(self) -> None:
        """Halve what attention layers say of their heads, as users of some peers have to."""
        for first, *_ in self.attention:
            parent = self.model.get_submodule(first.rpartition(".")[0])
            for name in HEAD_COUNTS:
                if isinstance(getattr(parent, name, None), int):
                    setattr(parent, name, getattr(parent, name) // 2)

    def _masked(self) -> Tensor:
        """Return what the dense model computes when nothing reads the units that are to go."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name in self.readers():
                layer = model.get_submodule(name)
                weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
                weight[:, : weight.shape[1] // 2] = 0
            for name, each in model.named_parameters():
                if name.endswith("experts.down_proj"):
                    each[..., : each.shape[-1] // 2] = 0
            return self.tensor(model(**self.inputs))

    def removed(self) -> int:
        """Return how many parameters the units have, at least: biases on top are not counted."""
        layers = [layer for names in (*self.attention, *self.feed_forward) for layer in names]
        found = sum(self.model.get_submodule(name).weight.numel() // 2 for name in layers)
        return found + sum(p.numel() // 2 for n, p in self.model.named_parameters() if ".experts." in n)


def width(layer: nn.Module) -> int:
    """Return how many outputs a layer has."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.weight.shape[1]


def verdict(name: str, cut: Callable[[Request], Any]) -> dict[str, str]:
    """Prune one model; return what came of it: ``handled``, ``wrong``, ``partly`` or ``error``, and why."""
    try:
        request = Request(name)
    except LookupError as error:
        return {"outcome": "absent", "about": short(error.args[0])}
    before, wanted = sum(each.numel() for each in request.model.parameters()), request.removed()
    try:
        small = cut(request)
        with torch.no_grad():
            found = request.tensor(small.eval()(**request.inputs))
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the result)
        traceback.print_exc()
        return {"outcome": "error", "about": short(error)}
    removed = before - sum(each.numel() for each in small.parameters())
    difference = float((found - request.expected).abs().max() / request.expected.abs().max())
    if not difference <= TOLERANCE:
        return {"outcome": "wrong", "about": f"outputs differ from those of the masked model by {difference:.1e}"}
    if removed < wanted:
        return {"outcome": "partly", "about": f"removed {removed:,} of {wanted:,} weights"}
    return {"outcome": "handled", "about": ""}


def _child(name: str, cut: Callable[[Request], Any], answers: Any) -> None:
    answers.put(verdict(name, cut))


def architectures_job(job: Job, cut: Callable[[Request], Any]) -> dict[str, Any]:
    """Ask a pruner for every architecture.

    Args:
        job: The job.
        cut: Removes what a request asks for, and returns the small model.
    """
    context = multiprocessing.get_context("fork")  # libraries are imported once
    found = {}
    for name in job.settings.get("architectures") or ARCHITECTURES:
        answers = context.Queue()
        child = context.Process(target=_child, args=(name, cut, answers))
        child.start()
        try:
            found[name] = answers.get(timeout=LIMIT_SECONDS)
            child.join()
        except Empty:
            ended = child.exitcode is not None
            child.kill()
            about = "the process died" if ended else f"not done after {LIMIT_SECONDS} seconds"
            found[name] = {"outcome": "error", "about": about}
        print(name, found[name], flush=True)
    return {"architectures": found}
