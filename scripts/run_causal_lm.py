"""Compress a language model that continues texts, by a recipe.

usage: python scripts/run_causal_lm.py --recipe scripts/recipes/smollm2_minitron.yaml --output_dir runs/smollm2
       python scripts/run_causal_lm.py --recipe RECIPE --model_name_or_path HuggingFaceTB/SmolLM2-135M
           --data_file texts.txt --output_dir runs/texts

All of TrainingArguments are arguments as well, and take the place of the recipe's.
"""

from dataclasses import dataclass, field
from typing import Any

from recipe_script import main


@dataclass
class LanguageArguments:
    """Which columns there are."""

    text_column_name: str | None = field(default=None, metadata={"help": "column of the text (default: text)"})
    block_size: int | None = field(default=None, metadata={"help": "tokens; longer texts are cut"})


def columns(given: Any) -> dict[str, Any]:
    """Return what the arguments say of the data."""
    column = given.text_column_name
    return {"text_columns": None if column is None else [column], "max_length": given.block_size}


if __name__ == "__main__":
    main("causal-lm", LanguageArguments, columns)
