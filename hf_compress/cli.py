"""The ``hf-compress`` command."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.hub import cached_file

from hf_compress.config import QuantizationConfig, SweepConfig
from hf_compress.errors import CompressionError, ConfigError, SweepError
from hf_compress.export.card import write_card
from hf_compress.export.contents import contents_of
from hf_compress.export.formats.table import FORMATS
from hf_compress.export.hub import push_to_hub
from hf_compress.export.pretrained import stored_method
from hf_compress.export.quantized import export_quantized
from hf_compress.export.skeleton import build_skeleton
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import dimension_groups
from hf_compress.latency.timing import DEFAULT_ROUNDS, compile_model
from hf_compress.loading import config_and_class, load_model
from hf_compress.recipe.overrides import load_recipe
from hf_compress.recipe.run import run_recipe
from hf_compress.recipe.sensitivity import sensitivity_on_recipe
from hf_compress.recipe.sweep import run_sweep
from hf_compress.report.compare import DEFAULT_LENGTH, compare
from hf_compress.report.html import REPORT_FILE, write_report
from hf_compress.report.inspect import inspect_groups
from hf_compress.report.profile import profile
from hf_compress.shrinking.sizes import METHOD

EXIT_ERROR = 2
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
MODEL_HELP = "Hub name or folder of a model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What to parse; the process's own arguments by default.

    Returns:
        The exit code: 0, or 2 after an error that is printed as one message.
    """
    given = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        sys.stdout.write(f"{given.run(given)}\n")
    except CompressionError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-compress", description="Make, measure and export compressed models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    loading = argparse.ArgumentParser(add_help=False)
    loading.add_argument("--auto-class", help="class that loads the model; default: the one in its config.json")
    _add_measuring(commands, loading)

    inspect = commands.add_parser("inspect", parents=[loading], help="list what can be pruned: the dimension groups")
    inspect.add_argument("model", help=f"{MODEL_HELP}; its config.json is enough")
    inspect.add_argument("--kind", action="append", default=[], help="only this kind of groups; may be repeated")
    inspect.add_argument("--all", action="store_true", help="a line for each group, not for each kind of layer")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--load-weights", action="store_true", help="analyze the loaded model, not its shapes alone")
    inspect.add_argument(
        "--sensitivity",
        metavar="RECIPE",
        help="instead: how much the loss rises when one layer is quantized, on the data of a recipe file",
    )
    inspect.add_argument("--bits", type=_count, nargs="+", help="with --sensitivity: numbers of bits (default: 8 4 2)")
    inspect.add_argument("--batches", type=_count, help="with --sensitivity: how many batches of evaluation data")
    inspect.add_argument("--output", help="with --sensitivity: folder for sensitivity.json, .txt and .png (default: .)")
    inspect.set_defaults(run=_inspect)

    _add_run(commands)
    _add_sweep(commands)

    card = commands.add_parser("card", help="write a model card again from the folder's results.json")
    card.add_argument("directory", help="folder of a compressed model")
    card.set_defaults(run=_card)

    _add_report(commands)
    _add_export(commands, loading)
    _add_push(commands)
    return parser


def _add_report(commands: Any) -> None:
    about = (
        "Write one HTML page, in one file that needs no network: the comparison with the dense model, quality against "
        "size and speed, what every layer kept, the curves of training, the recipe, versions and seeds."
    )
    report = commands.add_parser(
        "report", help="write an HTML page about a run, a model or several runs", description=about
    )
    report.add_argument(
        "directory",
        metavar="DIR",
        help="output folder of a run, finished or not; folder of a compressed model with its results.json; or a folder "
        "of several runs, which are compared",
    )
    report.add_argument("--output", metavar="FILE", help=f"file to write (default: {REPORT_FILE} in DIR)")
    report.set_defaults(run=_report)


def _add_export(commands: Any, loading: argparse.ArgumentParser) -> None:
    export = commands.add_parser("export", parents=[loading], help="save a model with integer weights")
    export.add_argument("model", help=MODEL_HELP)
    export.add_argument("directory", help="folder to write")
    export.add_argument("--format", default="torchao", help=f"{', '.join(FORMATS)} (default: torchao)")
    export.add_argument("--exclude", action="append", help="regular expression of Linear layers to leave as they are")
    export.add_argument("--config", help=".yaml or .json file of a QuantizationConfig: which numbers")
    export.add_argument(
        "--no-verify", action="store_true", help="do not load the result in a fresh process and compare"
    )
    export.set_defaults(run=_export)


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="upload a finished model folder to the Hugging Face Hub",
        description="Upload a finished model folder to the Hugging Face Hub in one commit: weights, config, tokenizer "
        "or processor, model card, results and recipe. Checkpoints, optimizer states and files that are not known to "
        "belong to a model stay behind. The repository and the branch are made if they do not exist; what is there "
        "already is not sent again.",
        epilog="The token is that of `hf auth login`, or HF_TOKEN. HF_ENDPOINT names another Hub.",
    )
    push.add_argument("directory", help="folder of a model, as save_pretrained, run or export write it")
    push.add_argument("repo_id", help="repository: NAME, or OWNER/NAME")
    push.add_argument("--private", action="store_true", help="make a new repository private (default: your account's)")
    push.add_argument("--revision", help="branch to upload to (default: main)")
    push.add_argument("--commit-message", help="default: Upload and the folder's name")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    push.set_defaults(run=_push)


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="train, compress, save and compare, as one recipe file says")
    run.add_argument("recipe", help=".yaml or .json file")
    run.add_argument("--dry-run", action="store_true", help="load and check everything, say what would be done, stop")
    run.add_argument("--output", help="folder to write, instead of the recipe's")
    run.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint, if there is one")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting: training.learning_rate=3e-5"
    )
    run.set_defaults(run=_run)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="several budgets of one recipe: one table, one Pareto chart",
        description="Runs one recipe with several settings and seeds, each in a folder of its own, as a sweep file "
        "says: recipe, output, runs, grid, search, seeds, x, metric, direction, baselines. Writes sweep.json, sweep.md "
        "and pareto.png into the output, again after each run. The exit code is 2 if any run failed; the others are "
        "finished then.",
    )
    sweep.add_argument("sweep", metavar="SWEEP", help=".yaml or .json file of a SweepConfig")
    sweep.add_argument("--output", help="folder to write, instead of the sweep's")
    sweep.add_argument(
        "--resume", action="store_true", help="keep what is finished, go on with the rest, do failed runs again"
    )
    sweep.add_argument("--dry-run", action="store_true", help="load and check every run, say what it would do, stop")
    sweep.set_defaults(run=_sweep)


def _add_measuring(commands: Any, loading: argparse.ArgumentParser) -> None:
    measure = commands.add_parser("profile", parents=[loading], help="parameters, operations, bytes, memory, latency")
    measure.add_argument("model", help=MODEL_HELP)
    measure.add_argument("--batch-size", type=_count, default=1, help="examples per batch (default: 1)")
    measure.add_argument("--length", type=_count, default=DEFAULT_LENGTH, help=f"tokens (default: {DEFAULT_LENGTH})")
    measure.add_argument("--no-latency", action="store_true", help="count only, do not time")
    measure.add_argument("--json", action="store_true", help="print JSON")
    measure.set_defaults(run=_profile)

    both = commands.add_parser("compare", parents=[loading], help="one table of a model and its compressed version")
    both.add_argument("dense", help=MODEL_HELP)
    both.add_argument("compressed", help=MODEL_HELP)
    both.add_argument("--batch-sizes", type=_count, nargs="+", default=[1, 32], help="latencies (default: 1 32)")
    both.add_argument("--length", type=_count, default=DEFAULT_LENGTH, help=f"tokens (default: {DEFAULT_LENGTH})")
    both.add_argument("--rounds", type=_count, default=DEFAULT_ROUNDS, help=f"default: {DEFAULT_ROUNDS}")
    both.add_argument("--compile", action="store_true", help="also time the compressed model under torch.compile")
    both.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="default: text")
    both.set_defaults(run=_compare)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return value


def _inspect(given: argparse.Namespace) -> str:
    if given.sensitivity is not None:
        return _sensitivity(given)
    for option in ("bits", "batches", "output"):
        if getattr(given, option) is not None:
            raise ConfigError(f"--{option}: has no effect without --sensitivity.")
    start = time.perf_counter()
    if given.load_weights:
        model = load_model(given.model, given.auto_class)
    else:
        model = build_skeleton(*config_and_class(given.model, given.auto_class))
    groups = dimension_groups(model)
    found = inspect_groups(model, groups, kinds=given.kind, seconds=time.perf_counter() - start)
    if given.json:
        return json.dumps(found.to_dict(), indent=2)
    return f"{found.table(collapse=not given.all)}\n{found.summary()}{_compressed_note(model)}"


def _sensitivity(given: argparse.Namespace) -> str:
    for option in ("kind", "all", "json", "load_weights", "auto_class"):
        if getattr(given, option):
            raise ConfigError(f"--{option.replace('_', '-')}: has no effect with --sensitivity.")
    output = Path(given.output or ".")
    recipe = load_recipe(given.sensitivity, [f"model={json.dumps(given.model)}"])
    datasets.disable_progress_bars()
    found = sensitivity_on_recipe(recipe, tuple(given.bits or (8, 4, 2)), given.batches)
    output.mkdir(parents=True, exist_ok=True)
    (output / "sensitivity.json").write_text(json.dumps(found.to_dict(), indent=2), encoding="utf-8")
    (output / "sensitivity.txt").write_text(f"{found.table()}\n", encoding="utf-8")
    picture = found.plot(output / "sensitivity.png")
    return f"{found.table()}\nwrote {picture} and the same as .json and .txt"


def _compressed_note(model: PreTrainedModel) -> str:
    method = stored_method(model)
    if method is None:
        return ""
    if method == METHOD:
        return "\nshrunk before: units are those that are left, and may be removed as well"
    return f"\n{method} has compressed its weights: shrink() needs floating point, so start from that checkpoint"


def _profile(given: argparse.Namespace) -> str:
    model = load_model(given.model, given.auto_class)
    inputs = make_example_inputs(model, given.batch_size, given.length)
    directory = given.model if Path(given.model).is_dir() else None
    found = profile(model, inputs, latency=not given.no_latency, directory=directory)
    return json.dumps(found.to_dict(), indent=2) if given.json else str(found)


def _compare(given: argparse.Namespace) -> str:
    dense, small = (load_model(name, given.auto_class) for name in (given.dense, given.compressed))
    inputs = {f"batch {size}": make_example_inputs(dense, size, given.length) for size in given.batch_sizes}
    names = ("dense", "compressed")
    folders = zip(names, (given.dense, given.compressed), strict=True)
    others, notes = {}, []
    if given.compile:
        compiled, reason = compile_model(small, list(inputs.values()))
        if compiled is None:
            notes.append(f"not timed under torch.compile: {reason}")
        else:
            others["compressed, compiled"] = compiled
    table = compare(
        dense,
        small,
        names=names,
        others=others,
        inputs=inputs,
        rounds=given.rounds,
        directories={name: folder for name, folder in folders if Path(folder).is_dir()},
        notes=notes,
    )
    if given.format == "json":
        return json.dumps(table.to_dict(), indent=2)
    return table.to_markdown() if given.format == "markdown" else str(table)


def _run(given: argparse.Namespace) -> str:
    recipe = load_recipe(given.recipe, given.set, given.output)
    datasets.disable_progress_bars()
    return str(run_recipe(recipe, dry_run=given.dry_run, resume=given.resume))


def _sweep(given: argparse.Namespace) -> str:
    config = SweepConfig.load(given.sweep)
    if given.output is not None:
        config = dataclasses.replace(config, output=given.output)
    datasets.disable_progress_bars()
    found = run_sweep(config, resume=given.resume, dry_run=given.dry_run, progress=_progress)
    if found.failed:
        sys.stdout.write(f"{found}\n")
        reasons = "".join(f"\n{name}: {each.error}" for name, each in found.failed.items())
        raise SweepError(f"{len(found.failed)} of the runs failed; --resume does them again.{reasons}")
    return str(found)


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _card(given: argparse.Namespace) -> str:
    return f"wrote {write_card(given.directory)}"


def _report(given: argparse.Namespace) -> str:
    return f"wrote {write_report(given.directory, given.output)}"


def _push(given: argparse.Namespace) -> str:
    commit = push_to_hub(
        given.directory,
        given.repo_id,
        private=True if given.private else None,
        revision=given.revision,
        commit_message=given.commit_message,
        create_pr=given.create_pr,
    )
    files = contents_of(Path(given.directory)).files
    return f"pushed {', '.join(files)}\n{commit.pr_url or commit.commit_url}"


def _export(given: argparse.Namespace) -> str:
    model = load_model(given.model, given.auto_class)
    config = None if given.config is None else QuantizationConfig.load(given.config)
    directory = export_quantized(
        model, given.directory, given.format, given.exclude, config, verify=not given.no_verify
    )
    if not _has_tokenizer(given.model):  # models of other modalities have none
        return f"wrote {directory} (without a tokenizer: {given.model} has none)"
    AutoTokenizer.from_pretrained(given.model).save_pretrained(directory)
    return f"wrote {directory}"


def _has_tokenizer(name: str) -> bool:
    """Whether there are tokenizer files; transformers would make an empty tokenizer up otherwise."""
    options = {"_raise_exceptions_for_missing_entries": False}
    return any(cached_file(name, file, **options) is not None for file in TOKENIZER_FILES)


if __name__ == "__main__":
    sys.exit(main())
