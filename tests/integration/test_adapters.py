"""Callbacks while PEFT adapters train: merging them afterwards changes nothing, and the result shrinks."""

import copy
from typing import Any

import peft
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from quantized_models import fake_quantized_modules, install_quantizers
from torch import Tensor

from hf_compress import (
    DistillationCallback,
    DistillationConfig,
    ExportError,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    TargetError,
    TrainingError,
    dimension_groups,
    enable_quantizers,
    export_quantized,
    shrink,
)
from hf_compress.instruments.fake_quantize import quantizable_layers
from hf_compress.instruments.gate import Gate
from hf_compress.shrinking.verify import relative_error

BASE_CHANGED = "ignore:PruningCallback. units were removed from the base weights"

LAYERS = {
    "bert": ["query", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
TEXTS = [{"input_ids": row, "labels": row} for row in torch.randint(5, 30, (16, 6)).tolist()]


def lora(kind: str, **changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": LAYERS[kind], **changes})


@pytest.fixture
def build(tiny_bert: Any, tiny_llama: Any, classification_data: Any) -> Any:
    """``build(kind)``: a dense model and data for it."""

    def make(kind: str) -> tuple[Any, list[Any]]:
        if kind == "bert":
            return tiny_bert(), classification_data(16)
        return (tiny_llama() if kind == "llama" else tiny_models.gpt2()), TEXTS

    return make


def pruning(**changes: Any) -> PruningCallback:
    defaults: dict[str, Any] = {"structures": {"heads": 0.5, "ffn": 0.5}, "begin": 1, "end": 3, "update_every": 1}
    return PruningCallback(PruningConfig(**{**defaults, **changes}))


def logits(model: Any, data: list[Any]) -> Tensor:
    model.eval()
    with torch.no_grad():
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in data[:4]]) for name in data[0]}
        return model(**batch).logits


@pytest.mark.parametrize("criterion", ["taylor", "l2"])
@pytest.mark.parametrize(("kind", "targets"), [("bert", ["query", "key", "value"]), ("llama", ["q_proj", "k_proj"])])
def test_units_that_act_through_adapted_queries_and_keys(
    build: Any, make_trainer: Any, kind: str, targets: list[str], criterion: str
) -> None:
    """Between query and key there is no layer whose input could be gated: rows of both weights are."""
    model, data = build(kind)
    adapted = get_peft_model(model, lora(kind, target_modules=targets, init_lora_weights=False))
    callback = pruning(structures={"head_dim": 0.5}, criterion=criterion)
    trainer = make_trainer(adapted, data, [callback], max_steps=6, learning_rate=1e-2)
    with pytest.warns(UserWarning, match=r"Save shrink\(trainer\), or the merged model"):
        trainer.train()
    masks = callback.masks()
    assert masks and all(0 < int(mask.sum()) < mask.numel() for mask in masks.values())
    trained = logits(adapted, data)
    small = shrink(trainer)
    assert relative_error(logits(small, data), trained) < 1e-4


def test_the_gate_of_adapted_queries_is_the_one_of_merged_ones() -> None:
    """Closed, halved and open gates, and their gradients."""
    found = []
    for merged in (False, True):
        torch.manual_seed(0)
        dense = tiny_models.bert()
        group = next(g for g in dimension_groups(dense) if g.kind == "head_dim" and g.sources)
        adapted = get_peft_model(dense, lora("bert", target_modules=["query"], init_lora_weights=False))
        model = adapted.merge_and_unload() if merged else adapted.get_base_model()
        model.eval()
        gate = Gate(group, model, needs_gradient=True)
        factors = torch.tensor([0.0, 0.5, 1.0]).repeat(group.num_units)[: group.num_units]
        gate.set_values(factors, factors)
        outputs = model(input_ids=torch.arange(5, 13)[None]).logits
        gate.set_mask(torch.arange(group.num_units) % 2 == 0)  # now the gates themselves act, with their gradients
        model(input_ids=torch.arange(5, 13)[None]).logits.square().sum().backward()
        found.append((outputs.detach(), gate.take_gradient()))
        gate.remove()
    (outputs, gradient), (merged_outputs, merged_gradient) = found
    assert torch.allclose(outputs, merged_outputs, atol=1e-5)
    assert gradient.abs().max() > 0
    assert torch.allclose(gradient, merged_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("criterion", ["taylor", "l2"])
@pytest.mark.parametrize("kind", LAYERS)
def test_masks_cover_base_and_adapters(build: Any, make_trainer: Any, kind: str, criterion: str) -> None:
    model, data = build(kind)
    before = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, lora(kind))
    callback = pruning(criterion=criterion)
    trainer = make_trainer(adapted, data, [callback], max_steps=6, learning_rate=1e-2)
    with pytest.warns(UserWarning, match=r"Save shrink\(trainer\), or the merged model"):
        trainer.train()
    trained = logits(adapted, data)
    small = shrink(trainer)
    assert relative_error(trained, logits(small, data)) < 1e-5
    assert type(small) is type(model)
    merged = adapted.merge_and_unload()
    assert relative_error(trained, logits(merged, data)) < 1e-5
    masks = callback.masks()
    changed = False
    for group in dimension_groups(merged):
        if group.name not in masks:
            continue
        gone = ~masks[group.name]
        assert gone.any() or group.kind == "heads"
        for part in group.slices:  # merging brings nothing back
            weight = merged.get_parameter(part.parameter)
            assert (weight.index_select(part.dim, part.index[gone].flatten()) == 0).all()
            changed |= not torch.equal(weight, before[part.parameter])
    assert changed
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in merged.parameters())


def test_open_gates_leave_the_training_of_adapters_bit_identical(build: Any, make_trainer: Any) -> None:
    results = []
    for callbacks in ([], [pruning(structures={"heads": 0.0, "ffn": 0.0})]):
        model, data = build("bert")
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora("bert", lora_dropout=0.1, modules_to_save=["classifier"]))
        make_trainer(adapted, data, callbacks, max_steps=4, learning_rate=1e-2).train()
        results.append(peft.get_peft_model_state_dict(adapted))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.filterwarnings(BASE_CHANGED)
def test_scores_of_weights_are_those_of_the_merged_model(build: Any, make_trainer: Any) -> None:
    """The units of smallest norm go, in the weights that merging leaves and not in the frozen ones."""
    model, data = build("bert")
    adapted = get_peft_model(model, lora("bert", init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    callback = pruning(criterion="l2", structures={"ffn": 0.5}, allocation="per_layer", end=1)
    make_trainer(adapted, data, [callback], max_steps=1, learning_rate=0.0).train()
    for group in dimension_groups(merged):
        if group.kind == "ffn":
            squares = sum(
                merged.get_parameter(part.parameter)
                .detach()
                .movedim(part.dim, 0)
                .reshape(group.num_units, -1)
                .pow(2)
                .sum(1)
                for part in group.slices
            )
            kept = callback.masks()[group.name].nonzero().flatten()
            assert set(squares.topk(group.num_units // 2).indices.tolist()) == set(kept.tolist())


@pytest.mark.filterwarnings(BASE_CHANGED)
def test_adapters_inside_a_transformers_model_are_merged_too(build: Any, make_trainer: Any, tmp_path: Any) -> None:
    model, data = build("bert")
    peft.inject_adapter_in_model(lora("bert"), model)  # what model.add_adapter does
    trainer = make_trainer(model, data, [pruning()], max_steps=6, learning_rate=1e-2)
    trainer.train()
    small = shrink(trainer)
    assert relative_error(logits(model, data), logits(small, data)) < 1e-5
    small.save_pretrained(tmp_path / "small")
    reloaded = type(small).from_pretrained(tmp_path / "small")
    assert torch.equal(logits(small, data), logits(reloaded, data))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_what_is_quantized_is_what_merging_leaves(build: Any, make_trainer: Any, tmp_path: Any, kind: str) -> None:
    model, data = build(kind)
    adapted = get_peft_model(model, lora(kind))
    callback = QuantizationCallback(QuantizationConfig())
    make_trainer(adapted, data, [callback], max_steps=4, learning_rate=1e-2).train()
    trained = logits(adapted, data)
    names = list(quantizable_layers(adapted.get_base_model()))
    merged = adapted.merge_and_unload()
    assert names == list(quantizable_layers(merged)) == fake_quantized_modules(merged)
    assert torch.equal(trained, logits(merged, data))
    callback.detach()
    assert fake_quantized_modules(merged) == []
    assert not torch.equal(trained, logits(merged, data))
    install_quantizers(quantizable_layers(merged))
    assert torch.equal(trained, logits(merged, data))
    export_quantized(merged, tmp_path / "dense", "dense", verify=False)


@pytest.mark.filterwarnings(BASE_CHANGED)
def test_all_three_callbacks_and_adapters_together(build: Any, make_trainer: Any) -> None:
    model, data = build("bert")
    teacher = copy.deepcopy(model)
    adapted = get_peft_model(model, lora("bert", modules_to_save=["classifier"]))
    callbacks = [
        pruning(),
        DistillationCallback(DistillationConfig(), teacher=teacher),
        QuantizationCallback(QuantizationConfig()),
    ]
    trainer = make_trainer(adapted, data, callbacks, max_steps=6, learning_rate=1e-2)
    trainer.train()
    small = shrink(trainer)
    assert fake_quantized_modules(small) == list(quantizable_layers(small))
    enable_quantizers(small)
    # A sum in another order may round to the next integer: a step of one grid point.
    assert relative_error(logits(adapted, data), logits(small, data)) < 2e-2
    head = adapted.get_base_model().classifier.modules_to_save["default"].weight
    assert torch.equal(small.classifier.weight, head)


@pytest.mark.filterwarnings(BASE_CHANGED)
@pytest.mark.parametrize("step", [2, 4])
def test_resumed_equals_straight(build: Any, make_trainer: Any, tmp_path: Any, step: int) -> None:
    results = []
    for resume in (None, tmp_path / "run" / f"checkpoint-{step}"):
        model, data = build("bert")
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora("bert"))
        callback = pruning()
        trainer = make_trainer(
            adapted, data, [callback], max_steps=6, learning_rate=1e-2, save_strategy="steps", save_steps=2
        )
        trainer.train(resume_from_checkpoint=resume and str(resume))
        results.append((dict(adapted.named_parameters()), callback.masks()))
    (weights, masks), (again, masks_again) = results
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert all(torch.equal(masks[name], masks_again[name]) for name in masks)


def refused(adapted: Any, data: Any, callback: Any, make_trainer: Any, error: type[Exception], match: str) -> None:
    trainer = make_trainer(adapted, data, [callback], max_steps=4)
    with pytest.raises(error, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


BAD_ADAPTERS = {
    "dora": (LoraConfig(target_modules=["query"], use_dora=True), "uses DoRA"),
    "bias": (LoraConfig(target_modules=["query"], lora_bias=True), "has lora_bias"),
    "ia3": (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "ia3"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
@pytest.mark.parametrize("make", [pruning, lambda: QuantizationCallback(QuantizationConfig())])
def test_other_adapters_are_refused_before_training(build: Any, make_trainer: Any, case: str, make: Any) -> None:
    settings, message = BAD_ADAPTERS[case]
    model, data = build("bert")
    refused(get_peft_model(model, settings), data, make(), make_trainer, TargetError, message)


def test_dropout_that_quantization_would_bypass_is_refused(build: Any, make_trainer: Any) -> None:
    model, data = build("bert")
    adapted = get_peft_model(model, lora("bert", lora_dropout=0.1))
    callback = QuantizationCallback(QuantizationConfig())
    refused(adapted, data, callback, make_trainer, TargetError, "has lora_dropout, which would have no effect")


def test_prompts_are_refused(build: Any, make_trainer: Any) -> None:
    model, data = build("bert")
    adapted = get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    refused(adapted, data, pruning(), make_trainer, TrainingError, "learns prompts or prefixes")


def test_models_with_adapters_are_not_exported(build: Any, tmp_path: Any) -> None:
    model, _ = build("bert")
    get_peft_model(model, lora("bert"))
    with pytest.raises(ExportError, match="Merge them first"):
        export_quantized(model, tmp_path / "out", "dense", verify=False)
    assert not (tmp_path / "out").exists()
