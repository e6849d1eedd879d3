"""Run by the demo in a process of its own: load a saved model and write down its logits.

usage: demo_reload.py MODEL_FOLDER INPUTS.safetensors LOGITS.safetensors
"""

import logging
import sys


def main() -> None:
    """Load, run, write."""
    logging.disable(logging.WARNING)  # before the imports, which warn about kernels for other hardware
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    import hf_compress  # noqa: F401 - registers the loader of models whose layers differ in size

    disable_progress_bar()
    folder, inputs, logits = sys.argv[1:]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        save_file({"logits": model(**load_file(inputs)).logits.contiguous()}, logits)


if __name__ == "__main__":
    main()
