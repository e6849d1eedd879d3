"""Optimal brain surgeon on the rows, columns and blocks of one weight, each removed as a whole.

The outputs of a layer do not see each other, so rows of a weight [outputs, inputs] are pruned apart: a band of rows is
a layer of its own, whose units are groups of neighbouring inputs (see ``hf_compress.pruning.obs``). A row is a band
with a single unit, which nothing is left to make up for; a column is a unit of the only band.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.pruning.obs import Consumer, removal_order, without_units


class BlockSurgeon:
    """One weight, cut into blocks, and what their removal costs.

    Source: the formulas of ZipLM, Kurtic et al. 2023, arXiv:2302.04089, section 3.1, for each band.

    Args:
        weight: [outputs, inputs].
        inverse: ``inverse_hessian`` of the inputs, [inputs, inputs].
        block: Outputs and inputs of a block; the last ones may be smaller.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, block: tuple[int, int]) -> None:
        self.weight = weight
        self.inverse = inverse.double()
        self.high, self.wide = min(block[0], weight.shape[0]), min(block[1], weight.shape[1])

    def losses(self) -> Tensor:
        """Return what each block adds to the squared output error when its turn comes, [blocks], float64.

        Blocks are in the order of rows, then of columns. In a band, the one that the others can best make up for goes
        first; a block is worth at least as much as those that go before it, so that thresholds cut the order.
        """
        if self.high == self.wide == 1:  # as if each were the only one that goes
            return (self.weight.double().square() / self.inverse.diagonal()).flatten()
        if self.wide == self.weight.shape[1]:
            weight = self.weight.double()
            rows = (weight * torch.linalg.solve(self.inverse, weight.T).T).sum(1)
            return torch.stack([band.sum() for band in rows.split(self.high)])
        return torch.cat([self._band_losses(consumer) for consumer in self._bands()])

    def without(self, keep: Tensor) -> Tensor:
        """Return the weight once blocks are gone: the least-squares solution over the inputs that stay, row by row.

        Args:
            keep: Bool [blocks].

        Returns:
            [outputs, inputs] in the dtype of the weight; exactly zero where blocks are gone.
        """
        parts = []
        for consumer, kept in zip(self._bands(), keep.cpu().view(-1, self._across()), strict=True):
            if kept.all():
                parts.append(consumer.weight)
            elif not kept.any():
                parts.append(torch.zeros_like(consumer.weight))
            else:
                parts.append(without_units(consumer, (~kept).nonzero().flatten()))
        return torch.cat(parts)[:, : self.weight.shape[1]]

    def _across(self) -> int:
        return -(-self.weight.shape[1] // self.wide)

    def _bands(self) -> list[Consumer]:
        """Return the bands, whose inputs are filled up with some that are never used and never matter."""
        missing = -self.weight.shape[1] % self.wide
        weight = F.pad(self.weight, (0, missing))
        inverse = F.pad(self.inverse, (0, missing, 0, missing))
        inverse.diagonal()[self.weight.shape[1] :] = 1.0
        index = torch.arange(weight.shape[1], device=weight.device).view(-1, self.wide)
        return [Consumer(rows, inverse, index) for rows in weight.split(self.high)]  # type: ignore[no-untyped-call]

    def _band_losses(self, consumer: Consumer) -> Tensor:
        removal = removal_order([consumer], len(consumer.index))
        losses = torch.zeros(len(consumer.index), dtype=torch.float64)
        losses[removal.order] = removal.errors.diff().cummax(0).values
        return losses
