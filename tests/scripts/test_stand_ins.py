"""Stand-ins: what they make of packages' files, on files that were made up here."""

import gzip
import importlib
import json
import stat
import struct
import sys
import zlib
from pathlib import Path

import numpy
import pytest
import recipe_files
from datasets import load_from_disk
from transformers import AutoModelForImageClassification, T5ForConditionalGeneration

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Import a module of ``stand_ins`` by name; its cache is empty."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("HF_COMPRESS_CACHE", str(tmp_path / "cache"))
    return lambda name: importlib.import_module(f"stand_ins.{name}")


def program(folder: Path, name: str, lines: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{lines}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def debian_with(monkeypatch, tmp_path):
    """Programs in the place of Debian's, whose packages hold one file."""

    def prepare(file: str, content: bytes) -> None:
        folder = tmp_path / "bin"
        program(folder, "apt-get", "pathlib.Path(sys.argv[-1] + '_1_all.deb').write_text('')")
        unpack = f"path = pathlib.Path(sys.argv[3]) / {file!r}\n    path.parent.mkdir(parents=True)\n"
        unpack += f"    path.write_bytes({content!r})"
        program(folder, "dpkg-deb", f"if sys.argv[1] == '-x':\n    {unpack}\nelse:\n    print('1:2.3-4')")
        monkeypatch.setenv("PATH", str(folder))

    return prepare


# --- packages


def test_a_package_is_unpacked_with_its_version(stand_ins, debian_with) -> None:
    debian_with("usr/share/words", b"one")
    packages = stand_ins("packages")
    with packages.debian("words") as package:
        assert package.version == "1:2.3-4"
        assert [path.read_bytes() for path in package.find("share/words")] == [b"one"]
        with pytest.raises(packages.StandInError, match=r"words 1:2.3-4: holds no nothing"):
            package.find("nothing")
    assert not package.root.exists()


def test_what_a_package_manager_says_is_passed_on(stand_ins, tmp_path, monkeypatch) -> None:
    packages = stand_ins("packages")
    program(tmp_path / "bin", "apt-get", "sys.exit('E: Unable to locate package words')")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(packages.StandInError, match="Unable to locate package words"), packages.debian("words"):
        pass
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(packages.StandInError, match="need Debian"), packages.debian("words"):
        pass


def test_a_folder_is_made_once_or_not_at_all(stand_ins, tmp_path) -> None:
    packages = stand_ins("packages")
    target, calls = tmp_path / "a" / "b", []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "half").write_text("", encoding="utf-8")
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packages.made_once(target, make)
    assert not target.exists()
    assert packages.made_once(target, make) == packages.made_once(target, make) == target
    assert len(calls) == 2 and [path.name for path in target.iterdir()] == ["half"]


# --- WordNet


NOUNS = """  1 a line of the licence
00000010 03 n 01 animal 0 003 ~ 00000021 n 0000 ~ 00000022 n 0000 ~ 00000023 n 0000 | a living thing; "an animal ran"
00000021 03 n 01 dog 0 001 @ 00000010 n 0000 | it barks
00000022 03 n 01 house_cat 0 001 @ 00000010 n 0000 | it purrs; at home
00000023 03 n 01 cow 0 001 @ 00000010 n 0000 | it moos
00000041 03 n 01 tool 0 000 | a tool
00000042 03 n 01 saw 0 001 @ 00000041 n 0000 | a saw
00000043 03 n 01 axe 0 001 @ 00000041 n 0000 | a axe
00000044 03 n 01 file 0 001 @ 00000041 n 0000 | a file
00000031 03 n 01 stone 0 001 @ 00000099 n 0000 | without a family
"""


def test_relations_of_nouns(stand_ins, debian_with) -> None:
    debian_with("usr/share/wordnet/data.noun", NOUNS.encode())
    wordnet = stand_ins("wordnet")
    found = wordnet.relations(NOUNS)
    assert set(found["train"]["premise"]) <= {f"{tool}: a {tool}" for tool in ("tool", "saw", "axe", "file")}
    rows = {row["label"]: (row["premise"], row["hypothesis"]) for row in found["test"]}
    animal, dog, cat = "animal: a living thing", "dog: it barks", "house cat: it purrs"
    assert rows == {0: (dog, animal), 1: (animal, cat), 2: (cat, "cow: it moos")}
    train, test = wordnet.wordnet_pairs()
    assert (train.num_rows, test.num_rows) == (3, 3)
    assert test.features["label"].names == ["hypernym", "hyponym", "sibling"]
    sources = json.loads((wordnet.data_folder() / "sources.json").read_text(encoding="utf-8"))
    assert sources == {"wordnet-base": "1:2.3-4"}


def test_questions_have_their_answer_in_the_text(stand_ins, debian_with) -> None:
    debian_with("usr/share/wordnet/data.noun", NOUNS.encode())
    module = stand_ins("wordnet_questions")
    data = load_from_disk(str(module.data_folder()))
    assert {row["question"] for row in data["test"]} == {"Which of these is a kind of animal?"}
    assert {row["question"] for row in data["train"]} == {"Which of these is a kind of tool?"}
    for row, answer, other in ((data["test"][0], "dog", "a saw"), (data["train"][0], "saw", "it barks")):
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert text == answer and row["context"][start:].startswith(f"{answer}: ")
        assert other in row["context"], "a noun of another family"


# --- Fashion-MNIST


def idx(values: numpy.ndarray) -> bytes:
    return gzip.compress(
        bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )


def test_images_with_their_classes(stand_ins, tmp_path) -> None:
    fashion = stand_ins("fashion_mnist")
    pixels = numpy.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype="uint8")
    labels = numpy.array([0, 9, 3, 3, 1], dtype="uint8")
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    found = fashion.images_of(tmp_path)
    for split in ("train", "test"):
        assert found[split]["label"] == labels.tolist()
        assert all((numpy.asarray(row["image"]) == pixels[i]).all() for i, row in enumerate(found[split]))
    assert found["test"].features["label"].int2str(9) == "Ankle boot"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"PK\x03\x04 ", "starts with 504b0304"), (b"\0\0\x08\x01" + struct.pack(">I", 3) + b"ab", "but holds 2 values")],
)
def test_damaged_arrays(stand_ins, tmp_path, data, message) -> None:
    (tmp_path / "file.gz").write_bytes(gzip.compress(data))
    with pytest.raises(stand_ins("packages").StandInError, match=message):
        stand_ins("fashion_mnist").read_idx(tmp_path / "file.gz")


def test_a_dense_model_is_trained_as_a_recipe_trains(stand_ins, tmp_path) -> None:
    whole = recipe_files.images(tmp_path)
    start = Path(whole["model"])
    before = AutoModelForImageClassification.from_pretrained(start).state_dict()
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    stand_ins("training").train_dense(start, tmp_path / "dense", whole["task"], whole["dataset"], training)
    after = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert any((after.state_dict()[name] != tensor).any() for name, tensor in before.items())
    assert set(after.config.id2label.values()) == {"dark", "light"}
    facts = (tmp_path / "dense" / "training.yaml").read_text(encoding="utf-8")
    assert "optimizer_steps: 3" in facts and str(tmp_path) not in facts
    assert (tmp_path / "dense" / "preprocessor_config.json").is_file()


# --- gettext


@pytest.fixture
def gettext_pairs(stand_ins):
    pytest.importorskip("polib")
    return stand_ins("gettext_pairs")


@pytest.mark.parametrize("suffix", [".po", ".mo"])
def test_catalogues(gettext_pairs, tmp_path, suffix) -> None:
    polib = gettext_pairs.polib
    catalogue = polib.POFile()
    catalogue.append(polib.POEntry(msgid="_Open file", msgstr="_Deschide fi\u0219ierul"))
    catalogue.append(polib.POEntry(msgid="not done", msgstr=""))
    catalogue.append(polib.POEntry(msgid="not sure", msgstr="nesigur", flags=["fuzzy"]))
    forms = {0: "un fi\u0219ier", 1: "fi\u0219iere", 2: "de fi\u0219iere"}
    catalogue.append(polib.POEntry(msgid="one file", msgid_plural="more files", msgstr_plural=forms))
    path = tmp_path / f"catalogue{suffix}"
    catalogue.save(str(path)) if suffix == ".po" else catalogue.save_as_mofile(str(path))
    assert sorted(gettext_pairs.pairs_of(path)) == [
        ("_Open file", "_Deschide fi\u0219ierul"), ("more files", "de fi\u0219iere"), ("one file", "un fi\u0219ier"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target", "usable"),
    [
        ("open the file", "deschide fi\u0219ierul", True),
        ("open", "deschide", False),
        ("the same text", "the same text", False),
        ("read %s now", "cite\u0219te %s acum", False),
        ("see <b>this</b>", "vezi <b>asta</b>", False),
        ("two words", "mult prea multe cuvinte pentru atat", False),
    ],
)
def test_usable_pairs(gettext_pairs, source, target, usable) -> None:
    assert gettext_pairs.is_usable(source, target) is usable


def test_pairs_are_split_by_their_text(gettext_pairs) -> None:
    pairs = [(f"open _file {i}", f"deschide fi\u0219ierul {i}") for i in range(200)]
    found = gettext_pairs.split([*pairs, ("Open file 3", "alta cu totul")])
    texts = {name: {row["translation"]["en"] for row in part} for name, part in found.items()}
    assert texts["train"] | texts["test"] == {f"open file {i}" for i in range(200)}
    assert 0 < len(texts["test"]) < 30 and not texts["train"] & texts["test"]
    again = gettext_pairs.split(reversed(pairs))
    assert {row["translation"]["en"] for row in again["test"]} == texts["test"]


def test_an_untrained_translator(gettext_pairs, tmp_path) -> None:
    data = gettext_pairs.split((f"open the file {i}", f"deschide fi\u0219ierul {i}") for i in range(60))["train"]
    gettext_pairs.untrained(tmp_path, data)
    tokenizer = gettext_pairs.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer("deschide fi\u0219ierul")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "deschide fi\u0219ierul"
    model = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.shared.weight.std().item() == pytest.approx(gettext_pairs.EMBEDDING_STD, rel=0.1)
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id
    assert not model.config.scale_decoder_outputs


# --- SmolLM2's text


def module_of(texts: list[str]) -> tuple[bytes, bytes]:
    index = data = b""
    for text in texts:
        packed = zlib.compress(text.encode())
        index += struct.pack("<III", len(data), len(packed), len(text.encode()))
        data += packed
    return index, data


def test_texts_of_a_sword_module(stand_ins) -> None:
    smollm2 = stand_ins("smollm2")
    texts = [
        "<title>Heading</title>In the <w>beginning</w><note n='1'>or: at first</note> , God",
        "said \u201cno\u201d",
    ]
    found = list(smollm2.blocks(*module_of(texts)))
    assert found == texts
    assert smollm2.plain(found[0]) == "In the beginning, God"
    assert smollm2.plain("a &amp; b\0") == "a & b"


def test_damaged_modules(stand_ins) -> None:
    smollm2, packages = stand_ins("smollm2"), stand_ins("packages")
    index, data = module_of(["one text", "another text"])
    with pytest.raises(packages.StandInError, match="byte 0 cannot be decompressed"):
        list(smollm2.blocks(index, b"x" + data))
    with pytest.raises(packages.StandInError, match="not 99"):
        list(smollm2.blocks(index[:8] + struct.pack("<I", 99), data))


def test_the_end_of_each_text_is_for_tests(stand_ins, tmp_path) -> None:
    smollm2 = stand_ins("smollm2")
    texts = [" ".join(f"{letter}{i}" for i in range(2050)) for letter in "ab"]
    smollm2.split(texts).save_to_disk(tmp_path / "data")
    data = load_from_disk(str(tmp_path / "data"))
    assert (data["train"].num_rows, data["test"].num_rows) == (36, 4)
    assert {text.split()[0] for text in data["test"]["text"]} == {"a1800", "a1900", "b1800", "b1900"}
