import pytest
import tiny_models
import torch

from hf_compress import ConfigError, make_example_inputs
from hf_compress.latency.key import check_key, cpu_name, latency_key
from hf_compress.report.environment import environment


def changed(before, after) -> set[str]:
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


def test_a_key_says_what_can_change_a_time() -> None:
    model = tiny_models.bert()
    inputs = make_example_inputs(model)
    key = latency_key(model, inputs)
    assert key == latency_key(tiny_models.bert(), make_example_inputs(model, seed=3))
    assert key["device"] == cpu_name() == environment()["cpu"]
    assert changed(key, latency_key(model, make_example_inputs(model, batch_size=5))) == {"inputs"}
    assert changed(key, latency_key(tiny_models.bert().bfloat16(), inputs)) == {"dtype"}
    wider = tiny_models.bert(intermediate_size=48)
    assert changed(key, latency_key(wider, inputs)) == {"config"}
    eager = tiny_models.bert(attn_implementation="eager")
    assert changed(key, latency_key(eager, inputs)) == {"attention"}
    assert changed(key, latency_key(tiny_models.bert_mlm(), inputs)) >= {"model"}


def test_names_of_labels_and_folders_change_nothing() -> None:
    model = tiny_models.bert()
    inputs = make_example_inputs(model)
    key = latency_key(model, inputs)
    model.config.id2label = {i: f"class {i}" for i in range(3)}
    model.config._name_or_path = "somewhere/else"
    assert latency_key(model, inputs) == key


def test_threads_are_part_of_it() -> None:
    model = tiny_models.bert()
    inputs = make_example_inputs(model)
    key = latency_key(model, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert changed(key, latency_key(model, inputs)) == {"threads"}
    finally:
        torch.set_num_threads(before)


def test_all_differences_are_named() -> None:
    check_key({"a": "1"}, {"a": "1"})
    with pytest.raises(ConfigError, match="a: measured with '1', here '2'; b: measured with None, here '3'"):
        check_key({"a": "1", "c": "4"}, {"a": "2", "b": "3", "c": "4"})
