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
from hf_compress.config.data import DatasetConfig
from hf_compress.config.distillation import FeatureConfig
from hf_compress.config.stages import StageConfig
from hf_compress.registry import Registry

PRUNING = {"structures": {"heads": 0.5, "ffn": 0.7}}
TWO_STEPS = {"schedule": "steps", "milestones": ((0.2, 0.5), (0.5, 1.0))}
SOFT = {"criterion": "movement", "options": {"mode": "soft"}}
PATTERN = {"structures": {"weights": 0.5}, "granularity": "2:4"}
TICKET = {"schedule": "lottery_ticket"}
CONFIGS = [
    PruningConfig(**PRUNING, criterion="l2", allocation="per_layer", begin=10, end=200, exclude=("a", "b")),
    QuantizationConfig(begin=0.5, exclude=("classifier",)),
    DistillationConfig(alpha=0.3, temperature=4),
    Recipe(pruning=PruningConfig(**PRUNING), distillation=DistillationConfig(), teacher="somewhere"),
    Recipe(distillation={"alpha": {"start": 0.9, "stop": 0.1}}, teacher=["self", "somewhere", "unmasked"]),
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


@pytest.mark.parametrize("kind", [type(config) for config in CONFIGS[:4]] + [DatasetConfig, StageConfig, FeatureConfig])
@pytest.mark.parametrize("data", [None, 5, "x", [], [("seed", 1)], {1: 2}], ids=repr)
def test_what_is_no_mapping_of_fields_is_refused(kind, data) -> None:
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: (got .*; allowed: a mapping|unknown key 1;)"):
        kind.from_dict(data)


def test_moments_of_unlike_kinds_are_left_to_the_run() -> None:
    config = PruningConfig(**PRUNING, begin="1 epoch", end=0.5)
    assert config.window(100, lambda: 10) == (10, 50)


def test_a_path_that_is_none_is_refused() -> None:
    for use in (PruningConfig.load, CONFIGS[0].save):
        with pytest.raises(ConfigError, match=r"PruningConfig: got 5 as a path; allowed: that of a \.json"):
            use(5)


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
        ({"begin": 0.7, "end": 0.6}, "end: got 0.6; allowed: nothing earlier than begin=0.7"),
        ({"begin": -1}, "an int >= 0"),
        ({"end": 1.5}, "float in \\[0, 1\\]"),
        ({"update_every": 0}, "an int >= 1"),
        ({"min_units": 0}, "an int >= 1"),
        ({"score_decay": 1.0}, "score_decay"),
        ({"max_layer_sparsity": 0.0}, "max_layer_sparsity"),
        ({"max_layer_sparsity": 0.6}, "at least the highest sparsity"),
        ({"allocation": "per_layer", "max_layer_sparsity": 0.9}, 'only 1.0 with allocation="per_layer"'),
        ({"structures": {"heads": 0.5}, "multiple_of": 8}, "only 1 unless one of ffn, hidden,"),
        ({"rounds": 3}, 'rounds: got 3; allowed: 5 unless schedule is "lottery_ticket"'),
        ({"rewind_to": 0.1}, 'rewind_to: got 0.1; allowed: 0 unless schedule is "lottery_ticket"'),
        ({**TICKET, "rounds": 0}, "rounds: got 0; allowed: an int >= 1"),
        ({**TICKET, "rewind_to": -1}, "rewind_to: got -1; allowed: an int >= 0"),
        ({**TICKET, "update_every": 5}, 'update_every: got 5; allowed: 10 with "lottery_ticket"'),
        ({**TICKET, "initial_sparsity": 0.1}, 'initial_sparsity: got 0.1; allowed: 0.0 with "lottery_ticket"'),
        ({**TICKET, "structures": ["ffn"], "target_params": 0.5}, "target_params: got 0.5; allowed: None with"),
        ({**TICKET, "criterion": "admm"}, "criterion: got 'admm'; allowed: a criterion that changes masks in every"),
        ({**TICKET, "rules": [{"match": ["a"], "end": 0.5}]}, r"rules\[0\].end: got 0.5; allowed: none with"),
        ({**TICKET, "rules": [{"match": ["a"], "criterion": "l0"}]}, r"rules\[0\]: .*criterion: got 'l0'"),
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
        (lambda: QuantizationConfig(scheme="int8_dynamc"), "closest match: 'int8_dynamic'"),
        (lambda: QuantizationConfig(method="qta"), "closest match: 'qat'"),
        (lambda: QuantizationConfig(exclude=("(",)), "allowed: regular expressions"),
        (lambda: PruningCallback({"structures": {"heads": 0.5}}), "config is a dict; pass a PruningConfig"),
        (lambda: QuantizationCallback({}), "config is a dict; pass a QuantizationConfig"),
        (lambda: Recipe(), "nothing to do"),
        (lambda: DatasetConfig.from_dict({}), r"DatasetConfig: got only \[\]; missing: 'path'\. Add them"),
        (lambda: Recipe(pruning=PruningConfig(**PRUNING), teacher="x"), "None without a distillation section"),
        (lambda: Recipe(distillation={}, teacher=3), "Recipe.teacher: got 3; allowed: a Hub name or folder, 'self', "),
        (lambda: Recipe(distillation={}, teacher=""), "teacher: got ''"),
        (lambda: Recipe(distillation={}, teacher=[]), r"teacher: got \(\); .*a list of these, or None"),
        (lambda: Recipe(distillation={}, teacher=["self", 3]), r"teacher: got \('self', 3\)"),
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


def test_rounds_that_do_not_fit_the_run_are_refused() -> None:
    config = PruningConfig(**PRUNING, **TICKET, begin=2, end=10, rounds=4, rewind_to="0.3 epochs")
    assert config.rewind_step(20, lambda: 10) == 3
    with pytest.raises(ConfigError, match=r"is step 4, but the first of 4 rounds of .* ends at step 4"):
        config.rewind_step(20, lambda: 13)
    with pytest.raises(ConfigError, match="10 for 4 rounds in a run of 10 optimizer steps; allowed"):
        config.moments(10)
    with pytest.raises(ConfigError, match="a step at least for each round"):
        PruningConfig(**PRUNING, **TICKET, begin=2, end=6).moments(20)


@pytest.mark.parametrize(("begin", "end", "total"), [(5, 50, 20), (15, 0.5, 20), (0.0, 0.01, 20)])
def test_windows_that_do_not_fit_the_run_are_refused(begin, end, total) -> None:
    with pytest.raises(ConfigError, match=f"the run has {total} optimizer steps; .*Train longer"):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_params": 0.5, "target_flops": 0.5}, "got target_params and target_flops; allowed: one budget"),
        ({"target_params": 1.5}, r"target_params: got 1\.5; allowed: an int > 1"),
        ({"target_params": True}, "target_params: got True"),
        ({"target_speedup": 1}, "target_speedup: got 1; allowed: a number > 1"),
        ({"target_latency_ms": 0}, "target_latency_ms: got 0; allowed: a number > 0"),
        ({"target_params": 0.5, "structures": {"ffn": 0.5}}, "a non-empty list such as.*target_params says how much"),
        ({"target_params": 0.5, "allocation": "per_layer"}, "allocation: got 'per_layer'; allowed: 'global' with"),
        ({"target_params": 0.5, "initial_sparsity": 0.1}, "initial_sparsity: got 0.1"),
        ({"target_params": 0.5, "structures": ["layers"]}, "structures: got 'layers'"),
        ({"target_speedup": 2, "structures": ["hidden"]}, "structures: got 'hidden'; allowed: heads, ffn with"),
        ({"target_params": 0.5, "latency_shape": (1, 64)}, "latency_shape: got"),
        ({"target_speedup": 2, "latency_shape": (0, 64)}, "latency_shape: got"),
        ({"target_params": 0.5, "criterion": "movement", "options": {"mode": "soft"}}, "which find out"),
        ({"target_params": 0.5, "criterion": "l0"}, "target_params: got 0.5; allowed: None with criterion 'l0'"),
        ({"target_speedup": 2, "criterion": "l0"}, "target_speedup: got 2; allowed: None with criterion 'l0'"),
        ({"target_params": 0.5, "rules": [{"match": ["a"], "criterion": "l2"}]}, r"rules\[0\]\.criterion: got 'l2'"),
    ],
)
def test_bad_budgets_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**{"structures": ["heads", "ffn"], **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structures": ["ffn"]}, "a non-empty mapping"),
        ({"structures": {"ffn": 0.5}, "criterion": "movement", "options": {"mode": "soft"}}, "finds out itself"),
        ({"structures": {"heads": 0.5}, "criterion": "block_influence"}, "'layers' with criterion 'block_influence'"),
        ({"structures": {"layers": 0.5}, "criterion": "wanda"}, "structures: got 'layers'"),
        ({"schedule": "steps"}, "milestones: got .*; allowed: moments with shares"),
        ({"milestones": ((0.5, 1.0),)}, 'none without schedule="steps"'),
        ({"schedule": "steps", "milestones": ((0.5, 0.9),)}, "the last share 1"),
        ({"schedule": "steps", "milestones": ((0.5, 1.0),), "begin": 3}, "begin/end"),
        ({"power": 2.0}, 'unless schedule is "polynomial"'),
        ({"score_decay": 0.5, "criterion": "l2"}, "score_decay: got 0.5; allowed: 0.95 with 'l2'"),
        ({"criterion": "admm", "regrow": True}, "regrow: got True; allowed: False with 'admm', which removes"),
        ({"criterion": "l0", "initial_sparsity": 0.1}, "initial_sparsity: got 0.1; allowed: 0.0 with 'l0'"),
        ({"criterion": "random", "regrow": True}, "regrow: got True; allowed: False with 'random'"),
        ({**PATTERN, "allocation": "per_layer"}, "got 'per_layer'; allowed: 'global' with granularity '2:4'"),
        ({**PATTERN, "max_layer_sparsity": 0.9}, "max_layer_sparsity: got 0.9; allowed: 1.0 with granularity '2:4'"),
        ({"structures": {"weights": 0.5}, "criterion": "fpgm"}, "structures: got 'weights'; .* with criterion 'fpgm'"),
        (
            {**SOFT, "structures": ["weights"], "granularity": "2:4"},
            "granularity: got '2:4'; .*A pattern removes exact",
        ),
        ({**SOFT, "structures": ["ffn"], "allocation": "per_layer"}, "'global' with 'movement', which finds out"),
        ({**SOFT, "structures": ["ffn"], "initial_sparsity": 0.1}, "initial_sparsity: got 0.1; allowed: 0.0 with"),
        ({**TWO_STEPS, "update_every": 3}, 'update_every: got 3; allowed: 10 with schedule="steps"'),
        ({"schedule": "steps", "milestones": ((0.5, 0.5), (0.2, 1.0))}, "moments and shares growing"),
        ({"schedule": "steps", "milestones": ((10, 0.5), (10, 1.0))}, "moments and shares growing"),
        ({"schedule": "steps", "milestones": (("2 epochs", 0.5), ("1 epoch", 1.0))}, "moments and shares growing"),
        (
            {"schedule": "one_shot", "initial_sparsity": 0.3},
            'initial_sparsity: got 0.3; allowed: 0.0 with schedule="one',
        ),
        ({"structures": ["ffn", "ffn"], "target_params": 0.5}, "structures: got .*; allowed: each structure once"),
        ({"structures": ["ffn"], "target_speedup": float("inf")}, "target_speedup: got inf"),
        ({"structures": ["ffn"], "target_latency_ms": float("inf")}, "target_latency_ms: got inf"),
        ({"exclude": None}, "exclude: got None; allowed: a tuple or list of regular expressions"),
        ({"exclude": 5}, "exclude: got 5"),
        ({"rules": None}, "rules: got None; allowed: a list of PruningRule"),
        ({"rules": 5}, "rules: got 5"),
        ({"rules": [{"match": None, "criterion": "l2"}]}, "match: got None"),
        ({"milestones": None}, "milestones: got None; allowed: pairs"),
        ({"schedule": "steps", "milestones": 5}, "milestones: got 5; allowed: pairs"),
        ({"structures": 5, "target_params": 0.5}, "structures: got 5; allowed: a non-empty list"),
        ({"structures": None, "target_params": 0.5}, "structures: got None; allowed: a non-empty list"),
        ({"begin": "1.5 epoch s"}, "a text such as '1.5 epochs'"),
        (
            {"begin": "1 epoch", "end": "0.5 epochs"},
            r"end: got '0\.5 epochs'; allowed: nothing earlier than begin='1 epoch'",
        ),
        ({"begin": 9, "end": 3}, "end: got 3; allowed: nothing earlier than begin=9"),
        ({"rules": [{"match": ["a"], "begin": 0.9}]}, r"rules\[0\].*end: got 0\.6; allowed: nothing earlier"),
        ({"regrow": 1}, "regrow: got 1; allowed: True or False"),
        ({"regrow": "yes"}, "regrow: got 'yes'; allowed: True or False"),
        ({"granularity": "row"}, '"element" unless'),
        ({"structures": {"weights": 0.5}, "granularity": "4:2"}, "or N:M such as 2:4"),
        ({"structures": {"weights": 0.25}, "granularity": "2:4"}, "allowed: 0.5, which is what the pattern removes"),
        ({"structures": {"weights": 0.5}, "block_size": (4, 4)}, 'unless granularity is "block"'),
        ({"rules": [{"match": []}]}, "at least one regular expression"),
        ({"rules": [{"match": ["a"]}]}, "a rule that sets something else"),
        ({"rules": [{"match": ["a"], "criterion": "x"}]}, r"rules\[0\].*unknown value 'x'"),
        ({"rules": [{"match": ["a"], "schedule": "linear"}]}, "PruningRule: unknown key 'schedule'"),
        ({"options": [1]}, "a mapping of the criterion's settings"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**{**PRUNING, **changes})


def test_what_other_structures_or_parts_need_is_not_refused() -> None:
    mixed = {**PATTERN, "structures": {"weights": 0.5, "ffn": 0.5}, "allocation": "per_layer"}
    rules = [{"match": ["a"], "structures": {"weights": 0.5}}, {"match": ["b"], "structures": {"ffn": 0.2}}]
    (_, one), (_, two), (_, rest) = PruningConfig(**mixed, rules=rules).parts()
    assert (one.allocation, one.granularity) == ("global", "2:4")
    assert (two.allocation, two.granularity) == ("per_layer", "element")
    assert (rest.allocation, rest.granularity) == ("per_layer", "2:4")


def test_a_rule_inherits_nothing_that_its_criterion_does_not_read() -> None:
    rules = [{"match": ["a"], "criterion": "admm"}, {"match": ["b"], "criterion": "random"}]
    (_, one), (_, two), (_, rest) = PruningConfig(**PRUNING, regrow=True, initial_sparsity=0.1, rules=rules).parts()
    assert (one.regrow, one.initial_sparsity) == (False, 0.0)
    assert (two.regrow, two.initial_sparsity) == (False, 0.1)
    assert (rest.regrow, rest.initial_sparsity) == (True, 0.1)


def test_rules_round_trip_and_change_only_what_they_say() -> None:
    one, two = {"criterion": "l2", "structures": {"heads": 0.25}}, {"end": "1 epoch"}
    rules = [{"match": ["layer.0"], **one}, {"match": ["b"], **two}]
    config = PruningConfig(**PRUNING, multiple_of=8, score_decay=0.5, rules=rules)
    assert PruningConfig.from_dict(config.to_dict()) == config
    (first, one), (second, two), (last, rest) = config.parts()
    assert first.match == ("layer.0",) and second.match == ("b",) and last is None
    assert (one.criterion, one.structures, one.multiple_of, one.score_decay) == ("l2", {"heads": 0.25}, 1, 0.95)
    assert (two.criterion, two.end, two.multiple_of) == ("taylor", "1 epoch", 8)
    assert rest.rules == () and rest.structures == config.structures


def test_a_missing_file_is_called_missing(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file; give the path of a Recipe file"):
        Recipe.load(tmp_path / "none.yaml")
