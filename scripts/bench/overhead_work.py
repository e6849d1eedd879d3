"""One measurement of ``overhead.py``, in this process.

usage: overhead_work.py time SHAPE ROUNDS [THREADS]        prints the result as JSON
       overhead_work.py memory SHAPE METHOD [THREADS]
"""

import atexit
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    TeacherCache,
    cache_teacher_outputs,
)
from hf_compress.instruments.attach import attachment_of
from hf_compress.instruments.fake_quantize import quantizable_layers
from hf_compress.instruments.mask import ElementMask

WARMUP = 2
"""Steps that are not measured: the optimizer makes its state in the first."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batches."""

    config: dict[str, int]
    batch_size: int
    length: int

    def model(self, seed: int = 0) -> BertForSequenceClassification:
        """Build the model with random weights."""
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**self.config))

    def data(self, num_batches: int) -> list[dict[str, Tensor]]:
        """Return texts without padding."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 2000, (num_batches * self.batch_size, self.length), generator=generator)
        return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def bert_shape(layers: int, width: int) -> Shape:
    """Return one of the sizes of Turc et al. 2019 (arXiv:1908.08962), heads of 64 channels."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": width // 64}
    return Shape({**sizes, "intermediate_size": 4 * width}, 8, 128)


SHAPES = {
    "BERT-tiny": bert_shape(2, 128),
    "BERT-mini": bert_shape(4, 256),
    "BERT-small": bert_shape(4, 512),
    "BERT-medium": bert_shape(8, 512),
    "BERT-base": bert_shape(12, 768),
    "small": Shape(
        {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}, 16, 64
    ),
    "tiny": Shape({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}, 2, 8),
}
"""The last is for tests."""


class MaskCallback(TrainerCallback):
    """Half of the weights of all Linear layers of the encoder masked, at random."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the masks on."""
        for name, module in quantizable_layers(kwargs["model"]).items():
            if "encoder" in name:
                mask = ElementMask(name, module)
                mask.set_mask(torch.rand(mask.tensor().shape) > 0.5)


PRUNING = PruningConfig(structures={"heads": 0.5, "ffn": 0.5}, criterion="taylor", begin=0.0, end=1.0)
QUANTIZATION = QuantizationConfig(scheme="int8_dynamic", method="qat")
DISTILLATION = DistillationConfig(alpha=0.5, temperature=2.0)


def cached(shape: Shape) -> TeacherCache:
    """Return what a teacher says about all batches, stored in a folder that is gone at the end of the process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    data = DataLoader(shape.data(2), batch_size=shape.batch_size)  # type: ignore[arg-type]
    return cache_teacher_outputs(shape.model(seed=1), data, folder.name)


METHODS: dict[str, Callable[[Shape], list[TrainerCallback]]] = {
    "plain": lambda shape: [],
    "gates": lambda shape: [PruningCallback(PRUNING)],
    "weight masks": lambda shape: [MaskCallback()],
    "int8 QAT": lambda shape: [QuantizationCallback(QUANTIZATION)],
    "distillation": lambda shape: [DistillationCallback(DISTILLATION, shape.model(seed=1))],
    "cached teacher": lambda shape: [DistillationCallback(DISTILLATION, cached(shape))],
}
TEACHER = "teacher forward"
"""Measured beside the methods, as the part of distillation that no implementation can save."""


class Turns:
    """Lets threads take turns, one turn each a round, and times the turns."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        """Wall and CPU time of each turn."""
        self.failed: list[BaseException] = []
        self._changed = threading.Condition()
        self._turn = 0

    def next_name(self) -> str:
        """Return whose turn it is; each round begins with another one, so that nobody always follows the same."""
        number, place = divmod(self._turn, len(self.names))
        return self.names[(number + place) % len(self.names)]

    def wait(self, name: str) -> None:
        """Return when it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self.failed or self.next_name() == name)
        if self.failed:
            raise RuntimeError("another thread failed")

    def done(self) -> None:
        """End the turn."""
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Wait for the turn, time what happens in it, end it."""
        self.wait(name)
        start = time.perf_counter(), time.process_time()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
        self.done()

    def run(self, work: dict[str, Callable[[], None]]) -> None:
        """Run one thread for each."""

        def guarded(each: Callable[[], None]) -> None:
            try:
                each()
            except BaseException as error:  # noqa: BLE001 (raised below, in the main thread)
                with self._changed:
                    self.failed.append(error)
                    self._changed.notify_all()

        threads = [threading.Thread(target=guarded, args=(work[name],)) for name in self.names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]


class TurnCallback(TrainerCallback):
    """Makes each step of a Trainer a turn, from the end of the last step to the end of this one.

    What the Trainer does between steps, and what comes before the first, is done in turns as well.
    """

    def __init__(self, turns: Turns, name: str) -> None:
        self.turns = turns
        self.name = name
        self.open: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the first turn."""
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the turn, and begin the next once it has come."""
        self.open.__exit__(None, None, None)
        if state.global_step < state.max_steps:
            self._begin()

    def _begin(self) -> None:
        self.open = self.turns.turn(self.name)
        self.open.__enter__()


def trainer_for(shape: Shape, method: str, steps: int, folder: str, last: TrainerCallback) -> Trainer:
    """Return a Trainer with the callbacks of the method and, after them, ``last``."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=shape.batch_size,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    callbacks = [*METHODS[method](shape), last]
    return Trainer(shape.model(), arguments, train_dataset=shape.data(2), callbacks=callbacks)


def measure_time(shape: Shape, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Train with every method at once, the steps taking turns; return the wall and CPU time of each step."""
    steps = rounds + WARMUP
    names = [*METHODS, TEACHER]
    turns = Turns(names)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_for(shape, name, steps, folder, TurnCallback(turns, name)) for name in METHODS}
        teacher = shape.model(seed=1).eval()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        teacher.to(device)
        batch = {"input_ids": torch.stack([row["input_ids"] for row in shape.data(1)]).to(device)}

        def teach() -> None:
            with torch.no_grad():
                for _ in range(steps):
                    with turns.turn(TEACHER):
                        teacher(**batch)

        work: dict[str, Callable[[], Any]] = {name: trainer.train for name, trainer in trainers.items()}
        turns.run({**work, TEACHER: teach})
    return {name: turns.seconds[name][WARMUP:] for name in names}


class MemoryCallback(TrainerCallback):
    """Counts the bytes that tensors hold before, within and after the last step."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._kept: dict[int, int] = {}
        self._owned: dict[int, int] = {}
        self._open: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        if state.global_step == state.max_steps - 1:
            gc.collect()
            self.found["steady"] = sum(live_bytes().values())
            self.found["instruments"] = instrument_bytes(kwargs["model"])
            self._owned = live_bytes()
            hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
            self._open = [hooks, CudaMemory() if torch.cuda.is_available() else CpuMemory()]
            for each in self._open:
                each.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the result."""
        if self._open:
            hooks, memory = self._open
            memory.__exit__(None, None, None)
            hooks.__exit__(None, None, None)
            self.found["kept for backward"] = sum(self._kept.values())
            self.found["peak"] = self.found["steady"] + memory.peak

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._owned:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor


class CpuMemory:
    """The most bytes that were held at once beyond what was held on entering, by the profiler's records."""

    def __enter__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profiler: Any = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)
        events = [each for each in self._profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
        held = self.peak = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            held += event.nbytes()
            self.peak = max(self.peak, held)


class CudaMemory:
    """The same for a GPU, by the allocator's own count."""

    def __enter__(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def __exit__(self, *error: Any) -> None:
        self.peak = torch.cuda.max_memory_allocated() - self._before


def live_bytes() -> dict[int, int]:
    """Return the size of every storage that a tensor known to Python has."""
    found = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter) and each.device.type != "meta":  # others have no memory
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def instrument_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the masks and gates that are attached to the model."""
    masks, gates = set(), set()
    for module in model.modules():
        attachment = attachment_of(module)
        if attachment is not None:
            masks |= {attachment.weight_mask} - {None}
            gates |= {factors.gate for factors in attachment.input_gates}
    # Of a gate its value and its gradient; by the callback its scores, float32, and its mask, bool.
    return sum(mask.tensor().nbytes for mask in masks) + sum(gate.value.numel() * (3 * 4 + 1) for gate in gates)


def measure_memory(shape: Shape, method: str) -> dict[str, int]:
    """Train a few steps with one method alone; return bytes."""
    watch = MemoryCallback()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(shape, method, WARMUP + 1, folder, watch)
        trainer.train()
    return watch.found


def main() -> None:
    """Do one measurement in this process and print it."""
    kind, shape, what, *threads = sys.argv[1:]
    logging.set_verbosity_error()
    torch.set_num_threads(int(threads[0]) if threads else 1)
    print(json.dumps(measure_time(SHAPES[shape], int(what)) if kind == "time" else measure_memory(SHAPES[shape], what)))


if __name__ == "__main__":
    main()
