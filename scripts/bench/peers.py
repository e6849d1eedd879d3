"""Beside the libraries that one would take instead: the same model, data, steps, batches and hardware for all.

usage: .venv/bin/python scripts/bench/peers.py --json FILE [--peers NAME ...] [--kinds prune quantize architectures]
           [--sparsities 0.5 0.75 0.9] [--seeds 0] [--steps 100] [--model FOLDER] [--retry] [--report]
           [--readme] [--check]

Task: three-way relations between WordNet's nouns, MiniLM fine-tuned on them: the dense model, from which all start.

Pruning: heads and feed-forward units go, until the encoder is as sparse as asked for; then what is left is trained
for ``--steps`` steps of ``--batch-size`` examples: AdamW, the same learning rate with warm-up and linear decay, the
same examples in the same order. One way of ours prunes while these steps go on and has the dense model as teacher,
which is what its README advises; the others prune at once and train on the task alone, as the peers do. All but ``all
layers alike`` of ours let scores compete across layers (the default), so that more may stay of a layer that matters;
the peers are asked for the same number of heads and units of every layer, but for Torch-Pruning's ``across layers``,
where heads compete with heads and units with units. Importance is measured on the first batches of training data.
``before`` is the accuracy before recovery, ``latency`` the median over rounds of the dense model's time / the small
one's in the same process, taking turns, eager, one batch of test examples: CPU time, which other processes disturb
less, and which is the latency where there is one thread. ``step`` is the CPU time of a training step / that of a
plain step of the dense model in the same process. ``memory`` is the peak of the process until recovery has ended,
beyond the peak of plain training steps in the same environment. ``cut`` is the CPU time of finding what belongs
together and removing it (without measuring importance, except where the library does both in one; ours includes its
verification). ``from_pretrained`` says whether plain transformers loads what ``save_pretrained`` wrote, in a fresh
process, and gets the same outputs.

Quantization: int8 of the dense model, all linear layers but the task head where one can choose, by the settings that
the library's documentation begins with (ModelOpt: INT8_DEFAULT_CFG, and
INT8_SMOOTHQUANT_CFG beside it). Latency as above, beside fp32 eager. Ways that
train get the same steps as above at a tenth of the learning rate.

Architectures: see ``peers/architectures.py``.

Every peer has an environment of its own, .cache/peers/NAME, made by pip on first use; one that cannot be installed is
left out, and the report says why. Each result is stored as it comes: a run that is stopped goes on where it was. What
failed is kept, too; ``--retry`` does it again. ``--report`` only writes the report again; ``--readme`` puts its summary
into README.md and ``--check`` compares that.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
sys.path.insert(0, str(SCRIPTS))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_data  # noqa: E402
import numpy  # noqa: E402
from peers_list import DENSE, OURS, PEERS, Peer, install  # noqa: E402
from peers_plot import plot  # noqa: E402
from peers_report import compared, report  # noqa: E402
from readme_results import filled  # noqa: E402
from stand_ins import wordnet  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from hf_compress.report.environment import environment  # noqa: E402

WORKERS = Path(__file__).resolve().parent / "peers"
KINDS = ("prune", "quantize", "architectures")
MAX_LENGTH = 48
JOB_SECONDS = 3600
START, END = "<!-- compared:start -->", "<!-- compared:end -->"
KEY = ("peer", "kind", "variant", "sparsity", "seed")

Data = dict[str, Any]


def arrays(tokenizer: Any, rows: Any) -> dict[str, Any]:
    """Return examples as arrays that any version of torch can take, padded with zeros."""
    encoded = tokenizer(list(rows["premise"]), list(rows["hypothesis"]), truncation=True, max_length=MAX_LENGTH)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    found = {"lengths": numpy.array(lengths), "labels": numpy.array(rows["label"])}
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        found[name] = numpy.zeros((len(lengths), max(lengths)), dtype=numpy.int64)
        for i, values in enumerate(encoded[name]):
            found[name][i, : len(values)] = values
    return found


def write_data(path: Path, model: Path, settings: Data, seed: int) -> None:
    """Store the training examples in their order, and the test examples."""
    if path.exists():
        return
    train, test = wordnet.wordnet_pairs()
    tokenizer = AutoTokenizer.from_pretrained(model)
    count = max(settings["steps"], settings["plain_steps"] + 1) * settings["batch_size"]
    parts = {"train": train.shuffle(seed=seed).select(range(count)), "test": test.select(range(settings["examples"]))}
    found = {f"{part}_{name}": each for part, rows in parts.items() for name, each in arrays(tokenizer, rows).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    numpy.savez(path, **found)


def keys_of(name: str, peer: Peer, kinds: list[str], sparsities: list[float], seeds: list[int]) -> Iterator[Data]:
    """Yield everything that a peer is asked to do."""
    todo: list[tuple[str, str, float, int]] = []
    if name == OURS and "prune" in kinds:
        todo += [("plain", DENSE, 0.0, seed) for seed in seeds]
    if peer.prune and "prune" in kinds:
        todo += [("plain", "", 0.0, seeds[0])]
        todo += [("prune", *each) for each in itertools.product(peer.prune, sparsities, seeds)]
    if "quantize" in kinds:
        todo += [("quantize", variant, 0.0, seed) for variant in peer.quantize for seed in seeds]
    if peer.architectures and "architectures" in kinds:
        todo += [("architectures", "", 0.0, seeds[0])]
    for each in todo:
        yield dict(zip(KEY, (name, *each), strict=True))


def variables(peer: Peer, threads: int) -> dict[str, str]:
    """Return the environment of a worker: nothing of this process's packages but for ours."""
    found = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    found |= {"TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_FREEZING": "1"}
    return found if peer.packages else {**found, "PYTHONPATH": str(ROOT)}


def last_error(text: str) -> str:
    """Return the line of a traceback that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or ["ended without a word"])[-1][:300]


def do(python: Path, key: Data, settings: Data, cache: Path, model: Path) -> Data:
    """Do one thing in a process of its own; return its result, or ``failed`` and why."""
    peer = PEERS[key["peer"]]
    folder = cache / "jobs" / "-".join(str(key[each]) for each in KEY if key[each] != "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = cache / "data" / f"{'-'.join(str(settings[name]) for name in sorted(settings))}-{key['seed']}.npz"
    write_data(data, model, settings, key["seed"])
    job = {**key, "settings": settings, "dense": str(model), "data": str(data)}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    environ = variables(peer, settings["threads"])
    command = [str(python), str(WORKERS / peer.worker), str(folder / "job.json")]
    try:
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environ, timeout=JOB_SECONDS, check=False
            )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {JOB_SECONDS} seconds"}
    if done.returncode != 0 or not (folder / "result.json").exists():
        return {"failed": last_error((folder / "log.txt").read_text(encoding="utf-8", errors="replace"))}
    result: Data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if (folder / "probe.npz").exists():
        result["reload"] = reloaded(python, folder, environ, peer)
    shutil.rmtree(folder / "model", ignore_errors=True)
    return result


def reloaded(python: Path, folder: Path, environ: dict[str, str], peer: Peer) -> Data:
    """Return whether plain transformers loads the model, and whether it does after the import that a peer asks for."""
    found = {}
    for name, more in (("plain", []), ("imported", [peer.needs_import] if peer.needs_import else None)):
        if more is None:
            continue
        command = [str(python), str(WORKERS / "reload.py"), str(folder), *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, check=False)
        lines = done.stdout.strip().splitlines()
        answer = lines[-1] if done.returncode == 0 and lines else "{}"
        answer = answer.replace(f"{folder}{os.sep}", "")  # where it lay on this machine says nothing
        found[name] = json.loads(answer) or {"loads": False, "error": last_error(done.stderr)}
        if found[name]["loads"]:
            break
    return found


def loaded(path: Path, settings: Data) -> Data:
    """Return what earlier runs left in the file, or an empty start."""
    if not path.exists():
        return {"environment": environment(), "settings": settings, "skipped": {}, "runs": []}
    data: Data = json.loads(path.read_text(encoding="utf-8"))
    if data["settings"] != settings:
        sys.exit(
            f"error: {path} holds results of other settings ({data['settings']}); these are {settings}. Give the same, "
            "or another file."
        )
    return data


def write(path: Path, data: Data) -> None:
    """Write the JSON file, the report and the plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    write_report(path, data)


def write_report(path: Path, data: Data) -> None:
    """Write the report and the plot beside the JSON file."""
    explained = (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2]
    picture = f"![Accuracy against encoder sparsity]({path.stem}.png)"
    text = report(data, picture if plot(data, path.with_suffix(".png")) else "")
    path.with_suffix(".md").write_text(f"{text}\n\n```\n{explained}```\n", encoding="utf-8")


def readme(path: Path, data: Data, *, check: bool) -> None:
    """Put the summary into the README, or end with an error if another one is there."""
    target = ROOT / "README.md"
    text = target.read_text(encoding="utf-8")
    wanted = filled(text, compared(data), START, END)
    if not check:
        target.write_text(wanted, encoding="utf-8")
    elif wanted != text:
        sys.exit(f"README.md: the comparison differs from {path}; run scripts/bench/peers.py --json {path} --readme")


def run(given: argparse.Namespace, settings: Data, data: Data) -> None:
    """Do what is missing, and write after each result."""
    cache = demo_data.cache_root().absolute() / "peers"
    model = given.model or wordnet.model_folder()
    for name in given.peers:
        keys = list(keys_of(name, PEERS[name], given.kinds, given.sparsities, given.seeds))
        missing = [key for key in keys if not any(_is_done(each, key, given.retry) for each in data["runs"])]
        python, reason = install(PEERS[name], cache / name) if missing else (None, "")
        data["skipped"].pop(name, None)
        if reason:
            data["skipped"][name] = reason
            print(f"without {name}: {reason}", file=sys.stderr, flush=True)
            write(given.json, data)
        for key in missing if python is not None else ():
            start = time.perf_counter()
            result = {**key, **do(python, key, settings, cache, model)}
            result["seconds"] = round(time.perf_counter() - start, 1)
            data["runs"] = [each for each in data["runs"] if not key.items() <= each.items()] + [result]
            print(json.dumps(result), file=sys.stderr, flush=True)
            write(given.json, data)
    write(given.json, data)


def _is_done(found: Data, key: Data, retry: bool) -> bool:
    return key.items() <= found.items() and not (retry and "failed" in found)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of all results")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of recovery")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--examples", type=int, default=800, help="test examples")
    parser.add_argument("--calibration-batches", type=int, default=8, help="batches that importance is measured on")
    parser.add_argument("--plain-steps", type=int, default=5, help="steps that step times are compared with")
    parser.add_argument("--rounds", type=int, default=11, help="of latencies")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="folder of the dense model; made on first use by default")
    parser.add_argument("--retry", action="store_true", help="do again what failed")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument("--readme", action="store_true", help="only put the summary into README.md")
    parser.add_argument("--check", action="store_true", help="only compare README.md with it")
    given = parser.parse_args()
    names = (
        "steps",
        "batch_size",
        "learning_rate",
        "examples",
        "calibration_batches",
        "plain_steps",
        "rounds",
        "threads",
    )
    settings = {name: getattr(given, name) for name in names}
    if min(settings.values()) <= 0:
        parser.error(f"{', '.join(names)} must be more than 0")
    if given.report or given.readme or given.check:
        data = json.loads(given.json.read_text(encoding="utf-8"))
        if given.report:
            write_report(given.json, data)
        if given.readme or given.check:
            readme(given.json, data, check=given.check)
        return
    data = loaded(given.json, settings)
    run(given, settings, data)
    print(report(data, ""))


if __name__ == "__main__":
    main()
