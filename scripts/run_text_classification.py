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

from hf_compress import ConfigError
from hf_compress.errors import choices

GLUE = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "wnli": ("sentence1", "sentence2"),
}
"""Configuration of GLUE -> its columns of texts; scores of similarity (stsb) are no classes."""


@dataclass
class TextArguments:
    """Which columns there are."""

    text_column_names: str | None = field(
        default=None, metadata={"help": "column of the text, or two of a pair: premise,hypothesis"}
    )
    label_column_name: str | None = field(default=None, metadata={"help": "column of the class (default: label)"})
    task_name: str | None = field(
        default=None, metadata={"help": f"a task of GLUE instead of --dataset_name: {', '.join(GLUE)}"}
    )
    max_seq_length: int | None = field(default=None, metadata={"help": "tokens; longer texts are cut"})


def columns(given: Any) -> dict[str, Any]:
    """Return what the arguments say of the data.

    Raises:
        ConfigError: If GLUE has no such task of classification.
    """
    texts = given.text_column_names
    glue = {}
    if given.task_name is not None:
        if given.task_name not in GLUE:
            raise ConfigError(f"--task_name: got {given.task_name!r}; {choices(given.task_name, GLUE)}.")
        split = "validation_matched" if given.task_name == "mnli" else "validation"
        glue = {"path": "nyu-mll/glue", "name": given.task_name, "eval_split": split}
        texts = texts or ",".join(GLUE[given.task_name])
    return {
        **glue,
        "text_columns": None if texts is None else texts.split(","),
        "label_column": given.label_column_name,
        "max_length": given.max_seq_length,
    }


if __name__ == "__main__":
    main("text-classification", TextArguments, columns)
