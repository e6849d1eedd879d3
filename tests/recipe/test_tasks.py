"""Images, questions and translations through a recipe; each task's answers against brute force."""

import itertools

import numpy
import pytest
import recipe_files
import torch
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
)

import hf_compress.recipe.measure as measuring
from hf_compress import ConfigError, Recipe, load_metric, run_recipe
from hf_compress.config import TASKS
from hf_compress.recipe.tasks.questions import MAX_ANSWER_TOKENS, Questions, best_span
from hf_compress.recipe.tasks.table import TASKS_BY_NAME
from hf_compress.recipe.trainer import make_trainer, prepare


@pytest.fixture(autouse=True)
def _measured_once(monkeypatch) -> None:
    full = measuring.compare
    monkeypatch.setattr(measuring, "compare", lambda *a, **k: full(*a, **{**k, "rounds": 1, "batch_sizes": (1,)}))


def test_every_task_of_recipes_is_there() -> None:
    assert tuple(TASKS_BY_NAME) == TASKS


@pytest.mark.parametrize("channels", [3, 1])
def test_images_from_a_folder_to_a_saved_model(channels, tmp_path) -> None:
    result = run_recipe(Recipe.from_dict(recipe_files.images(tmp_path, channels)))
    assert result.comparison.metrics["accuracy (%)"]["compressed"] == pytest.approx(
        100 * result.metrics["eval_accuracy"]
    )
    assert result.comparison.metrics["accuracy (%)"]["compressed"] == 100, "light and dark are easily told apart"
    small = AutoModelForImageClassification.from_pretrained(result.folders["compressed"])
    assert small.config.id2label == {0: "dark", 1: "light"}
    processor = AutoImageProcessor.from_pretrained(result.folders["compressed"])
    mode = "RGB" if channels == 3 else "L"
    picture = Image.open(tmp_path / "images" / "test" / "light" / "19.png").convert(mode)
    assert small(**processor(picture, return_tensors="pt")).logits.argmax() == 1
    assert result.comparison.profiles["compressed"].parameters < result.comparison.profiles["dense"].parameters


def test_flips_are_in_training_alone(tmp_path) -> None:
    recipe = recipe_files.images(tmp_path)
    plain = prepare(Recipe.from_dict(recipe), tmp_path / "a")
    flipped = prepare(Recipe.from_dict({**recipe, "dataset": {**recipe["dataset"], "flip": True}}), tmp_path / "b")
    assert torch.equal(plain.splits.evaluation[0]["pixel_values"], flipped.splits.evaluation[0]["pixel_values"])
    one = plain.splits.train[0]["pixel_values"]
    found = [flipped.splits.train[0]["pixel_values"] for _ in range(20)]
    kinds = {
        0 if torch.equal(each, one) else 1 if torch.allclose(each, one.flip(-1), atol=0.05) else 2 for each in found
    }
    assert kinds == {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"text_columns": ["a"]}, "none for image-classification"),
        ({"max_length": 4}, "dataset.max_length"),
        ({"stride": 4}, "dataset.stride"),
        ({"image_column": "label"}, "no column 'label'"),
        ({"path": "labels.csv", "image_column": "name"}, "holds Value.*images are needed"),
    ],
)
def test_settings_that_images_have_no_use_for(change, message, tmp_path, monkeypatch) -> None:
    recipe = recipe_files.images(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe_files.write_csv(tmp_path / "labels.csv", [{"name": "a.png", "label": "light"}] * 4)
    recipe["dataset"] |= change
    with pytest.raises(ConfigError, match=message):
        run_recipe(Recipe.from_dict(recipe))


@pytest.mark.parametrize("unanswerable", [False, True])
def test_questions_from_a_file_to_a_saved_model(unanswerable, tmp_path) -> None:
    recipe = recipe_files.questions(tmp_path, unanswerable)
    result = run_recipe(Recipe.from_dict(recipe))
    assert result.comparison.metrics["F1 (%)"]["compressed"] == pytest.approx(result.metrics["eval_f1"])
    assert result.comparison.metrics["exact match (%)"].keys() == {"dense", "compressed"}
    small = AutoModelForQuestionAnswering.from_pretrained(result.folders["compressed"])
    tokenizer = AutoTokenizer.from_pretrained(result.folders["compressed"])
    encoded = tokenizer("which", recipe_files.SENTENCES[0], return_tensors="pt")
    assert small(**encoded).start_logits.shape == encoded["input_ids"].shape


def test_labels_are_the_tokens_of_the_answer(tmp_path) -> None:
    prepared = prepare(Recipe.from_dict(recipe_files.questions(tmp_path)), tmp_path / "checkpoints")
    rows = prepared.splits.train
    assert len(rows) > 18, "contexts have several parts"
    found = 0
    for row in rows:
        start, end = row["start_positions"], row["end_positions"]
        if start == end == 0:
            continue
        found += 1
        text = prepared.processor.decode(row["input_ids"][start : end + 1])
        context = prepared.processor.decode(row["input_ids"])
        assert text and text.replace(" ", "") in context.replace(" ", "")
        assert prepared.processor.decode(row["input_ids"][end + 1 :]).strip(), "an answer is the last word but one"
    assert found >= 18, "every answer is in some part"


def test_right_answers_score_full_marks(tmp_path) -> None:
    """Logits that point at the labels, with padding behind them, and none where a part has no answer."""
    prepared = prepare(Recipe.from_dict(recipe_files.questions(tmp_path, unanswerable=True)), tmp_path / "checkpoints")
    rows, asked = prepared.splits.evaluation, prepared.splits.references
    logits = numpy.full((2, len(rows), 40), -100.0)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        logits[:, number, :length] = 0.0
        strength = 5.0 if row["start_positions"] else 1.0
        logits[0, number, row["start_positions"]] = logits[1, number, row["end_positions"]] = strength
    assert asked.score(*logits) == {"exact_match": 100, "f1": 100}
    assert any(not each for each in asked.answers), "some have none"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_the_best_span_is_that_of_brute_force(seed, length) -> None:
    generator = numpy.random.default_rng(seed)
    start, end = generator.normal(size=(2, length))
    offsets = [None if generator.random() < 0.3 else (3 * i, 3 * i + 2) for i in range(length)]
    pairs = itertools.product(range(length), repeat=2)
    valid = [(a, b) for a, b in pairs if offsets[a] and offsets[b] and a <= b < a + MAX_ANSWER_TOKENS]
    score, span = best_span(start, end, offsets)
    if not valid:
        assert span is None
        return
    a, b = max(valid, key=lambda pair: start[pair[0]] + end[pair[1]])
    assert score == pytest.approx(start[a] + end[b]) and span == (offsets[a][0], offsets[b][1])


def test_the_best_part_of_a_context_answers() -> None:
    asked = Questions(["one two three"], [["two"]], [0, 0], [[None, (0, 3), (4, 7)], [None, (4, 7), (8, 13)]])
    first, second = [0.0, 1.0, 0.5], [0.0, 3.0, 0.5]
    assert asked.answer([first, second], [first, second]) == ["two"]
    assert asked.answer([second, first], [second, first]) == ["one"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_columns": ["question"]}, "two columns"),
        ({"max_length": 12, "stride": 11}, "do not fit in 12 tokens"),
        ({"label_column": "question"}, "answers as in SQuAD"),
    ],
)
def test_questions_that_cannot_be_asked(change, message, tmp_path) -> None:
    recipe = recipe_files.questions(tmp_path)
    recipe["dataset"] |= change
    with pytest.raises(ConfigError, match=message):
        run_recipe(Recipe.from_dict(recipe))


def test_translations_are_scored_by_bleu(tmp_path) -> None:
    training = {"predict_with_generate": True, "generation_max_length": 12, "generation_num_beams": 2}
    recipe = Recipe.from_dict(recipe_files.translation(tmp_path, **training))
    result = run_recipe(recipe)
    assert list(result.comparison.metrics) == ["BLEU", "perplexity of targets"]
    assert result.comparison.metrics["BLEU"]["compressed"] == pytest.approx(result.metrics["eval_bleu"])
    prepared = prepare(recipe, tmp_path / "again")
    text = prepared.processor.decode(prepared.splits.train[0]["input_ids"], skip_special_tokens=True)
    assert text.startswith("translate")
    model, rows = prepared.student.model.eval(), load_from_disk(str(tmp_path / "wmt"))["validation"].flatten()
    written = []
    for row in rows:
        text = f"translate: {row['translation.en']}"
        inputs = prepared.processor(text, return_tensors="pt", truncation=True, max_length=24)
        ids = model.generate(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, max_length=12, num_beams=2)
        written.append(prepared.processor.decode(ids[0], skip_special_tokens=True).strip())
    expected = load_metric("sacrebleu").compute(predictions=written, references=list(rows["translation.ro"]))["bleu"]
    assert result.comparison.metrics["BLEU"]["dense"] == pytest.approx(expected)


def test_without_generation_nothing_is_predicted(tmp_path) -> None:
    prepared = prepare(Recipe.from_dict(recipe_files.translation(tmp_path)), tmp_path / "checkpoints")
    assert make_trainer(prepared, []).compute_metrics is None
    assert run_recipe(prepared.recipe).comparison.metrics.keys() == {"perplexity of targets"}


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [("text-classification", "prefix", "a"), ("causal-lm", "image_column", "a"), ("causal-lm", "flip", True)],
)
def test_settings_of_other_tasks_are_refused(task, field, value) -> None:
    with pytest.raises(ConfigError, match=f"dataset.{field}"):
        Recipe.from_dict({"task": task, "dataset": {"path": "x", field: value}, "pruning": recipe_files.PRUNING})
