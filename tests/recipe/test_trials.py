"""Searches by optuna: repeatable, resumable, with failed trials and with several values."""

import json
import sys

import pytest

from hf_compress import ConfigError, SearchConfig
from hf_compress.recipe.trials import check_optuna, run_trials

SPACE = {
    "a": {"type": "float", "low": -4.0, "high": 4.0},
    "b": {"type": "int", "low": 1, "high": 64, "log": True},
    "c": {"type": "categorical", "choices": ["x", None, 3]},
}


def search(trials: int = 12, **changes) -> SearchConfig:
    return SearchConfig(trials=trials, space=SPACE, **changes)


def score(settings) -> float:
    return -((settings["a"] - 1) ** 2) - settings["b"] / 64 + (settings["c"] == "x")


def trials_of(folder) -> list:
    return json.loads((folder / "trials.json").read_text(encoding="utf-8"))


def test_the_best_trial_has_the_largest_value(tmp_path) -> None:
    seen = {}

    def judge(number, settings):
        assert trials_of(tmp_path)[number] == settings  # known before the trial runs
        seen[number] = score(settings)
        return [seen[number]]

    best = run_trials(search(), 1, tmp_path, judge)
    assert best == [max(seen, key=seen.get)]
    assert all(-4 <= t["a"] <= 4 and isinstance(t["b"], int) and t["c"] in ("x", None, 3) for t in trials_of(tmp_path))


@pytest.mark.parametrize("stop", [0, 5, 11])
def test_an_interrupted_search_ends_as_if_nothing_had_happened(tmp_path, stop) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "cut").mkdir()
    best = run_trials(search(), 1, tmp_path / "straight", lambda number, settings: [score(settings)])

    def judge(number, settings):
        if number == stop:
            raise KeyboardInterrupt
        return [score(settings)]

    with pytest.raises(KeyboardInterrupt):
        run_trials(search(), 1, tmp_path / "cut", judge)
    again = run_trials(search(), 1, tmp_path / "cut", lambda number, settings: [score(settings)])
    assert (again, trials_of(tmp_path / "cut")) == (best, trials_of(tmp_path / "straight"))


def test_another_seed_tries_other_settings(tmp_path) -> None:
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        run_trials(search(2, sampler_seed=seed), 1, tmp_path / str(seed), lambda n, s: [score(s)])
    assert trials_of(tmp_path / "0") != trials_of(tmp_path / "1")


def test_two_values_give_the_trials_that_no_other_beats(tmp_path) -> None:
    values = {}

    def judge(number, settings):
        values[number] = [settings["a"], -abs(settings["a"] + settings["b"] / 16)]
        return values[number]

    best = run_trials(search(), 2, tmp_path, judge)
    beaten = {
        n
        for n, v in values.items()
        for w in values.values()
        if w != v and all(x >= y for x, y in zip(w, v, strict=True))
    }
    assert set(best) == set(values) - beaten


def test_failed_trials_are_never_the_best(tmp_path) -> None:
    best = run_trials(search(4), 1, tmp_path, lambda number, s: None if number != 2 else [-1e9])
    assert best == [2]
    (tmp_path / "none").mkdir()
    assert run_trials(search(2), 1, tmp_path / "none", lambda number, s: None) == []


def test_damaged_trials_and_a_missing_optuna_are_errors(tmp_path, monkeypatch) -> None:
    (tmp_path / "trials.json").write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trials\.json: is damaged"):
        run_trials(search(), 1, tmp_path, lambda number, s: [0.0])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf-compress\[search\]'"):
        check_optuna()
