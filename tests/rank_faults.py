"""Checkpoints of two ranks, and ranks that differ or fail: ``test_ranks.py`` starts this under torchrun."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import rank_runs
import torch
import torch.distributed as dist
from rank_runs import NO_DROPOUT, examples, keep, make_trainer, pruning, rank
from tiny_models import bert, llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import DistributedConfig, LlamaForCausalLM, TrainerCallback

from hf_compress import PruningCallback, QuantizationCallback, QuantizationConfig, TargetError, TrainingError
from hf_compress.callbacks import base
from hf_compress.instruments.pruner_state import scores_of
from hf_compress.registry import criteria

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "barrier",
    "reduce",
)


def trainer_with(callbacks: list[Any], folder: Path, others: Any = (), **args: Any) -> Any:
    trainer, _ = make_trainer(bert(**NO_DROPOUT), examples("bert"), callbacks, folder, **args)
    for other in others:
        trainer.add_callback(other)
    return trainer


@contextlib.contextmanager
def raises(kind: type[Exception], *texts: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert type(error) is kind, repr(error)
        assert all(text in str(error) for text in texts), error
    else:
        raise AssertionError(f"rank {rank()}: nothing was raised; expected {kind.__name__}: {texts}")


class WritesAgainOnOneRank(TrainerCallback):
    """Writes the state on rank 0 alone, as the Trainer does, where any exchange between ranks would never end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.times = folder, 0
        self.trainer: Any = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if rank() != 0:
            return
        with contextlib.ExitStack() as stack:
            for name in COLLECTIVES:
                stack.enter_context(mock.patch.object(dist, name, side_effect=AssertionError(name)))
            base._write(self.trainer, self.folder / f"checkpoint-{state.global_step}")
        self.times += 1


def check_resuming(folder: Path) -> None:
    """Adam and dropout in single precision: resumed with two ranks == straight with two ranks, bit for bit."""

    def run(name: str, resume: Any = None) -> None:
        teacher = bert(**NO_DROPOUT)
        callbacks = rank_runs.callbacks_for("all", teacher)
        model = bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        args = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}
        trainer, record = make_trainer(model, examples("bert"), callbacks, folder / name, **args)
        again = WritesAgainOnOneRank(folder / name)
        again.trainer = trainer
        trainer.add_callback(again)
        with mock.patch.object(base, "write_state", side_effect=base.write_state) as writes:
            trainer.train(resume_from_checkpoint=resume)
        assert bool(writes.call_count) == (rank() == 0)
        assert bool(again.times) == (rank() == 0)
        keep(trainer, record, folder / name)

    run("straight")
    for step in (1, 3, 5):
        run(f"resumed{step}", str(folder / "straight" / f"checkpoint-{step}"))


def check_other_config(folder: Path) -> None:
    """Both configs are good, but not the same."""
    callback = pruning(structures={"ffn": 0.5 if rank() == 0 else 0.25})
    with raises(TrainingError, "PruningCallback: callbacks, config or state differ", "'config'"):
        trainer_with([callback], folder).train()
    assert callback._pruner is None


def check_other_callbacks(folder: Path) -> None:
    """The second would wait for ever for the other rank, so it is the first that says so."""
    callbacks = [pruning(), QuantizationCallback(QuantizationConfig())][: 2 - rank()]
    with raises(TrainingError, "first difference: 'callbacks'"):
        trainer_with(callbacks, folder).train()


def check_bad_config_everywhere(folder: Path) -> None:
    with raises(TargetError, "'nothing' matches no dimension group"):
        trainer_with([pruning(exclude=("nothing",))], folder).train()


def check_bad_config_on_one_rank(folder: Path) -> None:
    callbacks = [QuantizationCallback(QuantizationConfig()), pruning(exclude=("nothing",) if rank() == 1 else ())]
    kind, text = (TargetError, "'nothing' matches") if rank() == 1 else (TrainingError, "process of rank 1 failed")
    with raises(kind, text):
        trainer_with(callbacks, folder).train()
    assert callbacks[0]._run is None and callbacks[1]._pruner is None


def check_no_state_on_one_rank(folder: Path) -> None:
    """As where nodes do not share a file system."""
    first = trainer_with([pruning()], folder, save_strategy="steps", save_steps=3)
    first.train()
    original = base.read_state

    def read(path: Path, step: Any) -> Any:
        return original(path if rank() == 0 else path / "missing", step)

    text = "process of rank 1 failed" if rank() == 0 else "no hf_compress_state.json"
    with mock.patch.object(base, "read_state", read), raises(TrainingError, text):
        trainer_with([pruning()], folder).train(resume_from_checkpoint=str(folder / "checkpoint-3"))


def check_missed_target_on_one_rank(folder: Path) -> None:
    def stop(self: Any, run: Any) -> None:
        if rank() == 1:
            raise TargetError("reached 0")

    kind, text = (TargetError, "reached 0") if rank() == 1 else (TrainingError, "process of rank 1 failed")
    with mock.patch.object(PruningCallback, "_stop", stop), raises(kind, text):
        trainer_with([pruning()], folder).train()


def check_other_masks(folder: Path) -> None:
    """Ranks that choose differently are found at the first update, and the group is named."""
    callback = pruning(structures={"ffn": 0.5}, allocation="per_layer")
    method = criteria.get(callback.config.criterion)
    original = method.score

    def score(self: Any, name: str, evidence: Any) -> Any:
        return original(self, name, evidence) * (-1 if rank() == 1 and "layer.1" in name else 1)

    with (
        mock.patch.object(method, "score", score),
        raises(TrainingError, "masks differ between the 2 processes", "'bert.encoder.layer.1.ffn'"),
    ):
        trainer_with([callback], folder).train()


class Gradients(TrainerCallback):
    """Changes gates' gradients on one rank before the callback after it reads them."""

    def __init__(self, callback: PruningCallback, change: Callable[[Any], Any], ranks: tuple[int, ...]) -> None:
        self.callback, self.change, self.ranks = callback, change, ranks

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if rank() in self.ranks:
            gate = next(iter(self.callback._pruner.units.values())).gate
            gate.value.grad = self.change(gate.value.grad)


def changed_gradients(folder: Path, change: Callable[[Any], Any], ranks: tuple[int, ...]) -> PruningCallback:
    callback = pruning()
    trainer = trainer_with([callback], folder)
    trainer.callback_handler.callbacks.insert(0, Gradients(callback, change, ranks))
    trainer.train()
    return callback


def check_numbers_that_are_none_on_one_rank(folder: Path) -> None:
    """NaN on one rank is NaN in the mean: all ranks leave the step out."""
    callback = changed_gradients(folder, lambda gradient: gradient * float("nan"), (1,))
    first, *others = scores_of(callback._pruner).values()
    assert not first.any()
    assert all(other.any() for other in others)


def check_a_gate_that_one_rank_did_not_reach(folder: Path) -> None:
    """It counts as zero there, as a parameter's gradient does in DDP."""
    callback = changed_gradients(folder / "none", lambda gradient: None, (1,))
    zeros = changed_gradients(folder / "zeros", torch.zeros_like, (1,))
    scores, expected = scores_of(callback._pruner), scores_of(zeros._pruner)
    assert all(torch.equal(scores[name], score) for name, score in expected.items())
    with raises(TrainingError, "got no gradient so far"):
        changed_gradients(folder / "both", lambda gradient: None, (0, 1))


def check_refusals(folder: Path) -> None:
    """Models that are spread in another way than the Trainer's FSDP does."""
    trainer, _ = make_trainer(llama(), examples("llama"), [], folder)
    trainer.create_optimizer()
    base.check_setup(trainer)
    llama().save_pretrained(folder / "saved")  # rank 0 writes
    dist.barrier()

    def refused(model: Any, *texts: str) -> None:
        trainer.model = model
        with raises(TrainingError, *texts, "Use DDP or FSDP version 2"):
            base.check_setup(trainer)

    load = functools.partial(LlamaForCausalLM.from_pretrained, folder / "saved")
    refused(load(tp_plan="auto"), "tp_size (tensor parallelism) is 2")
    refused(load(distributed_config=DistributedConfig(fsdp_size=2)), "sharded by from_pretrained(distributed_config=")
    by_hand = llama()
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for layer in by_hand.model.layers:
        parallelize_module(layer.mlp, init_device_mesh("cpu", (2,)), plan)
    refused(by_hand, "gate_proj.weight' is a DTensor")


CHECKS: dict[str, Callable[[Path], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, check in CHECKS.items():
        check(folder / name)
        (folder / f"{name}.rank{rank()}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
