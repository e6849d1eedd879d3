"""Criteria that see a trained model as a whole, without training: ``prune_oneshot`` carries them out."""

from dataclasses import dataclass
from typing import Any

from hf_compress.errors import ConfigError
from hf_compress.pruning.method import Method, MethodOptions, Setting
from hf_compress.registry import criteria


class OneShotMethod(Method):
    """A name and its options; there are no steps to take part in."""

    trains = False

    def __init__(self, settings: Any, setting: Setting) -> None:
        name = next(name for name in criteria if criteria.get(name) is type(self))
        raise ConfigError(
            f"PruningConfig.criterion: {name!r} works without training; use prune_oneshot(model, dataloader, config), "
            "or a criterion that scores while the model trains."
        )


@dataclass(frozen=True, kw_only=True)
class ObsOptions(MethodOptions):
    """Options of ``obs``."""

    damping: float = 0.01
    """What is added to the diagonal of the Hessian, relative to its mean, in [0, 1]."""

    block_size: int = 128
    """Columns whose single weights compete, for ``weights`` by elements or patterns."""

    def _validate(self) -> None:
        self._check_number("damping", 0, 1)
        self._check_count("block_size")


@criteria.register("obs")
class Obs(OneShotMethod):
    """Removes what the rest of a layer can best make up for, and updates the rest to do so.

    Options: see ``ObsOptions``.

    Source: units: Kurtic et al. 2023, arXiv:2302.04089 (ZipLM); single weights: Frantar and Alistarh 2023,
    arXiv:2301.00774 (SparseGPT); rows, columns and blocks of weights as units of a layer.
    """

    options = ObsOptions
    structures = frozenset({"heads", "ffn", "hidden", "head_dim", "other", "weights"})


@dataclass(frozen=True, kw_only=True)
class KwonOptions(MethodOptions):
    """Options of ``kwon``."""

    flops: float | None = None
    """Share of the operations of a forward pass to keep, in (0, 1), instead of a sparsity per structure: heads and
    feed-forward units then compete."""

    rearrange: bool = True
    """Swap units within layers by the whole Fisher information."""

    tune: bool = True
    """Scale the units that stay, by least squares on the outputs of their layer."""

    damping: float = 0.01
    """Pulls scales towards 1, relative to the mean of the normal equations' diagonal, in (0, 1]."""

    @property
    def decides(self) -> bool:
        """Whether the budget says how much of each structure goes."""
        return self.flops is not None

    def _validate(self) -> None:
        if self.flops is not None:
            self._check_number("flops", 0, 1, open_low=True, open_high=True)
        self._check_bool("rearrange")
        self._check_bool("tune")
        self._check_number("damping", 0, 1, open_low=True)
        if not self.tune and self.damping != KwonOptions.damping:
            raise self._error("damping", self.damping, f"{KwonOptions.damping} with tune=False")


@criteria.register("kwon")
class Kwon(OneShotMethod):
    """Masks by the Fisher information of gates, rearranged within layers, then scales for what stays.

    Options: see ``KwonOptions``.

    Source: Kwon et al. 2022, arXiv:2204.09656.
    """

    options = KwonOptions
    structures = frozenset({"heads", "ffn"})
