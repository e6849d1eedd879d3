"""Learned methods against sampling, autograd, torch's own Adam, and problems whose solution is known."""

import math

import pytest
import torch
from evidence import GivenEvidence, random_evidence

from hf_compress import ConfigError, PruningConfig
from hf_compress.pruning.learned.adam import adam_step
from hf_compress.pruning.learned.l0 import clipped_mean, density, gate
from hf_compress.pruning.method import Setting
from hf_compress.registry import criteria


def made(name, sparsity=None, **options):
    method = criteria.get(name)
    return method(method.options.from_dict(options), Setting(seed=0, sparsity=sparsity))


def pushing(gradient) -> GivenEvidence:
    """Evidence whose gate gradients are given."""
    weights = torch.ones(len(gradient), 1)
    return GivenEvidence(weights, torch.as_tensor(gradient)[:, None], torch.ones(1), torch.ones(1))


def test_adam_is_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    tensors = {"x": start.clone()}
    for _ in range(6):
        parameter.grad = torch.randn(5, generator=generator)
        adam_step(tensors, "x", parameter.grad, 0.1)
        optimizer.step()
    torch.testing.assert_close(tensors["x"], parameter.detach())


def test_movement_scores_move_against_the_gate_gradient() -> None:
    """Straight through: a score falls where more of the unit raises the loss."""
    method = made("movement")
    method.start("layer", pushing([1.0, -1.0, 0.0]))
    method.step("layer", pushing([1.0, -1.0, 0.0]))
    torch.testing.assert_close(method.score("layer", None), torch.tensor([-0.01, 0.01, 0.0]))


def test_the_penalty_of_soft_movement_is_the_gradient_of_the_mean_sigmoid() -> None:
    soft, plain = made("movement", mode="soft", regular_scale=4.0), made("movement")
    evidence = random_evidence(0)
    for method in (soft, plain):
        method.start("layer", evidence)
        method.share = 0.5
        method.tensors["layer"].copy_(torch.linspace(-1, 1, 7))
    scores = torch.linspace(-1, 1, 7, requires_grad=True)
    (4.0 * 0.5 * torch.sigmoid(scores).mean()).backward()
    soft.step("layer", evidence)
    expected = {"layer": torch.linspace(-1, 1, 7)}
    adam_step(expected, "layer", evidence.gate_gradients() + scores.grad, 1e-2)
    torch.testing.assert_close(soft.tensors["layer"], expected["layer"])


def test_soft_movement_lets_more_go_the_larger_the_penalty() -> None:
    kept = []
    for scale in (0.0, 60.0, 1000.0):
        method = made("movement", mode="soft", regular_scale=scale, learning_rate=0.1)
        generator = torch.Generator().manual_seed(0)
        evidence = [pushing(torch.randn(50, generator=generator)) for _ in range(60)]
        method.start("layer", evidence[0])
        method.share = 1.0
        for each in evidence:
            method.step("layer", each)
        kept.append(int((method.score("layer", None) >= method.threshold(1.0)).sum()))
    assert kept[0] == 50 and kept[0] > kept[1] > kept[2]


def test_the_expected_density_of_hard_concrete_gates_is_what_sampling_gives() -> None:
    logits = torch.tensor([-3.0, -1.0, 0.0, 0.7, 2.5])
    noise = torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    samples = gate(logits, noise)
    torch.testing.assert_close((samples > 0).float().mean(0), density(logits), atol=4e-3, rtol=0)
    assert (samples == 1).any() and (samples == 0).any() and samples.min() >= 0 and samples.max() <= 1
    assert clipped_mean(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_l0_logits_follow_the_gradient_through_the_sampled_gate() -> None:
    method = made("l0", sparsity=0.5)
    evidence = random_evidence(0)
    method.start("layer", evidence)
    before = method.tensors["layer"].clone()
    sampled, mean = method.factors("layer")
    assert torch.equal(sampled, method.factors("layer")[0])  # until the step is over
    noise = method._noise("layer")
    logits = before.clone().requires_grad_()
    (gate(logits, noise) * evidence.gate_gradients()).sum().backward()
    method.step("layer", evidence)
    method.end_step()
    expected = {"layer": before}
    adam_step(expected, "layer", logits.grad, 1e-2)
    torch.testing.assert_close(method.tensors["layer"], expected["layer"])
    assert not torch.equal(noise, method._noise("layer"))
    torch.testing.assert_close(mean, clipped_mean(torch.full((7,), 2.5)))


def test_the_multipliers_of_l0_drive_the_expected_sparsity_to_the_target() -> None:
    method = made("l0", sparsity=0.6, learning_rate=0.05, multiplier_rate=1.0)
    generator = torch.Generator().manual_seed(0)
    steps = [pushing(0.01 * torch.randn(40, generator=generator)) for _ in range(400)]
    method.start("layer", steps[0])
    method.share = 1.0
    for each in steps:
        method.step("layer", each)
        method.end_step()
    assert float(method.expected_sparsity()) == pytest.approx(0.6, abs=0.05)


def test_l0_moves_nothing_where_any_gradient_is_not_finite() -> None:
    method = made("l0", sparsity=0.5)
    for name in ("one", "other"):
        method.start(name, pushing([1.0] * 50))
    before = {name: tensor.clone() for name, tensor in method.tensors.items()}
    method.share = 1.0
    for gradient in (math.inf, 1.0):
        method.step("one", pushing([1.0] * 50))
        method.step("other", pushing([gradient] * 50))
        method.end_step()
        moved = [name for name, tensor in before.items() if not torch.equal(tensor, method.tensors[name])]
        where = {"one", "other", "one/linear", "one/quadratic"} if gradient == 1.0 else set()
        assert {name for name in moved if not name.endswith("draws")} == where


def test_l0_reads_nothing_back_from_the_device() -> None:
    """Tensors without values cannot be read: what does not fail on them does not wait for a device."""
    method = made("l0", sparsity=0.5)
    evidence = GivenEvidence(*(torch.empty(shape, device="meta") for shape in ((4, 1), (4, 1), (4,), (4,))))
    method.start("layer", evidence)
    for _ in range(2):
        method.step("layer", evidence)
        method.end_step()
        training, evaluation = method.factors("layer")
        assert training.device == evaluation.device == method.score("layer", evidence).device == torch.device("meta")


def test_slim_factors_shrink_where_the_loss_does_not_hold_them() -> None:
    method = made("slim", regular_scale=0.1, learning_rate=0.05)
    evidence = pushing([0.0, -1.0])
    method.start("layer", evidence)
    for _ in range(15):
        method.step("layer", evidence)
    shrunk, held = method.score("layer", evidence).tolist()
    assert shrunk < 0.5 and held > 1
    method.over = True
    before = method.tensors["layer"].clone()
    method.step("layer", evidence)
    assert torch.equal(before, method.tensors["layer"])


def test_admm_finds_the_sparse_solution_of_a_quadratic_loss() -> None:
    """min 1/2 ||w - t||^2 with two units of four: those of the largest norm, unchanged."""
    target = torch.tensor([[3.0, 0.0], [0.1, 0.1], [0.0, -2.0], [0.2, 0.0]])
    evidence = random_evidence(0, num_units=4, width=2)
    evidence.given_weights = torch.zeros(4, 2)
    method = made("admm", rho=0.5)
    method.start("layer", evidence)
    for step in range(400):
        pull = method.pull("layer", evidence)
        gradient = evidence.given_weights - target + (0.0 if pull is None else pull)
        evidence.given_weights = evidence.given_weights - 0.1 * gradient
        if step % 10 == 9:
            keep = torch.zeros(4, dtype=torch.bool)
            keep[method.score("layer", evidence).topk(2).indices] = True
            method.project("layer", evidence, keep)
    expected = target * torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    torch.testing.assert_close(evidence.given_weights, expected, atol=0.02, rtol=0)
    method.over = True
    assert method.pull("layer", evidence) is None


@pytest.mark.parametrize(
    ("criterion", "options", "message"),
    [
        ("movement", {"mode": "harder"}, "closest match: 'hard'"),
        ("movement", {"threshold": 0.3}, 'with mode="hard", where it has no effect'),
        ("movement", {"learning_rate": 0}, "learning_rate: got 0"),
        ("l0", {"multiplier": 1}, "unknown key 'multiplier'; closest match: 'multiplier_rate'"),
        ("admm", {"rho": -1}, "rho: got -1"),
        ("l2", {"rho": 1}, "unknown key 'rho'"),
    ],
)
def test_bad_options_are_refused(criterion, options, message) -> None:
    with pytest.raises(ConfigError, match=f"options for criterion '{criterion}'.*{message}"):
        PruningConfig(structures={"ffn": 0.5}, criterion=criterion, options=options)


@pytest.mark.parametrize(("name", "options"), [("slim", {}), ("l0", {}), ("movement", {"mode": "soft"})])
def test_what_is_learned_from_no_gradients_is_nothing(name, options) -> None:
    """A penalty alone moves all units alike."""
    known = []
    for gradient in ([0.0, 0.0, 0.0], [math.nan, 1.0, 2.0], [0.1, -0.2, 0.3]):
        method = made(name, 0.5, **options)
        method.start("layer", pushing(gradient))
        method.share = 0.5
        for _ in range(3):
            method.step("layer", pushing(gradient))
            if name == "l0":
                method.end_step()
        known.append(method.knows("layer"))
    assert known == [False, False, True]
