import dataclasses

import pytest
import tiny_models
import yaml
from hub_server import hub_server
from huggingface_hub import ModelCard

from hf_compress import DistillationConfig, PruningConfig, Recipe
from hf_compress.errors import ConfigError, ExportError
from hf_compress.export.card import naming_repository, write_card
from hf_compress.report.compare import compare
from hf_compress.report.results import Results

RECIPE = Recipe(pruning=PruningConfig(structures={"heads": 0.25}), distillation=DistillationConfig(alpha=0.7))


@pytest.fixture(scope="module")
def results() -> Results:
    table = compare(
        tiny_models.bert(), tiny_models.bert(intermediate_size=12), rounds=1, batch_sizes=(1,), length=5
    ).with_metric("accuracy (%)", {"dense": 84.5, "compressed": 83.254321})
    return Results(
        name="tiny compressed",
        model="compressed",
        base_model="me/tiny",
        auto_class="AutoModelForSequenceClassification",
        task="text-classification",
        dataset="some snippets",
        num_evaluation_examples=1234,
        license="apache-2.0",
        language="en",
        comparison=table.to_dict(),
        kept={"heads": [{"name": "layer.0.heads", "kept": 3, "total": 4}]},
        recipe=RECIPE.to_dict(),
        training={"seed": 5},
        checks=("the logits agree",),
    )


def test_the_hub_reads_the_metadata_back(results: Results, tmp_path) -> None:
    data = ModelCard.load(write_card(tmp_path, results)).data
    assert (data.base_model, data.base_model_relation) == ("me/tiny", "finetune")
    assert data.library_name == "transformers"
    assert data.language == "en"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["hf-compress", "model-compression", "pruning", "distillation"]
    (score,) = data.eval_results
    assert (score.metric_type, score.metric_value, score.dataset_name) == (
        "accuracy",
        83.2543,
        "some snippets",
    )
    assert (score.task_type, score.dataset_type, score.dataset_split) == ("text-classification", "local", "test")
    assert data.model_name == "tiny compressed"


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy (%)", "accuracy"),
        ("accuracy of words (%)", "accuracy"),
        ("macro F1 (%)", "f1"),
        ("exact match (%)", "exact_match"),
        ("BLEU", "bleu"),
        ("perplexity", "perplexity"),
        ("Novel score", "novel"),
    ],
)
def test_metrics_are_called_as_on_the_hub(results: Results, tmp_path, metric, expected) -> None:
    table = {**results.comparison, "metrics": {metric: {"dense": 2.0, "compressed": 1.5}}}
    (score,) = ModelCard.load(write_card(tmp_path, dataclasses.replace(results, comparison=table))).data.eval_results
    assert (score.metric_type, score.metric_name, score.metric_value) == (expected, metric, 1.5)


def test_the_hub_accepts_the_metadata(results: Results, tmp_path, monkeypatch) -> None:
    licensed = {"license": "other", "license_name": "llama", "license_link": "https://host/LICENSE"}
    changes = [{}, licensed, {"base_model_relation": "quantized"}, {"base_model_on_hub": False}, {"language": None}]
    with hub_server() as hub:
        hub.use(monkeypatch)
        for change in changes:
            card = ModelCard.load(write_card(tmp_path, dataclasses.replace(results, **change)))
            card.validate()
            assert all(card.data.get(name) == value for name, value in change.items() if name in licensed)
        with pytest.raises(ValueError, match="license"):
            ModelCard("---\nlicense: no such thing\n---\n").validate()


def test_the_card_holds_table_recipe_picture_and_checks(results: Results, tmp_path) -> None:
    text = write_card(tmp_path, results).read_text(encoding="utf-8")
    assert results.table().to_markdown() in text
    assert "![Units kept per layer](kept_units.png)" in text
    assert (tmp_path / "kept_units.png").stat().st_size > 1000
    assert "- the logits agree" in text
    assert "AutoModelForSequenceClassification.from_pretrained" in text
    assert "1,234 test examples" in text
    recipe = text.split("## Recipe\n\n```yaml\n")[1].split("```")[0]
    assert Recipe.from_dict(yaml.safe_load(recipe)) == RECIPE


def test_the_card_comes_from_results_json_alone(results: Results, tmp_path) -> None:
    first = write_card(tmp_path, results).read_bytes()
    (tmp_path / "README.md").write_text("---\ntags:\n- hf-compress\n---\nedited by hand", encoding="utf-8")
    (tmp_path / "kept_units.png").unlink()
    assert write_card(tmp_path).read_bytes() == first
    assert (tmp_path / "kept_units.png").exists()


def test_writing_again_changes_no_byte_of_any_file(results: Results, tmp_path) -> None:
    write_card(tmp_path, results)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_card(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"README.md", "results.json", "kept_units.png", "recipe.yaml"}
    assert Recipe.load(tmp_path / "recipe.yaml") == RECIPE


def test_a_card_that_somebody_wrote_is_not_replaced(results: Results, tmp_path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ntags:\n- mine\n---\n\n# My notes\n", encoding="utf-8")
    before = card.read_bytes()
    with pytest.raises(ExportError, match=r"README.md: is there already.*'hf-compress'.*add the tag"):
        write_card(tmp_path, results)
    assert card.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    card.write_text("---\ntags:\n- hf-compress\n---\n", encoding="utf-8")
    assert "## " in write_card(tmp_path, results).read_text(encoding="utf-8")


def test_the_card_says_with_what_it_was_made(results: Results, tmp_path) -> None:
    text = write_card(tmp_path, results).read_text(encoding="utf-8")
    measured_with = yaml.safe_load(text.split("## Measured with\n\n```yaml\n")[1].split("```")[0])
    assert measured_with == results.table().environment
    assert {"torch", "transformers", "cpu", "gpu"} <= set(measured_with)
    assert yaml.safe_load(text.split("## Training\n\n```yaml\n")[1].split("```")[0]) == {"seed": 5}


def test_the_example_names_the_repository_once_it_is_known(results: Results, tmp_path) -> None:
    text = write_card(tmp_path, results).read_text(encoding="utf-8")
    assert 'from_pretrained("me/small")' in naming_repository(text, "me/small")
    on_branch = naming_repository(text, "me/small", "int8")
    assert 'AutoModelForSequenceClassification.from_pretrained("me/small", revision="int8")' in on_branch
    example = on_branch.split("```python\n")[1].split("```")[0]
    compile(example, "card", "exec")
    assert naming_repository("no example", "me/small") == "no example"


def test_a_changed_number_changes_the_card(results: Results, tmp_path) -> None:
    before = write_card(tmp_path, results).read_text(encoding="utf-8")
    data = results.to_dict()
    data["comparison"] = {
        **data["comparison"],
        "metrics": {"accuracy (%)": {"dense": 84.5, "compressed": 61.0}},
    }
    after = write_card(tmp_path, Results.from_dict(data)).read_text(encoding="utf-8")
    assert "61.00 (-23.50)" in after
    assert "61.00" not in before


def test_models_and_data_from_disk_are_not_linked(results: Results, tmp_path) -> None:
    data = {**results.to_dict(), "base_model": "/home/me/bert", "base_model_on_hub": False}
    path = write_card(tmp_path, Results.from_dict(data))
    data = ModelCard.load(path).data
    assert (data.base_model, data.get("base_model_relation")) == (None, None)
    assert "huggingface.co/" not in path.read_text(encoding="utf-8")


def test_without_results_there_is_a_clear_error_and_nothing_is_written(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"no results\.json"):
        write_card(tmp_path)
    with pytest.raises(ExportError, match="no folder"):
        write_card(tmp_path / "missing")
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        write_card(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


HOSTILE = "a<img src=x onerror=alert(1)>[b](c) # d `e` *f*"


def test_names_are_shown_as_they_are(results: Results, tmp_path) -> None:
    named = dataclasses.replace(results, name=HOSTILE, base_model=HOSTILE, base_model_on_hub=False, dataset=HOSTILE)
    body = ModelCard.load(write_card(tmp_path, named)).text
    shown = r"a&lt;img src=x onerror=alert(1)&gt;\[b\](c) # d \`e\` \*f\*"
    title, summary, *_ = body.strip().split("\n\n")
    assert title == f"# {shown}"
    assert summary.count(shown) == 2
    assert "<img" not in body


@pytest.mark.parametrize(("kind", "variable"), [("AutoTokenizer", "tokenizer"), ("AutoImageProcessor", "processor")])
def test_the_example_loads_the_processor_as_well(results: Results, tmp_path, kind, variable) -> None:
    card = ModelCard.load(write_card(tmp_path, dataclasses.replace(results, processor_class=kind))).content
    named = naming_repository(card, "me/small", "int8")
    assert f"from transformers import AutoModelForSequenceClassification, {kind}\n" in named
    assert f'{variable} = {kind}.from_pretrained("me/small", revision="int8")' in named
    compile(named.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_card_promises_no_package_on_an_index(results: Results, tmp_path) -> None:
    card = ModelCard.load(write_card(tmp_path, dataclasses.replace(results, requires="hf-compress[int8]"))).content
    assert "It needs the package hf-compress (import hf_compress), installed with its extra int8." in card
    assert "pip install" not in card
