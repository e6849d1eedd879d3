"""Load a saved model as the documentation of Transformers says, in a process that knows nothing of any peer.

usage: reload.py FOLDER [MODULE]      FOLDER holds ``model`` and ``probe.npz``; MODULE is imported first
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from common import logits_of, short
from transformers import AutoModelForSequenceClassification

TOLERANCE = 1e-3


def loaded(folder: Path, module: str | None) -> dict[str, Any]:
    """Return whether it loads and computes what it computed before it was saved."""
    try:
        if module is not None:
            importlib.import_module(module)
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        arrays = dict(numpy.load(folder / "probe.npz"))
        expected = torch.from_numpy(arrays.pop("logits"))
        found = logits_of(model)({name: torch.from_numpy(each) for name, each in arrays.items()})
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the result)
        return {"loads": False, "error": short(error)}
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        return {"loads": False, "error": f"loads, but its outputs differ by {100 * difference:.0f} %"}
    return {"loads": True}


if __name__ == "__main__":
    print(json.dumps(loaded(Path(sys.argv[1]), *sys.argv[2:3] or [None])))
