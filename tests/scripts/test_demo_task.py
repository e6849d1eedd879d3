"""The demo on data of one's own: loading, labels, batches, and one whole run of the script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, BertTokenizer

import hf_compress

SCRIPTS = Path(hf_compress.__file__).parent.parent / "scripts"
WORDS = ["good", "bad", "fine", "poor", "film", "plot"]
ROWS = [{"review": f"{WORDS[i % 4]} film", "stars": "up" if i % 2 == 0 else "down"} for i in range(40)]


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_task

    return demo_task


@pytest.fixture
def tokenizer(tmp_path) -> BertTokenizer:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    return BertTokenizer(str(vocabulary))


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "folder", "folder of splits"])
def test_local_data_of_every_kind(task, tmp_path, kind: str) -> None:
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
    train, test, split = task.load_splits(str(path), None, "stars", None, seed=0)
    assert (len(train), len(test), split) == (36, 4, "held-out 10%")
    assert sorted([*train["review"], *test["review"]]) == sorted(row["review"] for row in ROWS)


def test_the_evaluation_split_is_the_first_with_labels(task, tmp_path) -> None:
    labeled = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    hidden = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]})
    DatasetDict({"train": labeled, "validation": labeled, "test": hidden}).save_to_disk(tmp_path / "glue")
    assert task.load_splits(str(tmp_path / "glue"), None, "label", None, seed=0)[2] == "validation"
    with pytest.raises(task.TaskError, match="holds no labels"):
        task.load_splits(str(tmp_path / "glue"), None, "label", "test", seed=0)
    with pytest.raises(task.TaskError, match="no split 'dev'"):
        task.load_splits(str(tmp_path / "glue"), None, "label", "dev", seed=0)


def test_missing_data_are_a_clear_error(task, tmp_path) -> None:
    with pytest.raises(task.TaskError, match="cannot be loaded"):
        task.load_splits(str(tmp_path / "missing.csv"), None, "label", None, seed=0)


def prepared(task, tokenizer, train, test=None, columns=("review", None, "stars")):
    return task.prepare((train, test or train, "test"), columns, tokenizer, 16)


def test_labels_of_any_type_become_numbers(task, tokenizer) -> None:
    rows = Dataset.from_list(ROWS)
    found = prepared(task, tokenizer, rows)
    assert found.labels == ("down", "up")
    assert found.train["labels"] == [1, 0] * 20
    assert found.model_options()["id2label"] == {0: "down", 1: "up"}
    numbers = rows.map(lambda row: {"stars": 7 if row["stars"] == "up" else 3})
    assert prepared(task, tokenizer, numbers).labels == ("3", "7")
    classes = rows.cast_column("stars", ClassLabel(names=["up", "down"]))
    assert prepared(task, tokenizer, classes).train["labels"] == [0, 1] * 20
    assert set(found.train.column_names) == {
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "labels",
        "length",
    }


def test_the_fingerprint_follows_the_content(task, tokenizer) -> None:
    first = prepared(task, tokenizer, Dataset.from_list(ROWS)).fingerprint
    again = prepared(task, tokenizer, Dataset.from_list(ROWS)).fingerprint
    changed = prepared(
        task, tokenizer, Dataset.from_list([{**ROWS[0], "review": "new"}, *ROWS[1:]])
    ).fingerprint
    assert first == again != changed


def test_unusable_columns_are_clear_errors(task, tokenizer) -> None:
    rows = Dataset.from_list(ROWS)
    with pytest.raises(task.TaskError, match=r"no column 'text'.*'review', 'stars'"):
        prepared(task, tokenizer, rows, columns=("text", None, "stars"))
    with pytest.raises(task.TaskError, match="class labels are needed"):
        prepared(task, tokenizer, rows.map(lambda row: {"stars": 0.5}))


def test_evaluation_covers_every_example_once_in_batches_of_one_shape(task, tokenizer) -> None:
    found = prepared(task, tokenizer, Dataset.from_list(ROWS))
    batches = list(task.evaluation_batches(found.test, tokenizer, 16))
    assert {tuple(inputs["input_ids"].shape) for inputs, _ in batches} == {(task.EVALUATION_BATCH, 16)}
    assert sum(real for _, real in batches) == len(ROWS)

    class First(torch.nn.Module):
        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": input_ids[:, :2]})

    logits = task.predict(First(), batches, "test")
    assert logits.shape == (len(ROWS), 2)
    assert logits[:, 1].tolist() == [ids[1] for ids in found.test["input_ids"]]


def test_accuracy(task) -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert task.accuracy(logits, {"labels": [0, 1, 1, 0]}) == 75.0


def demo(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
        "HF_COMPRESS_CACHE": str(cache),
        "HOME": str(cache),
    }
    command = [sys.executable, str(SCRIPTS / "demo.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_whole_demo_on_a_model_and_a_file_of_ones_own(tokenizer, tmp_path) -> None:
    tiny_models.bert(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    Dataset.from_list(ROWS * 4).to_csv(tmp_path / "reviews.csv")
    arguments = [
        *("--model", str(tmp_path / "tiny"), "--dataset", str(tmp_path / "reviews.csv")),
        *("--text_column", "review", "--label_column", "stars", "--output", str(tmp_path / "out")),
        *("--max_length", "16", "--batch_size", "4", "--heads", "0.5", "--ffn", "0.6"),
    ]
    first = demo(arguments, tmp_path / "cache")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "bit-identical" in first.stdout
    assert "speed-up, batch 32" in first.stdout
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "compressed")
    results = json.loads((tmp_path / "out" / "compressed" / "results.json").read_text(encoding="utf-8"))
    assert [unit["total"] for unit in results["kept"]["heads"]] == [4, 4]
    assert sum(unit["kept"] for unit in results["kept"]["heads"]) == 4
    assert "cached:" not in first.stdout
    second = demo(arguments, tmp_path / "cache")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "cached:" in second.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "1.5"], "structures['heads']"),
        (["--model", "missing/folder", "--dataset", "missing.csv"], "missing.csv"),
    ],
)
def test_wrong_arguments_end_with_one_message(
    arguments: list[str], message: str, monkeypatch, capsys
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_run

    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        demo_run.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().out.replace("\n", "")
