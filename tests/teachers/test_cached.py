"""Opening a cache: damaged, hostile and foreign ones are refused; and what look-ups do with what is not there."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from teacher_batches import text_batch, texts
from tiny_models import gpt2

from hf_compress.errors import TrainingError
from hf_compress.teachers import cached
from hf_compress.teachers.build import cache_teacher_outputs
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.live import model_digest
from hf_compress.teachers.manifest import MANIFEST, _digest
from hf_compress.teachers.outputs import SparseLogits
from hf_compress.teachers.rows import KeyTable, padded_rows, with_sentinels

SHARD = "outputs-00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of two files of token-level outputs."""
    batches = [text_batch(texts(4)), text_batch(texts(3, seed=1))]
    cache_teacher_outputs(gpt2(), batches, tmp_path / "cache", top_k=3, temperature=2.0, shard_bytes=1)
    return tmp_path / "cache"


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest as somebody would who knows how digests are made."""
    document = json.loads((folder / MANIFEST).read_text())
    document.pop("digest")
    change(document)
    document["digest"] = _digest(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], resigned: bool = True) -> None:
    """Change the first file, and what the manifest says about its size and, if wanted, contents."""
    tensors = safetensors.torch.load_file(folder / SHARD)
    change(tensors)
    payload = safetensors.torch.save(tensors)
    (folder / SHARD).write_bytes(payload)

    def resign(document: Any) -> None:
        document["shards"][0]["num_bytes"] = len(payload)
        if resigned:
            document["shards"][0]["sha256"] = hashlib.sha256(payload).hexdigest()

    edit(folder, resign)


def test_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"teacher_outputs.json is missing. Call cache_teacher_outputs"):
        TeacherCache.open(tmp_path)
    with pytest.raises(TrainingError, match="is missing"):
        TeacherCache.open(tmp_path / "nowhere")


def test_the_teacher_is_recognized(folder: Path) -> None:
    teacher = gpt2().train()
    assert len(TeacherCache.open(folder, teacher).manifest.shards) == 2
    with torch.no_grad():
        next(teacher.parameters()).view(-1)[-1] += 1e-3
    with pytest.raises(TrainingError, match="outputs of another teacher: a GPT2LMHeadModel with other weights"):
        TeacherCache.open(folder, teacher)
    other = gpt2()
    other.config.layer_norm_epsilon = 1e-3
    assert model_digest(other) != model_digest(gpt2())
    named = gpt2()
    named.config.id2label = {0: "good", 1: "bad"}
    named.config._name_or_path = "somewhere"
    assert model_digest(named) == model_digest(gpt2())


@pytest.mark.parametrize("resident_bytes", [0, 1 << 28], ids=["mapped", "resident"])
@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_files_cut_off(folder: Path, resident_bytes: int, length: int) -> None:
    whole = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(whole[:length])
    with pytest.raises(TrainingError, match=rf"{SHARD}: damaged: it has \d+ bytes, the manifest says"):
        TeacherCache.open(folder, resident_bytes=resident_bytes)
    edit(folder, lambda document: document["shards"][0].update(num_bytes=len(whole[:length])))
    with pytest.raises(TrainingError, match=rf"{SHARD}: damaged"):
        TeacherCache.open(folder, resident_bytes=resident_bytes)


def test_a_bit_that_flipped(folder: Path) -> None:
    payload = bytearray((folder / SHARD).read_bytes())
    payload[-3] ^= 1
    (folder / SHARD).write_bytes(bytes(payload))
    with pytest.raises(TrainingError, match="its contents have changed"):
        TeacherCache.open(folder)
    with pytest.raises(TrainingError, match="its contents have changed"):
        TeacherCache.open(folder, resident_bytes=0, verify=True)


def test_a_file_that_is_gone(folder: Path) -> None:
    (folder / SHARD).unlink()
    with pytest.raises(TrainingError, match=f"{SHARD}: damaged"):
        TeacherCache.open(folder)


@pytest.mark.parametrize(
    "name", ["../outputs-00000.safetensors", "/etc/passwd", "a/b.safetensors", "", "outputs-0.bin"]
)
def test_names_that_lead_elsewhere(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder, lambda document: document["shards"][0].update(file=name))
    monkeypatch.setattr(cached, "read_shard", lambda *_, **__: pytest.fail("a file was opened"))
    with pytest.raises(TrainingError, match="is no name of a file of outputs"):
        TeacherCache.open(folder)


def changed(path: str, value: Any) -> Callable[[Any], None]:
    """Return a change of one entry of the manifest; DELETED takes it out."""

    def change(document: Any) -> None:
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        for parent in parents:
            document = document[parent]
        if value is ...:
            del document[last]
        else:
            document[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 1, "schema_version is 1, allowed: 2"),
        ("teacher", {}, "teacher.class must be of type str, not NoneType"),
        ("teacher.config", "abc", "teacher.config must be of type dict, not str"),
        ("teacher.config", [1], "teacher.config must be of type dict, not list"),
        ("schema_version", ..., "schema_version is None"),
        ("content", [], "manifest.content must have exactly"),
        ("content.extra", 1, "manifest.content must have exactly"),
        ("content.dtype", "int8", "dtype is 'int8'"),
        ("content.top_k", True, "top_k must be of type int, not bool"),
        ("content.top_k", 10**6, "top_k=1000000 of shape"),
        ("content.top_k", None, "temperatures do not fit top_k"),
        ("content.temperatures", [], "temperatures do not fit top_k"),
        ("content.temperatures", [-1.0], "temperatures do not fit"),
        ("content.temperatures", [float("nan")], "temperatures do not fit"),
        ("content.temperatures", "2", "must be a list"),
        ("content.outputs", [], "no outputs or no inputs"),
        ("content.outputs.0.shape", [-3], "sizes must be at least 1"),
        ("content.inputs.hashed", [], "no outputs or no inputs"),
        ("content.inputs.hashed", [1], "must be of type str"),
        ("content.inputs.padded", ["x"], "padded inputs that are not hashed"),
        ("content.inputs.decoder_mask", "x", "decoder_mask is 'x'"),
        ("shards.0.num_examples", -1, "impossible sizes"),
        ("shards.0.num_positions", 2**70, "impossible sizes"),
        ("shards.0.num_examples", 1.5, "must be of type int"),
        ("shards.1.file", SHARD, "lists a file twice"),
        ("shards", [], "holds no examples"),
        ("shards.0.num_positions", 3, "tensor 'logits.indices' is"),
        ("shards.0.num_examples", 3, "tensor 'keys' is"),
        ("content.top_k", 2, "the manifest says"),
        ("content.dtype", "float16", "tensor 'logits.values' is"),
        ("content.outputs.0.per_position", False, "the manifest says"),
        ("content.outputs.0.name", "scores", "tensor 'logits.indices' is"),
    ],
)
def test_manifests_that_say_something_else(folder: Path, path: str, value: Any, message: str) -> None:
    edit(folder, changed(path, value))
    with pytest.raises(TrainingError, match=message):
        TeacherCache.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"schema_version": 1}', "\x00"])
def test_manifests_that_are_none(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(TrainingError, match="this is no manifest that this version"):
        TeacherCache.open(folder)


def test_a_manifest_edited_by_hand(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"num_examples": 4', '"num_examples": 5'))
    with pytest.raises(TrainingError, match="its digest does not match"):
        TeacherCache.open(folder)


@pytest.mark.parametrize("resident_bytes", [0, 1 << 28], ids=["mapped", "resident"])
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_classes_that_do_not_exist(folder: Path, resident_bytes: int, bad: int) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["logits.indices"][:, 1] = bad

    edit_tensors(folder, change)
    with pytest.raises(TrainingError, match=rf"logits has class {bad} of"):
        TeacherCache.open(folder, resident_bytes=resident_bytes).logits(text_batch(texts(4)))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lengths", [-1, 4], "lengths do not add up"),
        ("lengths", [2**62, 2**62], "lengths do not add up"),
        ("keys", [[5, 5], [5, 5]], "holds an example twice"),
        ("extra", [1], "tensor 'extra' is"),
    ],
)
def test_tensors_that_mislead(folder: Path, name: str, values: Any, message: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        given = torch.tensor(values)
        if name in tensors:
            tensors[name][: len(given)] = given
        else:
            tensors[name] = given

    edit_tensors(folder, change)
    with pytest.raises(TrainingError, match=message):
        TeacherCache.open(folder, resident_bytes=0)


@pytest.mark.parametrize("resident_bytes", [0, 1 << 28], ids=["mapped", "resident"])
def test_examples_that_are_not_there(folder: Path, resident_bytes: int) -> None:
    cache = TeacherCache.open(folder, resident_bytes=resident_bytes)
    rows = texts(4)
    cache.logits(text_batch(rows))
    cache.check()
    rows[1] = [*rows[1], 3]
    rows[2] = rows[2][:-1]
    with pytest.raises(TrainingError, match=r"2 of the examples.*tokenizer or the preprocessing.*Make the cache anew"):
        cache.logits(text_batch(rows))
    cache.check()


def test_an_accelerator_learns_of_it_at_the_end_of_the_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "_waits", lambda device: True)
    cache = TeacherCache.open(folder)
    rows = texts(4)
    cache.logits(text_batch(rows))
    cache.check()
    rows[1] = [*rows[1], 3]
    for _ in range(2):
        found = cache.logits(text_batch(rows))
        assert isinstance(found, SparseLogits)
        assert found.values[1][: len(rows[1])].isnan().all() and found.values[[0, 2, 3]].isfinite().all()
        assert found.indices[1].eq(0).all() and found.log_rest[1][: len(rows[1])].isnan().all()
    with pytest.raises(TrainingError, match="2 of the examples"):
        cache.check()
    cache.check()


def test_a_hash_of_another_length_is_not_found(folder: Path) -> None:
    rows = texts(4)
    keys = TeacherCache.open(folder).manifest.content.inputs.keys(text_batch(rows))
    lengths = torch.tensor([len(row) for row in rows])
    table = KeyTable.of(keys, lengths)
    assert table.find(keys, lengths + torch.tensor([1, 0, 0, 0]))[2].tolist() == [False, True, True, True]
    keys = keys + torch.tensor([0, 1])
    assert not table.find(keys, lengths)[2].any()


def test_what_is_missing_is_not_a_number() -> None:
    table = with_sentinels(torch.arange(1.0, 7.0).view(6, 1))
    counts = torch.tensor([[True, True, False], [True, False, False], [False, True, True]])
    found = torch.tensor([True, False, True])
    rows = padded_rows(table, torch.tensor([0, 2, 4]), counts, found).squeeze(-1)
    assert rows.nan_to_num(-1).tolist() == [[1, 2, 0], [-1, 0, 0], [0, 5, 6]]
    ones = padded_rows(table, torch.tensor([3, 0, 5]), None, found).squeeze(-1)
    assert ones.nan_to_num(-1).tolist() == [4, -1, 6]
    assert with_sentinels(torch.ones(2, 1, dtype=torch.int32)).flatten().tolist() == [1, 1, 0, 0]


def test_tables_find_all_and_only_what_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (100, 2), generator=generator)
    lengths = torch.randint(0, 5, (100,), generator=generator)
    table = KeyTable.of(keys, lengths)
    rows, starts, found = table.find(keys, lengths)
    assert found.all() and rows.tolist() == list(range(100))
    assert starts.tolist() == [int(lengths[:index].sum()) for index in range(100)]
    assert not table.find(torch.tensor([[2**63 - 1, 0], [-(2**63), 0]]), lengths[:2])[2].any()
    assert not table.find(keys.flip(1), lengths)[2].any()


def test_what_it_says_about_itself(folder: Path, tmp_path: Path) -> None:
    cache = TeacherCache.open(folder)
    assert cache.describe() == f"GPT2LMHeadModel, outputs for 7 examples in {folder}"
    same = cache_teacher_outputs(gpt2(), [text_batch(texts(3, seed=2))], tmp_path / "b", top_k=3, temperature=2.0)
    other = cache_teacher_outputs(gpt2(), [text_batch(texts(3))], tmp_path / "c", top_k=3, temperature=1.0)
    assert cache.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_batch_without_positions(folder: Path) -> None:
    cache = TeacherCache.open(folder)
    with pytest.raises(TrainingError, match="no 'attention_mask', 'input_ids'"):
        cache.logits({"inputs_embeds": torch.zeros(1, 2, 3)})
