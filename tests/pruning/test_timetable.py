"""When masks change, and by how much."""

import pytest

from hf_compress import ConfigError, PruningConfig
from hf_compress.pruning.timetable import Timetable
from hf_compress.schedule import ticket_rounds

STRUCTURES = {"heads": 0.5}


def timetable(total=100, epoch=None, **settings) -> Timetable:
    config = PruningConfig(**{"structures": STRUCTURES, "update_every": 10, **settings})
    return Timetable.of(config, config.moments(total, epoch), STRUCTURES["heads"])


def test_a_curve_changes_masks_every_few_steps_and_at_its_end() -> None:
    times = timetable(begin=20, end=45, schedule="linear")
    assert times.updates() == [30, 40, 45]
    assert [times.sparsity(step, 0.5) for step in (0, 20, 30, 45, 100)] == [0, 0, 0.2, 0.5, 0.5]


def test_everything_goes_at_the_start_of_a_one_shot_window() -> None:
    times = timetable(begin=20, end=40, schedule="one_shot")
    assert times.updates() == [20, 30, 40]
    assert [times.sparsity(step, 0.5) for step in (19, 20, 40)] == [0, 0.5, 0.5]


def test_the_initial_sparsity_is_where_the_curve_begins() -> None:
    times = timetable(begin=20, end=40, schedule="linear", initial_sparsity=0.2)
    assert times.updates() == [20, 30, 40]
    assert [round(times.sparsity(step, 0.5), 6) for step in (19, 20, 30, 40)] == [0, 0.2, 0.35, 0.5]
    assert times.sparsity(20, 0.1) == 0.1


def test_milestones_are_steps_up() -> None:
    times = timetable(schedule="steps", milestones=((0.2, 0.5), (60, 1.0)))
    assert (times.begin, times.end, times.updates()) == (20, 60, [20, 60])
    assert [times.sparsity(step, 0.4) for step in (19, 20, 59, 60, 99)] == [0, 0.2, 0.2, 0.4, 0.4]


def test_a_lottery_ticket_loses_the_same_fraction_of_what_is_left_in_every_round() -> None:
    times = timetable(begin=20, end=50, schedule="lottery_ticket", rounds=3)
    assert times.updates() == [30, 40, 50]
    left = [1 - times.sparsity(step, 0.5) for step in (29, 30, 39, 40, 50, 100)]
    assert left == pytest.approx([1, 0.5 ** (1 / 3), 0.5 ** (1 / 3), 0.5 ** (2 / 3), 0.5, 0.5])
    assert ticket_rounds(0, 4, 2, 0.0) == [(2, 0.5), (4, 1.0)]


def test_epochs_are_counted_in_steps() -> None:
    times = timetable(epoch=lambda: 30, begin="0.5 epochs", end="2 epochs")
    assert (times.begin, times.end) == (15, 60)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_the_polynomial_schedule_has_the_power_that_was_asked_for(power) -> None:
    times = timetable(begin=0, end=100, schedule="polynomial", **({} if power == 3.0 else {"power": power}))
    assert times.share(25) == pytest.approx(1 - 0.75**power)


def test_a_window_outside_the_run_is_refused() -> None:
    for wrong in ({"end": 200}, {"begin": 0.9, "end": "0.5 epochs"}, {"schedule": "steps", "milestones": ((200, 1),)}):
        with pytest.raises(ConfigError, match="window of steps"):
            timetable(epoch=lambda: 50, **wrong)


def test_milestones_need_steps_of_their_own() -> None:
    config = PruningConfig(structures={"ffn": 0.8}, schedule="steps", milestones=((0.4, 0.5), (0.45, 1.0)))
    assert [step for step, _ in config.moments(100)] == [40, 45]
    with pytest.raises(ConfigError, match="in a run of 5 optimizer steps they are at steps 2, 2; allowed: each"):
        config.moments(5)


def test_shares_of_milestones_count_from_the_initial_sparsity() -> None:
    config = PruningConfig(
        structures={"ffn": 0.8}, schedule="steps", milestones=((10, 0.5), (20, 1.0)), initial_sparsity=0.4
    )
    times = Timetable.of(config, config.moments(100), 0.8)
    assert [times.sparsity(step, 0.8) for step in (9, 10, 20)] == pytest.approx([0.0, 0.6, 0.8])
