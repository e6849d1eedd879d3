"""Run published experiments on stand-ins that need no Hub, and write what came of them into model_cards.

For each experiment: the dense model, our recipe and a baseline of the same number of steps (norms of weights as
criterion, no distillation) at several sparsities and seeds. Every finished run is stored at once in
model_cards/NAME/results.json; those that are there are not repeated. README.md and the pictures come from that file.

usage: python scripts/experiments.py --only vit_fashion_mnist --seeds 0 1
       python scripts/experiments.py --only vit_fashion_mnist --report
"""

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import demo_data
import transformers
from experiment import METHODS, RECIPES, Experiment, experiments
from experiment_card import RESULTS, write_report
from stand_ins.packages import SOURCES
from stand_ins.training import FACTS

from hf_compress import CompressionError, ConfigError, run_recipe
from hf_compress.config.base import read_file
from hf_compress.recipe.stages import SMALL
from hf_compress.report.results import Results

ROOT = Path(__file__).resolve().parent.parent


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = experiments()
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), metavar="NAME", help=", ".join(known))
    parser.add_argument("--sparsities", nargs="+", type=float, help="default: 0.5 0.75 0.9, or the experiment's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="times the steps of experiments (default: 1)")
    parser.add_argument("--cards", type=Path, default=ROOT / "model_cards", help="folder of the results")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments", help="folder of the models")
    parser.add_argument("--report", action="store_true", help="run nothing, write the cards again")
    found = parser.parse_args(given)
    if not all(0 < each < 1 for each in found.sparsities or ()):
        parser.error("--sparsities: allowed: numbers between 0 and 1")
    if found.steps_scale <= 0:
        parser.error("--steps-scale: must be more than 0")
    return found


def settings_of(experiment: Experiment, folders: tuple[Path, Path], scale: float) -> dict[str, Any]:
    """Return what all runs of an experiment have in common, weights of the dense model included."""
    weights = (folders[1] / "model.safetensors").read_bytes()
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "experiment": experiment.facts(),
                "recipe": read_file(RECIPES / experiment.recipe, "Recipe"),
                "steps_scale": scale,
                "dense_sha256": hashlib.sha256(weights).hexdigest(),
            }
        )
    )
    return plain


def stored(path: Path) -> dict[str, Any] | None:
    """Return the results in a file, or None if there is no file.

    Raises:
        ConfigError: If it is damaged.
    """
    if not path.is_file():
        return None
    data = read_file(path, "results")
    if not isinstance(data.get("runs"), list) or not isinstance(data.get("settings"), dict):
        raise ConfigError(f"{path}: holds no runs with settings. Delete it to begin anew.")
    return data


def begun(path: Path, experiment: Experiment, settings: dict[str, Any], folders: tuple[Path, Path]) -> dict[str, Any]:
    """Return the results so far. Parts of the published recipe that the experiment replaces may have changed.

    Raises:
        ConfigError: If they are of other settings.
    """
    data = stored(path)
    if data is None:
        facts = {"sources": folders[0] / SOURCES, "dense_training": folders[1] / FACTS}
        return {
            "settings": settings,
            **{name: read_file(file, name) for name, file in facts.items() if file.is_file()},
            "runs": [],
        }
    old, new = ({**each, "recipe": experiment.effective(each["recipe"])} for each in (data["settings"], settings))
    different = [name for name in new if old.get(name) != new[name]]
    if different:
        raise ConfigError(
            f"{path}: holds results of other settings: {', '.join(different)}. Run with the same, or move it away."
        )
    return data


def save(path: Path, data: dict[str, Any]) -> None:
    """Write the results; a killed process leaves the old ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def run_of(
    experiment: Experiment, key: dict[str, Any], scale: float, folders: tuple[Path, Path], output: Path
) -> dict[str, Any]:
    """Do one run, or take it from its folder if it is finished; return what came of it.

    Raises:
        CompressionError: If the recipe cannot be carried out.
    """
    recipe = experiment.recipe_of(**key, scale=scale, folders=folders, output=output)
    is_new = not output.exists()
    start = time.perf_counter()
    result = run_recipe(recipe, resume=not is_new)
    seconds = round(time.perf_counter() - start, 1)
    card = Results.load(result.folders[SMALL] / Results.FILE_NAME)
    return {
        **key,
        "comparison": card.comparison,
        "kept": card.kept,
        "examples": {"training": card.training["training_examples"], "evaluation": card.num_evaluation_examples},
        "steps": card.training["optimizer_steps"],
        "seconds": seconds if is_new else None,
    }


def run(experiment: Experiment, given: argparse.Namespace) -> None:
    """Do what is missing of an experiment, and write its card after each run.

    Raises:
        CompressionError: If a run fails, or the results are of other settings.
        DemoDataError: If the stand-in cannot be had.
    """
    folder = given.cards / experiment.name
    folders = experiment.folders()
    settings = settings_of(experiment, folders, given.steps_scale)
    data = begun(folder / RESULTS, experiment, settings, folders)
    models = given.runs / experiment.name / settings["dense_sha256"][:8]
    places = ("seed", "sparsity", "method")
    for place in itertools.product(given.seeds, given.sparsities or experiment.sparsities(), given.methods):
        key = dict(zip(places, place, strict=True))
        if any(key.items() <= each.items() for each in data["runs"]):
            continue
        output = models / "-".join(map(str, (*key.values(), given.steps_scale)))
        data["runs"].append(run_of(experiment, key, given.steps_scale, folders, output))
        save(folder / RESULTS, data)
        write_report(folder, data)
        last = data["runs"][-1]
        score = last["comparison"]["metrics"][experiment.metric][SMALL]
        print(f"{experiment.name}: {key}: {experiment.metric} {score:.2f}", flush=True)


def report(experiment: Experiment, cards: Path) -> None:
    """Write an experiment's card from its stored results.

    Raises:
        ConfigError: If there are none, or they are damaged.
    """
    data = stored(cards / experiment.name / RESULTS)
    if data is None:
        raise ConfigError(f"{cards / experiment.name}: holds no {RESULTS}; run without --report first.")
    write_report(cards / experiment.name, data)


def main(words: Sequence[str] | None = None) -> None:
    """Run or report; known errors end with one message and exit code 2."""
    given = arguments(words)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    known = experiments()
    try:
        for name in given.only:
            if given.report:
                report(known[name], given.cards)
            else:
                run(known[name], given)
    except (CompressionError, demo_data.DemoDataError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
