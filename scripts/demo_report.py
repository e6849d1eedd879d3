"""What the demo shows: a reload in a fresh process, one table, model cards."""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import demo_data
import torch
from demo_settings import Settings
from demo_task import EVALUATION_BATCH, Task, accuracy, evaluation_batches, predict
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.export.card import write_card
from hf_compress.latency.timing import compile_model
from hf_compress.report.compare import Comparison, compare
from hf_compress.report.results import Results

DENSE, SMALL, INT8 = "dense", "compressed fp32", "compressed int8, compiled"
console = Console()


@torch.no_grad()
def reloads_bit_identically(model: PreTrainedModel, folder: Path, inputs: dict[str, Tensor]) -> bool:
    """Load the folder in a fresh process and compare its logits with the model's, bit for bit."""
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, given)
        script = Path(__file__).with_name("demo_reload.py")
        subprocess.run([sys.executable, str(script), str(folder), str(given), str(found)], check=True)
        return torch.equal(load_file(found)["logits"], model.eval()(**inputs).logits)


def measure(
    dense: PreTrainedModel,
    folders: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_length: int,
) -> Comparison:
    """Evaluate and time the dense model and what lies in the folders."""
    batches = list(evaluation_batches(task.test, tokenizer, max_length))
    full = batches[0][0]
    inputs = {
        "batch 1": {name: tensor[:1] for name, tensor in full.items()},
        f"batch {EVALUATION_BATCH}": full,
    }
    small, quantized = (AutoModelForSequenceClassification.from_pretrained(folders[n]) for n in (SMALL, INT8))
    console.print("compiling the int8 model for two batch sizes; takes a minute or two, less the next time")
    with console.status("compiling"):
        compiled, reason = compile_model(quantized.eval(), list(inputs.values()))
    notes = [f"batches of real {task.test_split} examples, padded to {max_length} tokens"]
    if reason is not None:
        notes.append(f"int8 runs without torch.compile, so its latency means little: {reason}")
    others = {INT8: quantized if compiled is None else compiled}
    with console.status("measuring") as status:
        table = compare(
            dense,
            small,
            others=others,
            names=(DENSE, SMALL),
            inputs=inputs,
            directories={name: str(folder) for name, folder in folders.items()},
            notes=notes,
            progress=lambda line: status.update(f"measuring: {line}"),
        )
    scores = {}
    for name, model in {DENSE: dense.eval(), SMALL: small.eval(), **others}.items():
        scores[name] = accuracy(predict(model, batches, f"evaluating {name}"), task.test)
    return table.with_metric("accuracy (%)", scores)


def write_results(
    settings: Settings,
    task: Task,
    table: Comparison,
    folders: dict[str, Path],
    kept: dict[str, Any],
    training: dict[str, Any],
    checks: list[str],
) -> None:
    """Write results, picture and card into each model's folder."""
    base = settings.model or demo_data.MODEL_NAME
    local = settings.model is not None and Path(settings.model).exists()
    own_data = settings.dataset is None
    for name, folder in folders.items():
        results = Results(
            name=f"{Path(base).name} compressed{', int8' if name == INT8 else ''}",
            model=name,
            base_model=base,
            base_model_on_hub=not local,
            auto_class="AutoModelForSequenceClassification",
            processor_class="AutoTokenizer",
            requires="hf-compress[int8]" if name == INT8 else "hf-compress",
            task="text-classification",
            dataset=demo_data.DATASET_NAME if own_data else str(settings.dataset),
            dataset_id=None if own_data or Path(str(settings.dataset)).exists() else settings.dataset,
            evaluation_split=task.test_split,
            num_evaluation_examples=len(task.test),
            license="apache-2.0" if settings.model is None else None,
            language="en" if own_data else None,
            comparison=table.to_dict(),
            kept=kept,
            recipe=settings.recipe().to_dict(),
            training={**dataclasses.asdict(settings), **training},
            checks=tuple(checks),
        )
        write_card(folder, results)


def show(table: Comparison) -> None:
    """Print the comparison."""
    header, *rows = table.rows()
    view = Table(*header, title="dense against compressed")
    for column in view.columns[1:]:
        column.justify = "right"
    for row in rows:
        view.add_row(*row)
    console.print(view)
    for note in table.notes:
        console.print(f"note: {note}")
