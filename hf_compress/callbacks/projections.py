"""Trained linear maps from the student's widths to the teacher's, owned by the callback."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_compress.callbacks.owned import OwnedTensors
from hf_compress.callbacks.ranks import all_reduce_mean
from hf_compress.errors import TrainingError

RIDGE = 1e-3
"""Added to the student's covariance, relative to its mean diagonal, so that the fit has one solution."""


class Projections(OwnedTensors):
    """Maps by name, [student width, teacher width] each, and the state of their optimizer."""

    def fit(self, name: str, student: Tensor, teacher: Tensor, mask: Tensor, learning_rate: float) -> None:
        """Make a map: the least-squares fit over the batches of all ranks; every rank must call it.

        Args:
            name: Of the map.
            student: [batch, length, student width].
            teacher: [batch, length, teacher width].
            mask: Positions that count, bool, [batch, length].
            learning_rate: Of its optimizer.
        """
        weights = mask.flatten().float().unsqueeze(1)
        own, theirs = student.detach().flatten(0, 1).float(), teacher.detach().flatten(0, 1).float()
        with torch.autocast(own.device.type, enabled=False):  # rounding errors would be larger than the ridge
            products = all_reduce_mean(torch.cat([own, theirs], dim=1).mul(weights).T @ (own * weights))
        covariance, mixed = products[: own.shape[1]].double(), products[own.shape[1] :].double()
        ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
        eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        fitted = torch.linalg.solve(covariance + ridge * eye, mixed.T)
        self.add(name, fitted.float().contiguous().requires_grad_(), learning_rate)

    def apply(self, name: str, student: Tensor, channels: Tensor | None = None) -> Tensor:
        """Return what a map makes of features, [..., teacher width], in float32; of some channels, if given."""
        with torch.autocast(student.device.type, enabled=False):
            if channels is None:
                return student.float() @ self.tensors[name]
            return student.index_select(-1, channels).float() @ self.tensors[name].index_select(0, channels)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned.

        Raises:
            TrainingError: If maps are missing, or are of other sizes.
        """
        for name in self.rates:
            mine, stored = self.tensors[name], tensors.get(name)
            if stored is None or stored.shape != mine.shape:
                raise TrainingError(
                    f"distillation: the checkpoint holds no projection {name!r} of shape {list(mine.shape)}. Resume "
                    "with the features that the run had, or start a new run from the checkpoint's weights."
                )
        self._take(tensors)
