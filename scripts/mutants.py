"""Change the package in one random place at a time, and see whether the tests that run that place notice.

Needs what scripts/coverage leaves. Each mutant is tried on the tests that run its line, the fastest first, until one
fails: it is killed, if that test passes without the change. A mutant that survives all of them is printed with its
place. The places are drawn from all that the parts have, whether any test runs them or not.

usage: bash scripts/coverage && .venv/bin/python scripts/mutants.py --count 30
       .venv/bin/python scripts/mutants.py --parts graph --seed 1 --count 10
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from coverage import CoverageData
from mutations import Mutation, mutated, mutations

ROOT = Path(__file__).resolve().parent.parent
COVERAGE = ROOT / ".cache" / "coverage"
PARTS = ("graph", "instruments", "callbacks")
WANTED = 0.85
"""The share of mutants that must be killed."""

CHUNKS = (5, 20, 100)
"""Numbers of tests that are started together; most mutants die in the first."""

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".cache", "runs", "build", "__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Mutant:
    """One change in one place."""

    path: str
    """Of the file, relative to the repository."""

    mutation: Mutation

    def source(self, root: Path) -> str:
        """Return the whole file, changed."""
        return mutated(ast.parse((root / self.path).read_text(encoding="utf-8")), self.mutation)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    path: str
    line: int
    what: str
    killed: bool
    by: str
    """Name of the test that failed, or why none did."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30, help="number of mutants (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of places")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"of hf_compress (default: {', '.join(PARTS)})")
    parser.add_argument("--workers", type=int, default=2, help="mutants that are tried at once")
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds for a chunk of tests; longer counts as killed"
    )
    parser.add_argument("--output", type=Path, default=COVERAGE / "mutants.json", help="where the outcomes go")
    return parser.parse_args(given)


def all_mutants(parts: Sequence[str], root: Path = ROOT) -> list[Mutant]:
    """Return every mutant of some parts of the package, in the order of their places."""
    found = []
    for part in parts:
        folder = root / "hf_compress" / part
        if not folder.is_dir():
            raise SystemExit(f"--parts: there is no {folder}")
        for path in sorted(folder.rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [Mutant(str(path.relative_to(root)), each) for each in mutations(tree)]
    return found


def tests_of_lines() -> dict[str, dict[int, list[str]]]:
    """Return which tests ran which line of which file, by what scripts/coverage recorded.

    Lines that run when a file is imported, such as constants, run before all tests: those of the whole file count.
    """
    if not (COVERAGE / "data").is_file():
        raise SystemExit(f"{COVERAGE / 'data'} is missing. Run: bash scripts/coverage")
    data = CoverageData(str(COVERAGE / "data"))
    data.read()
    found: dict[str, dict[int, list[str]]] = {}
    for path in data.measured_files():
        lines = data.contexts_by_lineno(path)
        by_line = {line: {each.split("|")[0] for each in tests} - {""} for line, tests in lines.items()}
        of_file = set().union(*by_line.values())
        found[str(Path(path).relative_to(ROOT))] = {line: sorted(tests or of_file) for line, tests in by_line.items()}
    return found


def seconds_of_tests() -> dict[str, float]:
    """Return how long each test took, by its name without its file's folder, as JUnit's XML names it."""
    tree = xml.etree.ElementTree.parse(COVERAGE / "tests.xml")
    return {
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
        for case in tree.iter("testcase")
    }


def copies(number: int, folder: Path) -> Iterator[Path]:
    """Yield copies of the repository to be changed."""
    for index in range(number):
        copy = folder / f"copy{index}"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        yield copy


def run(copy: Path, tests: Sequence[str], timeout: int) -> str | None:
    """Return the name of the first test that fails in a copy of the repository, or None."""
    environment = {
        **os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end after {timeout} seconds"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"pytest's exit code {done.returncode}"


def outcome_of(mutant: Mutant, tests: Sequence[str], copy: Path, timeout: int) -> Outcome:
    """Try a mutant on tests, in growing chunks."""
    place = (mutant.path, mutant.mutation.line, mutant.mutation.what)
    if not tests:
        return Outcome(*place, killed=False, by="no test runs the line")
    target = copy / mutant.path
    original = target.read_text(encoding="utf-8")
    target.write_text(mutant.source(copy), encoding="utf-8")
    failed, chunk = None, list[str]()
    try:
        rest = list(tests)
        for size in (*CHUNKS, len(tests)):
            chunk, rest = rest[:size], rest[size:]
            failed = run(copy, chunk, timeout) if chunk else None
            if failed is not None:
                break
    finally:
        target.write_text(original, encoding="utf-8")
    if failed is None:
        return Outcome(*place, killed=False, by=f"{len(tests)} tests run the line")
    check_innocent(copy, failed, chunk, timeout)
    return Outcome(*place, killed=True, by=failed)


def check_innocent(copy: Path, failed: str, tests: Sequence[str], timeout: int) -> None:
    """Check that what failed passes where nothing is changed: a test that is gone, or fails anyway, kills nothing."""
    named = [each for each in tests if failed == f"FAILED {each}"]
    reason = run(copy, named or tests, timeout)
    if reason is not None:
        raise SystemExit(
            f"{reason}: the same happens without any change, so it says nothing about mutants. Tests: "
            f"{' '.join((named or list(tests))[:5])}. Mend them, then run: bash scripts/coverage"
        )


def outcomes(chosen: Sequence[Mutant], options: argparse.Namespace) -> Iterator[Outcome]:
    """Yield what becomes of mutants, in their order, while others are tried."""
    lines, seconds = tests_of_lines(), seconds_of_tests()

    def fastest_first(mutant: Mutant) -> list[str]:
        tests = lines.get(mutant.path, {}).get(mutant.mutation.line, [])
        return sorted(tests, key=lambda name: seconds.get(name, 0.0))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for copy in copies(options.workers, Path(folder)):
            free.put(copy)

        def tried(mutant: Mutant) -> Outcome:
            copy = free.get()
            try:
                return outcome_of(mutant, fastest_first(mutant), copy, options.timeout)
            finally:
                free.put(copy)

        yield from pool.map(tried, chosen)


def summary(found: Sequence[Outcome], options: argparse.Namespace) -> Mapping[str, object]:
    """Return what was tried, the counts and all outcomes."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    killed = sum(each.killed for each in found)
    tried = {"parts": options.parts, "seed": options.seed, "commit": commit}
    return {**tried, "mutants": len(found), "killed": killed, "outcomes": [asdict(each) for each in found]}


def main(given: Sequence[str] | None = None) -> int:
    """Try mutants; return 1 if too many survive."""
    options = arguments(given)
    every = all_mutants(options.parts)
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    found: list[Outcome] = []
    for outcome in outcomes(chosen, options):
        found.append(outcome)
        word = "killed" if outcome.killed else "SURVIVED"
        print(f"{word:8}  {outcome.path}:{outcome.line}  {outcome.what}  ({outcome.by})", flush=True)
        options.output.write_text(json.dumps(summary(found, options), indent=1) + "\n", encoding="utf-8")
    killed = sum(each.killed for each in found)
    print(f"{killed} of {len(found)} mutants killed ({killed / len(found):.0%}; wanted: {WANTED:.0%})")
    return 0 if killed >= WANTED * len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
