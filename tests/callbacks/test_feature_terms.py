"""Features of models that are no plain stack of equal layers over one text."""

from typing import Any

import pytest
import torch
from features_by_hand import ALPHA, WEIGHT, attention_kl, config, examples, hidden_mse
from torch import Tensor
from transformers import BertConfig, BertForMultipleChoice
from zoo import ALL, OTHERS, randomize
from zoo.base import ENCODER

from hf_compress import DistillationCallback, TrainingError

LOG = {"logging_strategy": "steps", "logging_steps": 1}
ONCE = {"max_steps": 1, "per_device_train_batch_size": 8, **LOG}


def stages(**changes: Any) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    """Two ConvNeXt, whose later layers have fewer positions and more channels, and images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    data = [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(images)]
    return OTHERS["convnext"]().train(), randomize(OTHERS["convnext"](**changes), seed=1), data


def channels(model: Any, data: list[dict[str, Tensor]]) -> list[Tensor]:
    pixels = torch.stack([example["pixel_values"] for example in data])
    with torch.no_grad():
        states = model.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
    return [each.flatten(2).mT for each in states]


@pytest.mark.parametrize("settings", [{}, {"layers": "dynamic", "candidates": {0: [0], 1: [1], 2: [2]}}], ids=str)
def test_stages_have_masks_of_their_own_size(make_trainer: Any, settings: dict[str, Any]) -> None:
    student, teacher, data = stages()
    pairs = list(zip(channels(student, data)[1:], channels(teacher, data)[1:], strict=True))
    assert len({own.shape for own, _ in pairs}) == len(pairs) == 3
    expected = sum(float((own - theirs).square().mean()) for own, theirs in pairs) / 3
    callback = DistillationCallback(config("hidden_mse", **settings), teacher)
    trainer = make_trainer(student.train(), data, [callback], **ONCE)
    trainer.train()
    assert trainer.state.log_history[0]["distillation_loss"] == pytest.approx(WEIGHT * expected, rel=1e-4)


def test_stages_of_other_widths_are_projected(make_trainer: Any) -> None:
    student, teacher, data = stages(hidden_sizes=[12, 16, 24])
    settings = config("hidden_mse", layers="dynamic", candidates={0: [0], -1: [2]}, learning_rate=0.01)
    callback = DistillationCallback(settings, teacher)
    trainer = make_trainer(student, data, [callback], **{**ONCE, "max_steps": 30, "learning_rate": 3e-3})
    trainer.train()
    losses = [entry["distillation_loss"] for entry in trainer.state.log_history if "distillation_loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"loss": "gram", "layers": "dynamic"}, "64 positions, with the teacher's layer 1, which has 16. Give candid"),
        ({"loss": "gram", "layers": {0: 2}}, "64 positions, with the teacher's layer 2, which has 4. Give other lay"),
        ({"loss": "fsp"}, r"unequal numbers of positions, \[4, 16, 64\]. Pair layers of equal ones"),
    ],
    ids=["dynamic", "given", "successive"],
)
def test_stages_that_cannot_be_compared_are_refused(make_trainer: Any, feature: dict[str, Any], message: str) -> None:
    student, teacher, data = stages()
    trainer = make_trainer(student, data, [DistillationCallback(config(**feature), teacher)])
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


FORMULAS = {"hidden_mse": hidden_mse, "attention_kl": attention_kl}


@pytest.mark.parametrize("loss", ["hidden_mse", "attention_kl"])
def test_choices_count_as_parts_of_their_example(make_trainer: Any, loss: str) -> None:
    """Each has a padding of its own."""
    texts = examples("bert", 16)
    data = [
        {
            "input_ids": torch.stack([a["input_ids"], b["input_ids"]]),
            "attention_mask": torch.stack([a["attention_mask"], b["attention_mask"]]),
            "labels": torch.tensor(i % 2),
        }
        for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    sizes = {**ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = (
        randomize(BertForMultipleChoice(BertConfig(**sizes, attn_implementation="eager")), seed) for seed in (0, 1)
    )
    batch = {name: torch.stack([each[name] for each in texts]) for name in ("input_ids", "attention_mask")}
    name, first = ("attentions", 0) if loss == "attention_kl" else ("hidden_states", 1)
    with torch.no_grad():
        own, theirs = (
            model.bert(**batch, output_hidden_states=True, output_attentions=True)[name][first:]
            for model in (student, teacher)
        )
    values = []
    for n, keep in enumerate(batch["attention_mask"].bool()):
        pairs = [(a[n], b[n]) for a, b in zip(own, theirs, strict=True)]
        cut = [tuple(x[:, keep][:, :, keep] if x.dim() == 3 else x[keep] for x in pair) for pair in pairs]
        values.append(sum(float(FORMULAS[loss](a, b)) for a, b in cut) / len(cut))
    trainer = make_trainer(student.train(), data, [DistillationCallback(config(loss), teacher)], **ONCE)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["distillation_loss"] == pytest.approx(WEIGHT * sum(values) / 16, rel=1e-4)
    assert entry["loss"] == pytest.approx((1 - ALPHA) * entry["task_loss"] + ALPHA * entry["distillation_loss"])


@pytest.mark.parametrize("projection", ["where needed", "always"])
def test_layers_that_may_be_paired_with_several_widths_are_refused(make_trainer: Any, projection: str) -> None:
    """OPT brings its last hidden state to the width of its embeddings."""
    student, teacher = ALL["opt"]().train(), randomize(ALL["opt"](), seed=1)
    assert teacher.config.word_embed_proj_dim != teacher.config.hidden_size
    data = [{**each, "labels": each["input_ids"]} for each in examples("bert")]
    settings = {"layers": "dynamic", "projection": projection}
    with pytest.raises(TrainingError, match=r"may pair layer 0 .* that are \[24, 32\] wide.*Give candidates"):
        make_trainer(student, data, [DistillationCallback(config("hidden_mse", **settings), teacher)], **ONCE).train()
    settings["candidates"] = {0: [0], 1: [1]}
    make_trainer(student, data, [DistillationCallback(config("hidden_mse", **settings), teacher)], **ONCE).train()
