"""The demo on data of one's own: loading, labels, batches, and one whole run of the script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification, BertTokenizer

import hf_compress
from hf_compress import ConfigError
from hf_compress.recipe.splits import Splits

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


def prepared(task, tokenizer, train, test=None, columns=("review", None, "stars")):
    return task.prepare(Splits(train, test or train, "test"), columns, tokenizer, 16)


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
    changed = prepared(task, tokenizer, Dataset.from_list([{**ROWS[0], "review": "new"}, *ROWS[1:]])).fingerprint
    assert first == again != changed


def test_unusable_columns_are_clear_errors(task, tokenizer) -> None:
    rows = Dataset.from_list(ROWS)
    with pytest.raises(ConfigError, match=r"no column 'text'.*'review', 'stars'"):
        prepared(task, tokenizer, rows, columns=("text", None, "stars"))
    with pytest.raises(ConfigError, match="class labels are needed"):
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
def test_wrong_arguments_end_with_one_message(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_run

    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        demo_run.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().out.replace("\n", "")
