"""Fixed pairs of layers."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compress import ConfigError
from hf_compress.distillation.pairing import RULES, pair_layers

depths = st.integers(1, 40)


def test_the_pairs_of_common_depths() -> None:
    assert pair_layers("same", 3, 3) == ((0, 0), (1, 1), (2, 2))
    assert pair_layers("uniform", 6, 12) == ((0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11))
    assert pair_layers("uniform", 5, 12) == ((0, 1), (1, 4), (2, 6), (3, 9), (4, 11))
    assert pair_layers("uniform", 4, 2) == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert pair_layers("last", 4, 12) == ((3, 11),)
    assert pair_layers({3: -1, 0: 2, -3: 2}, 4, 12) == ((0, 2), (1, 2), (3, 11))


@given(num_student=depths, num_teacher=depths)
def test_uniform_pairs_are_in_order_as_equally_spaced_as_whole_layers_can_be(
    num_student: int, num_teacher: int
) -> None:
    pairs = pair_layers("uniform", num_student, num_teacher)
    assert [student for student, _ in pairs] == list(range(num_student))
    teachers = [teacher for _, teacher in pairs]
    assert teachers == sorted(teachers)
    assert teachers[-1] == num_teacher - 1
    for student, teacher in pairs:
        exact = Fraction((student + 1) * num_teacher, num_student) - 1
        assert 0 <= teacher < num_teacher
        assert abs(teacher - exact) <= Fraction(1, 2) or (teacher == 0 and exact < 0)
    if num_student == num_teacher:
        assert pairs == pair_layers("same", num_student, num_teacher)
    if num_student <= num_teacher:
        assert len(set(teachers)) == num_student


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_pairs_the_only_layers_there_are(rule: str) -> None:
    assert pair_layers(rule, 1, 1) == ((0, 0),)


@pytest.mark.parametrize(
    ("how", "num_student", "num_teacher", "message"),
    [
        ("same", 3, 4, "3 layers, the teacher 4; it needs equal depths"),
        ("unifrom", 3, 4, "closest match: 'uniform'"),
        ("uniform", 0, 4, "the student has 0 layers"),
        ("uniform", 3, True, "the teacher has True layers"),
        ({}, 3, 4, "no layers are given"),
        ({3: 0}, 3, 4, "the student has 3 layers, and no layer 3; allowed: ints from -3 to 2"),
        ({0: -5}, 3, 4, "the teacher has 4 layers, and no layer -5"),
        ({0: True}, 3, 4, "no layer True"),
        ({2: 0, -1: 1}, 3, 4, "given twice"),
        ({"0": 1}, 3, 4, "no layer '0'"),
    ],
)
def test_what_does_not_fit_is_refused(how: Any, num_student: int, num_teacher: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair_layers(how, num_student, num_teacher)
