import json

import hostile
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_compress.callbacks.teacher import load_teacher
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.graph.model import dimension_groups
from hf_compress.loading import load_config, load_model
from hf_compress.recipe.models import load_student
from hf_compress.recipe.tasks.table import TASKS_BY_NAME
from hf_compress.shrinking.shrink import shrink


def stored(folder, **fields):
    """Save a config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_labels": 10**9}, "num_labels"),
        ({"num_labels": 10**30}, "num_labels"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "qwen2", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "convnext", "depths": [9999] * 100}, "depths"),
        ({"model_type": "mixtral", "num_hidden_layers": 9999, "num_local_experts": 9999}, "num_local_experts"),
        ({"model_type": "switch_transformers", "num_layers": 9999, "num_experts": 9999}, "num_experts"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
    ],
)
def test_what_would_never_end_is_refused_as_it_is_read(fields, named, tmp_path) -> None:
    folder = stored(tmp_path / "model", **fields)
    message = hostile.refused(folder, lambda: load_config(str(folder)), str(folder), ConfigError)
    assert named in message and "allowed" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 21_841},  # ImageNet-21k
        {"model_type": "mixtral", "num_hidden_layers": 61, "num_local_experts": 384},
        {"model_type": "llama4_text", "num_hidden_layers": 48, "num_local_experts": 128, "moe_layers": [*range(48)]},
        {"model_type": "swin", "depths": [2, 2, 18, 2]},
    ],
)
def test_sizes_of_real_models_are_read(fields, tmp_path) -> None:
    folder = stored(tmp_path / "model", **fields)
    assert load_config(str(folder)).to_dict() == AutoConfig.from_pretrained(folder).to_dict()


def test_shrunk_models_with_wide_layers_load(tmp_path) -> None:
    """Their config holds shapes under names of parameters, which have "layers" in them."""
    model = tiny_models.llama(intermediate_size=11_008)
    ffn = [group for group in dimension_groups(model) if group.kind == "ffn"]
    masks = {group.name: torch.arange(group.num_units) >= 1 + i for i, group in enumerate(ffn)}
    small = shrink(model, masks, verify=False)
    assert max(max(shape) for shape in small.config.quantization_config["shapes"].values()) > 10_000
    small.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert isinstance(loaded, type(AutoModelForCausalLM.from_pretrained(tmp_path)))
    assert loaded.model.layers[1].mlp.up_proj.out_features == 11_006


def test_a_model_that_is_none_for_the_task_is_an_error_without_a_list_of_all_that_are(tmp_path) -> None:
    tiny_models.bert().save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as raised:
        load_student(str(tmp_path), TASKS_BY_NAME["seq2seq-lm"], None, ())
    assert str(raised.value).endswith("for this kind of AutoModel: AutoModelForSeq2SeqLM.")


@pytest.fixture
def pickled(tmp_path):
    """The folder of a model that was saved as torch does it by itself."""
    model = tiny_models.bert()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_adapters_that_are_pickled_alone_are_refused(tmp_path, tiny_bert, monkeypatch) -> None:
    """Also those of the Hub, where there is no folder to look at before."""
    student = tiny_bert()
    student.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    assert load_teacher(str(tmp_path / "adapter"), student).num_parameters() > 0
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    monkeypatch.setattr("hf_compress.callbacks.teacher.check_weights", lambda name: None)
    with pytest.raises(TrainingError, match=r"no adapter_model\.safetensors, and pickled adapters are not loaded"):
        load_teacher(str(tmp_path / "adapter"), student)


def test_pickled_weights_are_refused(pickled, tiny_bert) -> None:
    message = r"its weights are pickled \(pytorch_model\.bin\).*save_pretrained"
    with pytest.raises(ConfigError, match=message):
        load_model(str(pickled))
    with pytest.raises(TrainingError, match=message):
        load_teacher(str(pickled), tiny_bert())
    with pytest.raises(ConfigError, match=message):
        load_student(str(pickled), TASKS_BY_NAME["text-classification"], None, ())
    tiny_bert().save_pretrained(pickled)  # safetensors beside them are taken
    assert load_model(str(pickled)).num_parameters() > 0
