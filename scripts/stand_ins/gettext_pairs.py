"""English and Romanian texts of programs' catalogues: in the place of WMT16's news."""

import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import demo_data
import polib
import torch
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk
from demo_data import Package
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from stand_ins.packages import debian, folder_of, made_once, save_data
from stand_ins.training import train_dense

PACKAGES = (
    "libreoffice-l10n-ro", "gimp-data", "vlc-l10n", "gnucash-common", "gnome-control-center-data", "aptitude-common",
    "iso-codes",
)  # fmt: skip
DJANGO = Package(
    "django==5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    source=False,
)
TARGET = "ro"
FEATURES = Features({"translation": {"en": Value("string"), TARGET: Value("string")}})
COLUMNS = {
    "text_columns": ["translation.en"],
    "target_column": f"translation.{TARGET}",
    "prefix": "translate English to Romanian: ",
    "max_length": 40,
    "max_target_length": 40,
}
ACCELERATOR = re.compile(r"[_~&](?=\w)")
"""What marks the letter of a keyboard shortcut."""

CODE = re.compile(r"[<>{}%\\|=_~&]|://")
"""Markup, places to be filled in, and what only programs read."""

WORDS = (2, 25)
"""Words of a text, at least and at most."""

MAX_RATIO = 2.0
"""Between the words of a text and of its translation."""

TEST_SHARE = 20
"""One pair in this many is a test pair."""

VOCABULARY = 4000
EMBEDDING_STD = 0.05


def pairs_of(path: Path) -> Iterator[tuple[str, str]]:
    """Return the finished translations of a .mo or .po file, plural forms included."""
    entries = polib.mofile(str(path)) if path.suffix == ".mo" else polib.pofile(str(path)).translated_entries()
    for entry in entries:
        if entry.msgid_plural:
            forms = entry.msgstr_plural
            yield entry.msgid, forms[min(forms)]
            yield entry.msgid_plural, forms[max(forms)]
        else:
            yield entry.msgid, entry.msgstr


def cleaned(text: str) -> str:
    """Return a text without the mark of its keyboard shortcut and without double spaces."""
    return " ".join(ACCELERATOR.sub("", text, count=1).split())


def is_usable(source: str, target: str) -> bool:
    """Return whether a pair is two texts of people's languages, and one translates the other."""
    lengths = sorted((len(source.split()), len(target.split())))
    return (
        source != target
        and not CODE.search(source + target)
        and lengths[0] >= WORDS[0]
        and lengths[1] <= WORDS[1]
        and lengths[1] <= MAX_RATIO * lengths[0]
    )


def split(pairs: Iterable[tuple[str, str]]) -> DatasetDict:
    """Return usable pairs, each English text once; its own letters say whether it is a test pair."""
    found: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        source, target = map(cleaned, pair)
        if is_usable(source, target):
            found.setdefault(source.lower(), (source, target))
    parts: dict[str, list[dict[str, object]]] = {"train": [], "test": []}
    for key, (source, target) in found.items():
        digest = int(hashlib.sha256(key.encode()).hexdigest(), 16)
        parts["test" if digest % TEST_SHARE == 0 else "train"].append({"translation": {"en": source, TARGET: target}})
    return DatasetDict(
        {name: Dataset.from_list(rows, features=FEATURES).shuffle(seed=0) for name, rows in parts.items()}
    )


def data_folder() -> Path:
    """Return the folder of the data, downloading the catalogues on first use.

    Raises:
        DemoDataError: If that fails.
    """

    def make(folder: Path) -> None:
        pairs, sources = _django(), {"django": DJANGO.requirement.rpartition("=")[2]}
        for name in PACKAGES:
            with debian(name) as package:
                catalogues = package.find(f"{TARGET}/LC_MESSAGES/*.mo")
                pairs += [pair for path in catalogues for pair in pairs_of(path)]
                sources[name] = package.version
        save_data(split(pairs), folder, sources)

    return made_once(folder_of("gettext") / "data", make)


def _django() -> list[tuple[str, str]]:
    wheel = demo_data.download(DJANGO)
    found = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(f"/{TARGET}/LC_MESSAGES/django.mo"):
                path = wheel.with_name("django.mo")
                path.write_bytes(archive.read(name))
                found += pairs_of(path)
                path.unlink()
    wheel.unlink()
    return found


def trained_tokenizer(texts: Iterable[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that ends texts as T5 does."""
    pad, end = "<pad>", "</s>"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[pad, end], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=end)


def untrained(folder: Path, data: Dataset) -> None:
    """Save a small T5 with random weights, and a tokenizer trained on the data."""
    texts = [text for row in data["translation"] for text in row.values()]
    tokenizer = trained_tokenizer([COLUMNS["prefix"], *texts])
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=192, d_kv=24, num_heads=8, d_ff=512, num_layers=3, num_decoder_layers=3,
        dropout_rate=0.1, tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    # T5's own embeddings, of standard deviation 1, and its logits that are scaled down suit its long pretraining: in a
    # few minutes the loss would stay near that of the tokens' frequencies. False does not untie T5, it scales nothing.
    torch.nn.init.normal_(model.shared.weight, std=EMBEDDING_STD)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_folder() -> Path:
    """Return the folder of a small T5, trained on the data on first use.

    Raises:
        DemoDataError: If the data cannot be downloaded.
    """

    def make(folder: Path) -> None:
        source = data_folder()
        untrained(folder, load_from_disk(str(source))["train"])
        training = {
            "max_steps": 3000, "per_device_train_batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 150,
            "weight_decay": 0.01, "lr_scheduler_type": "cosine", "train_sampling_strategy": "group_by_length",
        }  # fmt: skip
        train_dense(folder, folder, "seq2seq-lm", {"path": str(source), **COLUMNS}, training)

    return made_once(folder_of("gettext") / "model", make)
