import json
from pathlib import Path

import pytest
import tiny_models
from fake_timer import FakeTimer
from huggingface_hub import constants

from hf_compress import ConfigError, make_example_inputs
from hf_compress.latency.cache import default_directory, latency_table


def test_a_device_is_measured_once(tmp_path) -> None:
    timer = FakeTimer()
    first = latency_table(tiny_models.bert(), rounds=1, directory=tmp_path / "new", timer=timer)
    calls = timer.calls
    assert calls > 0
    assert latency_table(tiny_models.bert(), rounds=1, directory=tmp_path / "new", timer=timer) == first
    assert timer.calls == calls
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".json"]


def test_other_inputs_and_other_sizes_are_measured_by_themselves(tmp_path) -> None:
    model = tiny_models.bert()
    for settings in (
        {},
        {"multiple_of": 4},
        {"structures": ["ffn"]},
        {"example_inputs": make_example_inputs(model, 5)},
    ):
        latency_table(model, rounds=1, directory=tmp_path, timer=FakeTimer(), **settings)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_is_no_table_or_one_of_something_else_is_refused(tmp_path) -> None:
    latency_table(tiny_models.bert(), rounds=1, directory=tmp_path, timer=FakeTimer())
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    data["key"]["threads"] = "1000"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=rf"{path.name}.*threads: measured with '1000'.*Delete this file"):
        latency_table(tiny_models.bert(), rounds=1, directory=tmp_path, timer=FakeTimer())
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"not a table.*Delete this file"):
        latency_table(tiny_models.bert(), rounds=1, directory=tmp_path, timer=FakeTimer())


def test_tables_lie_below_the_folder_of_the_hugging_face_libraries(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert default_directory() == Path(tmp_path, "hf_compress", "latency")
    latency_table(tiny_models.bert(), rounds=1, timer=FakeTimer())
    assert len(list(default_directory().iterdir())) == 1
