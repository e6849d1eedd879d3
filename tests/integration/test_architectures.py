"""The whole way, with a plain Trainer, on architectures that the package has no code for."""

import copy

import pytest
import tiny_models
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    export_quantized,
    make_example_inputs,
    shrink,
)
from hf_compress.shrinking.verify import run

CLASSIFY, GENERATE, TRANSLATE, SEE = "classify", "generate", "translate", "see"
CASES = [
    (tiny_models.distilbert, CLASSIFY),
    (tiny_models.albert, CLASSIFY),
    (tiny_models.deberta_v2, CLASSIFY),
    (tiny_models.modernbert, CLASSIFY),
    (tiny_models.gpt2, GENERATE),
    (tiny_models.llama, GENERATE),
    (tiny_models.phi3, GENERATE),
    (tiny_models.opt, GENERATE),
    (tiny_models.bart, TRANSLATE),
    (tiny_models.t5, TRANSLATE),
    (tiny_models.vit, SEE),
]


def examples(task: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(16):
        if task == SEE:
            rows.append({"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(i % 3)})
            continue
        ids = torch.randint(3, 97, (9,), generator=generator)
        labels = {CLASSIFY: ids[0] % 3, GENERATE: ids.clone(), TRANSLATE: ids[:5].clone()}[task]
        rows.append({"input_ids": ids, "attention_mask": torch.ones(9, dtype=torch.long), "labels": labels})
    return rows


@pytest.mark.parametrize(("build", "task"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_train_shrink_save_reload(build, task, tmp_path) -> None:
    model, data = build(), examples(task)
    callbacks = [
        PruningCallback(PruningConfig(structures={"heads": 0.5, "ffn": 0.5}, begin=1, end=3, update_every=1)),
        DistillationCallback(DistillationConfig(), teacher=copy.deepcopy(model)),
    ]
    quantized = build is not tiny_models.gpt2  # its layers are no Linears
    if quantized:
        callbacks.append(QuantizationCallback(QuantizationConfig()))
    seq2seq = task == TRANSLATE
    arguments = (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **({"predict_with_generate": True} if seq2seq else {}),
    )
    trainer = (Seq2SeqTrainer if seq2seq else Trainer)(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks
    )
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    small = shrink(trainer)
    assert small.num_parameters() < 0.8 * model.num_parameters()
    small.save_pretrained(tmp_path / "small")
    inputs = make_example_inputs(small)
    reloaded = type(small).from_pretrained(tmp_path / "small")
    for parameter in reloaded.parameters():  # mapped files are not aligned, and kernels round by alignment
        parameter.data = parameter.data.clone()
    for expected, actual in zip(run(small, inputs), run(reloaded, inputs), strict=True):
        assert torch.equal(expected, actual)
    if quantized and pytest.importorskip("torchao"):
        export_quantized(small, tmp_path / "int8", verify=False)
        integers = type(small).from_pretrained(tmp_path / "int8")
        for expected, actual in zip(run(small, inputs), run(integers, inputs), strict=True):
            error = (expected - actual).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
            assert 0 < error < 0.2
