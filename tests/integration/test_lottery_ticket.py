"""Lottery tickets in a real Trainer."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_compress import ConfigError, PruningCallback, PruningConfig, preview, shrink

SPARSITIES = {"heads": 0.5, "ffn": 0.75}
START, ROUNDS, TOTAL = 1, [4, 6, 8], 10


class Watch(TrainerCallback):
    """Copies weights, masks and the optimizer's state after every step."""

    def __init__(self, pruning: PruningCallback) -> None:
        self.pruning = pruning
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.kept: dict[int, dict[str, int]] = {}
        self.num_states: dict[int, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.weights[state.global_step] = {name: each.detach().clone() for name, each in parameters}
        masks = {name: each for name, each in self.pruning._state()[0].items() if name.startswith("mask.")}
        self.kept[state.global_step] = {
            kind: sum(int(mask.sum()) for name, mask in masks.items() if name.endswith(kind)) for kind in SPARSITIES
        }
        self.num_states[state.global_step] = len(kwargs["optimizer"].state)


def ticket(**changes: Any) -> PruningConfig:
    settings = {"schedule": "lottery_ticket", "rounds": 3, "rewind_to": START, "begin": 2, "end": 8, **changes}
    return PruningConfig(structures=SPARSITIES, **settings)


@pytest.mark.parametrize("criterion", ["taylor", "l2"])
def test_every_round_prunes_and_goes_back(tiny_bert, classification_data, make_trainer, criterion) -> None:
    callback = PruningCallback(ticket(criterion=criterion))
    watch = Watch(callback)
    trainer = make_trainer(tiny_bert(), classification_data(32), [callback, watch], max_steps=TOTAL)
    trainer.train()
    for step, weights in watch.weights.items():
        same = all(torch.equal(each, watch.weights[START][name]) for name, each in weights.items())
        assert same == (step in (START, *ROUNDS)), step
        assert (watch.num_states[step] == 0) == (step in ROUNDS)
    heads = [watch.kept[step]["heads"] for step in (3, *ROUNDS)]
    assert heads == [8, 6, 5, 4]  # 8 * 0.5^(k / 3), rounded
    assert [watch.kept[step]["ffn"] for step in (3, *ROUNDS)] == [96, 60, 38, 24]  # 96 * 0.25^(k / 3)
    small = shrink(trainer)
    assert sum(layer.intermediate.dense.out_features for layer in small.bert.encoder.layer) == 24


def test_the_start_is_what_training_began_with(tiny_bert, classification_data, make_trainer) -> None:
    model = tiny_bert()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    callback = PruningCallback(ticket(rewind_to=0, begin=0, rounds=2))
    watch = Watch(callback)
    make_trainer(model, classification_data(32), [callback, watch], max_steps=TOTAL).train()
    for step in (4, 8):
        assert all(torch.equal(each, before[name]) for name, each in watch.weights[step].items())


@pytest.mark.filterwarnings("ignore:PruningCallback. units were removed from the base weights")
def test_adapters_go_back(tiny_bert, classification_data, make_trainer) -> None:
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS"))
    callback = PruningCallback(ticket())
    watch = Watch(callback)
    trainer = make_trainer(model, classification_data(32), [callback, watch], max_steps=TOTAL)
    trainer.train()
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained and any("lora_B" in name for name in trained)
    for name in trained:
        start = watch.weights[START][name]
        assert [step for step, each in watch.weights.items() if torch.equal(each[name], start)] == [START, *ROUNDS]
    assert shrink(trainer).num_parameters() < tiny_bert().num_parameters()


def test_a_preview_says_where_it_goes_back_to(tiny_bert, classification_data, make_trainer) -> None:
    trainer = make_trainer(tiny_bert(), classification_data(32), [PruningCallback(ticket())], max_steps=TOTAL)
    facts = preview(trainer).sections["pruning"]
    assert facts["weights go back to those of step"] == START
    shares = facts["share of the removal by step (ffn)"]
    assert list(shares) == [f"step {step}" for step in ROUNDS]
    assert shares["step 4"] == pytest.approx((1 - 0.25 ** (1 / 3)) / 0.75, abs=1e-4)


def test_a_moment_after_the_first_round_is_refused(tiny_bert, classification_data, make_trainer) -> None:
    callback = PruningCallback(ticket(rewind_to=4))
    trainer = make_trainer(tiny_bert(), classification_data(32), [callback], max_steps=TOTAL)
    with pytest.raises(ConfigError, match="ends at step 4"):
        trainer.train()
