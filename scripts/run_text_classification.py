"""Compress a classifier of texts or of pairs of texts, by a recipe.

usage: python scripts/run_text_classification.py --recipe scripts/recipes/bert_mnli.yaml --output_dir runs/mnli
       python scripts/run_text_classification.py --recipe RECIPE --model_name_or_path bert-base-uncased
           --data_file reviews.csv --text_column_names review --label_column_name stars --output_dir runs/reviews
       accelerate launch --multi_gpu scripts/run_text_classification.py ...

All of TrainingArguments are arguments as well, and take the place of the recipe's.
"""

from dataclasses import dataclass, field
from typing import Any

from recipe_script import main


@dataclass
class TextArguments:
    """Which columns there are."""

    text_column_names: str | None = field(
        default=None, metadata={"help": "column of the text, or two of a pair: premise,hypothesis"}
    )
    label_column_name: str | None = field(default=None, metadata={"help": "column of the class (default: label)"})
    max_seq_length: int | None = field(default=None, metadata={"help": "tokens; longer texts are cut"})


def columns(given: Any) -> dict[str, Any]:
    """Return what the arguments say of the data."""
    texts = given.text_column_names
    return {
        "text_columns": None if texts is None else texts.split(","),
        "label_column": given.label_column_name,
        "max_length": given.max_seq_length,
    }


if __name__ == "__main__":
    main("text-classification", TextArguments, columns)
