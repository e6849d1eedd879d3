"""Every registered criterion obeys the same laws."""

import pytest
import torch

from hf_compress.registry import criteria

EVIDENCE = {
    "gate_gradients": lambda g: torch.randn(7, generator=g),
    "weights": lambda g: torch.randn(7, 12, generator=g),
}


@pytest.fixture(params=sorted(criteria))
def criterion(request):
    return criteria.get(request.param)


@pytest.fixture
def evidence(criterion):
    return EVIDENCE[criterion.needs](torch.Generator().manual_seed(0))


def test_one_finite_non_negative_score_a_unit(criterion, evidence) -> None:
    scores = criterion.score(evidence)
    assert scores.shape == (7,)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()


def test_units_that_change_places_keep_their_scores(criterion, evidence) -> None:
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    assert torch.equal(criterion.score(evidence)[order], criterion.score(evidence[order]))


def test_nothing_in_nothing_out(criterion, evidence) -> None:
    assert torch.equal(criterion.score(torch.zeros_like(evidence)), torch.zeros(7))


def test_larger_evidence_never_lowers_a_score(criterion, evidence) -> None:
    assert (criterion.score(evidence * 2) >= criterion.score(evidence)).all()
