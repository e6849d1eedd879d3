"""Tiny random models of many architectures by name; ``zoo`` holds their sizes and many more."""

import torch
from zoo import OTHERS, VARIANTS, ZOO, Tiny, randomize
from zoo.base import DECODER, ENCODER, SPECIAL

bert = ZOO["bert"]
bert_mlm = VARIANTS["bert_mlm"]
roberta = ZOO["roberta"]
distilbert = ZOO["distilbert"]
albert = ZOO["albert"]
electra = ZOO["electra"]
mpnet = ZOO["mpnet"]
deberta_v2 = ZOO["deberta_v2"]
modernbert = ZOO["modernbert"]
gpt2 = ZOO["gpt2"]
gpt_neox = ZOO["gpt_neox"]
opt = ZOO["opt"]
llama = ZOO["llama"]
phi3 = ZOO["phi3"]
mixtral = ZOO["mixtral"]
bart = ZOO["bart"]
t5 = ZOO["t5"]
vit = ZOO["vit"]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


__all__ = [
    "DECODER",
    "ENCODER",
    "OTHERS",
    "SPECIAL",
    "VARIANTS",
    "ZOO",
    "Tiny",
    "albert",
    "bart",
    "bert",
    "bert_mlm",
    "deberta_v2",
    "distilbert",
    "electra",
    "gpt2",
    "gpt_neox",
    "llama",
    "mixtral",
    "modernbert",
    "mpnet",
    "opt",
    "phi3",
    "randomize",
    "relative_error",
    "roberta",
    "t5",
    "vit",
]
