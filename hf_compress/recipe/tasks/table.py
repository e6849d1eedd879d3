"""All tasks by name."""

from hf_compress.recipe.tasks.base import Task
from hf_compress.recipe.tasks.classification import TextClassification, TokenClassification
from hf_compress.recipe.tasks.images import ImageClassification
from hf_compress.recipe.tasks.language import CausalLm, Seq2SeqLm
from hf_compress.recipe.tasks.questions import QuestionAnswering

TASKS_BY_NAME: dict[str, Task] = {
    task.name: task
    for task in (
        TextClassification(),
        TokenClassification(),
        QuestionAnswering(),
        ImageClassification(),
        CausalLm(),
        Seq2SeqLm(),
    )
}
"""One for each of ``hf_compress.config.TASKS``."""
