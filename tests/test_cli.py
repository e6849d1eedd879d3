import json
import runpy
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from hub_server import hub_server
from transformers import AutoModelForSequenceClassification

from hf_compress import cli, shrink
from hf_compress.commands import make_parser
from hf_compress.config import Recipe
from hf_compress.export.card import write_card
from hf_compress.report.compare import Comparison, compare
from hf_compress.report.results import Results

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_models.bert().save_pretrained(path)
    return str(path)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def config_only(folder: str, tmp_path) -> str:
    shutil.copy(Path(folder) / "config.json", tmp_path)
    return str(tmp_path)


def test_inspect_prints_a_line_for_each_kind_of_layer_and_a_summary(folder, capsys) -> None:
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0
    assert "bert.encoder.layer.{0..1}.ffn" in out
    assert len([line for line in out.splitlines() if line.startswith(("heads ", "ffn "))]) == 2
    assert out.splitlines()[-1].startswith("BertForSequenceClassification: ")
    code, out, _ = run(capsys, "inspect", folder, "--all")
    assert code == 0
    assert len([line for line in out.splitlines() if line.startswith(("heads ", "ffn "))]) == 4


def test_inspect_needs_no_weights_and_finds_the_same_with_them(folder, capsys, tmp_path) -> None:
    described = {}
    for path, options in ((config_only(folder, tmp_path), ()), (folder, ("--load-weights",))):
        code, out, _ = run(capsys, "inspect", path, "--json", *options)
        assert code == 0
        described[path] = json.loads(out)
        assert described[path].pop("seconds") >= 0
    first, second = described.values()
    assert first == second
    assert first["prunable"]["heads"]["units"] == 8


def test_inspect_one_kind(folder, capsys) -> None:
    code, out, _ = run(capsys, "inspect", folder, "--kind", "heads", "--all", "--json")
    assert code == 0
    assert [group["num_units"] for group in json.loads(out)["groups"]] == [4, 4]


def test_inspect_with_another_class(folder, capsys, tmp_path) -> None:
    for name in ("AutoModel", "BertModel"):
        code, out, _ = run(capsys, "inspect", config_only(folder, tmp_path), "--auto-class", name)
        assert code == 0
        assert "BertModel: " in out


def test_inspect_shows_the_sizes_of_a_compressed_model(capsys, tmp_path) -> None:
    small = shrink(tiny_models.bert(), {"bert.encoder.layer.0.ffn": torch.arange(44) < 20})
    small.save_pretrained(tmp_path / "small")
    for file in (tmp_path / "small").glob("*.safetensors"):
        file.unlink()
    code, out, _ = run(capsys, "inspect", str(tmp_path / "small"), "--kind", "ffn")
    assert code == 0
    units = [line.split()[2] for line in out.splitlines() if line.startswith("ffn ")]
    assert units == ["20", "44"]
    assert f"{small.num_parameters():,} parameters" in out
    assert "shrunk before" in out


def test_profile_in_words_and_as_json(folder, capsys) -> None:
    code, out, _ = run(capsys, "profile", folder, "--batch-size", "3", "--length", "7", "--no-latency", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["inputs"]["input_ids"] == [3, 7]
    assert found["latency_ms"] is None
    assert found["measured_bytes"] > found["bytes_on_disk"]
    code, out, _ = run(capsys, "profile", folder)
    assert code == 0
    assert f"{found['parameters']:,}" in out
    assert " ms " in out


def test_compare_in_every_format(folder, capsys) -> None:
    shared = ("compare", folder, folder, "--batch-sizes", "1", "--length", "5", "--rounds", "1")
    _, text, _ = run(capsys, *shared)
    _, markdown, _ = run(capsys, *shared, "--format", "markdown")
    _, data, _ = run(capsys, *shared, "--format", "json")
    assert "speed-up, batch 1" in text
    assert markdown.startswith("|  | dense | compressed |")
    assert list(Comparison.from_dict(json.loads(data)).profiles) == ["dense", "compressed"]


def test_export_writes_a_model_that_loads(folder, capsys, tmp_path) -> None:
    code, out, _ = run(capsys, "export", folder, str(tmp_path / "dense"), "--format", "dense", "--no-verify")
    assert code == 0
    assert "without a tokenizer" in out
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("tokenizer*"))


def test_export_replaces_no_model(folder, capsys, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    held = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    for source in (str(tmp_path / "mine"), folder):
        code, _, err = run(capsys, "export", source, str(tmp_path / "mine"), "--format", "dense", "--no-verify")
        assert code == 2
        assert "holds a model (config.json)" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == held


def test_push_uploads_a_folder(capsys, tmp_path, monkeypatch) -> None:
    tiny_models.bert().save_pretrained(tmp_path / "small")
    with hub_server() as hub:
        hub.use(monkeypatch)
        options = ("--private", "--revision", "int8", "--commit-message", "as text")
        code, out, _ = run(capsys, "push", str(tmp_path / "small"), "me-too", *options)
        (commit,) = hub.commits("tester/me-too", "int8")
        assert (code, commit.title) == (0, "as text")
        assert (
            out == f"me-too (int8) holds config.json, model.safetensors\n{hub.url}/tester/me-too/commit/{commit.oid}\n"
        )
        assert hub.repositories["tester/me-too"].private
        tiny_models.bert(num_hidden_layers=1).save_pretrained(tmp_path / "small")
        code, out, _ = run(capsys, "push", str(tmp_path / "small"), "tester/me-too", "--create-pr")
        assert code == 0
        assert out.startswith("the pull request holds config.json")
        assert out.endswith("/tester/me-too/discussions/1\n")
        run(capsys, "push", str(tmp_path / "small"), "me-too")
        code, out, _ = run(capsys, "push", str(tmp_path / "small"), "tester/me-too", "--create-pr")
        head = hub.commits("tester/me-too")[-1].oid
        said = "nothing to propose: tester/me-too holds the same files already"
        assert (code, out) == (0, f"{said}\n{hub.url}/tester/me-too/commit/{head}\n")
        code, _, err = run(capsys, "push", str(tmp_path / "small"), "other/model")
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'small'}: was not uploaded to other/model")


def test_the_help_of_push_says_what_every_option_does(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["push", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "DIRECTORY" in text.upper()
    for part in (
        "--private",
        "--revision",
        "--commit-message",
        "--create-pr",
        "hf auth login",
        "HF_TOKEN",
        "one commit",
    ):
        assert part in text


def test_every_command_of_the_parser_is_carried_out() -> None:
    commands = next(action.choices for action in make_parser()._actions if action.dest == "command")
    assert set(commands) == set(cli.COMMANDS)


def test_python_m_is_the_same_command(capsys, monkeypatch, tmp_path) -> None:
    expected = run(capsys, "card", str(tmp_path))
    assert expected[0] == 2
    monkeypatch.setattr("sys.argv", ["hf_compress", "card", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hf_compress", run_name="__main__")
    assert (ended.value.code, *capsys.readouterr()) == expected


def test_card_is_written_again(capsys, tmp_path) -> None:
    model = tiny_models.bert()
    table = compare(model, model, rounds=1, batch_sizes=(1,), length=5)
    results = Results(
        name="tiny", model="compressed", base_model="me/tiny", auto_class="AutoModel", task="feature-extraction",
        dataset="nothing", comparison=table.to_dict(), kept={}, recipe=Recipe.from_dict({"quantization": {}}).to_dict(),
    )  # fmt: skip
    first = write_card(tmp_path, results).read_bytes()
    (tmp_path / "README.md").unlink()
    code, out, _ = run(capsys, "card", str(tmp_path))
    assert code == 0
    assert "README.md" in out
    assert (tmp_path / "README.md").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("card", "{tmp}"), "no results.json"),
        (("inspect", "{tmp}/missing"), "cannot be loaded"),
        (("inspect", "{model}", "--kind", "head"), "closest match: 'heads'"),
        (("inspect", "{model}", "--auto-class", "LlamaModel"), "LlamaModel cannot be built from a BertConfig"),
        (("profile", "{model}", "--auto-class", "AutoModelForNothing"), "no class 'AutoModelForNothing'"),
        (("export", "{model}", "{tmp}/out", "--format", "torchoa"), "closest match: 'torchao'"),
        (
            ("export", "{model}", "{tmp}/out", "--format", "dense", "--exclude", "nothing-like-this"),
            "nothing-like-this",
        ),
    ],
)
def test_errors_are_one_message_and_exit_code_2(arguments, message, folder, capsys, tmp_path) -> None:
    filled = [argument.format(tmp=tmp_path, model=folder) for argument in arguments]
    code, out, err = run(capsys, *filled)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_errors_of_the_system_name_the_file(capsys, monkeypatch) -> None:
    def full(_: object) -> str:
        raise PermissionError(13, "Permission denied", "/here")

    monkeypatch.setitem(cli.COMMANDS, "card", full)
    code, _, err = run(capsys, "card", "x")
    assert (code, err) == (
        2,
        "error: /here: Permission denied. Name another file or folder, or mend its permissions.\n",
    )


def test_errors_of_the_system_without_a_file_are_faults_of_the_program(monkeypatch) -> None:
    def broken(_: object) -> str:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli.COMMANDS, "card", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["card", "x"])


def test_lengths_beyond_the_models_positions_are_refused(folder, capsys, tmp_path) -> None:
    for command in (("profile", folder, "--no-latency"), ("compare", folder, folder, "--rounds", "1")):
        code, out, err = run(capsys, *command, "--length", "100000")
        assert (code, out) == (2, "")
        assert "--length: got 100000; allowed: at most 40, the positions of this model." in err
    code, out, _ = run(capsys, "profile", folder, "--no-latency", "--json", "--length", "38")
    assert code == 0 and json.loads(out)["inputs"]["input_ids"] == [1, 38]
    tiny_models.bert(max_position_embeddings=8).save_pretrained(tmp_path)  # less than the default, which nobody gave
    code, out, _ = run(capsys, "profile", str(tmp_path), "--no-latency", "--json")
    assert code == 0 and json.loads(out)["inputs"]["input_ids"] == [1, 6]


def test_misspelled_commands_and_counts_end_with_usage(folder, capsys) -> None:
    for arguments in (("inspekt", folder), ("profile", folder, "--batch-size", "0"), ()):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert "usage: hf-compress" in capsys.readouterr().err


DAMAGES = {
    "hidden_size": "abc",
    "num_attention_heads": 0,
    "architectures": [3],
    "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
}


@pytest.mark.parametrize("field", DAMAGES)
def test_damaged_configs_are_one_message(field, folder, capsys, tmp_path) -> None:
    config = json.loads((Path(folder) / "config.json").read_text())
    if field == "auto_map":
        config["model_type"] = "unheard-of"
    (tmp_path / "config.json").write_text(json.dumps({**config, field: DAMAGES[field]}))
    code, _, err = run(capsys, "inspect", str(tmp_path))
    assert code == 2
    assert err.startswith(f"error: {tmp_path}") or "cannot be built from a BertConfig" in err


def test_truncated_weights_are_one_message(folder, capsys, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, _, err = run(capsys, "inspect", str(tmp_path / "cut"), "--load-weights")
    assert code == 2
    assert "cannot be loaded: SafetensorError" in err
