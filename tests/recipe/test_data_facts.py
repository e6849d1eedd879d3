"""What tells data from others: the same in every process, of what the run reads alone, quick on large data."""

import hashlib
import time
from itertools import pairwise
from pathlib import Path

import pytest
import recipe_files
from datasets import Dataset, Image

import hf_compress.recipe.data_facts as module
from hf_compress import Recipe
from hf_compress.recipe.data_facts import data_facts
from hf_compress.recipe.splits import Splits
from hf_compress.recipe.trainer import prepare


def facts(train: Dataset, *columns: str) -> dict:
    return data_facts(Splits(train, train.select([0]), "test"), columns)["training"]


ROWS = [{"text": f"text {number}", "label": number % 2, "id": number} for number in range(600)]


def test_every_value_that_is_read_and_the_order_count() -> None:
    known = facts(Dataset.from_list(ROWS), "text", "label")
    assert known["examples"] == 600
    assert facts(Dataset.from_list(ROWS).flatten_indices(), "text", "label") == known
    other_id = [{**row, "id": 0} for row in ROWS]
    assert facts(Dataset.from_list(other_id), "text", "label") == known
    for changed in (
        [*ROWS[:599], {**ROWS[599], "text": "another"}],
        [*ROWS[:300], {**ROWS[300], "label": 7}, *ROWS[301:]],
        [ROWS[1], ROWS[0], *ROWS[2:]],
        ROWS[:599],
    ):
        assert facts(Dataset.from_list(changed), "text", "label") != known


def test_where_rows_lie_does_not_count() -> None:
    """Rows that were chosen and shuffled, against the same rows as a table of their own."""
    data = Dataset.from_list(ROWS).shuffle(seed=3).select(range(100))
    assert facts(data, "text") == facts(Dataset.from_list(data.to_list()), "text")


@pytest.mark.parametrize("num_rows", [1, 2, 10, 249, 250, 251, 618, 1000, 20_000])
def test_all_rows_are_read_once_if_there_are_few(num_rows) -> None:
    found = [number for block in module._blocks(num_rows) for number in block]
    assert sorted(found) == list(range(num_rows))


def test_of_many_rows_some_are_read_in_all_parts() -> None:
    found = sorted(number for block in module._blocks(1_000_000) for number in block)
    assert len(found) == len(set(found)) == module.MAX_ROWS
    gaps = [after - before for before, after in pairwise(found)]
    assert max(gaps) < 200 and found[0] < 200 and found[-1] > 999_800


def test_no_more_is_read_than_the_limit(monkeypatch) -> None:
    blocks = []
    spread = module._blocks
    monkeypatch.setattr(module, "_blocks", lambda n: (blocks.append(each) or each for each in spread(n)))
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    facts(Dataset.from_list(ROWS), "text")
    assert len(blocks) == 2 + 1  # of three, and the one row of the evaluation data


def test_large_data_take_no_time() -> None:
    data = Dataset.from_dict({"text": ["some words of a review that is not short at all " * 5] * 200_000})
    start = time.perf_counter()
    facts(data.shuffle(seed=0), "text")
    assert time.perf_counter() - start < 10


def test_images_are_told_apart_without_their_folder(tmp_path) -> None:
    found = []
    for name in ("a", "b", "c"):
        recipe = recipe_files.images(tmp_path / name)
        if name == "c":
            (picture,) = Path(recipe["dataset"]["path"]).glob("train/dark/0.png")
            picture.rename(picture.with_name("zero.png"))
        found.append(prepare(Recipe.from_dict(recipe), tmp_path / "checkpoints").data_facts())
    assert found[0] == found[1]
    assert found[0]["training"] != found[2]["training"] and found[0]["evaluation"] == found[2]["evaluation"]


def test_images_in_the_table_count_by_their_bytes() -> None:
    def data(*contents: bytes) -> Dataset:
        rows = [{"bytes": each, "path": None} for each in contents]
        return Dataset.from_dict({"img": rows}).cast_column("img", Image())

    assert facts(data(b"x", b"y")) == facts(data(b"x", b"y")) != facts(data(b"x", b"z"))


def test_the_digest_is_the_same_in_every_process_and_version() -> None:
    """It is stored, so that another one would end runs that were begun before."""
    rows = [{"text": ["a", None], "label": 0.1}, {"text": [], "label": float("nan")}]
    expected = hashlib.sha256(b"['label', 'text']")
    expected.update(b"[{'label': 0.1, 'text': ['a', None]}, {'label': nan, 'text': []}]")
    assert facts(Dataset.from_list(rows), "text", "label") == {"examples": 2, "digest": expected.hexdigest()}
