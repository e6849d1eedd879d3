"""Metrics against scikit-learn's definitions, counted by hand or brute force, and as modules of ``evaluate``."""

import math

import evaluate
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress import ConfigError, load_metric, profile
from hf_compress.metrics.answers import f1_of_words, normalized
from hf_compress.metrics.table import METRICS

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def f1_by_hand(pairs: list[tuple[int, int]], label: int) -> float:
    hits = sum(1 for given, wanted in pairs if given == wanted == label)
    precise = [given == wanted for given, wanted in pairs if given == label]
    recalled = [given == wanted for given, wanted in pairs if wanted == label]
    if not hits:
        return 0.0
    precision, recall = sum(precise) / len(precise), sum(recalled) / len(recalled)
    return 2 * precision * recall / (precision + recall)


@settings(max_examples=25, deadline=None)
@given(CLASSES)
def test_f1_and_accuracy_are_counted_right(pairs) -> None:
    columns = {"predictions": [each[0] for each in pairs], "references": [each[1] for each in pairs]}
    accuracy = sum(each == other for each, other in pairs) / len(pairs)
    assert load_metric("accuracy").compute(**columns)["accuracy"] == pytest.approx(accuracy)
    assert load_metric("f1").compute(**columns, pos_label=2)["f1"] == pytest.approx(f1_by_hand(pairs, 2))
    assert load_metric("f1").compute(**columns, average="micro")["f1"] == pytest.approx(accuracy)
    classes = sorted({label for pair in pairs for label in pair})
    ours = [f1_by_hand(pairs, each) for each in classes]
    assert load_metric("f1").compute(**columns, average="macro")["f1"] == pytest.approx(sum(ours) / len(ours))
    counts = [sum(wanted == each for _, wanted in pairs) for each in classes]
    weighted = sum(value * count for value, count in zip(ours, counts, strict=True)) / len(pairs)
    assert load_metric("f1").compute(**columns, average="weighted")["f1"] == pytest.approx(weighted)


def test_perplexity_is_that_of_a_uniform_guess() -> None:
    found = load_metric("perplexity").compute(predictions=[3 * math.log(7), 5 * math.log(7)], references=[3, 5])
    assert found["perplexity"] == pytest.approx(7)
    assert load_metric("perplexity").compute(predictions=[1e9], references=[1])["perplexity"] < math.inf
    with pytest.raises(ConfigError, match="no token"):
        load_metric("perplexity").compute(predictions=[0.0], references=[0])


def test_bleu_is_sacrebleus_own() -> None:
    from sacrebleu import corpus_bleu

    given = ["the cat sat on the mat", "a dog barks at night"]
    wanted = ["the cat sat on a mat", "the dog barks at night"]
    expected = corpus_bleu(given, [wanted]).score
    assert 0 < expected < 100
    assert load_metric("sacrebleu").compute(predictions=given, references=wanted)["bleu"] == pytest.approx(expected)
    nested = [[each] for each in wanted]
    assert load_metric("sacrebleu").compute(predictions=given, references=nested)["bleu"] == pytest.approx(expected)
    two = [[each, "something else"] for each in wanted]
    assert load_metric("sacrebleu").compute(predictions=given, references=two)["bleu"] >= expected
    with pytest.raises(ConfigError, match="equally many"):
        load_metric("sacrebleu").compute(predictions=given, references=[two[0], nested[0]])


@pytest.mark.parametrize(
    ("given", "wanted", "exact", "f1"),
    [
        ("The Eiffel tower!", ["eiffel tower"], 100, 100),
        ("tower in Paris", ["eiffel tower", "the tower of Paris"], 0, 200 / 3),
        ("", [], 100, 100),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
    ],
)
def test_answers_are_compared_as_words(given, wanted, exact, f1) -> None:
    found = load_metric("squad").compute(predictions=[given], references=[wanted])
    assert found == {"exact_match": pytest.approx(exact), "f1": pytest.approx(f1)}


def test_words_count_as_often_as_they_occur() -> None:
    assert normalized("A  man, a plan: the canal") == "man plan canal"
    assert f1_of_words("no no no", "no no yes") == pytest.approx(2 * 2 / 6)


def test_batches_add_up_and_modules_combine() -> None:
    metric = load_metric("accuracy")
    metric.add_batch(predictions=torch.tensor([1, 0]), references=torch.tensor([1, 1]))
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)
    both = evaluate.combine([load_metric("accuracy"), load_metric("f1")])
    assert both.compute(predictions=[1, 0], references=[1, 1]) == {
        "accuracy": pytest.approx(0.5),
        "f1": pytest.approx(2 / 3),
    }


def test_footprint_is_the_profile_of_each_model(tmp_path) -> None:
    models = [tiny_models.bert(), tiny_models.bert(num_hidden_layers=1)]
    folders = []
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        folders.append(str(tmp_path / str(number)))
    found = load_metric("footprint").compute(data=folders, length=8, latency=False)
    expected = [profile(model, latency=False).parameters for model in models]
    assert found["parameters"] == expected and found["flops"][0] > found["flops"][1] > 0
    assert found["latency_ms"] == [None, None]


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="closest match: 'sacrebleu'"):
        load_metric("sacreblue")
    with pytest.raises(ConfigError, match="macro"):
        load_metric("f1").compute(predictions=[1], references=[1], average="mean")
    assert all(METRICS[name]().info.description for name in METRICS)
