"""Settings that change a recipe file, also inside its lists."""

import pytest
import yaml

from hf_compress import ConfigError
from hf_compress.recipe.overrides import change_setting, load_recipe

STAGES = """
model: m
teacher: dense
stages:
  - training: {num_train_epochs: 1}
  - pruning: {structures: {heads: 0.5}}
    distillation: &shared {alpha: 0.5}
  - pruning: {structures: {ffn: 0.5}}
    distillation: *shared
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(STAGES, encoding="utf-8")
    return tmp_path / "recipe.yaml"


def test_places_in_lists_count_from_zero(recipe) -> None:
    found = load_recipe(recipe, ["stages.2.pruning.structures.ffn=0.7", "stages.2.repeat=3"])
    assert [stage.repeat for stage in found.stages] == [1, 1, 3]
    assert dict(found.stages[2].pruning.structures) == {"ffn": 0.7}
    assert dict(found.stages[1].pruning.structures) == {"heads": 0.5}


def test_what_an_anchor_shares_changes_in_one_place_alone(recipe) -> None:
    found = load_recipe(recipe, ["stages.1.distillation.alpha=0.9"])
    assert [stage.distillation.alpha for stage in found.stages[1:]] == [0.9, 0.5]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "stages.3.repeat=2",
            "--set stages.3.repeat: 'stages' is a list, so got '3' as a place in it; allowed: 0 to 2",
        ),
        ("stages.-1.repeat=2", "got '-1' as a place in it; allowed: 0 to 2"),
        ("stages.first.repeat=2", "got 'first' as a place in it; allowed: 0 to 2. Or give a new value for all of"),
        ("stages.3=null", "'stages' is a list, so got '3'"),
        ("model.x.y=2", "--set model.x.y: 'model' is 'm', which has no settings in it"),
    ],
)
def test_places_that_do_not_exist_are_refused(recipe, setting, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, [setting])


def test_an_empty_list_has_no_places() -> None:
    with pytest.raises(ConfigError, match=r"run 'a': 'stages' is a list.*allowed: none, since it is empty"):
        change_setting({"stages": []}, "stages.0.repeat", 2, "run 'a'")


def test_a_whole_entry_of_a_list_can_be_replaced() -> None:
    data = yaml.safe_load(STAGES)
    change_setting(data, "stages.0", {"training": {"max_steps": 3}}, "here")
    change_setting(data, "training.seed", 3, "here")
    assert data["stages"][0] == {"training": {"max_steps": 3}}
    assert data["training"] == {"seed": 3}


def test_what_every_stage_replaces_has_no_effect(recipe, tmp_path) -> None:
    assert load_recipe(recipe, ["training.num_train_epochs=5"]).training == {"num_train_epochs": 5}  # of two stages
    text = STAGES.replace("structures: {heads: 0.5}}", "structures: {heads: 0.5}}\n    training: &own {max_steps: 2}")
    text = text.replace("distillation: *shared", "training: *own").replace("num_train_epochs: 1", "max_steps: 1")
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--set training.max_steps: has no effect.*stages\.0\.training\.max_steps"):
        load_recipe(recipe, ["training.max_steps=5"])
    recipe.write_text(text.replace("max_steps", "num_train_epochs"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"training\.max_steps: has no effect"):
        load_recipe(recipe, ["training.max_steps=5"])  # epochs of a stage win over steps of the recipe
