"""TRL's SFTTrainer, where it is installed: its model has a fused language head in place of its own forward."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from training_runs import METHODS, Recorder, cases_of_methods, compression, history, instrumented, neutral, same
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_compress import QuantizationCallback, TrainingError, shrink

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@pytest.fixture
def make_sft(tiny_llama: Any, tmp_path: Any) -> Any:
    """``make_sft(callbacks, **args)``: an SFTTrainer for a tiny Llama."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 8, 7, 6] * 4
    rows = [{"input_ids": torch.randint(3, 50, (length,), generator=generator).tolist()} for length in lengths]
    data = datasets.Dataset.from_list(rows)

    def make(callbacks: list[Any], options: dict[str, Any] | None = None, **args: Any) -> Any:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "bf16": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        }
        return trl.SFTTrainer(
            model=tiny_llama(),
            args=trl.SFTConfig(**{**defaults, **args}),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            callbacks=callbacks,
            **(options or {}),
        )

    return make


def loss_func(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    return losses / num_items_in_batch


@pytest.mark.parametrize("args", [{}, {"bf16": True}, {"packing": True, "max_length": 16}], ids=str)
def test_neutral_callbacks_are_neutral(make_sft: Any, args: dict[str, Any]) -> None:
    """Law 1."""
    runs = []
    for callbacks in ([], neutral(("pruning", "quantization"), 4)):
        recorder = Recorder()
        trainer = make_sft([*callbacks, recorder], **args)
        trainer.train()
        runs.append((recorder, history(trainer, 3)))
    (plain, logs), (other, other_logs) = runs
    assert all(map(same, plain.weights[:3], other.weights[:3]))
    assert logs == other_logs
    assert instrumented(trainer.model)


@pytest.mark.parametrize("args", [{}, {"bf16": True}], ids=str)
def test_what_is_trained_shrinks_saves_and_reloads(make_sft: Any, tmp_path: Any, args: dict[str, Any]) -> None:
    trainer = make_sft(compression(["pruning", "quantization"]), **args)
    trainer.train()
    quantization = next(c for c in trainer.callback_handler.callbacks if isinstance(c, QuantizationCallback))
    quantization.detach()
    small = shrink(trainer)
    assert small.num_parameters() < 0.8 * trainer.model.num_parameters()
    small.save_pretrained(tmp_path / "small")
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        own = LlamaForCausalLM.forward(trainer.model.eval(), ids).logits
        torch.testing.assert_close(small(ids).logits, own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reloaded(ids).logits, own, rtol=1e-5, atol=1e-5)
    assert "forward" in vars(trainer.model) and "forward" not in vars(small)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("args", "options"), [({}, {"compute_loss_func": loss_func}), ({"label_smoothing_factor": 0.1}, {})], ids=str
)
@cases_of_methods("distillation", "all")
def test_distillation_with_a_loss_from_logits(
    make_sft: Any, tiny_llama: Any, method: str, args: dict[str, Any], options: dict[str, Any]
) -> None:
    trainer = make_sft(compression(METHODS[method], tiny_llama(seed=1)), options, **args)
    trainer.train()
    for entry in trainer.state.log_history[:4]:
        if "distillation" in METHODS[method]:
            mixed = 0.5 * entry["task_loss"] + 0.5 * entry["distillation_loss"]
            assert entry["loss"] == pytest.approx(mixed, rel=1e-4)
    if "pruning" in METHODS[method]:
        assert shrink(trainer).num_parameters() < 0.8 * trainer.model.num_parameters()


def test_distillation_without_logits_is_an_error_that_says_what_to_do(make_sft: Any, tiny_llama: Any) -> None:
    """The fused head computes the loss in tiles and never has the logits."""
    trainer = make_sft(compression(["distillation"], tiny_llama(seed=1)))
    with pytest.raises(TrainingError, match="compute_loss_func"):
        trainer.train()
