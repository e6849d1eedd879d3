"""The ``hf-compress`` command."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.hub import cached_file

from hf_compress.commands import make_parser
from hf_compress.config import QuantizationConfig, SweepConfig
from hf_compress.errors import CompressionError, ConfigError, ExportError, SweepError, message_of
from hf_compress.export.card import write_card
from hf_compress.export.contents import contents_of
from hf_compress.export.hub import push_to_hub
from hf_compress.export.pretrained import stored_method
from hf_compress.export.quantized import export_quantized
from hf_compress.export.saving import MAIN_FILES
from hf_compress.export.skeleton import build_skeleton
from hf_compress.graph.inputs import make_example_inputs
from hf_compress.graph.model import dimension_groups
from hf_compress.latency.timing import compile_model
from hf_compress.loading import config_and_class, load_model
from hf_compress.recipe.overrides import load_recipe
from hf_compress.recipe.run import run_recipe
from hf_compress.recipe.sensitivity import sensitivity_on_recipe
from hf_compress.recipe.sweep import run_sweep
from hf_compress.report.compare import DEFAULT_LENGTH, compare
from hf_compress.report.html import write_report
from hf_compress.report.inspect import inspect_groups
from hf_compress.report.profile import profile
from hf_compress.shrinking.sizes import METHOD

EXIT_ERROR = 2
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What to parse; the process's own arguments by default.

    Returns:
        The exit code: 0, or 2 after an error that is printed as one message.
    """
    given = make_parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        sys.stdout.write(f"{COMMANDS[given.command](given)}\n")
    except (CompressionError, OSError) as error:
        sys.stderr.write(f"error: {message_of(error)}\n")
        return EXIT_ERROR
    return 0


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
    inputs = _text_inputs(model, given.batch_size, given.length)
    directory = given.model if Path(given.model).is_dir() else None
    found = profile(model, inputs, latency=not given.no_latency, directory=directory)
    return json.dumps(found.to_dict(), indent=2) if given.json else str(found)


def _text_inputs(model: PreTrainedModel, batch_size: int, length: int | None) -> dict[str, Any]:
    """Return example inputs; the last positions, which some models reserve, are left free.

    Raises:
        ConfigError: If the model has fewer positions than the length that was given.
    """
    inputs = make_example_inputs(model, batch_size, DEFAULT_LENGTH if length is None else length)
    longest = min((inputs[name].shape[-1] for name in ("input_ids", "decoder_input_ids") if name in inputs), default=0)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or longest
    if length is not None and 0 < longest < length and length > positions:
        raise ConfigError(f"--length: got {length}; allowed: at most {positions}, the positions of this model.")
    return inputs


def _compare(given: argparse.Namespace) -> str:
    dense, small = (load_model(name, given.auto_class) for name in (given.dense, given.compressed))
    inputs = {f"batch {size}": _text_inputs(dense, size, given.length) for size in given.batch_sizes}
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
    if given.create_pr and commit.pr_url is None:
        return f"nothing to propose: {given.repo_id} holds the same files already\n{commit.commit_url}"
    files = contents_of(Path(given.directory)).files
    branch = given.repo_id if given.revision is None else f"{given.repo_id} ({given.revision})"
    where = branch if commit.pr_url is None else "the pull request"
    return f"{where} holds {', '.join(files)}\n{commit.pr_url or commit.commit_url}"


def _export(given: argparse.Namespace) -> str:
    held = [name for name in MAIN_FILES if (Path(given.directory) / name).is_file()]
    if held:
        raise ExportError(
            f"{given.directory}: holds a model ({held[0]}), which would be replaced. Choose another folder."
        )
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


COMMANDS: dict[str, Callable[[argparse.Namespace], str]] = {
    "inspect": _inspect,
    "profile": _profile,
    "compare": _compare,
    "run": _run,
    "sweep": _sweep,
    "card": _card,
    "report": _report,
    "export": _export,
    "push": _push,
}
"""Name -> what it does and then prints."""


if __name__ == "__main__":
    sys.exit(main())
