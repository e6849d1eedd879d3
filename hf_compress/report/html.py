"""``write_report``: one page about a run, a model or several runs, in one file that needs nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_compress.errors import ConfigError
from hf_compress.reading import write_new
from hf_compress.report.folders import RECIPE_FILE, RESULT_FILE, RunFolder, is_run, read_run, runs_below
from hf_compress.report.markup import Markup, tag, text
from hf_compress.report.overview import overview_sections, overview_summary
from hf_compress.report.results import Results
from hf_compress.report.sections import Section, run_sections
from hf_compress.report.style import SCRIPT, STYLE
from hf_compress.report.summary import key_facts, summary, title_of

REPORT_FILE = "report.html"

WRITTEN_BY = "Written by hf-compress report"
"""In every page, which a later one may replace."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is on the page."""

    title: str
    lead: str
    facts: Markup | None
    sections: Sequence[Section]


def write_report(directory: str | Path, path: str | Path | None = None) -> Path:
    """Write an HTML page about what lies in a folder.

    The page needs no other file and no network, and reads without JavaScript, which adds the numbers under the
    pointer.

    Args:
        directory: Output folder of a run, also of one that is not finished; folder of a compressed model with its
            ``results.json``; or a folder of several runs.
        path: File to write; ``report.html`` in the folder by default.

    Returns:
        The path.

    Raises:
        ConfigError: If there is nothing to report, a file is damaged, the page cannot be written, or another file than
            an earlier report is there.
    """
    directory = Path(directory)
    path = directory / REPORT_FILE if path is None else Path(path)
    if path.is_file() and not path.is_symlink() and WRITTEN_BY.encode() not in path.read_bytes():
        raise ConfigError(f"{path}: is there already, and no report, so it is not overwritten. Give another file.")
    page = _page(directory)
    try:
        write_new(path, _html(page))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error}). Give another file, in a folder that exists."
        ) from error
    return path


def _page(directory: Path) -> Page:
    if not directory.is_dir():
        raise ConfigError(f"{directory}: is no folder; give the output folder of a run, or a folder of runs.")
    if is_run(directory):
        run = read_run(directory)
        return Page(title=title_of(run), lead=summary(run), facts=key_facts(run), sections=run_sections(run))
    finished, unfinished = runs_below(directory)
    if not finished:
        raise ConfigError(
            f"{directory}: nothing to report: there is no {RESULT_FILE}, {RECIPE_FILE} or {Results.FILE_NAME}, and no "
            f"folder inside holds a finished run ({RESULT_FILE}). Give the output folder of a run, the folder of a "
            "compressed model, or a folder of runs."
        )
    runs, damaged = _readable(finished)
    return Page(
        title=f"{directory.resolve().name}: {len(runs)} compression run{'s' if len(runs) > 1 else ''}",
        lead=overview_summary(runs),
        facts=None,
        sections=overview_sections(runs, [path.name for path in unfinished], damaged),
    )


def _readable(folders: Sequence[Path]) -> tuple[dict[str, RunFolder], list[str]]:
    """Return the runs that can be read, by name, and what is wrong with the others.

    Raises:
        ConfigError: If none can.
    """
    runs, errors = {}, {}
    for path in folders:
        try:
            runs[path.name] = read_run(path)
        except ConfigError as error:
            errors[path.name] = error
    if errors and not runs:
        raise next(iter(errors.values()))
    return runs, [f"{name}: not shown. {error}" for name, error in errors.items()]


def _html(page: Page) -> str:
    links = [tag("li", tag("a", each.title, href=f"#{each.key}")) for each in page.sections]
    header = tag(
        "header",
        tag("p", "Compression report", class_="kicker"),
        tag("h1", page.title),
        tag("p", page.lead, class_="lead"),
        page.facts,
        tag("nav", tag("ul", links), aria_label="Sections"),
    )
    sections = [
        tag(
            "section",
            tag("h2", each.title, id=f"{each.key}-heading"),
            each.body,
            id=each.key,
            aria_labelledby=f"{each.key}-heading",
        )
        for each in page.sections
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", page.title),
        tag("style", Markup(STYLE)),
    )
    footer = tag("footer", f"{WRITTEN_BY}; every number is from the files of the run.")
    body = tag("body", header, tag("main", sections), footer, tag("script", Markup(SCRIPT)))
    return f"<!DOCTYPE html>\n{text(tag('html', head, body, lang='en'))}\n"
