"""Put the demo's outcome into the repository: model_cards/NAME and the results section of README.md.

usage: readme_results.py [DEMO_FOLDER]      take over what scripts/demo wrote, by default runs/demo
       readme_results.py --check            only compare README.md with model_cards
"""

import shutil
import sys
from pathlib import Path

from hf_compress.export.card import CARD, PICTURE, write_card
from hf_compress.report.results import Results

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
NAME = "minilm-movie-snippets"
START, END = "<!-- results:start -->", "<!-- results:end -->"


def render(cards: Path) -> str:
    """Return the results section, from ``results.json`` alone."""
    results = Results.load(cards / NAME / Results.FILE_NAME)
    table, training = results.table(), results.training
    minutes = (training["teacher_seconds"] + training["compression_seconds"]) / 60
    folder = f"model_cards/{NAME}"
    return "\n\n".join(
        [
            f"`bash scripts/demo` on {table.environment['threads']} threads of an {table.environment['cpu']}: "
            f"{results.base_model} on {results.num_evaluation_examples:,} {results.evaluation_split} examples of "
            f"{results.dataset}, {minutes:.1f} minutes of training, dense teacher included.",
            table.to_markdown(),
            f"![Heads and feed-forward units that every layer kept]({folder}/{PICTURE})",
            f"The whole [model card]({folder}/{CARD}) and its [numbers]({folder}/{Results.FILE_NAME}) are written by "
            "the demo.",
        ]
    )


def filled(readme: str, section: str, start: str = START, end: str = END) -> str:
    """Return the README with the section between the markers."""
    before, rest = readme.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{section}\n{end}{after}"


def main() -> None:
    """Take over or check."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--check"]:
        if filled(text, render(CARDS)) != text:
            sys.exit("README.md: the results section differs from model_cards; run scripts/readme_results.py")
        return
    source = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "demo") / "compressed"
    target = CARDS / NAME
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / Results.FILE_NAME, target)
    write_card(target)
    readme.write_text(filled(text, render(CARDS)), encoding="utf-8")
    print(f"wrote {target} and {readme}")


if __name__ == "__main__":
    main()
