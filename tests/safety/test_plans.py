"""Plans, latency tables, checkpoints of callbacks and teacher caches, made by others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_models
import torch
from hostile import ESCAPE, JSON, SAFETENSORS, changed, refused
from teacher_batches import text_batch, texts

from hf_compress import ConfigError, ShrinkError, TrainingError, dimension_groups, plan_shrink
from hf_compress.callbacks.state import JSON_FILE, TENSOR_FILE, Section, digest_of, read_state, write_state
from hf_compress.latency.cache import _read
from hf_compress.latency.table import Curve, LatencyTable
from hf_compress.shrinking.plan import ShrinkPlan
from hf_compress.teachers.build import cache_teacher_outputs
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.manifest import MANIFEST

FFN = "bert.encoder.layer.0.ffn"
WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"
TABLE = LatencyTable(
    key={"device": "cpu"},
    base=0.5,
    curves=(Curve(members=(("a",),), kept=(1, 2), seconds=(0.1, 0.2)),),
    totals=((0.5, 0.6), (0.7, 0.9)),
)
TEXTS = [name for name in JSON if name not in ("not utf-8", "utf-16", "random")]


@pytest.fixture(scope="module")
def plan() -> Any:
    model = tiny_models.bert()
    (group,) = [each for each in dimension_groups(model) if each.name == FFN]
    return json.loads(plan_shrink(model, {FFN: torch.arange(group.num_units) > 5}).to_json())


@pytest.mark.parametrize("attack", TEXTS)
def test_texts(attack, tmp_path) -> None:
    text = JSON[attack].decode()
    refused(tmp_path / "here", lambda: ShrinkPlan.from_json(text), "ShrinkPlan", ShrinkError)
    refused(tmp_path / "here", lambda: LatencyTable.from_json(text), "LatencyTable", ConfigError)


@pytest.mark.parametrize("attack", JSON)
def test_files_of_tables(attack, tmp_path) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "table.json"
    path.write_bytes(JSON[attack])
    refused(tmp_path / "here", lambda: _read(path, {}), "table.json", ConfigError)


@pytest.mark.parametrize(
    "kept", [[-1, 0], [0, 0], [1, 0], [True], [0.0], ["0"], [10**30], 5, None, {"0": 1}, [float("nan")], [[0]]]
)
@pytest.mark.parametrize("where", [f"groups/{FFN}/kept", f"groups/{FFN}/silenced", f"keep/{WEIGHT}/0"])
def test_positions_of_plans(where, kept, plan, tmp_path) -> None:
    text = json.dumps(changed(plan, where, kept))
    refused(tmp_path / "here", lambda: ShrinkPlan.from_json(text), "ShrinkPlan", ShrinkError)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (f"groups/{FFN}/kept", [44]),
        (f"groups/{FFN}/num_units", True),
        (f"groups/{FFN}/num_units", 10**30),
        (f"groups/{FFN}/kind", 5),
        (f"groups/{FFN}/more", 5),
        (f"keep/{WEIGHT}", {"-1": [0]}),
        (f"keep/{WEIGHT}", {"x": [0]}),
        ("num_parameters", [1, 2]),
        ("num_parameters", [True, False]),
        ("num_parameters", [1]),
        ("model_class", 5),
        ("layers", {"bert.encoder.layer": [1, 0]}),
        ("emptied", {"bert": [5, None]}),
        ("emptied", {"bert": [None, -1]}),
        ("attributes", [{"module": "bert", "path": [], "value": 1}]),
        ("attributes", [{"module": "bert", "path": ["a"], "value": True}]),
        ("attributes", [5]),
    ],
)
def test_values_of_plans(where, value, plan, tmp_path) -> None:
    text = json.dumps(changed(plan, where, value))
    refused(tmp_path / "here", lambda: ShrinkPlan.from_json(text), "ShrinkPlan", ShrinkError)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("base", float("nan")),
        ("base", float("inf")),
        ("base", -1.0),
        ("base", True),
        ("base", "1"),
        ("key", {"device": 5}),
        ("key", [1]),
        ("totals", []),
        ("totals", [[0.5, float("nan")]]),
        ("totals", [[1.0, 1.0], [0.5, 2.0]]),
        ("totals", [[0.5, 2.0], [1.0, 1.0]]),
        ("totals", [[0.5]]),
        ("curves", 5),
        ("curves/0/kept", [2, 1]),
        ("curves/0/kept", [1, 1]),
        ("curves/0/kept", [True, 2]),
        ("curves/0/kept", [1]),
        ("curves/0/kept", [-1, 2]),
        ("curves/0/seconds", [0.1, float("inf")]),
        ("curves/0/seconds", [-0.1, 0.2]),
        ("curves/0/seconds", [0.2, 0.1]),
        ("curves/0/members", [[]]),
        ("curves/0/members", [[5]]),
    ],
)
def test_values_of_tables(where, value, tmp_path) -> None:
    text = json.dumps(changed(json.loads(TABLE.to_json()), where, value))
    refused(tmp_path / "here", lambda: LatencyTable.from_json(text), "LatencyTable", ConfigError)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    write_state(folder, 7, {"pruning": Section({"a": 1}, {"mask": torch.ones(2)}, {"step": 7})})
    return folder


@pytest.mark.parametrize("attack", JSON)
def test_states(attack, checkpoint) -> None:
    (checkpoint / JSON_FILE).write_bytes(JSON[attack])
    refused(checkpoint, lambda: read_state(checkpoint, 7), JSON_FILE, TrainingError)


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_tensors_of_states(attack, checkpoint) -> None:
    (checkpoint / TENSOR_FILE).write_bytes(SAFETENSORS[attack])
    refused(checkpoint, lambda: read_state(checkpoint, 7), TENSOR_FILE, TrainingError)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("sections", 5),
        ("sections", []),
        ("sections/pruning", 5),
        ("sections/pruning/tensors", ["no such tensor"]),
        ("sections/pruning/tensors", 5),
        ("sections/pruning/tensors", [5]),
        ("checkpoint", 5),
        ("checkpoint", {}),
        ("checkpoint", {"../outside/secret.json": "0"}),
        ("checkpoint", {"/etc/passwd": "0"}),
        ("global_step", 10**30),
        ("global_step", True),
        ("schema_version", 99),
        ("schema_version", None),
        ("sha256", 5),
        ("sha256", ESCAPE),
    ],
)
def test_values_of_states(where, value, checkpoint) -> None:
    """By somebody who knows how the digest is made."""
    document = changed(json.loads((checkpoint / JSON_FILE).read_text()), where, value)
    document["digest"] = digest_of(document)
    (checkpoint / JSON_FILE).write_text(json.dumps(document))
    refused(checkpoint, lambda: read_state(checkpoint, 7), str(checkpoint), TrainingError)


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    cache_teacher_outputs(tiny_models.gpt2(), [text_batch(texts(4))], folder, top_k=3, temperature=2.0)
    return folder


@pytest.mark.parametrize("resident_bytes", [0, 1 << 28], ids=["mapped", "resident"])
@pytest.mark.parametrize("attack", SAFETENSORS)
def test_shards(attack, resident_bytes, cached, tmp_path) -> None:
    folder = Path(shutil.copytree(cached, tmp_path / "cache"))
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(SAFETENSORS[attack])
    refused(folder, lambda: TeacherCache.open(folder, resident_bytes=resident_bytes), shard.name, TrainingError)


@pytest.mark.parametrize("attack", JSON)
def test_manifests(attack, cached, tmp_path) -> None:
    folder = Path(shutil.copytree(cached, tmp_path / "cache"))
    (folder / MANIFEST).write_bytes(JSON[attack])
    refused(folder, lambda: TeacherCache.open(folder), MANIFEST, TrainingError)


def test_what_is_not_attacked_is_read(plan, checkpoint, cached) -> None:
    assert ShrinkPlan.from_json(json.dumps(plan)).num_parameters == tuple(plan["num_parameters"])
    assert LatencyTable.from_json(TABLE.to_json()) == TABLE
    assert set(read_state(checkpoint, 7)) == {"pruning"}
    assert safetensors.torch.load_file(checkpoint / TENSOR_FILE).keys() == {"pruning.mask"}
    assert len(TeacherCache.open(cached).manifest.shards) == 1
