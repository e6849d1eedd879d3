"""The parser of the ``hf-compress`` command."""

import argparse
from typing import Any

from hf_compress.export.formats.table import FORMATS
from hf_compress.latency.timing import DEFAULT_ROUNDS
from hf_compress.report.compare import DEFAULT_LENGTH
from hf_compress.report.html import REPORT_FILE

LENGTH_HELP = f"tokens (default: {DEFAULT_LENGTH}, or as many as the model allows)"
MODEL_HELP = "Hub name or folder of a model"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; ``command`` of what it parses is the name of the command."""
    parser = argparse.ArgumentParser(prog="hf-compress", description="Make, measure and export compressed models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
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

    _add_run(commands)
    _add_sweep(commands)

    card = commands.add_parser("card", help="write a model card again from the folder's results.json")
    card.add_argument("directory", help="folder of a compressed model")

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


def _add_export(commands: Any, loading: argparse.ArgumentParser) -> None:
    export = commands.add_parser("export", parents=[loading], help="save a model with integer weights")
    export.add_argument("model", help=MODEL_HELP)
    export.add_argument("directory", help="folder to write; one that holds a model is not overwritten")
    export.add_argument("--format", default="torchao", help=f"{', '.join(FORMATS)} (default: torchao)")
    export.add_argument("--exclude", action="append", help="regular expression of Linear layers to leave as they are")
    export.add_argument("--config", help=".yaml or .json file of a QuantizationConfig: which numbers")
    export.add_argument(
        "--no-verify", action="store_true", help="do not load the result in a fresh process and compare"
    )


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


def _add_run(commands: Any) -> None:
    run = commands.add_parser("run", help="train, compress, save and compare, as one recipe file says")
    run.add_argument("recipe", help=".yaml or .json file")
    run.add_argument("--dry-run", action="store_true", help="load and check everything, say what would be done, stop")
    run.add_argument("--output", help="folder to write, instead of the recipe's")
    run.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint, if there is one")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting: training.learning_rate=3e-5"
    )


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


def _add_measuring(commands: Any, loading: argparse.ArgumentParser) -> None:
    measure = commands.add_parser("profile", parents=[loading], help="parameters, operations, bytes, memory, latency")
    measure.add_argument("model", help=MODEL_HELP)
    measure.add_argument("--batch-size", type=_count, default=1, help="examples per batch (default: 1)")
    measure.add_argument("--length", type=_count, help=LENGTH_HELP)
    measure.add_argument("--no-latency", action="store_true", help="count only, do not time")
    measure.add_argument("--json", action="store_true", help="print JSON")

    both = commands.add_parser("compare", parents=[loading], help="one table of a model and its compressed version")
    both.add_argument("dense", help=MODEL_HELP)
    both.add_argument("compressed", help=MODEL_HELP)
    both.add_argument("--batch-sizes", type=_count, nargs="+", default=[1, 32], help="latencies (default: 1 32)")
    both.add_argument("--length", type=_count, help=LENGTH_HELP)
    both.add_argument("--rounds", type=_count, default=DEFAULT_ROUNDS, help=f"default: {DEFAULT_ROUNDS}")
    both.add_argument("--compile", action="store_true", help="also time the compressed model under torch.compile")
    both.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="default: text")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1")
    return value
