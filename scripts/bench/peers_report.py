"""The tables of the comparison with other libraries, and what follows from them in words."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from peers_list import DENSE, OURS, PEERS

Data = dict[str, Any]
Run = dict[str, Any]

VARIANTS = {
    (OURS, "default"): "taylor while training, with a teacher",
    (OURS, "taylor"): "taylor, at once",
    (OURS, "even"): "taylor, at once, all layers alike",
    (OURS, "l2"): "l2, at once",
    (OURS, "qat"): "trained, with a teacher",
    (OURS, "ptq"): "without training",
    ("modelopt", "qat"): "trained, with a teacher",
    ("modelopt", "ptq"): "without training",
    ("modelopt", "smoothquant"): "SmoothQuant, without training",
}
"""What the report calls a way of doing it, where its own name does not say enough."""

OWN = "default"
"""The way of ours that others' best is compared with."""

EVEN = "even"
"""The way of ours that does what the peers do: as many units of every layer."""

VARYING = {"fastest result": 1.1, "shortest cut": 2.0, "cheapest training step": 1.1}
"""Factors within which a number of the same code differs from run to run; a cut is measured once."""

OUTCOMES = {"handled": "yes", "partly": "partly", "wrong": "**wrong**", "error": "error", "absent": "-"}


def label(run: Run) -> str:
    """Return how a row is called."""
    peer = PEERS[run["peer"]].title
    about = VARIANTS.get((run["peer"], run["variant"]), run["variant"])
    return f"{peer}: {about}" if about else peer


def good(data: Data, kind: str) -> list[Run]:
    """Return the runs of a kind that came to an end, in the order of the peers and of their ways."""
    order = [(name, way) for name, peer in PEERS.items() for way in (*peer.prune, *peer.quantize)]
    found = [run for run in data["runs"] if run["kind"] == kind and "failed" not in run]
    return sorted(found, key=lambda run: order.index(way) if (way := (run["peer"], run["variant"])) in order else -1)


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is the head."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(values: Iterable[float | None]) -> str:
    """Return a mean in percent, or a dash."""
    found = [each for each in values if each is not None]
    return f"{100 * mean(found):.1f}" if found else "-"


def ratio(run: Run, base: str, name: str) -> float:
    """Return the median over rounds of the CPU time of ``base`` / the CPU time of ``name``."""
    times = run["cpu_milliseconds"]
    return median(one / other for one, other in zip(times[base], times[name], strict=True))


def plain_peak(data: Data, peer: str) -> int | None:
    """Return the peak memory of plain training steps in a peer's environment."""
    peaks = [run["peak_bytes"] for run in good(data, "plain") if run["peer"] == peer and run["variant"] != DENSE]
    return peaks[0] if peaks else None


def memory(data: Data, runs: list[Run]) -> str:
    """Return the peak memory beyond that of plain steps."""
    plain = plain_peak(data, runs[0]["peer"])
    if plain is None:
        return "-"
    return f"{(mean(run['peak_bytes'] for run in runs) - plain) / 2**20:+.0f} MiB"


def step(run: Run) -> float:
    """Return the CPU time of a training step / that of a plain step."""
    return float(run["step_seconds"]["method"] / run["step_seconds"]["plain"])


def reloads(run: Run) -> str:
    """Return whether ``from_pretrained`` loads what was saved."""
    if "unsaved" in run:
        return "not saved"
    found = run.get("reload", {})
    if found.get("plain", {}).get("loads"):
        return "yes"
    return "after `import hf_compress`" if found.get("imported", {}).get("loads") else "no"


def alike(runs: list[Run]) -> list[list[Run]]:
    """Return runs that differ in the seed alone, together."""
    found: dict[tuple[str, str, float], list[Run]] = {}
    for run in runs:
        found.setdefault((run["peer"], run["variant"], run["sparsity"]), []).append(run)
    return list(found.values())


def pruning_table(data: Data, sparsity: float) -> str:
    """Return one sparsity, the most accurate first."""
    head = ["", "before (%)", "after (%)", "encoder left", "latency", "MB", "`from_pretrained`", "cut (s)", "step",
            "memory"]  # fmt: skip
    rows = []
    groups = alike([run for run in good(data, "prune") if run["sparsity"] == sparsity])
    for runs in sorted(groups, key=lambda each: -mean(run["after"] for run in each)):
        sizes = [run["bytes"] / 1e6 for run in runs if run["bytes"] is not None]
        left = mean(run["encoder_parameters"] / run["dense_encoder_parameters"] for run in runs)
        row = [label(runs[0]), percent(run["before"] for run in runs), percent(run["after"] for run in runs)]
        row += [f"{100 * left:.1f} %", f"{mean(ratio(run, 'dense', 'pruned') for run in runs):.2f}x"]
        row += [f"{mean(sizes):.1f}" if sizes else "-", reloads(runs[0])]
        row += [f"{mean(run['prune_seconds'] for run in runs):.2f}", f"{mean(step(run) for run in runs):.2f}"]
        rows.append([*row, memory(data, runs)])
    return table([head, *rows])


def quantization_table(data: Data) -> str:
    """Return all int8 models, the fastest way to run each of them beside the others."""
    head = ["", "accuracy (%)", "faster than fp32 eager", "MB", "`from_pretrained`", "else loaded by", "step"]
    rows = []
    for runs in alike(good(data, "quantize")):
        first = runs[0]
        ways = [name for name in first["cpu_milliseconds"] if name != "fp32 eager"]
        speeds = ", ".join(f"{name} {mean(ratio(run, 'fp32 eager', name) for run in runs):.2f}x" for name in ways)
        by = first["reload_by"]
        row = [label(first), percent(run["after"] for run in runs), speeds]
        row += [f"{mean(run['bytes'] for run in runs) / 1e6:.1f}", reloads(first)]
        row += ["" if by == "from_pretrained" else f"`{by}`"]
        rows.append([*row, f"{mean(map(step, runs)):.2f}" if "method" in first.get("step_seconds", {}) else "-"])
    return table([head, *rows])


def outcomes(data: Data) -> dict[str, dict[str, dict[str, str]]]:
    """Return by peer and architecture what came of it."""
    return {run["peer"]: run["architectures"] for run in good(data, "architectures")}


def architecture_table(data: Data) -> str:
    """Return who handles what."""
    found = outcomes(data)
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    rows = [["", *(PEERS[peer].title for peer in found)]]
    for name in names:
        cells = [OUTCOMES[each[name]["outcome"]] if name in each else "-" for each in found.values()]
        rows.append([name, *cells])
    counts = [f"{_handled(each)} of {len(names)}" for each in found.values()]
    return table([*rows, ["handled", *counts]])


def _handled(each: dict[str, dict[str, str]]) -> int:
    return sum(result["outcome"] == "handled" for result in each.values())


def reasons(data: Data) -> list[str]:
    """Return why architectures are not handled, word for word."""
    return [
        f"- {PEERS[peer].title}, {name}: {result['about']}"
        for peer, each in outcomes(data).items()
        for name, result in each.items()
        if result["about"]
    ]


def failures(data: Data) -> list[str]:
    """Return what was left out or failed, and why; and why models could not be loaded again."""
    lines = [f"- {PEERS[name].title} is left out: {reason}" for name, reason in data["skipped"].items()]
    for run in data["runs"]:
        if "failed" in run:
            what = f"{run['kind']}, {run['sparsity']:.0%}" if run["kind"] == "prune" else run["kind"]
            lines.append(f"- {label(run)}, {what}: failed, {run['failed']}")
    errors: dict[str, str] = {}
    for run in [*good(data, "prune"), *good(data, "quantize")]:
        plain = run.get("reload", {}).get("plain", {})
        if not plain.get("loads", True):
            errors.setdefault(PEERS[run["peer"]].title, plain["error"])
    return lines + [f"- `from_pretrained` of what {name} saved: {error}" for name, error in errors.items()]


@dataclass(frozen=True)
class Best:
    """The best of several ways."""

    label: str
    score: float
    """The mean over seeds."""


def best(runs: list[Run], score: Callable[[Run], float]) -> Best | None:
    """Return the way with the highest mean of a score, if there is any."""
    ways = [Best(label(each[0]), mean(map(score, each))) for each in alike(runs)]
    return max(ways, key=lambda way: way.score, default=None)


def accuracy_verdicts(data: Data) -> list[str]:
    """Return, sparsity by sparsity, who is ahead in accuracy: our best against theirs, and equals against equals."""
    lines = []
    for sparsity in sorted({run["sparsity"] for run in good(data, "prune")}):
        runs = [run for run in good(data, "prune") if run["sparsity"] == sparsity]
        mine = best([run for run in runs if run["peer"] == OURS and run["variant"] == OWN], _percent)
        once = best([run for run in runs if run["peer"] == OURS and run["variant"] not in (OWN, EVEN)], _percent)
        even = best([run for run in runs if run["peer"] == OURS and run["variant"] == EVEN], _percent)
        theirs = best([run for run in runs if run["peer"] != OURS], _percent)
        for own in (mine, once, even):
            if own is None or theirs is None:
                continue
            lines.append(
                f"- {sparsity:.0%} sparse: {own.label} reaches {own.score:.1f} %, the best peer ({theirs.label}) "
                f"{theirs.score:.1f} %: {_who(own.score, theirs.score, data)}."
            )
    return lines


def _percent(run: Run) -> float:
    return 100 * float(run["after"])


def _who(own: float, theirs: float, data: Data) -> str:
    """Return which of two accuracies in percent is ahead, by more than the standard error of their difference."""
    lead, size = own - theirs, f"{abs(own - theirs):.1f} points"
    noise = sum(each * (100 - each) for each in (own, theirs)) ** 0.5 / data["settings"]["examples"] ** 0.5
    if abs(lead) <= noise:
        return f"**even**, {size} are within one standard error of a difference, {noise:.1f}"
    return f"ours is ahead by {size}" if lead > 0 else f"**the peer wins** by {size}"


def standard_error(data: Data) -> float:
    """Return one standard error of the dense model's accuracy, in points."""
    share = next((run["after"] for run in good(data, "plain") if run["variant"] == DENSE), 0.5)
    return float(100 * (share * (1 - share) / data["settings"]["examples"]) ** 0.5)


def other_verdicts(data: Data) -> list[str]:
    """Return who is ahead in everything but accuracy."""
    lines = []
    columns: tuple[tuple[str, str, Callable[[Run], float], str], ...] = (
        ("fastest result", "x", lambda run: ratio(run, "dense", "pruned"), "{:.2f}"),
        ("shortest cut", " s", lambda run: -run["prune_seconds"], "{:.2f}"),
        ("cheapest training step", " of a plain one", lambda run: -step(run), "{:.2f}"),
    )
    for sparsity in sorted({run["sparsity"] for run in good(data, "prune")}):
        runs = [run for run in good(data, "prune") if run["sparsity"] == sparsity]
        for title, unit, score, form in columns:
            own = [run for run in runs if run["peer"] == OURS]
            theirs = best([run for run in runs if run["peer"] != OURS], score)
            advised = best([run for run in own if run["variant"] == OWN], score)
            for mine in dict.fromkeys((best(own, score), advised)):
                if mine is None or theirs is None:
                    continue
                a, b = (form.format(abs(each.score)) + unit for each in (mine, theirs))
                won = "**the peer wins**" if theirs.score > mine.score else "ours is ahead"
                if 1 / VARYING[title] < theirs.score / mine.score < VARYING[title]:
                    won = f"**even**, the same code differs by a factor of {VARYING[title]:g} from run to run"
                lines.append(f"- {title}, {sparsity:.0%}: {mine.label} {a}, {theirs.label} {b}: {won}.")
    return lines


def int8_verdicts(data: Data) -> list[str]:
    """Return who is ahead in int8."""
    runs = good(data, "quantize")
    lines = []
    columns: tuple[tuple[str, Callable[[Run], float], str], ...] = (
        ("accuracy in %", _percent, "{:.1f}"),
        ("speed beside fp32 eager", fastest, "{:.2f}"),
        ("bytes", lambda run: -run["bytes"], "{:,.0f}"),
    )
    for title, score, form in columns:
        mine = best([run for run in runs if run["peer"] == OURS], score)
        theirs = best([run for run in runs if run["peer"] != OURS], score)
        if mine is not None and theirs is not None:
            a, b = (form.format(abs(each.score)) for each in (mine, theirs))
            won = "even" if a == b else "**the peer wins**" if theirs.score > mine.score else "ours is ahead"
            if title.startswith("accuracy"):
                won = _who(mine.score, theirs.score, data)
            lines.append(f"- int8, {title}: ours {a}, {theirs.label} {b}: {won}.")
    return lines


def fastest(run: Run) -> float:
    """Return the speed-up of the fastest int8 way to run a model."""
    return max(ratio(run, "fp32 eager", name) for name in run["cpu_milliseconds"] if name.startswith("int8"))


def verdicts(data: Data) -> list[str]:
    """Return all conclusions."""
    found = [*accuracy_verdicts(data), *other_verdicts(data), *int8_verdicts(data)]
    counts = {peer: _handled(each) for peer, each in outcomes(data).items()}
    others = {peer: count for peer, count in counts.items() if peer != OURS}
    if OURS in counts and others:
        most = max(others, key=lambda peer: others[peer])
        won = "**the peer wins**" if others[most] > counts[OURS] else "ours is ahead"
        won = "even" if others[most] == counts[OURS] else won
        found.append(f"- architectures: ours {counts[OURS]}, {PEERS[most].title} {others[most]}: {won}.")
    return found


def used(data: Data) -> str:
    """Return the versions of every peer."""
    found: dict[str, dict[str, str]] = {}
    for run in data["runs"]:
        found.setdefault(run["peer"], {}).update(run.get("versions", {}))
    lines = [
        f"- {PEERS[peer].title}: {', '.join(' '.join(each) for each in v.items())}" for peer, v in found.items() if v
    ]
    return "\n".join(lines)


def dense_line(data: Data) -> str:
    """Return what all are compared with."""
    runs = [run for run in good(data, "plain") if run["variant"] == DENSE]
    if not runs:
        return ""
    pruned = {run["seed"] for run in good(data, "prune")}
    count = "one seed" if len(pruned) == 1 else f"means over {len(pruned)} seeds"
    return (
        f"Dense: {100 * runs[0]['before']:.1f} % on {runs[0]['examples']:,} examples (one standard error is "
        f"{standard_error(data):.1f} points); {percent(run['after'] for run in runs)} % when it is trained on for as "
        f"many steps as the pruned models, {data['settings']['steps']} of {data['settings']['batch_size']} examples. "
        f"Pruned models: {count}."
    )


def report(data: Data, picture: str) -> str:
    """Return everything, as Markdown."""
    about = data["environment"]
    minutes = sum(run.get("cpu_seconds", 0) for run in data["runs"]) / 60
    title = f"# Beside other libraries\n\nWritten by `scripts/bench/peers.py`; {about['cpu']}, "
    title += f"{data['settings']['threads']} thread(s), {minutes:.0f} minutes of CPU time."
    parts = [title, dense_line(data)]
    for sparsity in sorted({run["sparsity"] for run in good(data, "prune")}):
        parts += [f"## Pruned, {sparsity:.0%} of the encoder", pruning_table(data, sparsity)]
    parts += [picture]
    if good(data, "quantize"):
        parts += ["## int8", quantization_table(data)]
    if good(data, "architectures"):
        parts += ["## Architectures", architecture_table(data), "\n".join(reasons(data))]
    parts += ["## Who is ahead", "\n".join(verdicts(data)), "## Left out, failed, not loaded"]
    parts += ["\n".join(failures(data)) or "Nothing.", "## Versions", used(data)]
    return "\n\n".join(part for part in parts if part)


def compared(data: Data) -> str:
    """Return the section of the README."""
    rows = [["accuracy (%) after recovery", *(f"{s:.0%} sparse" for s in _sparsities(data)), "`from_pretrained`"]]
    for variant in dict.fromkeys((run["peer"], run["variant"]) for run in good(data, "prune")):
        mine = [run for run in good(data, "prune") if (run["peer"], run["variant"]) == variant]
        cells = [percent(run["after"] for run in mine if run["sparsity"] == s) for s in _sparsities(data)]
        rows.append([label(mine[0]), *cells, reloads(mine[0])])
    skipped = [f"- {PEERS[name].title}: {reason}" for name, reason in data["skipped"].items()]
    parts = [dense_line(data), table(rows), "\n".join(verdicts(data))]
    parts += ["Left out:\n\n" + "\n".join(skipped) if skipped else ""]
    return "\n\n".join(part for part in parts if part)


def _sparsities(data: Data) -> list[float]:
    return sorted({run["sparsity"] for run in good(data, "prune")})
