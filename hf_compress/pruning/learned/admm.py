"""ADMM: training with the weights pulled to a sparse copy of themselves, until they can be cut without a jump."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.pruning.method import EVERYWHERE, LAYERS, DeferringMethod, Evidence, MethodOptions
from hf_compress.registry import criteria


@dataclass(frozen=True, kw_only=True)
class AdmmOptions(MethodOptions):
    """Options of ``admm``."""

    rho: float = 1e-2
    """Strength of the pull: rho * (W - Z + U) is added to the gradient."""

    def _validate(self) -> None:
        self._check_number("rho", 0, 1e6, open_low=True)


@criteria.register("admm")
class Admm(DeferringMethod):
    """The alternating direction method of multipliers.

    The loss gets the term rho / 2 ||W - Z + U||^2. Every ``update_every`` steps of the schedule Z becomes W + U with
    the units of smallest norm at zero, as many as are to go in the end, and U grows by W - Z. At the end of the
    schedule these units go.

    Keeps two more copies of the weights of the pruned structures, in checkpoints too.

    Options: see ``AdmmOptions``.

    Source: Zhang et al. 2018, arXiv:1804.03294, eq. 5 to 9.
    """

    options = AdmmOptions
    structures = EVERYWHERE - LAYERS

    def step(self, name: str, evidence: Evidence) -> None:
        """Do nothing: the pull is in the gradients."""

    def pull(self, name: str, evidence: Evidence) -> Tensor | None:
        """Return rho * (W - Z + U) once there is a Z."""
        if self.over or f"{name}/z" not in self.tensors:
            return None
        gap: Tensor = evidence.weights() - self.tensors[f"{name}/z"] + self.tensors[f"{name}/u"]
        return gap * float(self.settings.rho)

    def project(self, name: str, evidence: Evidence, mask: Tensor) -> None:
        """Take the steps of Z and U."""
        weights = evidence.weights()
        u = self.tensors.get(f"{name}/u", torch.zeros_like(weights))
        z = (weights + u) * mask.to(weights.device)[:, None]
        self.tensors[f"{name}/z"], self.tensors[f"{name}/u"] = z, u + weights - z

    def score(self, name: str, evidence: Evidence) -> Tensor:
        """Return the norm of W + U of each unit."""
        weights = evidence.weights()
        norm: Tensor = torch.linalg.vector_norm(weights + self.tensors.get(f"{name}/u", 0.0), dim=1)
        return norm
