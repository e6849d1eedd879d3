"""What a DistillationConfig may say: files both ways, and every setting that is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_compress import ConfigError, DistillationConfig, FeatureConfig, Ramp, Recipe

CONFIGS = {
    "defaults": DistillationConfig(),
    "ramps": DistillationConfig(
        alpha=Ramp(start=0.9, stop=0.1, begin=0.25, end="1.5 epochs", schedule="cubic"),
        temperature=Ramp(start=1, stop=4, begin=10, end=20),
    ),
    "teacher": DistillationConfig(loss="jensen_shannon", teacher_dtype="bfloat16", teacher_device="cuda:1"),
    "padded": DistillationConfig(padded_vocabulary=True),
    "pairs": DistillationConfig(
        loss=None,
        features=[
            FeatureConfig(loss="hidden_mse", layers={0: 2, 1: -1}, projection="always", learning_rate=1e-2),
            {"loss": "attention_kl", "layers": "last", "weight": {"start": 0.0001, "stop": 2.0}, "stack": "decoder"},
            {"loss": "relations", "options": {"relation_heads": 12}, "of": ["query", "value"], "weight": 3},
        ],
    ),
    "dynamic": DistillationConfig(
        features=[
            FeatureConfig(loss="hidden_mse", layers="dynamic", candidates={0: [1, 2], 1: (3,)}, ordered=True),
            FeatureConfig(loss="hidden_cosine", layers="dynamic", teacher_layers=[2, -1], chosen_by="teacher"),
            FeatureConfig(loss="hidden_mse", layers="dynamic", candidates="later"),
        ]
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_files_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    config.save(tmp_path / f"config.{suffix}")
    assert DistillationConfig.load(tmp_path / f"config.{suffix}") == config
    recipe = Recipe(distillation=config, teacher=["a", "self"])
    recipe.save(tmp_path / f"recipe.{suffix}")
    loaded = Recipe.load(tmp_path / f"recipe.{suffix}")
    assert loaded == recipe
    assert loaded.distillation == config


def test_layers_are_numbers_whatever_the_file_makes_of_them() -> None:
    stored = CONFIGS["pairs"].to_dict(), CONFIGS["dynamic"].to_dict()
    assert '"0": 2' in json.dumps(stored[0])
    for data in (json.loads(json.dumps(stored[0])), yaml.safe_load(yaml.safe_dump(stored[0]))):
        assert DistillationConfig.from_dict(data).features[0].layers == {0: 2, 1: -1}
    again = DistillationConfig.from_dict(json.loads(json.dumps(stored[1])))
    assert again.features[0].candidates == {0: (1, 2), 1: (3,)}
    assert again.features[1].teacher_layers == (2, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": -0.1}, r"Ramp\.start: got -0\.1; allowed: a number in \[0, "),
        ({"stop": "high"}, r"Ramp\.stop: got 'high'; allowed: a number"),
        ({"start": True}, r"Ramp\.start: got True"),
        ({"begin": 1.5}, r"Ramp\.begin: got 1\.5; allowed: an int >= 0 .*, a float in \[0, 1\].* '1\.5 epochs'"),
        ({"end": "2 weeks"}, r"Ramp\.end: got '2 weeks'"),
        ({"schedule": "cubik"}, r"Ramp\.schedule: unknown value 'cubik'; closest match: 'cubic'"),
        ({"stop": 0.5}, r"Ramp\.stop: got 0\.5; allowed: another number than start=0\.5\. Or give the number alone"),
        ({"begin": 5, "end": 2}, r"Ramp\.end: got 2; allowed: nothing earlier than begin=5"),
        ({"begin": 0.5, "end": 0.25}, r"Ramp\.end: got 0\.25; allowed: nothing earlier than begin=0\.5"),
        ({"begin": "2 epochs", "end": "1.5 epochs"}, r"Ramp\.end: got '1\.5 epochs'; allowed: nothing earlier"),
        ({"until": 3}, r"Ramp: unknown key 'until'; .*'start'"),
    ],
)
def test_bad_ramps_are_refused(changes: dict[str, Any], message: str) -> None:
    ramp = {"start": 0.5, "stop": 0.9, **changes}
    with pytest.raises(ConfigError, match=message):
        Ramp.from_dict(ramp)
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(alpha=ramp)


UP = {"start": 1.0, "stop": 2.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, r"DistillationConfig\.alpha: got 0; allowed: a number in \(0, 1\]"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"alpha": [0.5]}, r"alpha: got \[0\.5\]"),
        ({"alpha": {"start": 0.0, "stop": 1.0}}, r"alpha\.start: got 0\.0; allowed: a number in \(0, 1\]"),
        ({"alpha": UP}, r"alpha\.stop: got 2\.0"),
        ({"temperature": 1001}, r"temperature: got 1001; allowed: a number in \(0, 1000\]"),
        ({"temperature": {"start": 1.0, "stop": 1e4}}, r"temperature\.stop: got 10000\.0"),
        ({"loss": "kld"}, r"loss: unknown value 'kld'; closest match: 'kl'; allowed: 'auto', "),
        ({"loss": "hidden_mse"}, "loss: unknown value 'hidden_mse'"),
        ({"loss": 3}, "loss: unknown value 3"),
        ({"loss": None}, "loss: got None; allowed: a loss of logits unless there are features"),
        ({"loss": "mse", "temperature": 3}, r"temperature: got 3; allowed: 2\.0 where the loss is 'mse', which has no"),
        ({"loss": "mse", "temperature": UP}, r"temperature: got Ramp\(start=1\.0.*allowed: 2\.0 where the loss"),
        ({"loss": None, "features": [{"loss": "hidden_mse"}], "temperature": 3}, "temperature: got 3"),
        ({"features": {"loss": "hidden_mse"}}, "features: got .*; allowed: a list of FeatureConfig or of mappings"),
        ({"features": "hidden_mse"}, "features: got 'hidden_mse'; allowed: a list"),
        ({"features": 3}, "features: got 3; allowed: a list"),
        ({"features": ["hidden_mse"]}, "features: got 'hidden_mse'; allowed: FeatureConfig or mappings"),
        ({"features": [{"loss": "hidden_mse", "wieght": 2}]}, "FeatureConfig: unknown key 'wieght'; closest.*'weight'"),
        ({"teacher_dtype": "int8"}, "teacher_dtype: unknown value 'int8'; allowed: None, 'bfloat16', "),
        ({"teacher_device": ""}, "teacher_device: got ''; allowed: a text that is not empty"),
        ({"teacher_device": 0}, "teacher_device: got 0"),
        ({"teacher_device": "gpu:0"}, "teacher_device: got 'gpu:0'; allowed: a device such as 'cuda:1' or 'cpu'"),
        ({"teacher_device": "meta"}, "teacher_device: got 'meta'; allowed: .*; meta tensors have no values"),
        ({"padded_vocabulary": 1}, r"DistillationConfig\.padded_vocabulary: got 1; allowed: True or False"),
        ({"features": [{"weight": 1.0}]}, r"FeatureConfig: got only \['weight'\]; missing: 'loss'\. Add them"),
        ({"alpha": {"start": 0.5}}, r"Ramp: got only \['start'\]; missing: 'stop'"),
        ({"alpha": {}}, r"Ramp: got only \[\]; missing: 'start', 'stop'"),
        ({"aplha": 0.5}, "DistillationConfig: unknown key 'aplha'; closest match: 'alpha'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationConfig.from_dict(settings)


DYNAMIC = {"layers": "dynamic"}
NO_EFFECT = 'allowed: {} unless layers="dynamic", where it would have no effect'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hidden_mes"}, r"FeatureConfig\.loss: unknown value 'hidden_mes'; closest match: 'hidden_mse'"),
        ({"loss": "kl"}, "loss: unknown value 'kl'"),
        ({"weight": 0}, r"weight: got 0; allowed: a number in \(0, "),
        ({"weight": {"start": 0, "stop": 1}}, r"weight\.start: got 0"),
        ({"layers": "first"}, "layers: unknown value 'first'; .*'dynamic', 'last', 'same', 'uniform'"),
        ({"layers": {}}, r"layers: got \{\}; allowed: a mapping \{student layer: teacher layer\} that is not empty"),
        ({"layers": {"a": 1}}, r"layers: got \{'a': 1\}"),
        ({"layers": {"--1": 1}}, r"layers: got \{'--1': 1\}"),
        ({"layers": {0: [1]}}, r"layers: got \{0: \[1\]\}"),
        ({"layers": {True: 1}}, r"layers: got \{True: 1\}"),
        ({"candidates": "later"}, "candidates: got 'later'; " + NO_EFFECT.format("'all'")),
        ({"ordered": True}, "ordered: got True; " + NO_EFFECT.format("False")),
        ({"chosen_by": "teacher"}, "chosen_by: got 'teacher'; " + NO_EFFECT.format("'student'")),
        ({"teacher_layers": [1]}, r"teacher_layers: got \[1\]; " + NO_EFFECT.format("None")),
        (
            {"loss": "fsp", **DYNAMIC},
            "layers: got 'dynamic'; allowed: at least two fixed pairs where the loss is 'fsp'",
        ),
        ({"loss": "fsp", "layers": "last"}, "layers: got 'last'; allowed: at least two fixed pairs"),
        ({"loss": "fsp", "layers": {0: 1}}, r"layers: got \{0: 1\}; allowed: at least two fixed pairs"),
        ({"layers": {"0": 0, 0: 1}}, r"layers: got \{'0': 0, 0: 1\}; allowed: each student layer once"),
        ({**DYNAMIC, "candidates": {"1": [0], 1: [1]}}, "candidates: got .*; allowed: each student layer once"),
        ({**DYNAMIC, "candidates": {0: [1, 2, 1]}}, r"candidates\[0\]: got \[1, 2, 1\]; allowed: each layer once"),
        ({**DYNAMIC, "teacher_layers": [1, 1]}, r"teacher_layers: got \[1, 1\]; allowed: each layer once"),
        ({**DYNAMIC, "ordered": 1}, "ordered: got 1; allowed: True or False"),
        ({"loss": "relations", "of": ["key", "key"]}, r"of: got \('key', 'key'\); allowed: each of them once"),
        ({"loss": "relations", "options": {"relation_heads": 0}}, r"options\['relation_heads'\]: got 0; .*int >= 1"),
        ({"loss": "relations", "options": {"relation_heads": "2"}}, "got '2'; allowed: an int >= 1"),
        ({"loss": "relations", "options": {"relation_heads": True}}, "got True; allowed: an int >= 1"),
        ({**DYNAMIC, "candidates": "earlier"}, "candidates: unknown value 'earlier'; .*'all', 'later'"),
        ({**DYNAMIC, "candidates": {}}, r"candidates: got \{\}; allowed: a mapping \{student layer: \[teacher layer"),
        ({**DYNAMIC, "candidates": {0: 3}}, r"candidates: got \{0: 3\}"),
        ({**DYNAMIC, "candidates": {0: []}}, r"candidates: got \{0: \[\]\}"),
        ({**DYNAMIC, "candidates": {"x": [1]}}, r"candidates: got \{'x': \[1\]\}"),
        ({**DYNAMIC, "candidates": {0: [1]}, "teacher_layers": [1]}, r"teacher_layers: got \[1\]; allowed: None where"),
        ({**DYNAMIC, "chosen_by": "me"}, "chosen_by: unknown value 'me'; allowed: 'student', 'teacher'"),
        ({**DYNAMIC, "ordered": "yes"}, "ordered: got 'yes'; allowed: True or False"),
        ({**DYNAMIC, "teacher_layers": []}, r"teacher_layers: got \[\]; allowed: a list of layers that is not empty"),
        ({**DYNAMIC, "teacher_layers": ["a"]}, r"teacher_layers: got \['a'\]"),
        ({**DYNAMIC, "teacher_layers": 3}, "teacher_layers: got 3"),
        ({"stack": "both"}, "stack: unknown value 'both'; allowed: None, 'decoder', 'encoder'"),
        ({"projection": "never"}, "projection: unknown value 'never'; .*'where needed'"),
        ({"learning_rate": 0}, r"learning_rate: got 0; allowed: a number in \(0, 10\]"),
        ({"loss": "attention_kl", "projection": "always"}, "projection: got 'always'; .*which compares any widths"),
        ({"loss": "attention_kl", "learning_rate": 0.1}, r"learning_rate: got 0\.1; .*which compares any widths"),
        (
            {"of": ["query"]},
            r"of: got \('query',\); allowed: .* where the loss is 'hidden_mse', where it would have no",
        ),
        ({"loss": "relations", "of": []}, r"of: got \(\); allowed: a list of some of 'query', 'key', 'value'"),
        ({"loss": "relations", "of": ["query", "output"]}, r"of: got \('query', 'output'\)"),
        ({"loss": "relations", "of": "query"}, "of: got 'query'; allowed: a list"),
        ({"loss": "relations", "of": 3}, "of: got 3"),
        (
            {"loss": "relations", "options": {"relation_head": 2}},
            "options: unknown key 'relation_head' for 'relations'",
        ),
        ({"options": {"p": 2}}, "options: unknown key 'p' for 'hidden_mse'; it has none"),
        ({"loss": "attention_kl", "options": {"key_mask": 1}}, "options: unknown key 'key_mask' .*it has none"),
        ({"options": 3}, "options: got 3; allowed: a mapping"),
    ],
)
def test_bad_features_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FeatureConfig.from_dict({"loss": "hidden_mse", **settings})
    with pytest.raises(ConfigError, match=message):
        DistillationConfig(features=[{"loss": "hidden_mse", **settings}])
