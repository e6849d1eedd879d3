"""Distillation under a real Trainer, against losses and gradients written out by hand."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from hf_compress.callbacks.distillation import DistillationCallback
from hf_compress.config import DistillationConfig
from hf_compress.errors import ConfigError, TrainingError

ALPHA, TEMPERATURE = 0.7, 3.0
CONFIG = DistillationConfig(alpha=ALPHA, temperature=TEMPERATURE)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step and stops."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self.flat = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            ).clone()


def batch_of(data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in data]) for name in data[0]}


def gradient_of(model: nn.Module, loss: Callable[[Any], Tensor]) -> Tensor:
    model = copy.deepcopy(model).train()
    loss(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """T^2 * sum of p * log(p / q), at every position."""
    q, p = (F.softmax(logits / TEMPERATURE, dim=-1) for logits in (student, teacher))
    return TEMPERATURE**2 * (p * (p / q).log()).sum(-1)


class ByHand:
    """Mean task and distillation loss over all labels of a data set."""

    def __init__(
        self, teacher: nn.Module, data: list[dict[str, Tensor]], shift: bool, smoothing: float = 0.0
    ) -> None:
        self.batch, self.shift, self.smoothing = batch_of(data), shift, smoothing
        self.teacher = copy.deepcopy(teacher).eval()

    def pairs(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        logits, labels = model(**inputs).logits, self.batch["labels"]
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return logits[labels != -100], labels[labels != -100]

    def task(self, model: nn.Module) -> Tensor:
        logits, labels = self.pairs(model)
        # The Trainer's smoothing spreads epsilon over all classes, as torch does.
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def mixed(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            theirs, _ = self.pairs(self.teacher)
        own, _ = self.pairs(model)
        return (1 - ALPHA) * self.task(model) + ALPHA * divergence(own, theirs).mean()


def mean_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` that does not look at the number of items."""
    return F.cross_entropy(outputs.logits, labels)


def sum_loss_func(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A ``compute_loss_func`` as the documentation wants it."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", {}, {}),
    "bert with smoothed labels": ("bert", {"label_smoothing_factor": 0.2}, {}),
    "bert with mean loss function": ("bert", {}, {"compute_loss_func": mean_loss_func}),
    "bert with sum loss function": ("bert", {}, {"compute_loss_func": sum_loss_func}),
    "llama": ("llama", {}, {}),
    "llama with smoothed labels": ("llama", {"label_smoothing_factor": 0.2}, {}),
}


@pytest.fixture
def setting(
    tiny_bert: Any, tiny_llama: Any, classification_data: Any, language_data: Any
) -> Callable[[str], tuple[Any, Any, Any]]:
    """``setting(kind)`` gives student, teacher and data; the student has no dropout, the teacher was left training."""

    def make(kind: str) -> tuple[Any, Any, Any]:
        if kind == "bert":
            return tiny_bert(**NO_DROPOUT), tiny_bert(seed=1, hidden_size=16).train(), classification_data()
        return tiny_llama(), tiny_llama(seed=1, hidden_size=16).train(), language_data()

    return make


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_one_of_the_loss_written_by_hand(
    make_trainer: Any, setting: Any, case: str, accumulation: int
) -> None:
    """Law 6: whatever scale the plain Trainer gives to this loss, the mixed loss has the same."""
    kind, args, options = CASES[case]
    student, teacher, data = setting(kind)
    by_hand = ByHand(teacher, data, kind == "llama", args.get("label_smoothing_factor", 0.0))
    args = {
        **args,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": len(data) // accumulation,
        "gradient_accumulation_steps": accumulation,
    }

    def trained(*callbacks: Any) -> Tensor:
        gradients = Gradients()
        make_trainer(
            copy.deepcopy(student), data, [*callbacks, gradients], trainer_options=options, **args
        ).train()
        return gradients.flat

    plain, task = trained(), gradient_of(student, by_hand.task)
    scale = plain.norm() / task.norm()
    torch.testing.assert_close(plain, scale * task, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        trained(DistillationCallback(CONFIG, teacher)),
        scale * gradient_of(student, by_hand.mixed),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("case", CASES)
def test_logged_losses_add_up_to_the_loss(make_trainer: Any, setting: Any, case: str) -> None:
    kind, args, options = CASES[case]
    student, teacher, data = setting(kind)
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_options=options,
        logging_strategy="steps",
        logging_steps=3,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        **args,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        expected = (1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)
        assert entry["distillation_loss"] > 0


def test_logged_losses_are_free_of_the_loss_scale_of_mixed_precision(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    callbacks = [DistillationCallback(CONFIG, teacher)]
    trainer = make_trainer(student, data, callbacks, logging_strategy="steps", logging_steps=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(
        (1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"]
    )


def test_the_student_comes_to_agree_with_its_teacher(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    batch = batch_of(data)

    def distance() -> float:
        with torch.no_grad():
            return float(divergence(student.eval()(**batch).logits, teacher.eval()(**batch).logits).mean())

    before = distance()
    config = DistillationConfig(alpha=1.0, temperature=TEMPERATURE)
    make_trainer(student, data, [DistillationCallback(config, teacher)], max_steps=40).train()
    assert distance() < 0.1 * before


@pytest.mark.parametrize(
    "case", ["bert", "bert with smoothed labels", "bert with sum loss function", "llama"]
)
def test_evaluation_measures_the_task_alone(make_trainer: Any, setting: Any, case: str) -> None:
    kind, args, options = CASES[case]
    student, teacher, data = setting(kind)
    by_hand = ByHand(teacher, data, kind == "llama", args.get("label_smoothing_factor", 0.0))
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_options=options,
        eval_strategy="steps",
        eval_steps=4,
        per_device_eval_batch_size=len(data),
        **args,
    )
    trainer.train()
    logged = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    with torch.no_grad():
        assert logged == pytest.approx(float(by_hand.task(student.eval())), rel=1e-4)


@pytest.mark.parametrize(("training", "gradients"), [(True, False), (False, True)])
def test_other_calls_while_training_see_the_task_loss(
    make_trainer: Any, setting: Any, training: bool, gradients: bool
) -> None:
    """Such as a callback that measures something, or an analysis of the model by another callback."""
    student, teacher, data = setting("bert")
    by_hand = ByHand(teacher, data, shift=False)
    differences = []

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.train(training)
            with torch.set_grad_enabled(gradients):
                differences.append(float(model(**by_hand.batch).loss - by_hand.task(model)))

    make_trainer(student, data, [DistillationCallback(CONFIG, teacher), Measure()]).train()
    assert len(differences) == 4
    assert max(map(abs, differences)) < 1e-5


def test_everything_is_given_back_after_training(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    teacher.bert.encoder.eval()
    teacher.classifier.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_options={"compute_loss_func": sum_loss_func},
        label_smoothing_factor=0.1,
    )
    smoother = trainer.label_smoother
    before = [value.clone() for value in teacher.state_dict().values()]
    trainer.train()
    assert trainer.label_smoother is smoother
    assert trainer.compute_loss_func is sum_loss_func
    assert "log" not in vars(trainer)
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    assert modes == [module.training for module in teacher.modules()]
    assert flags == [parameter.requires_grad for parameter in teacher.parameters()]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(map(torch.equal, before, teacher.state_dict().values()))


def test_checkpoints_are_those_of_the_plain_model_plus_our_state(
    make_trainer: Any, setting: Any, tmp_path: Path
) -> None:
    """Law 4; the teacher is nowhere."""
    listings = []
    for callbacks in ([], [DistillationCallback(CONFIG, setting("bert")[1])]):
        student, _, data = setting("bert")
        output = tmp_path / f"with_{len(callbacks)}"
        make_trainer(
            student, data, callbacks, save_strategy="steps", save_steps=2, output_dir=str(output)
        ).train()
        folder = output / "checkpoint-4"
        weights = {name: value.shape for name, value in load_file(folder / "model.safetensors").items()}
        listings.append((weights, {path.name for path in folder.iterdir()}))
    (plain_weights, plain_files), (weights, files) = listings
    assert weights == plain_weights
    assert files - plain_files == {"hf_compress_state.safetensors", "hf_compress_state.json"}
    assert plain_files <= files


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_resumed_run_ends_where_a_straight_one_does(
    make_trainer: Any, tiny_bert: Any, setting: Any, tmp_path: Path, kind: str
) -> None:
    """Law 5, bit for bit, with dropout."""

    def run(output: str, *callbacks: Any, resume: bool = False) -> nn.Module:
        student, teacher, data = setting(kind)
        student = tiny_bert() if kind == "bert" else student
        trainer = make_trainer(
            student,
            data,
            [DistillationCallback(CONFIG, teacher), *callbacks],
            output_dir=str(tmp_path / output),
            save_strategy="steps",
            save_steps=1,
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return student

    straight = run("straight")
    run("resumed", StopAt(3))
    assert not (tmp_path / "resumed" / "checkpoint-4").exists()
    resumed = run("resumed", resume=True)
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_teacher_by_name_teaches_like_the_model_itself(
    make_trainer: Any, tiny_bert: Any, setting: Any, tmp_path: Path
) -> None:
    _, teacher, data = setting("bert")
    teacher.save_pretrained(tmp_path / "teacher")
    students = []
    for given in (teacher, str(tmp_path / "teacher"), tmp_path / "teacher"):
        student = tiny_bert()
        make_trainer(student, data, [DistillationCallback(CONFIG, given)]).train()
        students.append(student)
    for other in students[1:]:
        assert all(map(torch.equal, students[0].parameters(), other.parameters()))


def test_another_architecture_can_teach(make_trainer: Any, setting: Any, tmp_path: Path) -> None:
    """Inputs that the teacher does not know (token_type_ids) are left out."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    student, _, data = setting("bert")
    config = DistilBertConfig(
        vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=16, num_labels=3
    )
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    data = [{**example, "token_type_ids": torch.zeros(10, dtype=torch.long)} for example in data]
    make_trainer(student, data, [DistillationCallback(CONFIG, tmp_path / "teacher")]).train()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_encoder_decoder_is_taught(make_trainer: Any, language_data: Any, smoothing: float) -> None:
    """The teacher gets what its decoder needs, whether the labels reach the model or not."""
    data = [{**example, "decoder_input_ids": example["input_ids"].roll(1)} for example in language_data()]
    student, teacher = tiny_models.t5(), tiny_models.t5()
    with torch.no_grad():
        teacher.shared.weight.mul_(1.5)
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        logging_strategy="steps",
        logging_steps=1,
        label_smoothing_factor=smoothing,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["distillation_loss"] > 0
    assert entry["loss"] == pytest.approx(
        (1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"], rel=1e-4
    )


def test_adapters_are_taught(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    adapted = get_peft_model(
        student, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    )
    trainer = make_trainer(
        adapted, data, [DistillationCallback(CONFIG, teacher)], logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["distillation_loss"] > 0


@pytest.mark.parametrize(
    "args",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=str,
)
def test_training_options_keep_the_gradient(make_trainer: Any, setting: Any, args: dict[str, Any]) -> None:
    student, teacher, data = setting("llama")
    flats = []
    for extra in ({}, args):
        gradients = Gradients()
        callbacks = [DistillationCallback(CONFIG, teacher), gradients]
        make_trainer(copy.deepcopy(student), data, callbacks, max_steps=1, max_grad_norm=0.0, **extra).train()
        flats.append(gradients.flat)
    tolerance = 0.05 if "bf16" in args else 1e-5
    assert (flats[0] - flats[1]).norm() <= tolerance * flats[0].norm()


class IgnoresLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return F.cross_entropy(outputs.logits, inputs["labels"])


class PopsLabels(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels)


class SkipsForward(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        hidden = model.bert(inputs["input_ids"]).pooler_output
        return F.cross_entropy(model.classifier(hidden), inputs["labels"])


class Positional(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(inputs["input_ids"], labels=inputs["labels"]).loss


class IgnoresSmoother(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**inputs).loss


@pytest.mark.parametrize(
    ("trainer_class", "args", "message"),
    [
        (IgnoresLoss, {}, "no effect: the loss that was differentiated does not contain it"),
        (PopsLabels, {}, "returned no loss to mix with"),
        (SkipsForward, {}, "no effect: the model's forward was not called"),
        (Positional, {}, "positional arguments"),
        (IgnoresSmoother, {"label_smoothing_factor": 0.1}, "no effect"),
    ],
)
def test_an_overridden_compute_loss_without_distillation_is_an_error(
    make_trainer: Any, setting: Any, trainer_class: type[Trainer], args: dict[str, Any], message: str
) -> None:
    """Law 10: raised before the first optimizer step."""
    student, teacher, data = setting("bert")
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(
        student, data, [DistillationCallback(CONFIG, teacher)], trainer_class=trainer_class, **args
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


class DoublesLoss(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return 2 * model(**inputs).loss


def test_an_overridden_compute_loss_that_uses_the_loss_is_fine(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    trainer = make_trainer(
        student,
        data,
        [DistillationCallback(CONFIG, teacher)],
        trainer_class=DoublesLoss,
        logging_strategy="steps",
        logging_steps=1,
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(
        (1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"]
    )


def test_outputs_that_cannot_be_taught_are_errors(make_trainer: Any, setting: Any, tiny_bert: Any) -> None:
    student, teacher, data = setting("bert")
    student.config.return_dict = False
    with pytest.raises(TrainingError, match="got a tuple"):
        make_trainer(student, data, [DistillationCallback(CONFIG, teacher)]).train()
    student.config.return_dict = True
    unlabeled = [{name: value for name, value in example.items() if name != "labels"} for example in data]
    with pytest.raises(TrainingError, match="The data needs labels"):
        make_trainer(student, unlabeled, [DistillationCallback(CONFIG, teacher)]).train()


def test_a_teacher_that_says_nan_is_an_error(make_trainer: Any, setting: Any) -> None:
    student, teacher, data = setting("bert")
    with torch.no_grad():
        teacher.classifier.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        make_trainer(student, data, [DistillationCallback(CONFIG, teacher)]).train()


def named(model: Any, *names: str) -> Any:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


def sharing(student: Any, teacher: Any) -> Any:
    teacher.classifier = student.classifier
    return teacher


def problem(student: Any, kind: str) -> Any:
    student.config.problem_type = kind
    return student


BAD_TEACHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "other number of labels": (lambda s, make: make(num_labels=4), "teacher has 4 labels, the student 3"),
    "other order of labels": (
        lambda s, make: (named(s, "no", "maybe", "yes"), named(make(), "yes", "maybe", "no"))[1],
        r"labels are \['yes', 'maybe', 'no'\], the student's \['no', 'maybe', 'yes'\]",
    ),
    "other vocabulary": (lambda s, make: make(vocab_size=60), "vocabulary has 60 tokens, the student's 50"),
    "the student itself": (lambda s, make: s, "shares 41 parameters with the student"),
    "a part of the student": (lambda s, make: sharing(s, make()), "first: classifier.weight"),
    "regression": (lambda s, make: (problem(s, "regression"), make())[1], "problem_type='regression'"),
    "several labels per example": (
        lambda s, make: (problem(s, "multi_label_classification"), make())[1],
        "one of two or more labels per example",
    ),
    "no Transformers model": (
        lambda s, make: nn.Linear(2, 3),
        "the teacher is a Linear; allowed: a transformers",
    ),
    "no such folder": (lambda s, make: "no/such/folder/anywhere", "cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD_TEACHERS)
def test_a_teacher_that_cannot_teach_is_refused_before_training(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, tmp_path: Path, case: str
) -> None:
    choose, message = BAD_TEACHERS[case]
    student = tiny_bert()
    teacher = choose(student, lambda **sizes: tiny_bert(seed=1, **sizes))
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(student, classification_data(), [DistillationCallback(CONFIG, teacher)])
    steps = Gradients()
    trainer.add_callback(steps)
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert not hasattr(steps, "flat")
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not student._forward_hooks
    assert list((tmp_path / "run").iterdir()) == []


def test_a_checkpoint_without_the_head_is_refused(
    make_trainer: Any, tiny_bert: Any, classification_data: Any, tmp_path: Path
) -> None:
    student = tiny_bert()
    BertModel(student.config).save_pretrained(tmp_path / "headless")
    trainer = make_trainer(
        student, classification_data(), [DistillationCallback(CONFIG, tmp_path / "headless")]
    )
    with pytest.raises(TrainingError, match=r"no weights for classifier.bias, classifier.weight"):
        trainer.train()


def test_a_teacher_that_reads_other_inputs_is_refused(
    make_trainer: Any, tiny_bert: Any, classification_data: Any
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        num_labels=3,
    )
    teacher = ViTForImageClassification(config)
    trainer = make_trainer(tiny_bert(), classification_data(), [DistillationCallback(CONFIG, teacher)])
    with pytest.raises(TrainingError, match="reads 'pixel_values', the student 'input_ids'"):
        trainer.train()


def tokenizer_of(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(("[UNK]", "[PAD]", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


@pytest.fixture
def teacher_folder(tiny_bert: Any, tmp_path: Path) -> Iterator[Path]:
    """A saved teacher with a tokenizer that knows "a" and "b"."""
    folder = tmp_path / "teacher"
    tiny_bert(seed=1).save_pretrained(folder)
    tokenizer_of("a", "b").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(("words", "fits"), [(("a", "b"), True), (("b", "a"), False)])
def test_vocabularies_of_the_same_size_are_compared(
    make_trainer: Any,
    tiny_bert: Any,
    classification_data: Any,
    teacher_folder: Path,
    by_name: bool,
    words: Any,
    fits: bool,
) -> None:
    teacher = teacher_folder if by_name else BertForSequenceClassification.from_pretrained(teacher_folder)
    trainer = make_trainer(
        tiny_bert(pad_token_id=1),
        classification_data(),
        [DistillationCallback(CONFIG, teacher)],
        trainer_options={"processing_class": tokenizer_of(*words)},
    )
    if fits:
        trainer.train()
    else:
        with pytest.raises(
            TrainingError, match=r"other ids than the student's to 2 tokens, such as \['a', 'b'\]"
        ):
            trainer.train()


def test_arguments_of_other_types_are_refused_at_once(tiny_bert: Any) -> None:
    with pytest.raises(ConfigError, match="teacher is a int"):
        DistillationCallback(CONFIG, 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config is a dict"):
        DistillationCallback({"alpha": 0.5}, tiny_bert())  # type: ignore[arg-type]
