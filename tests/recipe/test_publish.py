"""Runs whose recipe names a repository on the Hub."""

import json
import shlex

import huggingface_hub
import pytest
import recipe_files
from hub_server import HANG_UP, HubServer, hub_server

import hf_compress.recipe.measure as measure
from hf_compress import ConfigError, ExportError, Recipe, cli, run_recipe
from hf_compress.report.results import Results


@pytest.fixture
def hub(monkeypatch):
    full = measure.compare
    monkeypatch.setattr(measure, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))
    with hub_server() as hub:
        hub.use(monkeypatch)
        yield hub


def uploads(hub: HubServer) -> int:
    return sum("/commit/" in request for request in hub.requests)


def test_the_compressed_model_and_the_exported_one_are_uploaded(hub, tmp_path) -> None:
    recipe = recipe_files.classification(tmp_path, export="dense", hub_model_id="reviews", hub_private=True)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    result = run_recipe(Recipe.from_dict(recipe))
    assert hub.repositories["tester/reviews"].private
    assert uploads(hub) == 2
    for name, branch in (("compressed", "main"), ("compressed-dense", "dense")):
        sent = hub.files("tester/reviews", branch)
        weights = tmp_path / "out" / name / "model.safetensors"
        assert sent["model.safetensors"] == weights.read_bytes()
        assert {"README.md", "results.json", "recipe.yaml", "kept_units.png", "tokenizer.json"} <= set(sent)
        assert "stage.json" not in sent
        assert b'"tester/reviews"' in sent["README.md"]
        assert f"{name} is on the Hub: {hub.url}/tester/reviews/commit/" in str(result)
        results = Results.load(tmp_path / "out" / name / "results.json")
        assert (results.license, results.training["seed"]) == ("mit", 0)
        assert results.base_model_relation == ("finetune" if name == "compressed" else "quantized")


def test_a_push_that_fails_leaves_the_result_and_says_how_to_push_it(hub, tmp_path, capsys) -> None:
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, hub_model_id="tester/reviews"))
    hub.faults.append((r"POST .*/commit/main", 500))
    with pytest.raises(ExportError, match=r"the run is complete and saved in .*Try again: (.*)") as caught:
        run_recipe(recipe)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["comparison"]
    assert run_recipe(recipe, resume=True).comparison is not None
    assert hub.commits("tester/reviews") == []
    command = shlex.split(str(caught.value).split("Try again: ")[1])
    assert command[0] == "hf-compress"
    assert cli.main(command[1:]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert "model.safetensors" in hub.files("tester/reviews")


def test_the_other_model_is_uploaded_all_the_same(hub, tmp_path) -> None:
    recipe = recipe_files.classification(tmp_path, export="dense", hub_model_id="tester/reviews")
    hub.faults.append((r"POST .*/commit/main", HANG_UP))
    with pytest.raises(ExportError, match="the run is complete") as caught:
        run_recipe(Recipe.from_dict(recipe))
    assert "model.safetensors" in hub.files("tester/reviews", "dense")
    assert str(caught.value).count("Try again") == 1


def test_without_a_name_nothing_is_sent(hub, tmp_path) -> None:
    run_recipe(Recipe.from_dict(recipe_files.classification(tmp_path)))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hub_model_id": "a/b/c"}, r"Recipe\.hub_model_id: got 'a/b/c'; allowed: 'name' or 'owner/name'"),
        ({"hub_model_id": ""}, r"Recipe\.hub_model_id: got ''"),
        ({"hub_model_id": 3}, r"Recipe\.hub_model_id: got 3"),
        ({"hub_private": True}, r"Recipe\.hub_private: got True; allowed: False without hub_model_id"),
        ({"hub_model_id": "a", "hub_private": "yes"}, r"Recipe\.hub_private: got 'yes'"),
    ],
)
def test_names_that_cannot_be_are_refused_before_training(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({"pruning": {"structures": {"heads": 0.5}}, **fields})


@pytest.mark.parametrize("name", ["push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "hub_token"])
def test_arguments_with_which_a_trainer_would_upload_dense_weights_are_refused(name) -> None:
    remedy = "HF_TOKEN" if name == "hub_token" else "Set the recipe's hub_model_id"
    for fields in (
        {"pruning": {"structures": {"heads": 0.5}}, "training": {name: True}},
        {"stages": [{"pruning": {"structures": {"heads": 0.5}}, "training": {name: True}}]},
    ):
        with pytest.raises(ConfigError, match=f"{name}.*{remedy}"):
            Recipe.from_dict(fields)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("reason", ["HF_HUB_OFFLINE is set", "there is no token"])
def test_an_upload_that_cannot_be_is_refused_before_training(hub, tmp_path, monkeypatch, reason, dry_run) -> None:
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, hub_model_id="tester/reviews"))
    if "token" in reason:
        monkeypatch.setattr("hf_compress.recipe.publish.get_token", lambda: None)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"{reason}.*hf-compress push .*out/compressed tester/reviews$") as caught:
        run_recipe(recipe, dry_run=dry_run)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and hub.requests == []


def test_a_dry_run_sends_nothing(hub, tmp_path) -> None:
    recipe = Recipe.from_dict(recipe_files.classification(tmp_path, hub_model_id="tester/reviews"))
    assert run_recipe(recipe, dry_run=True).preview is not None
    assert hub.requests == []
