"""How teacher outputs are to be stored, and the outputs in that form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_compress.errors import ConfigError, TrainingError
from hf_compress.teachers.manifest import DTYPES, Content, OutputSpec


@dataclass(frozen=True)
class StorageRequest:
    """Checked settings of ``cache_teacher_outputs``."""

    top_k: int | None
    temperatures: tuple[float, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def of(
        cls,
        top_k: int | None,
        temperature: float | Sequence[float] | None,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
    ) -> "StorageRequest":
        """Check the settings.

        Raises:
            ConfigError: If one is not allowed or without effect.
        """
        where = "cache_teacher_outputs"
        if top_k is not None:
            check_count("top_k", top_k, ", or None to store all classes")
        if (top_k is None) != (temperature is None):
            raise ConfigError(
                f"{where}: top_k={top_k!r} with temperature={temperature!r}: the temperature of the loss is needed to "
                "sum up the classes that top_k leaves out, and has no effect without top_k. Give both or none."
            )
        given = temperature if isinstance(temperature, Sequence) else [] if temperature is None else [temperature]
        for each in given:
            if not isinstance(each, int | float) or isinstance(each, bool) or not 0 < each < math.inf:
                raise ConfigError(f"{where}: temperature is {each!r}; allowed: numbers above 0, or a list of them.")
        temperatures = tuple(sorted({float(each) for each in given}))
        if top_k is not None and not temperatures:
            raise ConfigError(f"{where}: temperature is an empty list; give at least one.")
        if _name(dtype) not in DTYPES:
            raise ConfigError(f"{where}: dtype is {dtype}; allowed: {', '.join(f'torch.{name}' for name in DTYPES)}.")
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise ConfigError(f"{where}: autocast is {autocast}; allowed: torch.float16, torch.bfloat16 or None.")
        return cls(top_k, temperatures, dtype, autocast)

    @property
    def computed_in(self) -> str:
        """Name of the dtype of autocast, empty if there is none."""
        return "" if self.autocast is None else _name(self.autocast)

    @property
    def dtype_name(self) -> str:
        """Name of the dtype that values are stored in."""
        return _name(self.dtype)


def check_count(name: str, value: object, otherwise: str = "") -> None:
    """Check a number of things.

    Raises:
        ConfigError: If it is none, or below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"cache_teacher_outputs: {name} is {value!r}; allowed: an int >= 1{otherwise}.")


def check_top_k(top_k: int | None, outputs: Sequence[OutputSpec]) -> None:
    """Check that there are more classes than are to be stored.

    Raises:
        ConfigError: If not.
    """
    for output in outputs:
        if top_k is not None and (not output.shape or top_k >= output.shape[-1]):
            classes = output.shape[-1] if output.shape else "no"
            raise ConfigError(
                f"cache_teacher_outputs: top_k={top_k}, but {output.name} has {classes} classes; allowed: fewer than "
                "that. Leave top_k and temperature out."
            )


def stored_parts(
    outputs: Mapping[str, Tensor], counts: Tensor | None, chosen: Tensor, content: Content
) -> dict[str, Tensor]:
    """Return outputs in the form that they are stored in, on the CPU.

    Args:
        outputs: Of a batch, by name.
        counts: Positions that count, bool, [batch, length]; None if no output has positions.
        chosen: Numbers of the examples to store, int64, [chosen].
        content: The form.

    Raises:
        TrainingError: If a number is not finite, or not in the dtype to store.
    """
    stored: dict[str, Tensor] = {}
    for output in content.outputs:
        rows = outputs[output.name][chosen]
        if output.per_position:
            assert counts is not None
            rows = rows[counts[chosen]]
        for part, tensor in _parts(rows.float(), content).items():
            dtype, _ = content.names(output)[part]
            cast = tensor.to(getattr(torch, dtype))
            if not bool(cast.isfinite().all()):
                raise TrainingError(_not_finite(output.name, rows, dtype))
            stored[f"{output.name}.{part}"] = cast.cpu().contiguous()
    return stored


def _parts(rows: Tensor, content: Content) -> dict[str, Tensor]:
    if content.top_k is None:
        return {"values": rows}
    values, indices = rows.topk(content.top_k, dim=-1)
    rest = rows.scatter(-1, indices, -torch.inf)
    log_rest = torch.stack([(rest / each).logsumexp(-1) for each in content.temperatures], dim=-1)
    return {"values": values, "indices": indices, "log_rest": log_rest}


def _not_finite(name: str, rows: Tensor, dtype: str) -> str:
    if bool(rows.isfinite().all()):
        return (
            f"teacher cache: {name} reaches {float(rows.abs().max()):.3g}, which {dtype} cannot hold. Store with "
            "dtype=torch.float32."
        )
    return (
        f"teacher cache: {name} of the teacher has values that are infinite or not numbers (NaN). Check its weights, "
        "or load it with dtype=torch.float32 and leave autocast out."
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
