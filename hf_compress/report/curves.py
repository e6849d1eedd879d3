"""The training curves of a page: which logged quantities share a chart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_compress.report.frame import NUM_STYLES
from hf_compress.report.lines import Series, Stretch, line_chart
from hf_compress.report.logs import StageLog, offsets, quantities
from hf_compress.report.markup import Markup

ASIDE = ("step", "epoch", "total_flos", "num_input_tokens_seen")
"""What the Trainer logs that says nothing about how training went."""

TIMES = ("_runtime", "_per_second", "_preparation_time")


@dataclass(frozen=True)
class Panel:
    """One chart: its title and the quantities that belong there."""

    title: str
    shows: Callable[[str], bool]


PANELS = (
    Panel("Loss", lambda key: key in ("loss", "eval_loss")),
    Panel("Evaluation", lambda key: key.startswith("eval_")),
    Panel("Sparsity", lambda key: key.endswith("_sparsity")),
    Panel("Task and teacher", lambda key: key in ("task_loss", "distillation_loss")),
    Panel("Parts of the teacher's loss", lambda key: key.endswith("_loss")),
    Panel("Parameters if shrunk now", lambda key: key == "parameters"),
    Panel("Share of operations if shrunk now", lambda key: key == "flops_kept"),
    Panel("Learning rate", lambda key: key == "learning_rate"),
    Panel("Gradient norm", lambda key: key == "grad_norm"),
    Panel("Lowest score kept", lambda key: key.endswith("_threshold")),
)
"""A quantity is in the first chart that shows it; each of those that none shows has its own."""


def training_charts(history: Sequence[StageLog]) -> list[Markup]:
    """Return a figure for every group of quantities that were logged, over the optimizer steps of all stages."""
    starts = offsets(history)
    stages = [
        Stretch(name=log.name, begin=begin, end=end)
        for log, begin, end in zip(history, starts, starts[1:], strict=False)
    ]
    found: dict[str, list[Series]] = {panel.title: [] for panel in PANELS}
    for key in quantities(history):
        series = _series(key, history, stages)
        if series.pieces and not _is_aside(key):
            title = next((panel.title for panel in PANELS if panel.shows(key)), _words(key))
            found.setdefault(title, []).append(series)
    parts = [(title, part) for title, series in found.items() for part in _split(series)]
    return [
        line_chart(f"curve-{number}", title, series, stages)
        for number, (title, series) in enumerate(parts, 1)
        if series
    ]


def _split(series: Sequence[Series]) -> list[Sequence[Series]]:
    """No chart has more curves than there are styles."""
    return [series[start : start + NUM_STYLES] for start in range(0, len(series), NUM_STYLES)]


def _series(key: str, history: Sequence[StageLog], stages: Sequence[Stretch]) -> Series:
    both = list(zip(history, stages, strict=True))
    pieces = [log.points(key, stage.begin) for log, stage in both]
    return Series(
        name=key,
        pieces=[piece for piece in pieces if piece],
        targets=[(stage.begin, stage.end, log.targets[key]) for log, stage in both if key in log.targets],
    )


def _words(key: str) -> str:
    return key[:1].upper() + key[1:].replace("_", " ")


def _is_aside(key: str) -> bool:
    return key in ASIDE or key.startswith("train_") or key.endswith(TIMES)
