"""Making a cache: from a real Trainer's data, again, after an interruption, and what is refused."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
from ranks import on_two_ranks
from teacher_batches import text_batch, texts
from tiny_models import bert_mlm
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import BertTokenizerFast, DataCollatorForLanguageModeling, Trainer

from hf_compress.errors import ConfigError, TrainingError
from hf_compress.teachers import manifest
from hf_compress.teachers.build import cache_teacher_outputs
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.live import output_specs
from hf_compress.teachers.manifest import DRAFT, MANIFEST


class Taught(Trainer):
    """Half of the loss is the mean squared difference to logits from somewhere."""

    speak: Callable[[dict[str, Any]], Tensor]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        difference = (outputs.logits - self.speak(inputs)) ** 2
        loss = outputs.loss + difference.mean()
        return (loss, outputs) if return_outputs else loss


class PowerCutError(Exception):
    pass


@pytest.fixture
def teacher(tiny_bert: Callable[..., Any]) -> Any:
    return tiny_bert(seed=5)


def count_calls(teacher: Any, fail_at: int | None = None) -> list[int]:
    """Return a list that grows with each forward pass; one of them may fail."""
    calls: list[int] = []

    def called(*_: Any) -> None:
        if len(calls) == fail_at:
            raise PowerCutError
        calls.append(1)

    teacher.register_forward_pre_hook(called)
    return calls


def logits_of(teacher: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        given = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        logits: Tensor = teacher.eval()(**given).logits
    return logits


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_as_with_the_live_teacher(
    tmp_path: Path, tiny_bert: Any, classification_data: Any, make_trainer: Any, teacher: Any, workers: int
) -> None:
    data = classification_data(11)
    weights = []
    for live in (True, False):
        trainer = make_trainer(
            tiny_bert(),
            data,
            trainer_class=Taught,
            num_train_epochs=2,
            max_steps=-1,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            dataloader_drop_last=True,
            optim="sgd",  # Adam would blow up the rounding of gradients that are zero
        )
        cache = None if live else cache_teacher_outputs(teacher, trainer, tmp_path / "cache")
        trainer.speak = (lambda inputs: logits_of(teacher, inputs)) if cache is None else cache.logits
        trainer.train()
        weights.append(torch.cat([each.detach().flatten() for each in trainer.model.parameters()]))
        if cache is not None:
            cache.check()
            assert sum(shard.num_examples for shard in cache.manifest.shards) == 11
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-6)


def test_nothing_of_the_run_is_touched(
    tmp_path: Path, tiny_bert: Any, classification_data: Any, make_trainer: Any, teacher: Any
) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(9))
    teacher.bert.eval()
    modes = [module.training for module in teacher.modules()]
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    loaders = list(trainer.accelerator._dataloaders)
    cache_teacher_outputs(teacher, trainer, tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]
    assert trainer.accelerator._dataloaders == loaders
    assert [module.training for module in teacher.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_a_whole_cache_is_reused(tmp_path: Path, teacher: Any) -> None:
    batches = [text_batch(texts(4)), text_batch(texts(4, seed=1))]
    cache_teacher_outputs(teacher, batches, tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    calls = count_calls(teacher)
    cache = cache_teacher_outputs(teacher, batches[::-1], tmp_path)
    assert len(calls) == 1  # to see that the outputs are of the same kind
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert torch.equal(cache.logits(batches[0]), TeacherCache.open(tmp_path).logits(batches[0]))


def test_examples_are_stored_once(tmp_path: Path, teacher: Any) -> None:
    rows = texts(5)
    cache = cache_teacher_outputs(teacher, [text_batch(rows + rows[:3]), text_batch(rows, 2)], tmp_path)
    assert [shard.num_examples for shard in cache.manifest.shards] == [5]


@pytest.mark.parametrize("fail_at", [1, 3, 5])
def test_an_interrupted_build_goes_on(tmp_path: Path, tiny_bert: Any, fail_at: int) -> None:
    batches = [text_batch(texts(3, seed=seed)) for seed in range(6)]
    teacher = tiny_bert(seed=5)
    count_calls(teacher, 2 + fail_at)  # two to see whether padding before an example makes a difference
    folder = tmp_path / "cache"
    with pytest.raises(PowerCutError):
        cache_teacher_outputs(teacher, batches, folder, shard_bytes=1)
    with pytest.raises(TrainingError, match=r"unfinished one\. Call cache_teacher_outputs"):
        TeacherCache.open(folder)
    (folder / "outputs-00007.safetensors.123.tmp").write_bytes(b"half")
    (folder / "outputs-00005.safetensors").write_bytes(b"written, but not in the draft yet")
    again = tiny_bert(seed=5)
    calls = count_calls(again)
    cache = cache_teacher_outputs(again, batches, folder, shard_bytes=1)
    assert len(calls) == 1 + len(batches) - (fail_at - 1)
    straight = cache_teacher_outputs(again, batches, tmp_path / "straight", shard_bytes=1)
    assert all(torch.equal(cache.logits(batch), straight.logits(batch)) for batch in batches)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in straight.directory.iterdir())


@pytest.mark.parametrize("kill_at", range(9))
def test_killed_between_any_two_writes(
    tmp_path: Path, teacher: Any, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [text_batch(texts(3, seed=seed)) for seed in range(3)]
    writes: list[int] = []

    def fsync(_: int) -> None:
        writes.append(1)
        if len(writes) > kill_at:
            raise PowerCutError

    # The draft; a file and the draft with it, three times; the manifest, after which the draft is deleted.
    last = 1 + 2 * len(batches) + 1
    with monkeypatch.context() as patched:
        patched.setattr(manifest.os, "fsync", fsync)
        if kill_at >= last:
            patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PowerCutError))
        with pytest.raises(PowerCutError):
            cache_teacher_outputs(teacher, batches, tmp_path / "cache", shard_bytes=1)
    if kill_at < last:
        with pytest.raises(TrainingError, match=r"teacher_outputs\.json is missing"):
            TeacherCache.open(tmp_path / "cache")
    else:
        assert len(TeacherCache.open(tmp_path / "cache").manifest.shards) == len(batches)
    cache = cache_teacher_outputs(teacher, batches, tmp_path / "cache", shard_bytes=1)
    names = {path.name for path in cache.directory.iterdir()}
    assert names == {MANIFEST, *(f"outputs-0000{number}.safetensors" for number in range(3))}
    torch.testing.assert_close(cache.logits(batches[1]), logits_of(teacher, batches[1]))


def test_an_unfinished_cache_of_something_else_is_kept(tmp_path: Path, tiny_bert: Any) -> None:
    teacher = tiny_bert(seed=5)
    count_calls(teacher, 2 + 2)
    with pytest.raises(PowerCutError):
        cache_teacher_outputs(teacher, [text_batch(texts(3)), text_batch(texts(3, seed=1))], tmp_path, shard_bytes=1)
    with pytest.raises(ConfigError, match=r"cache of something else \(teacher_digest"):
        cache_teacher_outputs(tiny_bert(seed=6), [text_batch(texts(3))], tmp_path)
    assert (tmp_path / DRAFT).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": torch.float16}, "dtype: float32 there, float16 now"),
        ({"autocast": torch.bfloat16}, "computed_in:  there, bfloat16 now"),
        ({"top_k": 2, "temperature": 2.0}, "top_k: None there, 2 now"),
    ],
)
def test_a_cache_of_other_settings_is_kept(
    tmp_path: Path, teacher: Any, settings: dict[str, Any], message: str
) -> None:
    batches = [text_batch(texts(3))]
    cache_teacher_outputs(teacher, batches, tmp_path)
    with pytest.raises(ConfigError, match=message):
        cache_teacher_outputs(teacher, batches, tmp_path, **settings)
    assert TeacherCache.open(tmp_path, teacher).manifest.content.top_k is None


def test_other_data_and_other_directories_are_kept(tmp_path: Path, teacher: Any) -> None:
    cache_teacher_outputs(teacher, [text_batch(texts(3))], tmp_path / "cache")
    with pytest.raises(ConfigError, match="lacks 3 of the training examples"):
        cache_teacher_outputs(teacher, [text_batch(texts(3, seed=1))], tmp_path / "cache")
    with pytest.raises(ConfigError, match="inputs: InputSpec"):
        batch = text_batch(texts(3))
        cache_teacher_outputs(teacher, [{**batch, "token_type_ids": batch["input_ids"] * 0}], tmp_path / "cache")
    (tmp_path / "notes.tmp").write_text("mine")
    with pytest.raises(ConfigError, match="holds other things"):
        cache_teacher_outputs(teacher, [text_batch(texts(3))], tmp_path)
    assert (tmp_path / "notes.tmp").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        cache_teacher_outputs(teacher, [text_batch(texts(3))], tmp_path / "notes.tmp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0, "temperature": 1.0}, "top_k is 0; allowed: an int >= 1"),
        ({"top_k": True, "temperature": 1.0}, "top_k is True"),
        ({"top_k": 2}, "the temperature of the loss is needed"),
        ({"temperature": 2.0}, "has no effect without top_k"),
        ({"top_k": 2, "temperature": 0.0}, "allowed: numbers above 0"),
        ({"top_k": 2, "temperature": "2"}, "allowed: numbers above 0"),
        ({"top_k": 2, "temperature": []}, "empty list"),
        ({"top_k": 3, "temperature": 1.0}, "logits has 3 classes; allowed: fewer"),
        ({"dtype": torch.int8}, "allowed: torch.float32, torch.float16, torch.bfloat16"),
        ({"autocast": torch.float32}, "autocast is torch.float32"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"batch_size": 2}, "no effect on data that comes in batches"),
    ],
)
def test_wrong_settings(tmp_path: Path, teacher: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cache_teacher_outputs(teacher, [text_batch(texts(3))], tmp_path / "cache", **settings)
    assert not (tmp_path / "cache" / MANIFEST).exists()


def test_wrong_data_and_teachers(tmp_path: Path, teacher: Any) -> None:
    folder = tmp_path / "cache"
    for data in ("train", 3, text_batch(texts(2))):
        with pytest.raises(ConfigError, match="allowed: a Trainer, a DataLoader or batches"):
            cache_teacher_outputs(teacher, data, folder)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a batch is a list"):
        cache_teacher_outputs(teacher, [[1, 2]], folder)  # type: ignore[list-item]
    with pytest.raises(TrainingError, match="no training examples"):
        cache_teacher_outputs(teacher, [], folder)
    with pytest.raises(ConfigError, match="teacher is a str"):
        cache_teacher_outputs("bert", [], folder)  # type: ignore[arg-type]
    for size in (0, -1, "2", True, 1.5):
        with pytest.raises(ConfigError, match=rf"batch_size is {size!r}; allowed: an int >= 1\."):
            cache_teacher_outputs(teacher, [], folder, batch_size=size)  # type: ignore[arg-type]
    for place in (None, "", 3):
        with pytest.raises(ConfigError, match=f"directory is {place!r}; allowed: the path of a directory"):
            cache_teacher_outputs(teacher, [], place)  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"returned \['last_hidden_state', 'pooler_output'\], which has no logits"):
        cache_teacher_outputs(teacher.bert, [text_batch(texts(2))], folder)


def test_numbers_that_cannot_be_stored(tmp_path: Path, tiny_bert: Any) -> None:
    large, broken = tiny_bert(), tiny_bert()
    torch.nn.init.constant_(large.classifier.bias, 1e6)
    torch.nn.init.constant_(broken.classifier.bias, torch.nan)
    with pytest.raises(TrainingError, match=r"reaches 1e\+06, which float16 cannot hold"):
        cache_teacher_outputs(large, [text_batch(texts(2))], tmp_path / "large", dtype=torch.float16)
    with pytest.raises(TrainingError, match="not numbers"):
        cache_teacher_outputs(broken, [text_batch(texts(2))], tmp_path / "broken")
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_outputs_whose_padding_cannot_be_told() -> None:
    counts = torch.ones(2, 9, dtype=torch.bool)
    with pytest.raises(TrainingError, match="cannot be told which outputs are padding"):
        output_specs({"logits": torch.zeros(2, 4, 30)}, counts)
    (spec,) = output_specs({"logits": torch.zeros(2, 4, 30)}, None)
    assert (spec.per_position, spec.shape) == (False, (4, 30))


class Stream(IterableDataset[Any]):
    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.examples)


def test_kinds_of_data(
    tmp_path: Path, tiny_bert: Any, classification_data: Any, make_trainer: Any, teacher: Any
) -> None:
    data = classification_data(7)
    table = datasets.Dataset.from_list([{k: v.tolist() for k, v in each.items()} | {"text": "a"} for each in data])
    kinds = {
        "examples": make_trainer(tiny_bert(), data),
        "table": make_trainer(tiny_bert(), table),
        "stream": make_trainer(tiny_bert(), Stream(data)),
        "shuffled loader": DataLoader(data, batch_size=3, shuffle=True, drop_last=True),
        "loader of batches": DataLoader([torch.utils.data.default_collate(data)], batch_size=None),
        "loader with a batch sampler": DataLoader(data, batch_sampler=[[0, 1], [5]]),
    }
    batch = torch.utils.data.default_collate(data)
    for name, kind in kinds.items():
        cache = cache_teacher_outputs(teacher, kind, tmp_path / name)
        torch.testing.assert_close(cache.logits(batch), logits_of(teacher, batch), rtol=1e-4, atol=1e-5)
    assert cache.manifest.content.inputs.hashed == ("attention_mask", "input_ids")


def test_masks_that_change_are_refused(tmp_path: Path, make_trainer: Any) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    model = bert_mlm()
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in texts(8)]
    trainer = make_trainer(model, data, trainer_options={"data_collator": DataCollatorForLanguageModeling(tokenizer)})
    cache = cache_teacher_outputs(bert_mlm(), trainer, tmp_path / "cache", top_k=3, temperature=1.0)
    torch.manual_seed(1)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(TrainingError, match=r"not in this cache.*dynamic masking do.*or use the live teacher"):
        cache.logits(batch)


@pytest.mark.multiprocess
def test_two_processes(tmp_path: Path) -> None:
    on_two_ranks(Path(__file__).with_name("cache_on_ranks.py"), str(tmp_path))
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    # The first also looks at the first batch, each time, to see what there is to store.
    assert told == ["calls 6, steps 6, other data: ConfigError", "calls 0, steps 6, other data: CompressionError"]
