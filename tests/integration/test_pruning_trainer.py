"""PruningCallback in a real Trainer."""

import copy
import itertools

import pytest
import tiny_models
import torch
from transformers import EarlyStoppingCallback, Trainer, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from hf_compress import (
    PruningCallback,
    PruningConfig,
    ShrinkError,
    TargetError,
    TrainingError,
    dimension_groups,
    make_example_inputs,
    profile,
    shrink,
)

HEADS = [f"bert.encoder.layer.{i}.attention.heads" for i in range(2)]
FFN = [f"bert.encoder.layer.{i}.ffn" for i in range(2)]


def config(**changes):
    defaults = {"structures": {"heads": 0.5, "ffn": 0.75}, "begin": 2, "end": 6, "update_every": 2}
    return PruningConfig(**{**defaults, **changes})


@pytest.fixture
def train(tiny_bert, classification_data, make_trainer):
    def run(settings, *, max_steps=8, steps_before=0, **options):
        callback = PruningCallback(settings)
        trainer = make_trainer(tiny_bert(), classification_data(32), [callback], max_steps=max_steps, **options)
        trainer.train()
        return trainer, callback

    return run


@pytest.mark.parametrize("criterion", ["taylor", "l2"])
@pytest.mark.parametrize("allocation", ["global", "per_layer"])
def test_the_target_is_met_and_the_result_shrinks(train, criterion, allocation) -> None:
    trainer, callback = train(config(criterion=criterion, allocation=allocation))
    masks = callback.masks()
    assert set(masks) == {*HEADS, *FFN}
    assert sum(int(masks[name].sum()) for name in HEADS) == 4
    assert sum(int(masks[name].sum()) for name in FFN) == 24
    if allocation == "per_layer":
        assert [int(masks[name].sum()) for name in (*HEADS, *FFN)] == [2, 2, 12, 12]
    small = shrink(trainer)
    inputs = {"input_ids": torch.arange(3, 13).view(2, 5)}
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, trainer.model.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)
    groups = {g.name: g for g in dimension_groups(trainer.model)}
    gone = sum(int((~mask).sum()) * groups[name].parameters_per_unit for name, mask in masks.items())
    assert trainer.model.num_parameters() - small.num_parameters() == gone


def test_l2_removes_the_units_of_smallest_norm(train, tiny_bert) -> None:
    """With a learning rate of 0 the weights are known."""
    _, callback = train(config(structures={"ffn": 0.5}, criterion="l2", allocation="per_layer"), learning_rate=0.0)
    for layer, name in zip(tiny_bert().bert.encoder.layer, FFN, strict=True):
        up, bias, down = layer.intermediate.dense.weight, layer.intermediate.dense.bias, layer.output.dense.weight
        norm = (up.square().sum(1) + bias.square() + down.square().sum(0)).detach()
        assert set(norm.topk(24).indices.tolist()) == set(callback.masks()[name].nonzero().flatten().tolist())


def test_taylor_scores_are_averaged_gate_gradients(tiny_bert, classification_data, make_trainer) -> None:
    """One step, no dropout: |sum of w * dL/dw| over the consumer's columns."""
    settings = config(structures={"ffn": 0.5}, begin=0, end=1, allocation="per_layer", schedule="one_shot")
    options = {"max_steps": 1, "per_device_train_batch_size": 32, "learning_rate": 0.0}
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = classification_data(32)
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    model(**batch).loss.backward()
    weights = [layer.output.dense.weight for layer in model.bert.encoder.layer]
    expected = [(w * w.grad).sum(0).abs().topk(24).indices for w in weights]
    callback = PruningCallback(settings)
    fresh = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    make_trainer(fresh, data, [callback], **options).train()
    for indices, name in zip(expected, FFN, strict=True):
        assert set(indices.tolist()) == set(callback.masks()[name].nonzero().flatten().tolist())


def test_zero_sparsity_leaves_the_trajectory_bit_identical(tiny_bert, classification_data, make_trainer) -> None:
    """Law 1."""
    models = []
    for callbacks in ([], [PruningCallback(config(structures={"heads": 0.0, "ffn": 0.0}))]):
        trainer = make_trainer(tiny_bert(), classification_data(32), callbacks, max_steps=6)
        trainer.train()
        models.append(trainer.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))


def test_evaluation_after_training_sees_the_pruned_model(train, classification_data) -> None:
    trainer, callback = train(config())
    layer = trainer.model.bert.encoder.layer[0]
    assert type(layer.output.dense) is torch.nn.Linear
    pruned = ~callback.masks()[FFN[0]]
    assert not layer.output.dense.weight[:, pruned].any()
    before = trainer.predict(classification_data(8)).predictions
    small = shrink(trainer)
    after = Trainer(small, trainer.args).predict(classification_data(8)).predictions
    assert abs(before - after).max() < 1e-5


def test_pruned_units_stay_pruned_and_sparsity_grows_as_scheduled(train, monkeypatch) -> None:
    seen = []
    original = PruningCallback.on_step_end

    def watch(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        seen.append({name: mask.clone() for name, mask in self._pruner.masks.items()})

    monkeypatch.setattr(PruningCallback, "on_step_end", watch)
    train(config(structures={"ffn": 0.75}, end=10), max_steps=12)
    removed = [sum(int((~mask).sum()) for mask in masks.values()) for masks in seen]
    final = 0.75 * 96
    assert removed == [round(final * (1 - (1 - p) ** 3)) for p in (0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1, 1)]
    for earlier, later in itertools.pairwise(seen):
        assert all(not (later[name] & ~earlier[name]).any() for name in later)


def test_limits_are_honored(train) -> None:
    settings = config(structures={"heads": 0.5, "ffn": 0.5}, max_layer_sparsity=0.6, multiple_of=8)
    _, callback = train(settings)
    for name in FFN:
        kept = int(callback.masks()[name].sum())
        assert kept % 8 == 0 and kept >= 0.4 * 48
    assert all(callback.masks()[name].sum() >= 2 for name in HEADS)


def test_excluded_groups_stay(train) -> None:
    _, callback = train(config(structures={"ffn": 0.5}, exclude=(r"layer\.0\.",)))
    assert set(callback.masks()) == {FFN[1]}


def test_logs_show_the_sparsity(train) -> None:
    trainer, _ = train(config(), logging_strategy="steps", logging_steps=1)
    values = [entry["ffn_sparsity"] for entry in trainer.state.log_history if "ffn_sparsity" in entry]
    assert values[0] == 0.0 and values[-1] == 0.75


def test_logs_say_what_the_model_would_have_after_shrinking(train) -> None:
    trainer, _ = train(config(), logging_strategy="steps", logging_steps=1)
    entries = [entry for entry in trainer.state.log_history if "parameters" in entry]
    small = shrink(trainer)
    inputs = make_example_inputs(trainer.model)
    whole, left = (profile(model, inputs, latency=False) for model in (trainer.model, small))
    assert entries[0]["parameters"] == whole.parameters and entries[0]["flops_kept"] == 1.0
    assert entries[-1]["parameters"] == left.parameters
    assert entries[-1]["flops_kept"] == pytest.approx(left.flops / whole.flops, abs=1e-4)
    assert "heads_threshold" not in entries[0]
    assert entries[-1]["heads_threshold"] > 0


def test_scores_that_never_move_are_an_error(tiny_bert, classification_data, make_trainer) -> None:
    """Which units go would be chance: here every gradient is not a number."""
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    trainer = make_trainer(model, classification_data(32), [PruningCallback(config())], max_steps=8)
    with pytest.raises(TrainingError, match="scores of all 'heads' are 0 when the first are to go"):
        trainer.train()


@pytest.mark.parametrize("broken", ["nan", "no gradient"])
@pytest.mark.parametrize("criterion", ["slim", "l0", "apoz", "random"])
def test_a_run_without_a_usable_loss_is_an_error(
    tiny_bert, classification_data, make_trainer, criterion, broken
) -> None:
    """Law 8: neither learned scores nor chance may hide that nothing was trained."""
    model = tiny_bert()
    with torch.no_grad():
        if broken == "nan":
            model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
        else:
            model.classifier.weight.zero_()
    trainer = make_trainer(model, classification_data(32), learning_rate=0.0, max_steps=8)
    trainer.add_callback(PruningCallback(config(structures={"ffn": 0.5}, criterion=criterion)))
    if broken != "nan" and criterion in ("apoz", "random"):
        trainer.train()  # they need no loss
        return
    message = "is NaN or infinite in places" if broken == "nan" else "no gradient told"
    with pytest.raises(TrainingError, match=message):
        trainer.train()


@pytest.mark.parametrize("structure", ["ffn", "weights"])
def test_frozen_weights_cannot_be_pulled(tiny_bert, classification_data, make_trainer, structure) -> None:
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    exclude = ("classifier",) if structure == "weights" else ()
    settings = config(structures={structure: 0.5}, criterion="admm", exclude=exclude)
    trainer = make_trainer(model, classification_data(32), [PruningCallback(settings)], max_steps=8)
    with pytest.raises(TrainingError, match=r"got no gradient|get no gradients"):
        trainer.train()


def test_a_criterion_that_finds_out_that_nothing_goes_is_an_error(train) -> None:
    """Law 8."""
    soft = {"mode": "soft", "regular_scale": 0.0}
    with pytest.raises(TargetError, match=r"removed nothing of heads, ffn after 8 steps .* Raise options"):
        train(config(structures=["heads", "ffn"], criterion="movement", options=soft))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"exclude": ("nothing",)}, TargetError, "'nothing' matches no dimension group; groups here: 'bert"),
        ({"structures": {"heads": 0.5}, "exclude": ("heads",)}, TargetError, "no 'heads' to prune"),
        ({"structures": {"heads": 0.9}, "min_units": 2}, TargetError, r"highest sparsity allowed here is 0\.5"),
    ],
)
def test_bad_targets_are_refused_before_training(
    tiny_bert, classification_data, make_trainer, tmp_path, settings, error, message
) -> None:
    model = tiny_bert()
    before = copy.deepcopy(model.state_dict())
    trainer = make_trainer(model, classification_data(8), [PruningCallback(config(**settings))], max_steps=4)
    with pytest.raises(error, match=message):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(type(m).__name__ != "InstrumentedLinear" for m in model.modules())
    assert trainer.state.global_step == 0
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_a_run_that_stops_before_the_target_is_an_error(tiny_bert, classification_data, make_trainer) -> None:
    """Law 8."""

    class Stop(EarlyStoppingCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

        def on_train_begin(self, *args, **kwargs):
            pass

    trainer = make_trainer(tiny_bert(), classification_data(32), [PruningCallback(config()), Stop()], max_steps=8)
    with pytest.raises(TargetError, match=r"asked for sparsity 0\.5, reached 0\.0000.*after 3 steps.*ends at step 6"):
        trainer.train()


def test_a_best_checkpoint_from_before_the_end_is_an_error_that_says_how_to_avoid_it(train) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(TargetError, match=r"went back to .*checkpoint-4.*set eval_delay=6"):
        train(config(), eval_steps=4, save_steps=4, learning_rate=1.0, greater_is_better=True, **options)
    _, callback = train(config(), eval_steps=7, save_steps=7, **options)
    assert sum(int(callback.masks()[name].sum()) for name in FFN) == 24


def test_shrinking_before_training_is_an_error(tiny_bert, classification_data, make_trainer) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(8), [PruningCallback(config())], max_steps=8)
    with pytest.raises(ShrinkError, match="training has not finished"):
        shrink(trainer)


def test_shrinking_a_trainer_without_masks_is_an_error(tiny_bert, classification_data, make_trainer) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(8), [], max_steps=1)
    with pytest.raises(ShrinkError, match="Add a PruningCallback"):
        shrink(trainer)


def test_masks_of_another_trainers_model_are_refused(tiny_bert, classification_data, make_trainer) -> None:
    """They would remove other units than those that the first model was trained without."""
    callback, data = PruningCallback(config()), classification_data(8)
    first = make_trainer(tiny_bert(), data, [callback], max_steps=8)
    first.train()
    assert callback.masked_model is first.model
    masks, size = callback.masks(), shrink(first).num_parameters()
    second = make_trainer(tiny_bert(seed=1), data, [callback], max_steps=8)
    second.train()
    with pytest.raises(ShrinkError, match="made for another model"):
        shrink(first)
    assert shrink(first, masks).num_parameters() == size
    assert shrink(second).num_parameters() < second.model.num_parameters()


def test_a_quantized_model_is_refused(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    model.config.quantization_config = {"quant_method": "torchao"}
    trainer = make_trainer(model, classification_data(8), [PruningCallback(config())], max_steps=8)
    with pytest.raises(ShrinkError, match="quantized already"):
        trainer.train()


def test_gates_of_heads_inside_a_norm_stay_after_training(make_trainer) -> None:
    """OLMo 2 normalizes queries over all heads: after training, zeros would still be in those statistics."""
    model = tiny_models.OTHERS["olmo2"]()
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(8)]
    callback = PruningCallback(config(structures={"heads": 0.5}))
    trainer = make_trainer(model, rows, [callback], max_steps=8)
    with pytest.warns(UserWarning, match=r"gates stay on the model.*'model\.layers\.0\.self_attn\.heads'"):
        trainer.train()
    small, inputs = shrink(trainer), {"input_ids": torch.arange(3, 13).view(2, 5)}
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, model.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert small.num_parameters() < model.num_parameters()


def speech(**config):
    """A wav2vec2 that drops layers and overwrites frames in place while it trains, as its default config says."""
    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    more = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    shape = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    torch.manual_seed(0)
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**settings, **more, **shape, num_labels=2, mask_time_length=2, **config)
    )


@pytest.mark.parametrize("criterion", ["taylor", "movement", "mean_activation"])
def test_layers_that_are_dropped_at_random_say_nothing_in_that_step(make_trainer, criterion) -> None:
    """LayerDrop: no rank runs a dropped layer."""
    rows = [{"input_values": torch.randn(400), "labels": i % 2} for i in range(8)]
    callback = PruningCallback(config(structures={"ffn": 0.5}, criterion=criterion, begin=4, end=10))
    trainer = make_trainer(speech(layerdrop=0.4), rows, [callback], max_steps=12)
    trainer.train()
    assert sum(int(mask.sum()) for mask in callback.masks().values()) == 36
    assert shrink(trainer).num_parameters() < trainer.model.num_parameters()


def test_a_layer_that_never_runs_is_an_error(make_trainer, monkeypatch) -> None:
    rows = [{"input_values": torch.randn(400), "labels": i % 2} for i in range(8)]
    model = speech(layerdrop=0.0)
    layer = model.wav2vec2.encoder.layers[1]
    monkeypatch.setattr(type(layer), "forward", skipping(type(layer).forward, layer))
    trainer = make_trainer(model, rows, [PruningCallback(config(structures={"ffn": 0.5}))], max_steps=8)
    with pytest.raises(TrainingError, match=r"gates of 'wav2vec2\.encoder\.layers\.1\..*' got no gradient so far"):
        trainer.train()


def skipping(forward, layer):
    def replaced(self, hidden_states, *args, **kwargs):
        if self is layer and self.training:
            return hidden_states
        return forward(self, hidden_states, *args, **kwargs)

    return replaced


def test_a_model_that_changes_activations_in_place_trains_with_weight_masks(make_trainer) -> None:
    """SpecAugment overwrites frames of a projection's output."""
    rows = [{"input_values": torch.randn(400), "labels": i % 2} for i in range(8)]
    settings = config(structures={"weights": 0.5}, criterion="level", exclude=("conv",))
    trainer = make_trainer(speech(layerdrop=0.0), rows, [PruningCallback(settings)], max_steps=8)
    trainer.train()
    assert (trainer.model.wav2vec2.feature_projection.projection.weight == 0).any()
