"""Teachers without a training run: what they are asked, what is noticed, how several speak as one."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn

from hf_compress import DistillationConfig, TrainingError
from hf_compress.callbacks.ensemble import Ensemble, frozen_models
from hf_compress.callbacks.heads import Head
from hf_compress.callbacks.teachers import (
    Lesson,
    LiveTeacher,
    UnmaskedStudent,
    copy_of,
    moved,
    ready_teacher,
)
from hf_compress.config import QuantizationConfig
from hf_compress.instruments.fake_quantize import is_fake_quantized, quantizable_layers
from hf_compress.instruments.quantize import make_quantizers
from hf_compress.teachers.outputs import SparseLogits

IDS = {"input_ids": torch.arange(3, 15).view(2, 6)}


def trainer(**attributes: Any) -> Any:
    made = {"accelerator": SimpleNamespace(autocast=nullcontext), "processing_class": None, "train_dataset": None}
    args = SimpleNamespace(device=torch.device("cpu"), remove_unused_columns=True)
    return SimpleNamespace(**{**made, "args": args, **attributes})


def live(model: Any = None, wants: tuple[str, ...] = (), speaks: bool = True) -> LiveTeacher:
    return LiveTeacher(model or tiny_models.bert(), tiny_models.bert(), trainer(), wants, speaks)


class Says(LiveTeacher):
    """Says given logits, one after the other."""

    def __init__(self, *logits: Tensor) -> None:
        super().__init__(tiny_models.bert(), tiny_models.bert(), trainer())
        self.says = iter(logits)

    def _run(self, inputs: Any) -> Any:
        return {"logits": next(self.says)}

    def ask(self) -> Lesson:
        return self.teach(IDS, Head(self.student))


def test_a_teacher_answers_without_gradients() -> None:
    teacher = live()
    lesson = teacher.teach({**IDS, "labels": torch.zeros(2, dtype=torch.long)}, Head(teacher.student))
    assert isinstance(lesson.logits, Tensor) and not lesson.logits.requires_grad
    assert torch.equal(lesson.logits, teacher.model(**IDS).logits.detach())
    assert lesson.features == () and lesson.known is None


def test_features_come_with_or_without_logits() -> None:
    for speaks in (True, False):
        teacher = live(wants=("hidden_states",), speaks=speaks)
        lesson = teacher.teach(IDS, Head(teacher.student))
        assert (lesson.logits is not None) == speaks
        (features,) = lesson.features
        assert len(list(features.tensors())) > 1
        assert not teacher.model._forward_hooks
        teacher.check()
    broken = tiny_models.bert()
    broken.bert.embeddings.word_embeddings.weight.data.fill_(float("inf"))
    teacher = live(broken, ("hidden_states",), speaks=False)
    teacher.teach(IDS, Head(teacher.student))
    with pytest.raises(TrainingError, match="gave NaN or infinite values"):
        teacher.check()


INFINITE = {"nan": float("nan"), "infinite": float("inf")}


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("first", [True, False])
def test_numbers_that_are_none_are_noticed_among_those_that_are(name, first) -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, INFINITE[name], 1.0]])
    teacher = Says(*(bad, good) if first else (good, bad), good)
    teacher.ask()
    teacher.ask()
    with pytest.raises(TrainingError, match=r"the teacher \(BertForSequenceClassification, .* gave NaN or infinite"):
        teacher.check()
    teacher.ask()
    teacher.check()  # of the last batch alone
    teacher.check()  # of nothing


def test_classes_may_be_excluded_and_batches_empty() -> None:
    teacher = Says(torch.tensor([[0.0, float("-inf"), 1.0]]), torch.zeros(0, 3))
    teacher.ask()
    teacher.ask()
    teacher.check()


def test_the_first_steps_alone_are_checked_at_once() -> None:
    bad = torch.full((1, 3), float("nan"))
    for num_good, raises in ((0, True), (1, True), (2, False)):
        teacher = Says(*[torch.zeros(1, 3)] * num_good, bad)
        for _ in range(num_good):
            teacher.ask()
            teacher.end_step()
        teacher.ask()
        with pytest.raises(TrainingError) if raises else nullcontext():
            teacher.end_step()


def test_inputs_that_layers_made_are_checked_once_for_each_kind(monkeypatch) -> None:
    checked: list[set[str]] = []
    monkeypatch.setattr("hf_compress.callbacks.teachers.check_inputs", lambda *args: checked.append(set(args[2])))
    teacher = Says(*[torch.zeros(2, 3)] * 4)
    embeds = {"inputs_embeds": torch.zeros(2, 6, 32)}
    for inputs in (IDS, embeds, embeds, {**embeds, "past_key_values": torch.zeros(1)}):
        teacher.teach({"encoder_outputs": None, **inputs}, Head(teacher.student))
    assert checked == [{"inputs_embeds"}, {"inputs_embeds", "past_key_values"}]


def too_long(length: int, ids: bool = True) -> dict[str, Tensor]:
    return {"input_ids": torch.full((1, length), 5)} if ids else {"inputs_embeds": torch.zeros(1, length, 32)}


def test_texts_that_are_too_long_for_the_teacher_are_named() -> None:
    teacher = live(tiny_models.bert(max_position_embeddings=8))
    teacher.teach(too_long(8), Head(teacher.student))
    with pytest.raises(
        TrainingError, match=r"has 8 positions, but texts of this batch are 9 tokens long.*max_length=8"
    ):
        teacher.teach(too_long(9), Head(teacher.student))


class Fails(LiveTeacher):
    error: type[Exception] = RuntimeError

    def _run(self, inputs: Any) -> Any:
        raise self.error("of another kind")


@pytest.mark.parametrize("error", [RuntimeError, IndexError])
@pytest.mark.parametrize(("model", "ids"), [("bert", 8), ("t5", 50), ("bert", None)])
def test_other_errors_of_a_teacher_are_its_own(error, model, ids) -> None:
    plain = tiny_models.t5() if model == "t5" else tiny_models.bert(max_position_embeddings=8)
    teacher = Fails(plain, plain, trainer())
    teacher.error = error
    inputs = {"attention_mask": torch.ones(1, 9)} if ids is None else too_long(ids)
    with pytest.raises(error, match="of another kind"):
        teacher.teach(inputs, Head(teacher.student))


def test_the_unmasked_student_is_asked_in_eval_mode_and_goes_on_as_before() -> None:
    student = tiny_models.bert().train()
    student.bert.encoder.eval()
    modes = [module.training for module in student.modules()]
    make_quantizers(QuantizationConfig(), quantizable_layers(student)).install()
    teacher = UnmaskedStudent(student, student, trainer())
    seen: list[bool] = []
    student.classifier.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    lesson = teacher.teach(IDS, Head(student))
    assert isinstance(lesson.logits, Tensor)
    assert torch.equal(lesson.logits, tiny_models.bert()(**IDS).logits.detach())
    assert seen == [False]
    assert [module.training for module in student.modules()] == modes
    assert is_fake_quantized(student.bert.pooler.dense)
    assert (teacher.fingerprint(), teacher.describe()) == ("unmasked", "the student without its masks")


def test_a_teacher_is_told_by_its_weights_and_described_by_its_size() -> None:
    one, same, other = live(), live(), live(tiny_models.bert(num_hidden_layers=1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    size = sum(parameter.numel() for parameter in one.model.parameters())
    assert one.describe() == f"BertForSequenceClassification, {size:,} parameters"


class Member:
    """Says one lesson."""

    def __init__(self, lesson: Lesson, name: str = "member") -> None:
        self.lesson, self.name, self.done = lesson, name, []

    def teach(self, inputs: Any, head: Any, labels: Any = None) -> Lesson:
        self.done.append(("teach", inputs, labels))
        return self.lesson

    def end_step(self) -> None:
        self.done.append("end_step")

    def check(self) -> None:
        self.done.append("check")

    def fingerprint(self) -> str:
        return f"digest of {self.name}"

    def describe(self) -> str:
        return self.name


def ensemble(*lessons: Lesson, ordered: bool = False) -> Ensemble:
    return Ensemble([Member(lesson, name) for lesson, name in zip(lessons, "bac", strict=False)], ordered)


HEAD: Any = None


def test_several_teachers_are_averaged() -> None:
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]], dtype=torch.float64)
    lesson = ensemble(Lesson(first), Lesson(second)).teach(IDS, HEAD)
    assert torch.equal(lesson.logits, torch.tensor([[2.0, 4.0]]))  # type: ignore[arg-type]
    assert lesson.known is None and lesson.features == ()


def test_several_teachers_speak_of_what_all_of_them_speak_of() -> None:
    known = [torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])]
    lessons = [Lesson(torch.zeros(1, 3, 2), mask, (f"features {i}",)) for i, mask in enumerate(known)]  # type: ignore[arg-type]
    lesson = ensemble(*lessons, Lesson(torch.zeros(1, 3, 2))).teach(IDS, HEAD)
    assert lesson.known is not None and lesson.known.tolist() == [[True, False, False]]
    assert lesson.features == ("features 0", "features 1")


def test_several_teachers_of_features_alone_have_no_logits() -> None:
    assert ensemble(Lesson(None), Lesson(None)).teach(IDS, HEAD).logits is None


def test_what_cannot_be_averaged_is_refused() -> None:
    sparse = SparseLogits(*[torch.zeros(1, 1)] * len(SparseLogits.__dataclass_fields__))
    with pytest.raises(TrainingError, match=r"largest logits \(top_k\) cannot be averaged"):
        ensemble(Lesson(torch.zeros(1, 2)), Lesson(sparse)).teach(IDS, HEAD)
    with pytest.raises(TrainingError, match="shape"):
        ensemble(Lesson(torch.zeros(1, 2)), Lesson(torch.zeros(1, 3))).teach(IDS, HEAD)


def test_all_members_take_part() -> None:
    both = ensemble(Lesson(None), Lesson(None))
    labels = torch.zeros(2)
    both.teach(IDS, HEAD, labels)
    both.end_step()
    both.check()
    for member in both.members:
        assert member.done == [("teach", IDS, labels), "end_step", "check"]  # type: ignore[attr-defined]
    assert both.describe() == "b and a"
    assert both.fingerprint() == "digest of a digest of b"
    assert ensemble(Lesson(None), Lesson(None), ordered=True).fingerprint() == "digest of b digest of a"


def test_a_copy_of_the_student_has_the_dtype_that_is_asked_for() -> None:
    model = tiny_models.bert()
    plain, half = copy_of(model, DistillationConfig()), copy_of(model, DistillationConfig(teacher_dtype="bfloat16"))
    assert plain is not model and plain.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert model.dtype == torch.float32
    make_quantizers(QuantizationConfig(), quantizable_layers(model)).install()
    with pytest.raises(TrainingError, match="something is attached to it already"):
        copy_of(model, DistillationConfig())


def test_models_are_frozen_while_they_teach_but_not_the_student_itself() -> None:
    student, teachers = tiny_models.bert().train(), [tiny_models.bert().train() for _ in range(2)]
    itself = UnmaskedStudent(student, student, trainer())
    members = [LiveTeacher(each, student, trainer()) for each in teachers]
    for teaching, frozen in ((Ensemble([*members, itself]), teachers), (members[0], teachers[:1]), (itself, [])):
        with frozen_models(teaching):
            for model in (student, *teachers):
                is_frozen = any(model is each for each in frozen)
                assert model.training != is_frozen
                assert all(parameter.requires_grad != is_frozen for parameter in model.parameters())
        assert all(model.training for model in teachers)
        assert all(parameter.requires_grad for model in teachers for parameter in model.parameters())


def test_inputs_go_to_the_teachers_device_and_precision() -> None:
    model = tiny_models.vit().to(torch.bfloat16)
    found = moved(
        {"pixel_values": torch.zeros(1, 3, 16, 16), "ids": torch.zeros(1, dtype=torch.long), "flag": True}, model
    )
    assert found["pixel_values"].dtype == torch.bfloat16
    assert found["ids"].dtype == torch.long and found["flag"] is True
    meta = moved({"ids": torch.zeros(1)}, tiny_models.bert().to("meta"))
    assert meta["ids"].is_meta


COLUMNS = ["input_ids", "token_type_ids", "labels", "other"]


@pytest.mark.parametrize(
    ("columns", "removed", "warns"),
    [(COLUMNS, True, True), (COLUMNS, False, False), (["input_ids", "labels"], True, False), (None, True, False)],
)
def test_columns_that_only_the_teacher_reads_are_missed(columns, removed, warns, monkeypatch, caplog) -> None:
    """DistilBERT reads no token types, so the Trainer drops them."""
    student = tiny_models.distilbert()
    dataset = SimpleNamespace(column_names=columns)
    args = SimpleNamespace(device=torch.device("cpu"), remove_unused_columns=removed)
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    made = ready_teacher(tiny_models.bert(), DistillationConfig(), student, trainer(train_dataset=dataset, args=args))
    assert isinstance(made.model, nn.Module)
    assert ("the teacher reads token_type_ids, which the Trainer drops" in caplog.text) == warns
