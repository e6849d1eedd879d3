import dataclasses

import pytest

from hf_compress import QuantizationCallback, QuantizationConfig, QuantizationRule
from hf_compress.config.formats import TensorFormat
from hf_compress.errors import ConfigError
from hf_compress.registry import schemes


def test_what_is_not_said_is_as_in_the_scheme() -> None:
    for name in schemes:
        config = QuantizationConfig(scheme=name)
        assert config.formats() == schemes.get(name)


def test_fields_change_the_scheme_and_rules_change_the_fields() -> None:
    config = QuantizationConfig(
        weights={"num_bits": 4},
        rules=[{"match": ["query"], "weights": {"num_bits": 8}}, QuantizationRule(match=["value"], inputs=False)],
    )
    assert config.formats().weights == TensorFormat(num_bits=4, granularity="channel")
    first, second = config.rule_formats()
    assert first.weights == TensorFormat(num_bits=8, granularity="channel")
    assert first.inputs == config.formats().inputs
    assert second.weights == config.formats().weights
    assert second.inputs is None


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig(scheme="int8_static", freeze=0.8, observe=0.0, begin=0.2),
        QuantizationConfig(scheme="int4_weight_only", weights={"group_size": 16}, exclude=["classifier"]),
        QuantizationConfig(method="lsq", options={"learning_rate": 0.01}, rules=[{"match": ["x"], "weights": False}]),
        QuantizationConfig(scheme="int8_static", method="ptq", inputs={"observer": "percentile"}),
    ],
    ids=["default", "static", "groups", "lsq", "ptq"],
)
def test_a_config_survives_json_and_yaml(config, tmp_path) -> None:
    for name in ("config.json", "config.yaml"):
        config.save(tmp_path / name)
        assert QuantizationConfig.load(tmp_path / name) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"num_bits": 9}}, r"weights: TensorFormat.num_bits: got 9; allowed: an int from 1 to 8"),
        ({"weights": {"num_bits": 1}}, r"weights.num_bits: got 1 with method 'qat'; allowed: 2 to 8"),
        ({"weights": {"bits": 4}}, r"unknown key 'bits'; closest match: 'num_bits'"),
        ({"weights": 4}, r"weights: got 4; allowed: None \(as in the scheme\), False"),
        ({"weights": {}}, r"weights: got \{\}"),
        (
            {"weights": {"granularity": "token"}},
            r"weights.granularity: got 'token'; allowed: 'tensor', 'channel', 'group'",
        ),
        ({"weights": {"granularity": "group"}}, r"group_size: got None; allowed: an int >= 1 with granularity 'group'"),
        ({"weights": {"group_size": 32}}, r"group_size: got 32; allowed: None unless granularity is 'group'"),
        ({"weights": {"dynamic": True}}, r"weights.dynamic: got True; allowed: False"),
        ({"weights": {"observer": "ema"}}, r"weights.observer: got 'ema'; allowed: others"),
        ({"weights": {"observer": "mes"}}, r"unknown value 'mes'; closest match: 'mse'"),
        (
            {"weights": {"observer": "mse", "observer_options": {"momentum": 1}}},
            r"weights.observer_options: .*momentum",
        ),
        ({"weights": {"observer_options": {"momentum": 1}}}, r"Name the observer"),
        ({"weights": False, "inputs": False}, r"all False, so nothing is quantized"),
        ({"outputs": False}, r"outputs: got False, but they are not quantized anyway"),
        ({"inputs": {"dynamic": False}}, r"inputs.granularity: got 'token'; allowed: 'tensor'.*Set dynamic=True"),
        ({"scheme": "int8_static", "inputs": {"observer": "mse"}}, r"observer: got 'mse' with method 'qat'.*'ema'"),
        ({"targets": []}, r"targets: got \[\]; allowed: a list"),
        ({"targets": "linear"}, r"targets: got 'linear'; allowed: a list"),
        ({"targets": ["linaer"]}, r"targets: got 'linaer'"),
        ({"rules": {"match": ["x"]}}, r"rules: got .*allowed: a list of rules"),
        ({"rules": [{"match": ["x"]}]}, r"This one has no effect"),
        ({"rules": [{"match": [], "weights": False}]}, r"at least one regular expression"),
        ({"rules": [{"match": ["x"], "weights": {"num_bits": 12}}]}, r"QuantizationRule.weights: .*num_bits: got 12"),
        ({"options": {"learning_rate": 1}}, r"options for method 'qat': .*unknown key 'learning_rate'"),
        ({"method": "lsq", "options": {"learning_rate": 0}}, r"learning_rate: got 0; allowed: a number in \(0, 1\]"),
        ({"method": "lsq", "scheme": "int8_static"}, r"inputs.symmetric: got False with method 'lsq'.*'lsq_plus'"),
        ({"method": "lsq_plus"}, r"inputs.symmetric: got True with method 'lsq_plus'; allowed: False"),
        ({"method": "lsq_plus", "inputs": False}, r"without inputs or outputs use method 'lsq'"),
        ({"method": "bnn"}, r"weights.num_bits: got 8 with method 'bnn'; allowed: 1 to 1"),
        ({"method": "dorefa"}, r"weights.granularity: got 'channel' with method 'dorefa'; allowed: 'tensor'"),
        ({"freeze": 0.5}, r"freeze: got 0.5; allowed: None. All ranges are computed at every call"),
        ({"observe": 0}, r"observe: got 0; allowed: None. All ranges"),
        ({"method": "ptq", "begin": 0.5}, r"begin: got 0.5; allowed: 0.0 with method 'ptq'"),
        ({"scheme": "int8_static", "observe": -1}, r"observe: got -1; allowed: an int >= 0"),
    ],
)
def test_what_has_no_sense_or_no_effect_raises(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig(**settings)


def test_a_callback_is_not_for_what_needs_no_training() -> None:
    with pytest.raises(ConfigError, match=r"method 'ptq' does not train.*calibrate"):
        QuantizationCallback(QuantizationConfig(method="ptq"))


def test_a_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantizationConfig().scheme = "int8_static"
