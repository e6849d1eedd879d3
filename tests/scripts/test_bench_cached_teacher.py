"""The benchmark of cached teachers runs and says what it found."""

from ranks import ROOT, run


def test_it_runs_with_a_tiny_model() -> None:
    script = ROOT / "scripts" / "bench" / "cached_teacher.py"
    done = run(str(script), "--shapes", "tiny", "--small-rounds", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "distilled step / plain step: " in done.stdout and "target 1.05" in done.stdout
    found = [line for line in done.stdout.splitlines() if line.startswith("- ") and line.endswith(" ms")]
    assert len(found) == 6
