"""All export formats by name."""

from hf_compress.errors import ExportError, choices
from hf_compress.export.formats.base import Format
from hf_compress.export.formats.compressed_tensors import CompressedTensors
from hf_compress.export.formats.dense import Dense
from hf_compress.export.formats.onnx import Onnx
from hf_compress.export.formats.torchao import TorchAo

FORMATS: dict[str, Format] = {each.name: each for each in (TorchAo(), CompressedTensors(), Onnx(), Dense())}
"""Name -> format."""


def find_format(name: str) -> Format:
    """Return a format.

    Raises:
        ExportError: If there is none of that name.
    """
    if name not in FORMATS:
        raise ExportError(f"export_quantized: unknown format {name!r}; {choices(name, FORMATS)}.")
    return FORMATS[name]
