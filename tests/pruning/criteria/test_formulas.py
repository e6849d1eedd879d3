"""Criteria against the loss itself, brute force, or numbers worked out by hand."""

import math

import pytest
import torch
from evidence import GivenEvidence, random_evidence
from torch import nn

from hf_compress.pruning.method import Setting
from hf_compress.registry import criteria

WEIGHTS = torch.tensor([[3.0, -4.0], [0.0, 1.0], [1.0, 1.0]])


def scores_of(name, evidence, decay=0.0, **options):
    method = criteria.get(name)
    method = method(method.options.from_dict(options), Setting(score_decay=decay, seed=0))
    steps = evidence if isinstance(evidence, list) else [evidence]
    method.start("layer", steps[0])
    for each in steps:
        method.step("layer", each)
    return method.score("layer", steps[-1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("l1", [7.0, 1.0, 2.0]), ("l2", [5.0, 1.0, math.sqrt(2)]), ("level", [3.5, 0.5, 1.0])],
)
def test_norms(name, expected) -> None:
    evidence = GivenEvidence(WEIGHTS, WEIGHTS, torch.ones(3), torch.ones(3))
    torch.testing.assert_close(scores_of(name, evidence), torch.tensor(expected))


def test_fpgm_is_the_sum_of_distances_to_all_others() -> None:
    evidence = random_evidence(0)
    w = evidence.given_weights
    expected = torch.tensor([sum(float((a - b).norm()) for b in w) for a in w])
    torch.testing.assert_close(scores_of("fpgm", evidence), expected, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """ReLU units with a quadratic loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        self.x, self.y = torch.randn(20, 4).double(), torch.randn(20, 3).double()

    def loss(self, gate):
        return (self.down(self.up(self.x).relu() * gate) - self.y).square().mean()


def evidence_of(net) -> GivenEvidence:
    gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
    net.zero_grad()
    net.loss(gate).backward()
    weights, gradients = net.down.weight.detach().t(), net.down.weight.grad.t()
    torch.testing.assert_close((weights * gradients).sum(1), gate.grad)  # a gate multiplies all consumers' weights
    return GivenEvidence(weights, gradients, torch.ones(6), torch.ones(6))


def finite_differences(net, step=1e-6):
    ones = torch.ones(6, dtype=torch.float64)
    with torch.no_grad():
        pairs = [(ones - step * unit, ones + step * unit) for unit in torch.eye(6, dtype=torch.float64)]
        return torch.stack([(net.loss(b) - net.loss(a)) / (2 * step) for a, b in pairs])


def test_taylor_is_the_slope_of_the_loss_along_each_gate() -> None:
    net = Net()
    slope = finite_differences(net)
    evidence = evidence_of(net)
    torch.testing.assert_close(scores_of("taylor", evidence), slope.abs(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores_of("taylor2", evidence), slope.square(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores_of("fisher", evidence), slope.square() / 2, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores_of("grain", evidence), slope.abs() * math.tanh(1 / 0.3), rtol=1e-6, atol=1e-8)


def test_taylor_of_weights_adds_up_what_each_single_weight_changes() -> None:
    net = Net()
    evidence = evidence_of(net)
    expected = torch.zeros(6, dtype=torch.float64)
    with torch.no_grad():
        base = net.loss(1.0)
        for unit in range(6):
            for output in range(3):
                kept = float(net.down.weight[output, unit])
                net.down.weight[output, unit] = kept * (1 - 1e-6)
                expected[unit] += float((net.loss(1.0) - base) / 1e-6) ** 2
                net.down.weight[output, unit] = kept
    torch.testing.assert_close(scores_of("taylor_weights", evidence), expected, rtol=1e-4, atol=1e-8)


def test_grain_counts_less_in_empty_layers() -> None:
    full, empty = random_evidence(0), random_evidence(0)
    empty.share_kept = 0.03
    ratio = scores_of("grain", empty, alpha=0.3) / scores_of("grain", full, alpha=0.3)
    torch.testing.assert_close(ratio, torch.full((7,), math.tanh(0.1) / math.tanh(1 / 0.3)))


def test_averages_decay() -> None:
    steps = [random_evidence(seed) for seed in range(3)]
    a, b, c = (each.gate_gradients().abs() for each in steps)
    torch.testing.assert_close(scores_of("taylor", steps, decay=0.5), 0.125 * a + 0.25 * b + 0.5 * c)


def test_wanda_is_magnitude_times_the_norm_of_the_input() -> None:
    evidence = random_evidence(0)
    expected = evidence.given_weights.abs().sum(1) * evidence.inputs.sqrt()
    torch.testing.assert_close(scores_of("wanda", evidence), expected)
    torch.testing.assert_close(criteria.get("wanda").statistic(torch.tensor([-2.0, 3.0])), torch.tensor([4.0, 9.0]))


def test_statistics_of_activations() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert criteria.get("apoz").statistic(x).tolist() == [0, 0, 1]
    assert criteria.get("mean_activation").statistic(x).tolist() == [2, 0, 3]


def test_random_scores_depend_on_seed_and_layer_alone() -> None:
    method = criteria.get("random")

    def draw(seed, layer):
        made = method(method.options(), Setting(seed=seed))
        made.start(layer, random_evidence(0))
        return made.score(layer, random_evidence(1)).tolist()

    assert draw(0, "a") == draw(0, "a")
    assert len({str(draw(*each)) for each in ((0, "a"), (0, "b"), (1, "a"))}) == 3


def test_fpgm_tells_units_apart_that_lie_near_each_other() -> None:
    """Distances from squared norms lose all their digits here."""
    weights = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 1e-3 + 10
    got = scores_of("fpgm", GivenEvidence(weights, weights, torch.ones(64), torch.ones(64)))
    exact = (weights.double()[:, None] - weights.double()[None]).norm(dim=-1).sum(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


def test_fisher_while_training_is_half_of_taylor2() -> None:
    """As its documentation says: gates have gradients of whole steps, not of examples."""
    steps = [random_evidence(seed) for seed in range(3)]
    found = {name: scores_of(name, steps, decay=0.9) for name in ("fisher", "taylor2")}
    torch.testing.assert_close(found["fisher"], found["taylor2"] / 2)
