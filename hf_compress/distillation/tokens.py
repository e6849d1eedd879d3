"""Logits of the tokens that two models have, where the table of one of them is padded.

Tables of one tokenizer differ in size where they are padded to a multiple of some number. Tokens have the same ids in
both, so those that both have come first; the rows behind them mean nothing.
"""

import math

import torch.nn.functional as F
from torch import Tensor


def common_tokens(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the tokens that both have.

    Args:
        student: Logits, [..., tokens].
        teacher: Logits, [..., tokens], of as many or another number.

    Returns:
        Views of both, [..., tokens] with the smaller number.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    return _first(student, size), _first(teacher, size)


def over_tokens_of(student: Tensor, indices: Tensor, values: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return logits as ``sparse_kl`` compares them, over the tokens of the teacher.

    Tokens that the student lacks have probability 0 for both models; those that the teacher lacks are left out. What
    the teacher gives to all tokens but the k largest stays as it is: how much of it padding has, is not known.

    Args:
        student: Logits, [positions, tokens].
        indices: The tokens whose logits are known of the teacher, [positions, k].
        values: Its logits of these, [positions, k].
        num_tokens: How many tokens the teacher has.

    Returns:
        Logits of the student, [positions, num_tokens], and those of the teacher, [positions, k].
    """
    size = student.shape[-1]
    if size >= num_tokens:
        return _first(student, num_tokens), values
    wide = F.pad(student, (0, num_tokens - size), value=-math.inf)
    return wide, values.masked_fill(indices >= size, -math.inf)


def _first(logits: Tensor, size: int) -> Tensor:
    # The backward pass of a slice fills a tensor of the size of all logits, also where it takes all of them.
    return logits if logits.shape[-1] == size else logits[..., :size]
