"""Compress a model that finds answers in texts, by a recipe.

usage: python scripts/run_question_answering.py --recipe scripts/recipes/bert_squad.yaml --output_dir runs/squad
       python scripts/run_question_answering.py --recipe RECIPE --model_name_or_path bert-base-uncased
           --dataset_name rajpurkar/squad --output_dir runs/squad

Answers are stored as in SQuAD. All of TrainingArguments are arguments as well, and take the place of the recipe's.
"""

from dataclasses import dataclass, field
from typing import Any

from recipe_script import main


@dataclass
class QuestionArguments:
    """Which columns there are."""

    question_column_name: str | None = field(default=None, metadata={"help": "column of the question"})
    context_column_name: str | None = field(default=None, metadata={"help": "column of the text with the answer"})
    answer_column_name: str | None = field(default=None, metadata={"help": "column of the answers"})
    max_seq_length: int | None = field(default=None, metadata={"help": "tokens; longer texts are read in parts"})
    doc_stride: int | None = field(default=None, metadata={"help": "tokens that two parts share"})


def columns(given: Any) -> dict[str, Any]:
    """Return what the arguments say of the data."""
    names = [given.question_column_name, given.context_column_name]
    default = ["question", "context"] if given.dataset_name or given.data_file or given.train_file else None
    return {
        "text_columns": names if any(names) else default,
        "label_column": given.answer_column_name,
        "max_length": given.max_seq_length,
        "stride": given.doc_stride,
    }


if __name__ == "__main__":
    main("question-answering", QuestionArguments, columns)
