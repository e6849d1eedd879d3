import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_compress import (
    ConfigError,
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    QuantizationCallback,
    QuantizationConfig,
    Recipe,
)
from hf_compress.registry import Registry

PRUNING = {"structures": {"heads": 0.5, "ffn": 0.7}}
CONFIGS = [
    PruningConfig(**PRUNING, criterion="l2", allocation="per_layer", begin=10, end=200, exclude=("a", "b")),
    QuantizationConfig(begin=0.5, exclude=("classifier",)),
    DistillationConfig(alpha=0.3, temperature=4),
    Recipe(pruning=PruningConfig(**PRUNING), distillation=DistillationConfig(), teacher="somewhere"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_files_round_trip(config, suffix, tmp_path) -> None:
    path = tmp_path / f"config{suffix}"
    config.save(path)
    assert type(config).load(path) == config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_unknown_keys_are_refused_with_the_closest_match(config) -> None:
    with pytest.raises(ConfigError, match="unknown key 'schema_versoin'; closest match: 'schema_version'"):
        type(config).from_dict({**config.to_dict(), "schema_versoin": 1})


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schema_version: got 99; allowed: 1\. Upgrade hf-compress"):
        DistillationConfig(schema_version=99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structures": {}}, "non-empty mapping"),
        ({"structures": {"head": 0.5}}, "unknown structure 'head'; closest match: 'heads'"),
        ({"structures": {"heads": 1.0}}, r"structures\['heads'\]: got 1.0; allowed: a sparsity .* in \[0, 1\)"),
        ({"structures": {"heads": -0.1}}, "got -0.1"),
        ({"structures": {"heads": float("nan")}}, "got nan"),
        ({"structures": {"heads": True}}, "got True"),
        ({"structures": {"heads": "0.5"}}, "got '0.5'"),
        ({"criterion": "tailor"}, "unknown value 'tailor'; closest match: 'taylor'"),
        ({"allocation": "locally"}, "allowed: 'global', 'isomorphic', 'per_layer'"),
        ({"schedule": "cubik"}, "closest match: 'cubic'"),
        ({"exclude": "layer.0"}, "a tuple or list of regular expressions"),
        ({"exclude": (3,)}, "a tuple or list of regular expressions"),
        ({"exclude": ("[",)}, "got '\\['; allowed: regular expressions. This one is none"),
        ({"begin": 0.7, "end": 0.6}, "at least begin = 0.7"),
        ({"begin": -1}, "an int >= 0"),
        ({"end": 1.5}, "float in \\[0, 1\\]"),
        ({"update_every": 0}, "an int >= 1"),
        ({"min_units": 0}, "an int >= 1"),
        ({"score_decay": 1.0}, "score_decay"),
        ({"max_layer_sparsity": 0.0}, "max_layer_sparsity"),
        ({"max_layer_sparsity": 0.6}, "at least the highest sparsity"),
        ({"allocation": "per_layer", "max_layer_sparsity": 0.9}, 'only 1.0 with allocation="per_layer"'),
        ({"structures": {"heads": 0.5}, "multiple_of": 8}, 'only 1 unless one of ffn, hidden,'),
    ],
)
def test_bad_pruning_settings_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**{**PRUNING, **changes})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DistillationConfig(alpha=0), r"alpha: got 0; allowed: a number in \(0, 1\]"),
        (lambda: DistillationConfig(alpha=1.1), "alpha"),
        (lambda: DistillationConfig(temperature=0), "temperature"),
        (lambda: DistillationConfig(loss="kld"), "closest match: 'kl'"),
        (lambda: QuantizationConfig(scheme="int8"), "closest match: 'int8_dynamic'"),
        (lambda: QuantizationConfig(method="qta"), "closest match: 'qat'"),
        (lambda: QuantizationConfig(exclude=("(",)), "allowed: regular expressions"),
        (lambda: PruningCallback({"structures": {"heads": 0.5}}), "config is a dict; pass a PruningConfig"),
        (lambda: QuantizationCallback({}), "config is a dict; pass a QuantizationConfig"),
        (lambda: Recipe(), "nothing to do"),
        (lambda: Recipe(pruning=PruningConfig(**PRUNING), teacher="x"), "None without a distillation section"),
        (lambda: Recipe(pruning=3), "a PruningConfig, a mapping of its fields, or None"),
        (lambda: Recipe(pruning={"structures": {"heads": 2}}), "a sparsity"),
    ],
)
def test_bad_settings_are_refused(build, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot be read as json"),
        ("a.yaml", "a: [", "cannot be read as yaml"),
        ("a.yaml", "- 1", "expected a mapping"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "cannot be read as yaml"),
        ("a.txt", "", "unknown file type"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        PruningConfig.load(tmp_path / name)


def test_configs_are_frozen() -> None:
    config = PruningConfig(**PRUNING)
    with pytest.raises(AttributeError):
        config.criterion = "l2"


@pytest.mark.parametrize(
    ("begin", "end", "total", "window"), [(0.1, 0.6, 100, (10, 60)), (5, 0.5, 20, (5, 10)), (0, 1.0, 7, (0, 7))]
)
def test_windows_in_steps_and_fractions(begin, end, total, window) -> None:
    assert PruningConfig(**PRUNING, begin=begin, end=end).window(total) == window


@pytest.mark.parametrize(("begin", "end", "total"), [(5, 50, 20), (15, 0.5, 20), (0.0, 0.01, 20)])
def test_windows_that_do_not_fit_the_run_are_refused(begin, end, total) -> None:
    with pytest.raises(ConfigError, match=f"the run has {total} optimizer steps"):
        PruningConfig(**PRUNING, begin=begin, end=end).window(total)


@given(st.floats(0, 0.999), st.floats(0, 0.999))
def test_every_allowed_sparsity_round_trips(heads, ffn) -> None:
    config = PruningConfig(structures={"heads": heads, "ffn": ffn})
    assert PruningConfig.from_dict(config.to_dict()) == config


def test_registries_name_what_they_know() -> None:
    registry: Registry[int] = Registry("thing")
    registry.register("one", "eins")(1)
    assert list(registry) == ["eins", "one"] and registry.get("eins") == 1
    with pytest.raises(ConfigError, match="unknown thing 'onee'; closest match: 'one'; allowed: 'eins', 'one'"):
        registry.get("onee")
