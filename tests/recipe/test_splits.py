"""Loading data of every kind, and choosing what to evaluate on."""

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_compress import ConfigError, DatasetConfig
from hf_compress.recipe.splits import Splits, drop_incomplete, load_splits

WORDS = ["good", "bad", "fine", "poor"]
ROWS = [{"review": f"{WORDS[i % 4]} film", "stars": "up" if i % 2 == 0 else "down"} for i in range(40)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "folder", "folder of splits"])
def test_local_data_of_every_kind(tmp_path, kind: str) -> None:
    data, path = Dataset.from_list(ROWS), tmp_path / f"data.{kind}"
    write = {
        "csv": lambda: data.to_csv(path),
        "tsv": lambda: data.to_csv(path, sep="\t"),
        "json": lambda: path.write_text(json.dumps(ROWS), encoding="utf-8"),
        "jsonl": lambda: data.to_json(path),
        "parquet": lambda: data.to_parquet(path),
        "folder": lambda: data.save_to_disk(path),
        "folder of splits": lambda: DatasetDict({"train": data}).save_to_disk(path),
    }
    write[kind]()
    splits = load_splits(DatasetConfig(path=str(path)), "stars", seed=0)
    train, evaluation = splits.train, splits.evaluation
    assert (len(train), len(evaluation), splits.evaluation_name) == (36, 4, "held-out 10%")
    assert sorted([*train["review"], *evaluation["review"]]) == sorted(row["review"] for row in ROWS)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_file_of_its_own_to_evaluate_on(tmp_path, kind) -> None:
    data, paths = Dataset.from_list(ROWS), [tmp_path / f"{name}.{kind}" for name in ("train", "dev")]
    for part, path in zip((data, data.select(range(6))), paths, strict=True):
        part.to_json(path) if kind == "jsonl" else part.to_csv(path, sep="\t" if kind == "tsv" else ",")
    train, dev = map(str, paths)
    splits = load_splits(DatasetConfig(path=train, eval_file=dev), "stars", seed=0)
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (40, 6, "validation")
    with pytest.raises(ConfigError, match=r"dev.*holds no labels in 'grade'"):
        load_splits(DatasetConfig(path=train, eval_file=dev), "grade", seed=0)
    with pytest.raises(ConfigError, match="a file of the same kind as path"):
        load_splits(DatasetConfig(path=train, eval_file="dev.parquet"), "stars", seed=0)
    with pytest.raises(ConfigError, match="eval_split"):
        DatasetConfig(path=train, eval_file=dev, eval_split="dev")


def test_the_evaluation_split_is_the_first_with_labels(tmp_path) -> None:
    labeled = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    hidden = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]})
    DatasetDict({"train": labeled, "validation": labeled, "test": hidden}).save_to_disk(tmp_path / "glue")
    path = str(tmp_path / "glue")
    assert load_splits(DatasetConfig(path=path), "label", seed=0).evaluation_name == "validation"
    with pytest.raises(ConfigError, match="holds no labels"):
        load_splits(DatasetConfig(path=path, eval_split="test"), "label", seed=0)
    with pytest.raises(ConfigError, match="no split 'dev'"):
        load_splits(DatasetConfig(path=path, eval_split="dev"), "label", seed=0)


def test_missing_data_are_a_clear_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_splits(DatasetConfig(path=str(tmp_path / "missing.csv")), "label", seed=0)
    with pytest.raises(
        ConfigError, match=r"cannot be loaded from the Hub or from disk: .*Give a folder or a file that is"
    ):
        load_splits(DatasetConfig(path="missing/data"), "label", seed=0)


def test_incomplete_rows_are_left_out_and_said() -> None:
    data = Dataset.from_dict({"x": ["a", None, "c"], "y": ["p", "q", None]})
    splits = drop_incomplete(Splits(data, data, "test"), ["x", "y"])
    assert splits.train["x"][:] == ["a"]
    assert splits.notes == (
        "2 training examples without x or y were left out",
        "2 evaluation examples without x or y were left out",
    )


def test_so_many_examples_and_no_more(tmp_path) -> None:
    data = Dataset.from_dict({"text": [str(i) for i in range(20)]})
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "data")
    config = DatasetConfig(path=str(tmp_path / "data"), max_train_examples=5, max_eval_examples=3)
    splits = load_splits(config, None, seed=0)
    assert (len(splits.train), splits.evaluation["text"][:]) == (5, ["0", "1", "2"])
    assert splits.train["text"][:] == load_splits(config, None, seed=0).train["text"][:]
    assert splits.train["text"][:] != load_splits(config, None, seed=1).train["text"][:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "The file is empty; give one with a row of column names"),
        (b"review,stars\n", "it has no rows. Give a file with at least two"),
        ("review,stars\ncaf\xe9,up\n".encode("latin-1"), "UnicodeDecodeError: .*Save the file as UTF-8"),
    ],
)
def test_files_without_data_say_what_is_wrong_with_them(tmp_path, content, message) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_splits(DatasetConfig(path=str(path)), None, seed=0)
