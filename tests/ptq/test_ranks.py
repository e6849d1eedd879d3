"""Calibration in two processes."""

from pathlib import Path

import pytest
from ranks import on_two_ranks


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_find_what_one_finds() -> None:
    on_two_ranks(Path(__file__).with_name("calibrating_ranks.py"))
