"""Benchmarks of whole training runs, on a task that takes a moment."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import hf_compress

SCRIPTS = Path(hf_compress.__file__).parent.parent / "scripts"


@pytest.fixture
def small_tasks(monkeypatch: Any, tmp_path: Path) -> Callable[[str], Any]:
    """``small_tasks(script)``: a script of ``scripts/bench``, on a tiny model and texts with their label inside."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    monkeypatch.setenv("HF_COMPRESS_CACHE", str(tmp_path / "cache"))

    def load(script: str) -> Any:
        for name in (script, "methods_work", "methods_plot"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        module, work = (importlib.import_module(name) for name in (script, "methods_work"))
        source = tmp_path / "model"
        model = tiny_models.bert(num_labels=2)
        model.save_pretrained(source)
        words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "good", "bad", "it", "is"])}
        backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
        backend.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
        tokenizer.save_pretrained(source)
        rows = [{"text": f"{('bad', 'good')[i % 2]} it is", "label": i % 2} for i in range(64)]
        task = work.Task("Words", 2, lambda: (Dataset.from_list(rows), Dataset.from_list(rows)))
        monkeypatch.setattr(work.demo_data, "model_folder", lambda: source)
        monkeypatch.setitem(work.TASKS, "movies", task)
        return module

    return load
