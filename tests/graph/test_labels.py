"""Labels for heads of every shape, by what they return, without a real model."""

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_compress import GraphError, make_labels
from hf_compress.graph.input_text import NUM_CHOICES
from hf_compress.graph.labels import FRAMES_PER_LABEL, IGNORED, OBJECTS

IDS = torch.tensor([[1, 5, 6, 7], [1, 5, 0, 0]])


class Head(nn.Module):
    """Returns the same outputs for all inputs, keeps the labels that it is given and computes their loss."""

    def __init__(self, outputs: Mapping[str, Any], loss: Callable[..., Any], **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = PreTrainedConfig()
        for name, value in {"vocab_size": 9, "problem_type": None, **config}.items():
            setattr(self.config, name, value)
        self.outputs, self.loss = outputs, loss
        self.inputs: set[str] | None = None
        self.given: list[dict[str, Any]] = []

    def forward(self, **arguments: Any) -> Any:
        if self.inputs is None:  # the first call has no labels
            self.inputs = set(arguments)
        labels = {name: value for name, value in arguments.items() if name not in self.inputs}
        if not labels:
            return dict(self.outputs)
        self.given.append(labels)
        return {**self.outputs, "loss": self.loss(**labels)}


def refuse(**labels: Any) -> None:
    raise ValueError("not these")


def head(arguments: str, outputs: Mapping[str, Any], loss: Callable[..., Any] = refuse, **config: Any) -> Head:
    """A head whose forward takes the named arguments."""

    def forward(self: Any, **given: Any) -> Any:
        return Head.forward(self, **given)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in arguments.split()]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("Head", (Head,), {"forward": forward})(outputs, loss, **config)


def offered(arguments: str, outputs: Mapping[str, Any], inputs: Mapping[str, Any], **config: Any) -> list[Any]:
    """All labels that are tried on a head, in their order."""
    model = head(arguments, outputs, **config)
    with pytest.raises(GraphError, match="no labels known"):
        make_labels(model, inputs)
    return model.given


def labels_of(outputs: Mapping[str, Any], inputs: Mapping[str, Any], **config: Any) -> list[Tensor]:
    return [each["labels"] for each in offered("labels", outputs, inputs, **config)]


def kinds(labels: list[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(each.shape), each.dtype) for each in labels]


LONG, FLOAT = torch.long, torch.float32


def test_what_gives_a_finite_loss_is_returned_and_nothing_before_it() -> None:
    losses = iter([float("nan"), None, float("inf"), 1.0])
    model = head(
        "labels start_positions return_loss",
        {"logits": torch.zeros(2, 3)},
        lambda **labels: None if (loss := next(losses)) is None else torch.tensor(loss),
    )
    found = make_labels(model, {"input_ids": IDS})
    assert len(model.given) == 4
    assert found is not None and found.keys() == model.given[-1].keys()
    assert [set(each) for each in model.given] == [
        {"return_loss"}, {"start_positions", "end_positions"}, {"labels"}, {"labels"}
    ]  # fmt: skip
    assert model.given[0] == {"return_loss": True}


def test_a_loss_without_labels_needs_none() -> None:
    assert make_labels(head("labels", {"loss": torch.tensor(1.0)}), {"input_ids": IDS}) == {}


def test_the_error_says_what_the_head_returns_and_why_the_first_labels_failed() -> None:
    outputs = {"logits": torch.zeros(2, 3), "other": None}
    message = r"Head: no labels known .* returns \{'logits': \(2, 3\)\} \(ValueError: not these\)\. Pass labels"
    with pytest.raises(GraphError, match=message):
        make_labels(head("labels", outputs), {"input_ids": IDS})
    with pytest.raises(GraphError, match=r"\(with labels the loss is nan\)"):
        make_labels(head("labels", outputs, lambda labels: torch.tensor(float("nan"))), {"input_ids": IDS})
    with pytest.raises(GraphError, match=r"returns \{'logits': \(2, 3\)\}\. Pass labels"):
        make_labels(head("", outputs), {"input_ids": IDS})


def test_the_problem_type_that_a_loss_writes_down_is_forgotten_also_after_an_error() -> None:
    def loss(labels: Tensor) -> Tensor:
        model.config.problem_type = "regression"
        raise ValueError

    model = head("labels", {"logits": torch.zeros(2, 3)}, loss)
    with pytest.raises(GraphError):
        make_labels(model, {"input_ids": IDS})
    assert model.config.problem_type is None


def test_classes_then_several_classes() -> None:
    labels = labels_of({"logits": torch.zeros(8, 5)}, {"input_ids": IDS}, num_labels=3)
    assert kinds(labels) == [((8,), LONG), ((8, 5), FLOAT)]
    assert set(labels[0].tolist()) == {0, 1, 2}
    assert set(labels[1].flatten().tolist()) == {0.0, 1.0}
    few = labels_of({"logits": torch.zeros(8, 2)}, {"input_ids": IDS}, num_labels=3)
    assert set(few[0].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_labels": 1}, [((2,), FLOAT), ((2,), LONG), ((2, 1), FLOAT)]),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, [((2,), LONG), ((2, 1), FLOAT)]),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, [((2, 1), FLOAT)]),
        ({"num_labels": 3, "problem_type": "regression"}, [((2,), FLOAT), ((2,), LONG), ((2, 1), FLOAT)]),
    ],
)
def test_the_problem_type_decides(config, expected) -> None:
    labels = labels_of({"logits": torch.zeros(2, 1)}, {"pixel_values": torch.zeros(2, 3, 4, 4)}, **config)
    assert kinds(labels) == expected


def test_numbers_come_in_the_dtype_of_the_logits() -> None:
    labels = labels_of({"logits": torch.zeros(2, 3, dtype=torch.bfloat16)}, {}, num_labels=3, problem_type="regression")
    assert kinds(labels) == [((2, 3), torch.bfloat16), ((2,), LONG), ((2, 3), torch.bfloat16)]


def test_tokens_that_are_real_or_replaced() -> None:
    first, *_ = labels_of({"logits": torch.zeros(2, 4)}, {"input_ids": IDS}, num_labels=2, pad_token_id=0)
    assert first.shape == (2, 4) and (first == IGNORED).tolist() == (IDS == 0).tolist()
    assert set(first.flatten().tolist()) <= {0, 1, IGNORED}
    for size, shape in ((4, (2, 4)), (2, (2, 3))):
        plain, *_ = labels_of({"logits": torch.zeros(*shape)}, {"input_ids": IDS}, num_labels=size)
        assert plain.shape == (2,)


def test_choices_are_chosen_from() -> None:
    def forward(self: Any, input_ids: Any = None, labels: Any = None, **given: Any) -> Any:
        num_choices = NUM_CHOICES  # noqa: F841 (multiple-choice heads are known by this name)
        given = {"labels": labels} if labels is not None else {}
        return Head.forward(self, **given)

    model = type("Choices", (Head,), {"forward": forward})({"logits": torch.zeros(64, 3)}, refuse, num_labels=2)
    with pytest.raises(GraphError):
        make_labels(model, {"input_ids": IDS})
    assert [set(each["labels"].tolist()) for each in model.given[:2]] == [{0, 1, 2}, {0, 1}]


def test_tokens_have_labels_but_not_the_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    inputs = {"input_ids": IDS, "attention_mask": mask}
    labels = labels_of({"logits": torch.zeros(2, 4, 6)}, inputs, pad_token_id=0)
    assert kinds(labels) == [((2, 4), LONG), ((2, 4), LONG), ((2, 4, 6), FLOAT)]
    assert (labels[0] == -100).tolist() == [[False] * 4, [True, False, True, True]]
    assert labels[0].max() < 6 and labels[1].min() >= 0 and labels[1].max() < 6
    assert set(labels[2].flatten().tolist()) == {0.0, 1.0}
    (without, *_) = labels_of({"logits": torch.zeros(2, 4, 6)}, {"input_ids": IDS})
    assert not (without == IGNORED).any()
    (other, *_) = labels_of({"logits": torch.zeros(2, 4, 6)}, {"input_ids": IDS, "attention_mask": mask[:, :2]})
    assert not (other == IGNORED).any()


def test_the_first_token_has_a_label_also_among_padding_alone() -> None:
    ids = torch.tensor([[0, 0, 0], [0, 5, 0]])
    (labels, *_) = labels_of({"logits": torch.zeros(2, 3, 6)}, {"input_ids": ids}, pad_token_id=0)
    assert (labels == IGNORED).tolist() == [[False, True, True], [False, False, True]]


def test_a_decoder_has_labels_for_its_own_tokens() -> None:
    decoder_ids = torch.tensor([[2, 5, 4], [2, 0, 0]])
    inputs = {"input_ids": IDS, "decoder_input_ids": decoder_ids, "attention_mask": torch.zeros(2, 3, dtype=LONG)}
    labels = labels_of({"logits": torch.zeros(2, 3, 6)}, inputs, pad_token_id=0)
    assert kinds(labels)[0] == ((2, 3), LONG)
    assert (labels[0] == IGNORED).tolist() == [[False] * 3, [False, True, True]]


def test_placeholders_have_no_label() -> None:
    (labels, *_) = labels_of({"logits": torch.zeros(2, 4, 6)}, {"input_ids": IDS}, image_token_id=5, audio_token_id=7)
    assert torch.equal(labels == IGNORED, (IDS == 5) | (IDS == 7))


def test_heads_that_run_their_decoder_on_the_labels() -> None:
    inputs = {"input_ids": IDS.repeat(8, 1)}
    (labels,) = labels_of({"encoder_last_hidden_state": torch.zeros(2, 4, 6)}, inputs, pad_token_id=0)
    assert labels.shape == (16, 4) and labels.max() == 8
    assert (labels == IGNORED).any()
    assert labels_of({"last": torch.zeros(2, 4)}, {}) == []


def test_hidden_patches() -> None:
    hidden = torch.tensor([[True, False, True], [False, True, True]])
    labels = labels_of({"logits": torch.zeros(2, 3, 6)}, {"bool_masked_pos": hidden})
    assert kinds(labels) == [((4,), LONG), ((2, 3), LONG)]
    assert all(each.min() >= 0 and each.max() < 6 for each in labels)


def test_frames() -> None:
    labels = labels_of({"logits": torch.zeros(2, 8, 6)}, {})
    assert kinds(labels) == [((2, 8, 6), FLOAT), ((2, 8), LONG)]
    assert labels[0].sum(dim=-1).eq(1).all()
    assert labels[1].max() < 6


def test_transcripts_are_shorter_than_the_frames_and_hold_no_special_token() -> None:
    transcript, *others = labels_of({"logits": torch.zeros(8, 8, 9)}, {}, pad_token_id=0, bos_token_id=3)
    assert transcript.shape == (8, 8 // FRAMES_PER_LABEL) and len(others) == 2
    assert (transcript == IGNORED).nonzero().tolist() == [[7, 1]]
    assert not {0, 3} & set(transcript.flatten().tolist())
    one, *_ = labels_of({"logits": torch.zeros(2, 3, 9)}, {}, pad_token_id=0)
    assert one.shape == (2, 1) and (one > 0).all()


def test_pixels() -> None:
    inputs = {"pixel_values": torch.zeros(2, 3, 12, 16)}
    (labels,) = labels_of({"logits": torch.zeros(2, 5, 3, 4)}, inputs)
    assert kinds([labels]) == [((2, 12, 16), LONG)] and set(labels.flatten().tolist()) == set(range(5))
    (small,) = labels_of({"logits": torch.zeros(2, 5, 3, 4)}, {})
    assert small.shape == (2, 3, 4)
    assert labels_of({"logits": torch.zeros(2, 1, 5, 3, 4)}, inputs) == []


def test_scores_are_logits_where_there_are_none() -> None:
    for outputs in ({"itm_score": torch.zeros(4, 3)}, {"itm_score": torch.zeros(4, 9), "logits": torch.zeros(4, 3)}):
        (first, *_) = labels_of(outputs, {}, num_labels=9)
        assert first.shape == (4,) and first.max() < 3


def test_pair_labels_come_with_others_then_alone() -> None:
    given = offered("labels next_sentence_label", {"logits": torch.zeros(2, 4, 6)}, {"input_ids": IDS})
    assert [set(each) for each in given] == [{"labels", "next_sentence_label"}] * 3 + [{"next_sentence_label"}]
    assert given[-1]["next_sentence_label"].shape == (2,)
    alone = offered("sentence_order_label", {"logits": torch.zeros(32, 2)}, {"input_ids": IDS})
    assert [set(each) for each in alone] == [{"sentence_order_label"}]
    assert set(alone[0]["sentence_order_label"].tolist()) == {0, 1}


def test_spans_lie_in_the_text() -> None:
    outputs = {"start_logits": torch.zeros(64, 8), "end_logits": torch.zeros(64, 8)}
    (span,) = offered("start_positions end_positions", outputs, {"input_ids": torch.ones(64, 8, dtype=LONG)})
    start, end = span["start_positions"], span["end_positions"]
    assert start.shape == end.shape == (64,)
    assert set(start.tolist()) == {0, 1, 2, 3}
    assert set((end - start).tolist()) == {0, 1}
    (by_tokens,) = offered("start_positions", {"last": torch.zeros(2)}, {"input_ids": IDS.repeat(16, 1)})
    assert set(by_tokens["start_positions"].tolist()) == {0, 1}
    assert torch.equal(by_tokens["start_positions"], by_tokens["end_positions"])
    assert offered("start_positions", {"last": torch.zeros(2)}, {}) == []


def test_objects_are_boxes_within_the_image() -> None:
    outputs = {"pred_boxes": torch.zeros(3, 5, 4), "logits": torch.zeros(3, 5, 4)}
    config = {"num_labels": 3}
    objects, *_ = labels_of(outputs, {"pixel_values": torch.zeros(3, 3, 6, 8)}, **config)
    assert len(objects) == 3
    for label in objects:
        assert set(label) == {"class_labels", "boxes"}
        assert label["class_labels"].shape == (OBJECTS,) and label["class_labels"].max() < 3
        center, size = label["boxes"].split(2, dim=1)
        assert (center - size / 2 >= 0).all() and (center + size / 2 <= 1).all() and (size > 0).all()
    masked = {**outputs, "pred_masks": torch.zeros(3, 5, 2, 2)}
    objects, *_ = labels_of(masked, {"pixel_values": torch.zeros(3, 3, 6, 8)}, **config)
    assert [label["masks"].shape for label in objects] == [(OBJECTS, 6, 8)] * 3
    assert all(label["masks"].dtype == FLOAT for label in objects)


@pytest.mark.parametrize("name", ["pixel_values", "pixel_values_videos"])
def test_segments_have_a_mask_and_a_class(name) -> None:
    (given,) = offered(
        "mask_labels class_labels", {"last": torch.zeros(1)}, {name: torch.zeros(3, 3, 6, 8)}, num_labels=4
    )
    assert [each.shape for each in given["mask_labels"]] == [(OBJECTS, 6, 8)] * 3
    assert [each.shape for each in given["class_labels"]] == [(OBJECTS,)] * 3
    masks, classes = torch.stack(given["mask_labels"]), torch.stack(given["class_labels"])
    assert set(masks.flatten().tolist()) == {0.0, 1.0} and masks.dtype == FLOAT
    assert classes.min() >= 0 and classes.max() < 4
    assert offered("mask_labels", {"last": torch.zeros(1)}, {}) == []


def test_a_config_that_counts_no_labels_has_one() -> None:
    model = head("labels", {"pred_boxes": torch.zeros(9, 5, 4), "logits": torch.zeros(9, 5, 4)}, num_labels=1)
    for config in (model.config, SimpleNamespace(vocab_size=9)):
        model.config = config
        with pytest.raises(GraphError):
            make_labels(model, {"pixel_values": torch.zeros(9, 3, 6, 8)})
        assert not any(label["class_labels"].any() for label in model.given[-3]["labels"])
        model.given.clear()


def test_contrasts_are_other_frames_of_the_same_example() -> None:
    arguments = "mask_time_indices sampled_negative_indices"
    (given,) = offered(arguments, {"projected_states": torch.zeros(3, 8, 5)}, {}, num_negatives=4)
    hidden, others = given["mask_time_indices"], given["sampled_negative_indices"]
    assert hidden.shape == (3, 8) and hidden.dtype == torch.bool
    assert hidden[:, 0].all() and not hidden.all()
    assert others.shape == (3, 8, 4)
    assert torch.equal(others // 8, torch.arange(3).view(3, 1, 1).expand(3, 8, 4))
    assert len(others.unique()) > 8
    (default,) = offered(arguments, {"projected_states": torch.zeros(3, 8, 5)}, {})
    assert default["sampled_negative_indices"].shape == (3, 8, 1)
    assert offered(arguments, {"last": torch.zeros(2)}, {}) == []


@pytest.mark.parametrize("name", ["future_values", "target_values"])
def test_the_future_has_the_shape_of_what_is_predicted(name) -> None:
    outputs = {
        "prediction_logits": torch.zeros(32, 3), "regression_outputs": torch.zeros(2, 4),
        "forecast_counts": torch.zeros(2, dtype=LONG), "last": torch.zeros(2, 7),
    }  # fmt: skip
    given = offered(name, outputs, {})
    assert kinds([each[name] for each in given]) == [((32,), LONG), ((32, 3), FLOAT), ((2, 4), FLOAT)]
    assert set(given[0][name].tolist()) == {0, 1, 2}
    assert given[2][name].std() > 0
    assert offered(name, outputs, {name: torch.zeros(2)}) == []


@pytest.mark.parametrize("name", ["predicted_depth", "reconstruction"])
def test_what_is_reconstructed_is_compared_with_positive_numbers(name) -> None:
    (labels,) = labels_of({name: torch.zeros(2, 4, 4)}, {})
    assert kinds([labels]) == [((2, 4, 4), FLOAT)]
    assert labels.min() >= 0.5 and labels.max() <= 1.5


def test_the_seed_decides() -> None:
    def labels(seed: int) -> Tensor:
        model = head("labels", {"logits": torch.zeros(16, 9)}, lambda labels: torch.tensor(1.0), num_labels=9)
        return make_labels(model, {"input_ids": IDS}, seed)["labels"]

    assert torch.equal(labels(1), labels(1)) and not torch.equal(labels(1), labels(2))
