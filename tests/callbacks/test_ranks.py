"""What several ranks do together, each a thread here; training on several processes is in ``tests/invariants``."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from thread_ranks import on_ranks, outcomes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import Shard, distribute_tensor

from hf_compress import TrainingError
from hf_compress.callbacks.owned import OwnedTensors
from hf_compress.callbacks.ranks import (
    all_reduce_mean,
    check_parallelism,
    check_same_on_all_ranks,
    elementwise,
    fail_together,
    fingerprint,
    mean_gradients,
    num_ranks,
    on_first_rank,
    warn_of_lost_processes,
)

CPU = torch.device("cpu")


def test_ranks_are_counted_and_their_group_does_not_outlive_them() -> None:
    assert num_ranks() == 1
    assert on_ranks(lambda rank: (rank, num_ranks()), 3) == [(0, 3), (1, 3), (2, 3)]
    assert num_ranks() == 1 and not dist.is_initialized()


def test_a_rank_that_waits_for_another_is_an_error_of_the_test(monkeypatch) -> None:
    monkeypatch.setattr("thread_ranks.SECONDS", 0.2)
    with pytest.raises(AssertionError, match=r"ranks \[1\] still waited"):
        on_ranks(lambda rank: rank and dist.barrier())
    assert on_ranks(lambda rank: rank) == [0, 1]


def test_means_over_ranks_leave_what_they_are_of_alone() -> None:
    def mean(rank: int) -> Any:
        own = torch.tensor([1.0, 10.0]) * (rank + 1)
        return all_reduce_mean(own.requires_grad_()), own

    for found, own in on_ranks(mean, 3):
        assert found.tolist() == [2.0, 20.0]
        assert not found.requires_grad
        assert found is not own
    assert [own[0].item() for _, own in on_ranks(mean, 3)] == [1.0, 2.0, 3.0]
    alone = torch.ones(2)
    assert all_reduce_mean(alone) is alone


@pytest.mark.parametrize(("operation", "expected"), [("min", [0.0, -1.0]), ("max", [1.0, 0.0]), ("sum", [1.0, -1.0])])
def test_elementwise(operation, expected) -> None:
    def joined(rank: int) -> Any:
        own = torch.tensor([1.0 * rank, -1.0 * rank])
        return elementwise(own, operation).tolist(), own.tolist()

    assert on_ranks(joined) == [(expected, [0.0, 0.0]), (expected, [1.0, -1.0])]
    alone = torch.ones(2)
    assert torch.equal(elementwise(alone, operation), alone)
    assert elementwise(alone, operation) is not alone


LIKE = {"everywhere": torch.zeros(2, 2), "on one": torch.zeros(3), "nowhere": torch.zeros(()), "zero": torch.zeros(1)}


def gradients_of(rank: int) -> dict[str, torch.Tensor | None]:
    return {
        "everywhere": torch.full((2, 2), 2.0 * rank),
        "on one": torch.tensor([2.0, 4.0, 6.0]) if rank else None,
        "nowhere": None,
        "zero": torch.zeros(1),
    }


def test_gradients_are_averaged_and_who_has_none_counts_as_zero() -> None:
    for found in on_ranks(lambda rank: mean_gradients(gradients_of(rank), LIKE)):
        assert list(found) == list(LIKE)
        assert torch.equal(found["everywhere"], torch.ones(2, 2))
        assert torch.equal(found["on one"], torch.tensor([1.0, 2.0, 3.0]))
        assert found["nowhere"] is None
        assert torch.equal(found["zero"], torch.zeros(1))


def test_gradients_of_one_rank_and_of_nothing_are_themselves() -> None:
    alone = gradients_of(1)
    found = mean_gradients(alone, LIKE)
    assert found == alone and found is not alone
    assert on_ranks(lambda rank: mean_gradients({}, {})) == [{}, {}]


def test_tensors_that_a_callback_owns_move_alike_on_all_ranks() -> None:
    def moved(rank: int) -> Any:
        owned, tensor = OwnedTensors(), torch.zeros(2, requires_grad=True)
        owned.add("owned", tensor, 0.5)
        # Adam's first step is as long whatever the gradient, so the second must be taken, too.
        for gradient in ([1.0, 3.0], [2.0, -4.0]):
            tensor.grad = torch.tensor(gradient) * 2 * rank
            owned.step(1.0)
            assert tensor.grad is None
        return tensor.detach()

    first, second = on_ranks(moved)
    alone = OwnedTensors()
    tensor = torch.zeros(2, requires_grad=True)
    alone.add("owned", tensor, 0.5)
    for gradient in ([1.0, 3.0], [2.0, -4.0]):
        tensor.grad = torch.tensor(gradient)
        alone.step(1.0)
    assert torch.equal(first, second) and torch.equal(first, tensor.detach())


@pytest.mark.parametrize("name", ["a tensor", "a text"])
@pytest.mark.parametrize("of_rank", [0, 1])
def test_differences_are_an_error_on_every_rank(name, of_rank) -> None:
    def check(rank: int) -> None:
        values = {"same": torch.ones(2), "a tensor": torch.ones(2), "a text": "one", "last": "x"}
        if rank == of_rank:
            values[name] = torch.tensor([1.0, 2.0]) if name == "a tensor" else "two"
        check_same_on_all_ranks(values, "masks", CPU)

    for error in outcomes(check):
        assert isinstance(error, TrainingError)
        assert f"masks differ between the 2 processes (first difference: {name!r})" in str(error)


def test_the_same_everywhere_is_no_error() -> None:
    values = {"a": torch.arange(5), "b": "text", "c": torch.ones(2, 3).t()}
    assert on_ranks(lambda rank: check_same_on_all_ranks(values, "masks", CPU)) == [None, None]
    assert on_ranks(lambda rank: check_same_on_all_ranks({"of the rank": str(rank)}, "masks", CPU), 1) == [None]


def test_an_error_on_some_ranks_is_one_on_all() -> None:
    def work(rank: int) -> str:
        with fail_together(CPU):
            if rank in (1, 3):
                raise KeyError(f"rank {rank}")
        return "went on"

    alone, failed = outcomes(work)
    assert isinstance(alone, TrainingError) and isinstance(failed, KeyError)
    first, second, third, fourth = outcomes(work, 4)
    assert isinstance(second, KeyError) and second.args == ("rank 1",)
    assert isinstance(fourth, KeyError) and fourth.args == ("rank 3",)
    for error in (first, third):
        assert isinstance(error, TrainingError)
        assert "the process of rank 1, 3 failed; its own message says why" in str(error)


def test_without_an_error_all_ranks_go_on() -> None:
    def work(rank: int) -> str:
        with fail_together(CPU):
            pass
        return f"{rank} went on"

    assert on_ranks(work) == ["0 went on", "1 went on"]
    with pytest.raises(KeyError), fail_together(CPU):
        raise KeyError


def test_the_first_rank_works_for_all() -> None:
    called = []

    def work(rank: int) -> Any:
        return on_first_rank(lambda: called.append(rank) or {"found": rank})

    assert on_ranks(work, 3) == [{"found": 0}] * 3
    assert called == [0]
    assert on_first_rank(lambda: 5) == 5


def test_an_error_of_the_first_rank_reaches_all() -> None:
    def fail() -> None:
        raise KeyError("budget")

    first, second = outcomes(lambda rank: on_first_rank(fail))
    assert isinstance(first, KeyError)
    assert isinstance(second, TrainingError)
    assert "the process of rank 0 failed: KeyError('budget')" in str(second)
    with pytest.raises(KeyError):
        on_first_rank(fail)


def test_a_fingerprint_tells_names_values_and_facts_apart() -> None:
    tensor, facts = torch.arange(6.0).view(2, 3), {"b": 1, "a": 2}
    known = fingerprint({"weight": tensor}, facts)
    assert known == fingerprint({"weight": tensor.clone()}, {"a": 2, "b": 1})
    others = [({"bias": tensor}, facts), ({"weight": tensor.t()}, facts), ({"weight": tensor}, {**facts, "a": 3})]
    assert len({known, *(fingerprint(*other) for other in others)}) == 4
    (digest,) = json.loads(known)[0].values()
    assert 0 <= digest < 2**56  # so that its negative is an int64, too


def trainer_of(model: Any, *, fsdp: Any = None, parallelism: Any = None, **attributes: Any) -> Any:
    accelerator = SimpleNamespace(parallelism_config=parallelism, state=SimpleNamespace(fsdp_plugin=fsdp))
    return SimpleNamespace(model=model, accelerator=accelerator, is_fsdp_enabled=fsdp is not None, **attributes)


def linear(**attributes: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    vars(model).update(attributes)
    return model


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (trainer_of(linear(tp_size=2)), r"tp_size \(tensor parallelism\) is 2: .* Use DDP or FSDP version 2"),
        (trainer_of(linear(), parallelism=SimpleNamespace(tp_size=4)), r"tp_size \(tensor parallelism\) is 4"),
        (trainer_of(linear(), parallelism=SimpleNamespace(cp_size=2)), r"cp_size \(context parallelism\) is 2"),
        (trainer_of(linear(), parallelism=SimpleNamespace(sp_size=3)), r"sp_size \(sequence parallelism\) is 3"),
        (trainer_of(linear(is_distributed_loading_by_transformers=True)), "was sharded by from_pretrained"),
        (trainer_of(linear(), is_distributed_loading_by_transformers=True), "was sharded by from_pretrained"),
        (trainer_of(linear(), fsdp=SimpleNamespace(cpu_offload=CPUOffloadPolicy())), "Set offload_params to false"),
    ],
)
def test_other_ways_to_share_a_model_are_refused(trainer, message) -> None:
    with pytest.raises(TrainingError, match=message):
        check_parallelism(trainer)


@pytest.mark.parametrize(
    "trainer",
    [
        trainer_of(linear()),
        trainer_of(linear(tp_size=None)),
        trainer_of(linear(tp_size=1), parallelism=SimpleNamespace(tp_size=1, cp_size=None, sp_size=1)),
        trainer_of(linear(), parallelism=SimpleNamespace(tp_size=None, cp_size=1, sp_size=None)),
        trainer_of(linear(is_distributed_loading_by_transformers=False)),
        trainer_of(linear(), fsdp=SimpleNamespace(cpu_offload=None)),
    ],
)
def test_the_trainers_own_ways_to_share_a_model_are_not(trainer) -> None:
    check_parallelism(trainer)


def test_sharded_parameters_need_the_trainers_fsdp() -> None:
    def check(fsdp: Any) -> list[Any]:
        def check_sharded(rank: int) -> None:
            model = linear()
            mesh = init_device_mesh("cpu", (2,))
            model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
            check_parallelism(trainer_of(model, fsdp=fsdp))

        return outcomes(check_sharded)

    assert check(SimpleNamespace(cpu_offload=None)) == [None, None]
    for error in check(None):
        assert isinstance(error, TrainingError)
        assert "parameter 'weight' is a DTensor, but the Trainer does not run FSDP" in str(error)


LAUNCHED = {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        (LAUNCHED, True),
        ({"ACCELERATE_USE_CPU": "true"}, False),
        ({"MASTER_PORT": "29500"}, False),
        ({**LAUNCHED, "WORLD_SIZE": "1"}, False),
        ({**LAUNCHED, "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({}, False),
    ],
)
def test_processes_that_a_launcher_did_not_start_are_missed(environment, warns, monkeypatch, caplog) -> None:
    for name in (*LAUNCHED, "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    warn_of_lost_processes()
    assert ("a single process is training" in caplog.text) == warns
    caplog.clear()
    on_ranks(lambda rank: warn_of_lost_processes())
    assert caplog.text == ""
