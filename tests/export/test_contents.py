import json

import pytest
import tiny_models
from trained_tokenizers import word_piece
from transformers import ViTImageProcessorPil

from hf_compress.errors import ExportError
from hf_compress.export.contents import contents_of, is_stale


@pytest.fixture
def folder(tmp_path):
    tiny_models.bert().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    tiny_models.bert().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_model_tokenizer_processor_card_and_what_a_run_writes_beside_them(folder) -> None:
    tokenizer = word_piece()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)
    for name in ("README.md", "results.json", "quantization.json", "recipe.yaml", "kept_units.png", "LICENSE"):
        (folder / name).write_text("text", encoding="utf-8")
    saved = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"tokenizer.json", "preprocessor_config.json", "additional_chat_templates/tools.jinja"} <= saved
    assert set(contents_of(folder).files) == saved
    assert contents_of(folder).unknown == ()


@pytest.mark.parametrize(
    "name",
    [
        *(
            "vocab.txt",
            "vocab.json",
            "merges.txt",
            "spiece.model",
            "sentencepiece.bpe.model",
            "source.spm",
            "bpe.codes",
        ),
        *(
            "target_vocab.json",
            "entity_vocab.json",
            "vocab-src.json",
            "normalizer.json",
            "emoji.json",
            "spm_char.model",
        ),
        *("processor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "special_tokens_map.json"),
    ],
)
def test_files_of_tokenizers_and_processors(folder, name) -> None:
    (folder / name).write_text("text", encoding="utf-8")
    assert name in contents_of(folder).files


def test_what_a_run_keeps_for_itself_stays_behind_and_what_is_unknown_is_named(folder) -> None:
    for name in ("checkpoint-10", "compressed.partial", "runs", ".cache", "notes"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"x")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "stage.json", ".env"):
        (folder / name).write_bytes(b"x")
    for name in ("hf_compress_state.json", "pytorch_model.bin", "secrets.txt", "model-00001-of-00002.safetensors"):
        (folder / name).write_bytes(b"x")
    (folder / "tokenizer.json").mkdir()
    found = contents_of(folder)
    assert found.files == ("config.json", "model.safetensors")
    expected = ("model-00001-of-00002.safetensors", "notes", "pytorch_model.bin", "secrets.txt", "tokenizer.json")
    assert found.unknown == expected


def test_the_shards_of_an_index(sharded) -> None:
    shards = {path.name for path in sharded.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert set(contents_of(sharded).files) == {"config.json", "model.safetensors.index.json", *shards}


def change_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_an_incomplete_index_is_an_error(sharded) -> None:
    change_index(sharded, lambda index: index["weight_map"].update(extra=max(index["weight_map"].values())))
    with pytest.raises(ExportError, match=r"lacks 'extra', which model\.safetensors\.index\.json says it has"):
        contents_of(sharded)
    min(sharded.glob("model-*.safetensors")).unlink()
    with pytest.raises(ExportError, match=r"model-00001.*cannot be read"):
        contents_of(sharded)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ExportError, match="no weight_map"):
        contents_of(sharded)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/model.safetensors", "passwords.txt"])
def test_an_index_cannot_name_other_files(sharded, name) -> None:
    (sharded.parent / "secret.safetensors").write_bytes((min(sharded.glob("model-*"))).read_bytes())
    change_index(sharded, lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], name)))
    with pytest.raises(ExportError, match="allowed: files of this folder"):
        contents_of(sharded)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_a_link_to_the_outside_is_refused(folder, name) -> None:
    target = folder.parent / "elsewhere"
    target.write_bytes((folder / name).read_bytes() if (folder / name).is_file() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(ExportError, match="outside of the folder"):
        contents_of(folder)


def test_a_folder_that_nobody_can_load_is_an_error(folder, tmp_path) -> None:
    with pytest.raises(ExportError, match="no folder"):
        contents_of(tmp_path / "missing")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(ExportError, match=r"model\.safetensors: cannot be read"):
        contents_of(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"but pytorch_model\.bin, which runs code"):
        contents_of(folder)
    weights.write_bytes(content)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ExportError, match="weights of two models"):
        contents_of(folder)
    (folder / "model.safetensors.index.json").unlink()
    for text, message in (("{", "cannot be read"), ("[]", "no JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ExportError, match=message):
            contents_of(folder)


def test_an_onnx_folder_needs_no_config(tmp_path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(b"x")
    assert contents_of(tmp_path).files == ("model.onnx", "model.onnx.data")


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("model.safetensors", ("model.safetensors.index.json",), True),
        ("model-00001-of-00003.safetensors", ("model-00001-of-00002.safetensors",), True),
        ("pytorch_model.bin", ("model.safetensors",), True),
        ("model.safetensors", ("model.safetensors",), False),
        ("model.safetensors", ("model.onnx",), False),
        ("model.onnx", ("model.safetensors",), False),
        ("model.onnx.data", ("model.onnx",), True),
        ("last-checkpoint/model.safetensors", ("model.safetensors.index.json",), False),
        ("notes.txt", ("model.safetensors",), False),
    ],
)
def test_weights_of_an_earlier_model_are_stale(name, files, expected) -> None:
    assert is_stale(name, files) is expected
