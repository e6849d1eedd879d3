import itertools

import pytest

from hf_compress.schedule import progress_at, schedules, to_steps


@pytest.mark.parametrize("name", sorted(schedules))
def test_every_schedule_ends_at_one_and_never_falls(name) -> None:
    curve = schedules.get(name)
    values = [curve(i / 20) for i in range(21)]
    assert values[-1] == 1.0
    assert all(0 <= a <= b <= 1 for a, b in itertools.pairwise(values))


def test_cubic_is_the_published_curve() -> None:
    """Zhu and Gupta 2017, eq. 1, with initial sparsity 0, final sparsity 1, n * dt = 10."""
    for t in range(11):
        assert schedules.get("cubic")(t / 10) == pytest.approx(1 + (0 - 1) * (1 - t / 10) ** 3)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (99, 1.0)])
def test_progress(step, expected) -> None:
    assert progress_at(step, 10, 20) == expected


def test_an_empty_window_is_over_at_its_end() -> None:
    assert [progress_at(step, 5, 5) for step in (4, 5)] == [0.0, 1.0]


def test_floats_are_fractions_and_ints_are_steps() -> None:
    assert [to_steps(when, 300) for when in (1, 1.0, 0.5, 0)] == [1, 300, 150, 0]
