"""Relations of WordNet's nouns, three classes of pairs of texts: in the place of MNLI."""

import re
from collections.abc import Callable
from pathlib import Path

import demo_data
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_from_disk

from stand_ins.packages import debian, folder_of, made_once, save_data
from stand_ins.training import train_dense

PACKAGE = "wordnet-base"
FEATURES = Features(
    {
        "premise": Value("string"),
        "hypothesis": Value("string"),
        "label": ClassLabel(names=["hypernym", "hyponym", "sibling"]),
    }
)
COLUMNS = {"text_columns": ["premise", "hypothesis"], "max_length": 48}


def nouns(table: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the text of every noun, ``"lemma: definition"``, and the hyponyms of each, by WordNet's numbers.

    Args:
        table: The text of WordNet's ``data.noun``.
    """
    texts: dict[str, str] = {}
    families: dict[str, list[str]] = {}
    for line in table.splitlines():
        fields, _, gloss = line.partition(" | ")
        words = fields.split()
        if not gloss or not words[0].isdigit():
            continue
        lemma = words[4].replace("_", " ")
        texts[words[0]] = f"{lemma}: {gloss.split(';')[0].strip()}"
        for parent in re.findall(r" @ (\d{8}) n", fields):
            families.setdefault(parent, []).append(words[0])
    return texts, families


def is_for_tests(parent: str) -> bool:
    """Return whether the family of a noun is in the test data."""
    return int(parent) % 10 == 0


def relations(table: str) -> DatasetDict:
    """Return pairs of noun definitions: 0 the second is the first's hypernym, 1 the reverse, 2 they share one.

    Families of hyponyms are whole in training or in test data.

    Args:
        table: The text of WordNet's ``data.noun``.
    """
    texts, families = nouns(table)
    train, test = [], []
    for parent, children in families.items():
        if parent not in texts or len(children) < 3:
            continue
        rows = [(children[0], parent, 0), (parent, children[1], 1), (children[1], children[2], 2)]
        mine = [{"premise": texts[a], "hypothesis": texts[b], "label": label} for a, b, label in rows]
        (test if is_for_tests(parent) else train).extend(mine)
    parts = {"train": (train, 0), "test": (test, 1)}
    return DatasetDict(
        {name: Dataset.from_list(rows, features=FEATURES).shuffle(seed=seed) for name, (rows, seed) in parts.items()}
    )


def data_folder() -> Path:
    """Return the folder of the data, downloading WordNet 3.0 on first use.

    Raises:
        StandInError: If that fails.
    """
    return made_of_nouns("wordnet", relations)


def made_of_nouns(name: str, make_data: Callable[[str], DatasetDict]) -> Path:
    """Return the folder of data that are made of WordNet's nouns, on first use.

    Args:
        name: Of the stand-in's folder.
        make_data: What makes them of the text of ``data.noun``.

    Raises:
        StandInError: If WordNet cannot be downloaded.
    """

    def make(folder: Path) -> None:
        with debian(PACKAGE) as package:
            table = package.find("data.noun")[0].read_text(encoding="utf-8")
            save_data(make_data(table), folder, {PACKAGE: package.version})

    return made_once(folder_of(name) / "data", make)


def wordnet_pairs() -> tuple[Dataset, Dataset]:
    """Return training and test data with ``premise``, ``hypothesis`` and ``label``.

    Raises:
        StandInError: If they cannot be downloaded.
    """
    data = load_from_disk(str(data_folder()))
    return data["train"], data["test"]


def model_folder() -> Path:
    """Return the folder of MiniLM, fine-tuned on the data on first use.

    Raises:
        DemoDataError: If anything cannot be downloaded.
    """

    def make(folder: Path) -> None:
        data = {"path": str(data_folder()), **COLUMNS}
        training = {
            "max_steps": 1200, "per_device_train_batch_size": 16, "learning_rate": 1e-4, "warmup_steps": 60,
            "weight_decay": 0.01, "train_sampling_strategy": "group_by_length",
        }  # fmt: skip
        train_dense(demo_data.model_folder(), folder, "text-classification", data, training)

    return made_once(folder_of("wordnet") / "model", make)
