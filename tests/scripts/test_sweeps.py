"""Sweep files of the repository: every run of each is a valid recipe, of sizes that differ."""

from pathlib import Path

import pytest

from hf_compress import SweepConfig
from hf_compress.recipe.run import check_run
from hf_compress.recipe.sweep_plan import plan_run, with_recipe

SWEEPS = sorted((Path(__file__).parents[2] / "scripts" / "recipes" / "sweeps").glob("*.yaml"))


def test_there_are_sweeps_of_texts_translations_and_images() -> None:
    assert {path.stem for path in SWEEPS} == {"bert_mnli", "t5_wmt16", "vit_cifar10"}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_could_begin(path, tmp_path) -> None:
    config = with_recipe(SweepConfig.load(path))
    runs = [run for name, settings in config.settings() for run in plan_run(config, tmp_path, name, settings)]
    assert len({run.key for run in runs}) == len(runs) >= 4
    for run in runs:
        output, stages = check_run(run.recipe, resume=False)
        assert output == tmp_path / run.key and stages
    recipes = [str({**run.recipe.to_dict(), "output": None}) for run in runs]
    assert len(set(recipes)) == len(recipes)
