"""What only a GPU shows: devices, mixed precision with real kernels, waits for the device, measured latency there."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oneshot_models import batches
from training_runs import METHODS, NO_DROPOUT, Recorder, compression, same
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_compress import PruningCallback, PruningConfig, profile, prune_oneshot, shrink
from hf_compress.oneshot.prune import CRITERIA
from hf_compress.registry import criteria

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:PruningCallback. gates stay:UserWarning"),
    pytest.mark.filterwarnings("ignore:Requested unified CUBLASLT workspace size:UserWarning"),  # full determinism
]

TRAINED = sorted(name for name in criteria if criteria.get(name).trains)
SPARSITY = {"heads": 0.5, "ffn": 0.5, "hidden": 0.25, "weights": 0.5}
CASES = [(name, kind) for name in TRAINED for kind in SPARSITY if kind in criteria.get(name).structures]
ROOT = str(Path(__file__).parents[2])
INPUTS = {"input_ids": torch.arange(3, 13).view(2, 5)}


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def pruning(name: str, structures: Any, **changes: Any) -> PruningCallback:
    settings = {"structures": structures, "criterion": name, "begin": 1, "end": 5, "update_every": 1}
    return PruningCallback(PruningConfig(**{**settings, **changes}))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_masked_is_shrunk(name, kind, tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    callback = pruning(name, {kind: SPARSITY[kind]})
    data = classification_data(32)
    trainer = make_trainer(model, data, [callback], max_steps=7, learning_rate=1e-3, use_cpu=False)
    trainer.train()
    assert model.device.type == "cuda"
    achieved = callback._pruner.pools[0].achieved(callback._pruner.masks)
    assert abs(achieved - SPARSITY[kind]) <= callback._pruner.pools[0].tolerance() + 1e-9
    if kind == "weights":
        parameters = dict(model.named_parameters())
        masks = callback._pruner.masks
        zeros = {name: int((parameters[name] == 0).sum()) for name in masks}
        assert zeros == {name: int((~mask).sum()) for name, mask in masks.items()}
        return
    with torch.no_grad():
        trained = model.eval()(**on_gpu(INPUTS)).logits
        small = shrink(trainer).eval()
        assert small.device.type == "cuda"
        torch.testing.assert_close(small(**on_gpu(INPUTS)).logits, trained, rtol=1e-4, atol=1e-5)
    assert small.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("methods", list(METHODS))
def test_everything_together_reloads_on_a_cpu(
    methods, precision, tiny_bert, classification_data, make_trainer, tmp_path
) -> None:
    model = tiny_bert()
    callbacks = compression(METHODS[methods], tiny_bert(seed=1))
    mixed = {} if precision == "fp32" else {precision: True}
    data = classification_data(32)
    trainer = make_trainer(model, data, callbacks, max_steps=8, learning_rate=1e-3, use_cpu=False, **mixed)
    trainer.train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    if "pruning" not in METHODS[methods]:
        return
    small = shrink(trainer).eval()
    small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        theirs = loaded(**INPUTS).logits
        torch.testing.assert_close(small.cpu()(**INPUTS).logits, theirs, rtol=1e-5, atol=1e-6)
    assert loaded.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_resuming_is_the_straight_run(options, tiny_bert, classification_data, make_trainer, tmp_path) -> None:
    """Bit for bit, with the kernels that torch calls deterministic."""
    common = {"use_cpu": False, "full_determinism": True, "max_steps": 6, "save_steps": 3, "save_strategy": "steps"}
    teacher, data, weights = tiny_bert(seed=1), classification_data(48), []
    for resume in (None, str(tmp_path / "run" / "checkpoint-3")):
        recorder = Recorder()
        callbacks = [*compression(METHODS["all"], teacher), recorder]
        trainer = make_trainer(tiny_bert(**NO_DROPOUT), data, callbacks, **common, **options)
        trainer.train(resume_from_checkpoint=resume)
        weights.append(recorder.weights[-1])
    torch.use_deterministic_algorithms(False)
    assert same(*weights)


class NoticeWaits(TrainerCallback):
    """Makes torch warn where something waits for the device, from the third step on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= 2:
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("methods", list(METHODS))
def test_steps_do_not_wait_for_the_device(methods, tiny_bert, classification_data, make_trainer) -> None:
    """Between changes of the masks."""
    callbacks = compression(METHODS[methods], tiny_bert(seed=1), update_every=100, begin=0, end=1)
    callbacks.append(NoticeWaits())
    trainer = make_trainer(tiny_bert(), classification_data(48), callbacks, max_steps=6, use_cpu=False)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer.train()
        torch.cuda.set_sync_debug_mode("warn")
        torch.ones((), device="cuda").item()
        torch.cuda.set_sync_debug_mode("default")
    found = [str(each.filename) for each in recorded if "synchronizing" in str(each.message)]
    assert __file__ in found  # the one above: that they are noticed at all
    ours = [name.removeprefix(ROOT) for name in found if "hf_compress/" in name.removeprefix(ROOT)]
    assert set(ours) <= {"/hf_compress/distillation/positions.py"}  # how many positions count; once a forward pass


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_one_shot(criterion, tiny_bert) -> None:
    each = CRITERIA[criterion]
    structures = {"weights": 0.5}
    if each.units is not None:
        structures = {"heads": 0.5, "ffn": 0.5} if "heads" in each.structures else {"layers": 0.5}
    models = [tiny_bert().eval(), tiny_bert().eval().cuda()]
    results = [
        prune_oneshot(model, batches(3), PruningConfig(structures=structures, criterion=criterion)) for model in models
    ]
    assert results[0].masks.keys() == results[1].masks.keys()
    same_units = sum(int((a == results[1].masks[name].cpu()).sum()) for name, a in results[0].masks.items())
    assert same_units >= 0.98 * sum(mask.numel() for mask in results[0].masks.values())  # ties and rounding
    assert {parameter.device.type for parameter in models[1].parameters()} == {"cuda"}


def test_latency_is_measured_there(tiny_bert, classification_data, make_trainer) -> None:
    """With a budget of time, whose table is that of the GPU."""
    callback = PruningCallback(
        PruningConfig(structures=["heads", "ffn"], target_speedup=1.01, begin=1, end=5, update_every=1)
    )
    model = tiny_bert(num_hidden_layers=6, hidden_size=256, intermediate_size=4096)
    trainer = make_trainer(model, classification_data(32), [callback], max_steps=7, use_cpu=False)
    trainer.train()
    assert any(not bool(mask.all()) for mask in callback._pruner.masks.values())
    assert profile(shrink(trainer)).latency_ms > 0
