"""Losses of how hidden states lie to each other: between tokens, layers or channels."""

from torch import Tensor

from hf_compress.distillation.losses import LayerPair, feature_loss, num_positions, unit


@feature_loss("gram", "hidden_states")
def gram(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Compare which tokens of an example are similar to each other; widths may differ.

    Each model's matrix of dot products between tokens, its rows scaled to length 1; the squared Frobenius norm of the
    difference, divided by the squared number of positions, [batch].

    Source: Tung and Mori 2019, arXiv:1907.09682, eq. 1-4, tokens of an example in the place of examples of a batch.
    """
    difference = unit(student @ student.mT) - unit(teacher @ teacher.mT)
    return difference.square().sum((1, 2)) / num_positions(mask).square()


@feature_loss("fsp", "hidden_states", needs_equal_width=True, successive=True)
def fsp(student: LayerPair, teacher: LayerPair, mask: Tensor) -> Tensor:
    """Compare the flow from one layer to the next: G = F1^T F2 / positions, [width, width].

    The mean squared difference of the two models' G, [batch].

    Source: Yim et al. 2017, "A gift from knowledge distillation", eq. 1-2, a mean over G in the place of the sum.
    """
    difference = student[0].mT @ student[1] - teacher[0].mT @ teacher[1]
    return (difference / num_positions(mask)[:, None, None]).square().mean((1, 2))


@feature_loss("nst", "hidden_states")
def nst(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Compare the distributions of what channels respond to; widths may differ, and no projection is needed.

    A channel is the vector of its activations at the positions that count, scaled to length 1. The result is the
    squared maximum mean discrepancy (MMD) between both models' channels under the kernel k(x, y) = (x^T y)^2, [batch].

    Its feature map is x x^T, whose mean over channels is the Gram matrix F F^T / width: the distance of these needs no
    pairs of channels, and cannot be negative.

    Source: Huang and Wang 2017, arXiv:1707.01219, polynomial kernel with d = 2, c = 0 (eq. 8).
    """
    own, theirs = unit(student, dim=1), unit(teacher, dim=1)
    difference = own @ own.mT / own.shape[-1] - theirs @ theirs.mT / theirs.shape[-1]
    return difference.square().sum((1, 2))


@feature_loss("nst_linear", "hidden_states")
def nst_linear(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return ``nst`` with the kernel k(x, y) = x^T y: the squared distance of the mean channels, [batch].

    Source: Huang and Wang 2017, arXiv:1707.01219, linear kernel.
    """
    return (unit(student, dim=1).mean(-1) - unit(teacher, dim=1).mean(-1)).square().sum(1)
