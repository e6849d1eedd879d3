"""Losses of hidden states, position by position."""

from torch import Tensor

from hf_compress.distillation.losses import feature_loss, mean_over_positions, unit


@feature_loss("hidden_mse", "hidden_states", needs_equal_width=True)
def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared difference over the width and the positions that count, [batch].

    Source: Jiao et al. 2019, TinyBERT, arXiv:1909.10351, eq. 8, with padding left out.
    """
    return mean_over_positions((student - teacher).square().mean(-1), mask)


@feature_loss("hidden_cosine", "hidden_states", needs_equal_width=True)
def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return 1 - the cosine of the angle at each position, averaged, [batch], in [0, 2].

    A zero vector counts as orthogonal to all others and gets no gradient.

    Source: Sanh et al. 2019, DistilBERT, arXiv:1910.01108, section 3.
    """
    return mean_over_positions(1 - (unit(student) * unit(teacher)).sum(-1), mask)


@feature_loss("pkd", "hidden_states", needs_equal_width=True)
def pkd(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the squared distance of the vectors after scaling them to length 1, averaged over positions, [batch].

    The paper takes the first position only: a mask that is True there. A zero vector stays zero.

    Source: Sun et al. 2019, Patient KD, arXiv:1908.09355, eq. 7, a mean in the place of its sum over examples.
    """
    return mean_over_positions((unit(student) - unit(teacher)).square().sum(-1), mask)
