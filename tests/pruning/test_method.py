"""What methods have in common: averages over steps."""

from dataclasses import dataclass

import pytest
import torch

from hf_compress.pruning.method import SHORT, AveragedMethod, MethodOptions, Setting

SIZES = {"short": (3,), "matrix": (2, 5), "long": (SHORT + 1,)}


@dataclass
class Given:
    value: torch.Tensor


class Copied(AveragedMethod):
    def measure(self, evidence):
        return evidence.value


def stepped(method: Copied, values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        method.step(name, Given(value))
    method.end_step()


@pytest.fixture
def steps() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(size, generator=generator) for name, size in SIZES.items()} for _ in range(3)]


def test_layers_are_averaged_each_for_itself(steps) -> None:
    method = Copied(MethodOptions(), Setting(score_decay=0.75))
    expected = {name: torch.zeros(size) for name, size in SIZES.items()}
    for values in steps:
        stepped(method, values)
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in values.items()}
    assert method.tensors.keys() == SIZES.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(method.tensors[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", list(SIZES))
def test_a_step_with_numbers_that_are_not_finite_is_left_out(steps, bad) -> None:
    method = Copied(MethodOptions(), Setting(score_decay=0.75))
    stepped(method, steps[0])
    before = {name: tensor.clone() for name, tensor in method.tensors.items()}
    broken = dict(steps[1])
    broken[bad] = broken[bad].clone()
    broken[bad].flatten()[1] = float("nan")
    stepped(method, broken)
    for name, tensor in before.items():  # of this layer alone
        assert torch.equal(method.tensors[name], tensor) == (name == bad)
    stepped(method, steps[2])
    assert all(torch.isfinite(tensor).all() for tensor in method.tensors.values())


def test_layers_that_did_not_run_keep_their_average(steps) -> None:
    method = Copied(MethodOptions(), Setting(score_decay=0.75))
    stepped(method, steps[0])
    before = method.tensors["matrix"].clone()
    stepped(method, {"short": steps[1]["short"]})
    assert torch.equal(method.tensors["matrix"], before)
    assert not torch.equal(method.tensors["short"], 0.25 * steps[0]["short"])


def test_a_first_step_counts_from_zero_whatever_the_precision(steps) -> None:
    method = Copied(MethodOptions(), Setting(score_decay=0.5))
    values = {"half": torch.ones(4, dtype=torch.bfloat16), "double": torch.ones(2, dtype=torch.float64)}
    stepped(method, values)
    assert {name: (each.dtype, each.tolist()) for name, each in method.tensors.items()} == {
        "half": (torch.bfloat16, [0.5] * 4),
        "double": (torch.float64, [0.5] * 2),
    }
