"""The dense model as an ONNX file, for the engines that read one."""

from pathlib import Path

import torch
from common import Job, collate, unlabeled


def to_onnx(job: Job, path: Path) -> None:
    """Export by torch, for any number of examples and tokens."""
    model = job.dense()
    example = unlabeled(collate(job.rows("test")[:2]))
    batch, tokens = torch.export.Dim("batch", min=1, max=1024), torch.export.Dim("tokens", min=2, max=512)
    shapes = {name: {0: batch, 1: tokens} for name in example}
    model.config.return_dict = False
    program = torch.onnx.export(model, (), kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    program.save(str(path))
