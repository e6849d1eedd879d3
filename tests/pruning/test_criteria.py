import torch

from hf_compress.registry import criteria


def test_taylor_is_the_size_of_the_gate_gradient() -> None:
    assert criteria.get("taylor").score(torch.tensor([-2.0, 0.5])).tolist() == [2.0, 0.5]


def test_l2_is_the_norm_of_a_units_weights() -> None:
    assert criteria.get("l2").score(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist() == [5.0, 1.0]
