import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compress import ConfigError
from hf_compress.latency.table import Curve, LatencyTable, interpolate, never_falling

TABLE = LatencyTable(
    key={"device": "cpu", "threads": "2"},
    base=1.0,
    curves=(
        Curve(members=(("a",), ("b",)), kept=(0, 2, 4), seconds=(0.0, 1.0, 1.5)),
        Curve(members=(("c", "d"),), kept=(1, 10), seconds=(0.0, 9.0)),
    ),
    totals=((1.0, 1.0), (13.0, 10.0)),
)


def test_parts_add_up_and_totals_say_what_that_means() -> None:
    assert TABLE.sum_of_parts({}) == 1.0 + 1.5 + 1.5 + 9.0
    assert TABLE.predict({}) == 10.0
    kept = {"a": 1, "b": 4, "c": 4}
    assert TABLE.sum_of_parts(kept) == 1.0 + 0.5 + 1.5 + 3.0
    assert TABLE.predict(kept) == pytest.approx(1.0 + 9.0 * 5.0 / 12.0)
    assert TABLE.parts_for(TABLE.predict(kept)) == pytest.approx(6.0)


def test_a_group_that_was_not_measured_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'e' was not measured"):
        TABLE.predict({"e": 1})
    with pytest.raises(ConfigError, match="not measured as one structure"):
        TABLE.curve_of(["c"])
    assert TABLE.curve_of(["d", "c"]) == ("c", TABLE.curves[1])


def test_json_both_ways() -> None:
    assert LatencyTable.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize("text", ["", "[]", '{"key": {}}', TABLE.to_json().replace("10.0", '"many"')])
def test_other_text_is_refused(text) -> None:
    with pytest.raises(ConfigError, match="not a table"):
        LatencyTable.from_json(text)


def test_a_table_of_something_else_is_refused_and_the_error_says_what_differs() -> None:
    TABLE.check({"device": "cpu", "threads": "2"})
    with pytest.raises(ConfigError, match="threads: measured with '2', here '4'") as caught:
        TABLE.check({"device": "cpu", "threads": "4"})
    assert "device" not in str(caught.value)


def test_a_scaled_table_expects_longer_times_for_the_same_parts() -> None:
    scaled = TABLE.scaled(1.5)
    kept = {"a": 1, "c": 4}
    assert scaled.predict(kept) == pytest.approx(1.5 * TABLE.predict(kept))
    assert scaled.parts_for(1.5 * TABLE.predict(kept)) == pytest.approx(TABLE.sum_of_parts(kept))


def test_interpolation_goes_on_in_proportion_beyond_the_ends() -> None:
    points = [(2.0, 4.0), (4.0, 6.0)]
    assert [interpolate(points, x) for x in (1.0, 2.0, 3.5, 4.0, 8.0)] == [2.0, 4.0, 5.5, 6.0, 12.0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_the_nearest_numbers_that_never_fall(values) -> None:
    found = never_falling(values)
    assert all(a <= b for a, b in itertools.pairwise(found))

    def distance(other) -> float:
        return sum((a - b) ** 2 for a, b in zip(values, other, strict=True))

    grid = itertools.combinations_with_replacement(range(6), len(values))
    assert distance(found) <= min(map(distance, grid)) + 1e-9
    if values == sorted(values):
        assert found == values
