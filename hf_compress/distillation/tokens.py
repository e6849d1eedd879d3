"""Logits of the tokens that two models have, where the table of one of them is padded.

Tables of one tokenizer differ in size where they are padded to a multiple of some number. Tokens have the same ids in
both, so those that both have come first; the rows behind them mean nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ABSENT = -1e30
"""A logit whose probability is 0 at every temperature, and finite: of -inf alone, logsumexp has no gradient."""


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


def over_tokens_of(
    student: Tensor, indices: Tensor, values: Tensor, log_rest: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits as ``sparse_kl`` compares them, over the tokens of the teacher.

    Tokens that the student lacks have probability 0 for both models; those that the teacher lacks are left out. What
    the teacher gives to all tokens but the k largest stays as it is: how much of it padding has is not known, unless
    all tokens that the student has are among the k.

    Args:
        student: Logits, [positions, tokens].
        indices: The tokens whose logits are known of the teacher, [positions, k].
        values: Its logits of these, [positions, k].
        log_rest: Log of the sum of exp(logit / T) of its other tokens, [positions].
        num_tokens: How many tokens the teacher has.

    Returns:
        Logits of the student, [positions, num_tokens], in float32 or better where any are added; those of the teacher,
        [positions, k], and of its other tokens, [positions].
    """
    size = student.shape[-1]
    if size >= num_tokens:
        return _first(student, num_tokens), values, log_rest
    dtype = torch.promote_types(student.dtype, torch.float32)
    wide = F.pad(student.to(dtype), (0, num_tokens - size), value=_ABSENT)
    beyond = indices >= size
    rest_is_padding = (~beyond).sum(-1) == size
    return wide, values.masked_fill(beyond, -math.inf), log_rest.masked_fill(rest_is_padding, -math.inf)


def _first(logits: Tensor, size: int) -> Tensor:
    # The backward pass of a slice fills a tensor of the size of all logits, also where it takes all of them.
    return logits if logits.shape[-1] == size else logits[..., :size]
