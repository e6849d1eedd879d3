"""Sweeps as data: which runs there are, what is refused, files and back."""

import pytest

from hf_compress import ConfigError, ParameterSpace, SearchConfig, SweepConfig

RECIPE = {"model": "m", "pruning": {"structures": {"ffn": 0.5}}}
SPACE = {"pruning.structures.ffn": {"type": "float", "low": 0.1, "high": 0.9}}


def sweep(**changes) -> SweepConfig:
    runs = {} if {"grid", "search"} & changes.keys() else {"runs": {"as-it-is": None}}
    return SweepConfig(**{"recipe": RECIPE, "output": "out", **runs, **changes})


def test_a_grid_is_every_combination_under_names_of_the_values() -> None:
    grid = {"pruning.structures.ffn": [0.5, 0.75], "pruning.criterion": ["l2", "taylor"]}
    found = dict(sweep(grid=grid, runs={"plain": {}}).settings())
    assert list(found) == [
        "plain",
        "ffn-0.5_criterion-l2",
        "ffn-0.5_criterion-taylor",
        "ffn-0.75_criterion-l2",
        "ffn-0.75_criterion-taylor",
    ]
    assert found["plain"] == {}
    assert found["ffn-0.75_criterion-l2"] == {"pruning.structures.ffn": 0.75, "pruning.criterion": "l2"}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_sweeps_survive_files(suffix, tmp_path) -> None:
    config = sweep(
        runs={"half": {"pruning.structures.ffn": 0.5}, "one": {}},
        grid={"training.learning_rate": [1e-5, 3e-5]},
        seeds=[0, 1],
        x="latency",
        baselines=["one"],
        search={"trials": 3, "space": {**SPACE, "pruning.criterion": {"type": "categorical", "choices": ["l1", None]}}},
    )
    config.save(tmp_path / f"sweep.{suffix}")
    assert SweepConfig.load(tmp_path / f"sweep.{suffix}") == config
    assert isinstance(config.search.space["pruning.criterion"], ParameterSpace)


def test_the_path_of_a_recipe_starts_at_the_sweeps_file(tmp_path) -> None:
    for given, expected in (("../r.yaml", tmp_path / "../r.yaml"), ("/r.yaml", "/r.yaml")):
        sweep(recipe=given).save(tmp_path / "sweep.yaml")
        assert SweepConfig.load(tmp_path / "sweep.yaml").recipe == str(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": ""}, "SweepConfig.recipe: got ''"),
        ({"recipe": 3}, "SweepConfig.recipe: got 3"),
        ({"runs": None}, "nothing to run; give at least one of runs, grid and search"),
        ({"runs": {}}, "SweepConfig.runs: got {}"),
        ({"runs": {"a/b": {}}}, "got 'a/b'; allowed: names of letters, digits"),
        ({"runs": {"a": 3}}, r"SweepConfig.runs\['a'\]: got 3"),
        ({"runs": {"a": {"training..x": 3}}}, "got 'training..x'; allowed: settings such as"),
        ({"runs": {"a": {"output": "x"}}}, "Every run has a folder in the sweep's output"),
        ({"runs": {"a": {"training.seed": 1}}, "seeds": [0]}, "got 'training.seed'; allowed: no seed beside seeds"),
        ({"runs": {"a": {"stages.0.training.seed": 1}}, "seeds": [0]}, "no seed beside seeds. Leave one of them out"),
        ({"grid": {}}, "SweepConfig.grid: got {}"),
        ({"grid": {"model": "abc"}}, r"SweepConfig.grid\['model'\]: got 'abc'; allowed: a list"),
        ({"grid": {"model": []}}, r"SweepConfig.grid\['model'\]: got \[\]"),
        ({"grid": {"model": ["a b", "a-b"]}}, "two runs are called 'model-a-b'"),
        ({"grid": {"output": ["a", "b"]}}, "Every run has a folder in the sweep's output"),
        ({"runs": {"trial-0": {}}, "search": {"trials": 1, "space": SPACE}}, "two runs are called 'trial-0'"),
        ({"seeds": []}, r"SweepConfig.seeds: got \[\]"),
        ({"seeds": [1, 1]}, "allowed: a list of different ints"),
        ({"seeds": [True]}, "allowed: a list of different ints"),
        ({"x": "size"}, "SweepConfig.x: unknown value 'size'"),
        ({"direction": "up"}, "SweepConfig.direction: unknown value 'up'"),
        ({"baselines": ["other"]}, r"SweepConfig.baselines: got \['other'\]; .*\['as-it-is'\]"),
        ({"search": 3}, "SweepConfig.search: got 3"),
        ({"search": {"trials": 0, "space": SPACE}}, "SearchConfig.trials: got 0"),
        ({"search": {"trials": 1, "space": {}}}, "SearchConfig.space: got {}"),
        ({"search": {"trials": 1, "space": SPACE, "sampler_seed": -1}}, "SearchConfig.sampler_seed: got -1"),
        ({"search": {"trials": 1, "space": {"output": SPACE["pruning.structures.ffn"]}}}, "Every run has a folder"),
    ],
)
def test_what_makes_no_sweep_is_refused(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(**changes)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"type": "number"}, "ParameterSpace.type: unknown value 'number'"),
        ({"type": "float", "low": 1.0}, "ParameterSpace.high: got None"),
        ({"type": "int", "low": 1.5, "high": 3}, "ParameterSpace.low: got 1.5; allowed: an int"),
        ({"type": "float", "low": 1.0, "high": float("inf")}, "ParameterSpace.high: got inf"),
        ({"type": "float", "low": 1.0, "high": 0.5}, "allowed: more than low=1.0"),
        ({"type": "float", "low": 0.0, "high": 0.5, "log": True}, "allowed: more than 0 with log"),
        ({"type": "float", "low": 0.0, "high": 0.5, "choices": [1]}, "Give low and high"),
        ({"type": "categorical"}, "ParameterSpace.choices: got None"),
        ({"type": "categorical", "choices": ["a", "a"]}, "a list of different texts"),
        ({"type": "categorical", "choices": [[1]]}, "a list of different texts"),
        ({"type": "categorical", "choices": ["a"], "low": 0}, "ParameterSpace.low: got 0; allowed: nothing"),
        ({"type": "categorical", "choices": ["a"], "log": True}, "ParameterSpace.log: got True"),
    ],
)
def test_what_makes_no_space_is_refused_with_the_name_of_the_setting(space, message) -> None:
    with pytest.raises(ConfigError, match=f"SearchConfig.space, a.b: .*{message}"):
        SearchConfig(trials=1, space={"a.b": space})


def test_ends_tell_whether_all_values_are_allowed() -> None:
    assert ParameterSpace(type="int", low=1, high=9).ends() == (1, 9)
    assert ParameterSpace(type="categorical", choices=["a", None, 2]).ends() == ("a", None, 2)
