from pathlib import Path

import pytest
from ranks import on_two_ranks


@pytest.mark.multiprocess
def test_features_on_two_ranks_teach_what_they_do_on_one(tmp_path: Path) -> None:
    on_two_ranks(Path(__file__).with_name("ddp_features.py"), str(tmp_path))
