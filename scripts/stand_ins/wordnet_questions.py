"""Questions about WordNet's nouns, whose answer is a word of a text: in the place of SQuAD."""

import random
from pathlib import Path
from typing import Any

import demo_data
from datasets import Dataset, DatasetDict

from stand_ins.wordnet import is_for_tests, made_of_nouns, nouns

EXPLAINED = 4
"""Nouns that a text explains."""

LIMITS = {"train": 8000, "test": 800}


def questions(table: str) -> DatasetDict:
    """Return rows as SQuAD has them: which of the nouns that a text explains is a kind of another noun?

    Only one of them is; the others are of other families. Families are whole in training or in test data.

    Args:
        table: The text of WordNet's ``data.noun``.
    """
    texts, families = nouns(table)
    generator = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    parents = [parent for parent in families if parent in texts]
    generator.shuffle(parents)
    for parent in parents:
        child = families[parent][0]
        others = generator.sample(parents, min(EXPLAINED, len(parents)))
        strangers = [families[other][0] for other in others if other != parent][: EXPLAINED - 1]
        strangers = [each for each in strangers if each not in families[parent]]
        if child in texts and strangers:
            part = rows["test" if is_for_tests(parent) else "train"]
            part.append(_row(texts[parent], texts[child], [texts[each] for each in strangers], generator))
    return DatasetDict({name: Dataset.from_list(part[: LIMITS[name]]) for name, part in rows.items()})


def _row(kind: str, answer: str, others: list[str], generator: random.Random) -> dict[str, Any]:
    """Return one question.

    Args:
        kind: Text of the noun that is asked about, ``"lemma: definition"``.
        answer: Text of the noun that is a kind of it.
        others: Texts of nouns that are not.
        generator: Says in which order the text explains them.
    """
    explained = [answer, *others]
    generator.shuffle(explained)
    context = ". ".join(explained)
    lemma = answer.partition(":")[0]
    start = sum(len(each) + 2 for each in explained[: explained.index(answer)])
    question = f"Which of these is a kind of {kind.partition(':')[0]}?"
    return {"question": question, "context": context, "answers": {"text": [lemma], "answer_start": [start]}}


def data_folder() -> Path:
    """Return the folder of the data, downloading WordNet 3.0 on first use.

    Raises:
        StandInError: If that fails.
    """
    return made_of_nouns("wordnet_questions", questions)


def model_folder() -> Path:
    """Return the folder of MiniLM as it was published; the recipe's first stage teaches it to answer.

    Raises:
        DemoDataError: If it cannot be downloaded.
    """
    return demo_data.model_folder()
