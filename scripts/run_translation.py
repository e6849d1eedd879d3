"""Compress a translator, or any other model that writes a text for a text, by a recipe.

usage: python scripts/run_translation.py --recipe scripts/recipes/t5_wmt16.yaml --output_dir runs/en-ro
       python scripts/run_translation.py --recipe RECIPE --model_name_or_path google-t5/t5-small
           --dataset_name wmt/wmt16 --dataset_config_name ro-en --source_lang en --target_lang ro
           --source_prefix "translate English to Romanian: " --output_dir runs/en-ro

All of Seq2SeqTrainingArguments are arguments as well, and take the place of the recipe's; with
``--predict_with_generate`` texts are written and BLEU is computed.
"""

from dataclasses import dataclass, field
from typing import Any

from recipe_script import main


@dataclass
class TranslationArguments:
    """Which columns there are."""

    source_lang: str | None = field(default=None, metadata={"help": "part of the column translation to read, as en"})
    target_lang: str | None = field(default=None, metadata={"help": "part of the column translation to write, as ro"})
    source_column: str | None = field(default=None, metadata={"help": "instead: column of the text to read"})
    target_column: str | None = field(default=None, metadata={"help": "instead: column of the text to write"})
    source_prefix: str | None = field(default=None, metadata={"help": "put before each text to read"})
    max_source_length: int | None = field(default=None, metadata={"help": "tokens; longer texts are cut"})
    max_target_length: int | None = field(default=None, metadata={"help": "tokens; longer texts are cut"})


def columns(given: Any) -> dict[str, Any]:
    """Return what the arguments say of the data."""
    source = given.source_column or (given.source_lang and f"translation.{given.source_lang}")
    return {
        "text_columns": source and [source],
        "target_column": given.target_column or (given.target_lang and f"translation.{given.target_lang}"),
        "prefix": given.source_prefix,
        "max_length": given.max_source_length,
        "max_target_length": given.max_target_length,
    }


if __name__ == "__main__":
    main("seq2seq-lm", TranslationArguments, columns)
