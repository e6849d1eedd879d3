"""What an example is known by, for every kind of model."""

from typing import Any

import pytest
import torch
from teacher_batches import padded, text_batch, texts
from tiny_models import ZOO, bart, bert, gpt2, t5, vit
from transformers import BertForSequenceClassification
from zoo import ALL

from hf_compress.callbacks.teacher import taught_inputs
from hf_compress.errors import TrainingError
from hf_compress.teachers.inputs import InputSpec, read_inputs, without_own_loss


def batch_of(rows: list[list[int]], **more: Any) -> dict[str, Any]:
    return {**text_batch(rows), **more}


def test_labels_are_read_by_decoders_alone() -> None:
    rows = texts(4)
    labels = padded(rows, value=-100)
    assert set(read_inputs(bert(), batch_of(rows, labels=labels))) == {"input_ids", "attention_mask"}
    assert set(read_inputs(gpt2(), batch_of(rows, labels=labels))) == {"input_ids", "attention_mask"}
    assert "labels" in read_inputs(t5(), batch_of(rows, labels=labels))
    given = batch_of(rows, labels=labels, decoder_input_ids=labels.clamp_min(0))
    assert "labels" not in read_inputs(t5(), given)
    assert "labels" not in read_inputs(bart(), batch_of(rows, labels=torch.tensor([0, 1, 0, 1])))


@pytest.mark.parametrize("make", [t5, bart, ALL["marian"], ALL["pegasus"]], ids=lambda make: make.name)
def test_decoders_read_what_they_would_have_made_of_their_labels(make: Any) -> None:
    teacher = make()
    rows = texts(4)
    given = batch_of(rows, labels=padded(rows, value=-100))
    read = without_own_loss(teacher, given)
    assert set(read) == {"input_ids", "attention_mask", "decoder_input_ids"}
    with torch.no_grad():
        assert torch.equal(teacher(**read).logits, teacher(**given).logits)
    ids = given["input_ids"]
    assert torch.equal(without_own_loss(teacher, {**given, "decoder_input_ids": ids})["decoder_input_ids"], ids)


def test_labels_of_other_heads_stay() -> None:
    given = batch_of(texts(4), labels=torch.zeros(4, 3))
    assert set(without_own_loss(t5(), given)) == set(given)
    given["labels"] = given["input_ids"]
    assert set(without_own_loss(bert(), given)) == set(given)


def test_what_the_teacher_does_not_read_changes_nothing() -> None:
    rows = texts(4)
    spec = InputSpec.of(ZOO["distilbert"](), batch_of(rows))
    keys = spec.keys(batch_of(rows))
    assert spec.hashed == ("attention_mask", "input_ids")
    more = {"token_type_ids": torch.ones(4, 9), "idx": torch.arange(4), "labels": torch.arange(4), "use_cache": True}
    assert torch.equal(spec.keys(batch_of(rows, **more)), keys)


def test_a_teacher_that_names_no_input_reads_all() -> None:
    class Everything(BertForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    class Some(BertForSequenceClassification):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            return super().forward(input_ids, **kwargs)

    given = batch_of(texts(4), labels=torch.arange(4), num_items_in_batch=torch.tensor(4))
    config = bert().config
    assert set(read_inputs(Everything(config), given)) == {"input_ids", "attention_mask"}
    assert InputSpec.of(Everything(config), given).read == ("attention_mask", "input_ids")
    assert set(taught_inputs(Everything(config), bert(), given)) == {"input_ids", "attention_mask"}
    for read in (read_inputs(Some(config), given), taught_inputs(Some(config), bert(), given)):
        assert set(read) == {"input_ids"}
    assert "input_ids" not in read_inputs(vit(), given)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids"])
def test_every_input_counts(name: str) -> None:
    rows = texts(4)
    given = batch_of(rows, token_type_ids=padded([[0] * len(row) for row in rows]))
    spec = InputSpec.of(bert(), given)
    changed = {**given, name: given[name].clone()}
    changed[name][2, 1] = 1 - changed[name][2, 1]
    same = (spec.keys(given) == spec.keys(changed)).all(1)
    assert same.tolist() == [True, True, False, True]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_padding_does_not_count(side: str, extra: int) -> None:
    rows = texts(5)
    spec = InputSpec.of(gpt2(), text_batch(rows))
    keys = spec.keys(text_batch(rows))
    assert torch.equal(spec.keys(text_batch(rows, extra, side, pad=11)), keys)
    assert len(keys[:, 0].unique()) == 5


def test_a_decoder_is_known_by_both_sides() -> None:
    rows, targets = texts(4), texts(4, seed=1)
    given = batch_of(rows, labels=padded(targets, value=-100))
    spec = InputSpec.of(t5(), given)
    assert (spec.hashed, spec.decoder_mask) == (("attention_mask", "input_ids", "labels"), "labels")
    keys = spec.keys(given)
    assert torch.equal(spec.keys(batch_of(rows, labels=padded(targets, extra=3, value=-100))), keys)
    bare = batch_of(rows)
    assert torch.equal(spec.keys(bare, labels=given["labels"]), keys)
    targets[1][0] += 1
    same = (spec.keys(batch_of(rows, labels=padded(targets, value=-100))) == keys).all(1)
    assert same.tolist() == [True, False, True, True]
    with pytest.raises(TrainingError, match="no 'labels'"):
        spec.keys(bare)


def test_labels_left_out_within_a_target_count() -> None:
    rows = texts(1)
    spec = InputSpec.of(t5(), batch_of(rows, labels=torch.tensor([[-100, 5, 6]])))
    one, other = (spec.keys(batch_of(rows, labels=torch.tensor([each]))) for each in ([-100, 5, 6], [5, -100, 6]))
    assert not torch.equal(one, other)
    counts = spec.output_counts(batch_of(rows, labels=torch.tensor([[-100, 5, -100]])))
    assert counts is not None and counts.tolist() == [[True, True, False]]


def test_decoder_inputs_without_labels_end_before_padding() -> None:
    rows = texts(2)
    ids = torch.tensor([[0, 5, 0, 0], [0, 5, 6, 7]])
    spec = InputSpec.of(t5(), batch_of(rows, decoder_input_ids=ids))
    assert (spec.decoder_mask, spec.pad_token_id) == ("decoder_input_ids", 0)
    counts = spec.output_counts(batch_of(rows, decoder_input_ids=ids))
    assert counts is not None and counts.sum(1).tolist() == [2, 4]
    longer = torch.nn.functional.pad(ids, (0, 3))
    keys = spec.keys(batch_of(rows, decoder_input_ids=ids))
    assert torch.equal(spec.keys(batch_of(rows, decoder_input_ids=longer)), keys)


def test_images_are_known_whole() -> None:
    model = vit()
    size = model.config.image_size
    images = torch.randn(3, model.config.num_channels, size, size)
    spec = InputSpec.of(model, {"pixel_values": images})
    assert (spec.hashed, spec.padded, spec.output_counts({"pixel_values": images})) == (("pixel_values",), (), None)
    moved = images.clone()
    moved[1] = moved[1].roll(1, -1)
    same = (spec.keys({"pixel_values": images}) == spec.keys({"pixel_values": moved})).all(1)
    assert same.tolist() == [True, False, True]


def test_choices_are_padded_too() -> None:
    rows = texts(6)
    model = bert()
    short, long = ({k: v.view(3, 2, -1) for k, v in text_batch(rows, extra).items()} for extra in (0, 4))
    spec = InputSpec.of(model, short)
    assert torch.equal(spec.keys(short), spec.keys(long))
    swapped = {name: value.flip(1) for name, value in short.items()}
    assert not (spec.keys(swapped) == spec.keys(short)).any()


def test_missing_and_unknown_inputs_are_refused() -> None:
    rows = texts(3)
    given = batch_of(rows)
    spec = InputSpec.of(bert(), given)
    with pytest.raises(TrainingError, match=r"has no 'attention_mask'.*same collator"):
        spec.keys({"input_ids": given["input_ids"]})
    with pytest.raises(TrainingError, match=r"has 'position_ids', which the teacher would read"):
        spec.keys({**given, "position_ids": given["input_ids"]})
    with pytest.raises(TrainingError, match="does not fit its mask"):
        spec.keys({**given, "attention_mask": given["attention_mask"][:, 1:]})
    with pytest.raises(TrainingError, match="one row per example"):
        spec.keys({**given, "input_ids": given["input_ids"][:2]})
    with pytest.raises(TrainingError, match=r"allowed: \[batch, length\]"):
        spec.keys({**given, "attention_mask": torch.ones(3)})
    with pytest.raises(TrainingError, match="reads none of the tensors"):
        InputSpec.of(bert(), {"pixels": torch.ones(3)})
    language = InputSpec.of(gpt2(), given)
    with pytest.raises(TrainingError, match="logits_to_keep"):
        language.keys({**given, "logits_to_keep": 1})
    assert torch.equal(language.keys({**given, "logits_to_keep": 0}), language.keys(given))


def test_a_decoder_mask_that_is_gone_is_named() -> None:
    rows = texts(2)
    labels = padded(rows, value=-100)
    given = batch_of(rows, labels=labels, decoder_input_ids=labels.clamp_min(0))
    spec = InputSpec.of(t5(), given)
    assert spec.hashed == ("attention_mask", "decoder_input_ids", "input_ids")
    del given["labels"]
    with pytest.raises(TrainingError, match="no 'labels', which showed where the decoder's padding"):
        spec.keys(given)
    assert spec.keys(given, labels=labels).shape == (2, 2)
