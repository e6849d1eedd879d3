"""Classes of texts, and of the words of a text."""

from collections.abc import Callable
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
)

from hf_compress.config import DatasetConfig
from hf_compress.errors import ConfigError
from hf_compress.metrics.table import load_metric
from hf_compress.recipe.labels import IGNORED, LABELS
from hf_compress.recipe.splits import Splits
from hf_compress.recipe.tasks.base import Evaluation, Task, best_class
from hf_compress.recipe.tasks.texts import Columns, TextEncoder, encode_texts, text_limit


def class_metrics(predictions: Any, labels: Any) -> dict[str, float]:
    """Return accuracy and macro F1, in [0, 1], of class numbers; positions without a label do not count."""
    valid = labels != IGNORED
    columns = {"predictions": predictions[valid], "references": labels[valid]}
    f1 = load_metric("f1").compute(**columns, average="macro")
    return {**load_metric("accuracy").compute(**columns), **f1}


class ClassificationTask(Task):
    """Chooses one of several classes."""

    has_classes = True
    accuracy = "accuracy (%)"

    def trainer_options(self, processor: Any, splits: Splits, args: TrainingArguments) -> dict[str, Any]:
        """Return the metrics that the Trainer computes."""
        return {
            "compute_metrics": lambda predicted: class_metrics(predicted.predictions, predicted.label_ids),
            "preprocess_logits_for_metrics": best_class,
        }

    def evaluate(self, model: PreTrainedModel, evaluation: Evaluation) -> dict[str, float]:
        """Return accuracy and macro F1."""
        accuracy, f1 = load_metric("accuracy"), load_metric("f1")
        with evaluation.outputs(model) as outputs:
            for found, batch in outputs:
                valid = batch[LABELS] != IGNORED
                columns = {
                    "predictions": found.logits.argmax(-1)[valid].cpu().numpy(),
                    "references": batch[LABELS][valid].cpu().numpy(),
                }
                accuracy.add_batch(**columns)
                f1.add_batch(**columns)
        return {
            self.accuracy: 100 * accuracy.compute()["accuracy"],
            "macro F1 (%)": 100 * f1.compute(average="macro")["f1"],
        }


class TextClassification(ClassificationTask):
    """The class of a text, or of a pair of texts."""

    name = hub_name = "text-classification"
    auto_class = AutoModelForSequenceClassification

    def encode(self, splits: Splits, data: DatasetConfig, processor: Any, model_config: Any) -> Splits:
        """Tokenize texts."""
        encoder = TextEncoder(processor, data, text_limit(processor, model_config))

        def rows(batch: Columns) -> Columns:
            texts = [batch[column] for column in data.text_columns]
            return {**processor(*texts, **encoder.options()), LABELS: batch[LABELS]}

        return encode_texts(splits, data, rows)

    def collator(self, processor: Any, model: PreTrainedModel) -> Callable[[Any], Any]:
        """Return what pads texts."""
        return DataCollatorWithPadding(processor)


class TokenClassification(ClassificationTask):
    """The class of every word."""

    name = hub_name = "token-classification"
    auto_class = AutoModelForTokenClassification
    accuracy = "accuracy of words (%)"

    def encode(self, splits: Splits, data: DatasetConfig, processor: Any, model_config: Any) -> Splits:
        """Tokenize words: the first token of a word has its label; the others, and special tokens, have none."""
        encoder = TextEncoder(processor, data, text_limit(processor, model_config))
        (column,) = data.text_columns

        def rows(batch: Columns) -> Columns:
            encoded = processor(batch[column], is_split_into_words=True, **encoder.options())
            labels = []
            for row, of_words in enumerate(batch[LABELS]):
                _check_words(batch[column][row], of_words, column)
                words = encoded.word_ids(row)
                firsts = [None if i and words[i - 1] == word else word for i, word in enumerate(words)]
                labels.append([IGNORED if word is None else of_words[word] for word in firsts])
            return {**encoded, LABELS: labels}

        return encode_texts(splits, data, rows, words=True)

    def collator(self, processor: Any, model: PreTrainedModel) -> Callable[[Any], Any]:
        """Return what pads texts and labels."""
        return DataCollatorForTokenClassification(processor)


def _check_words(words: Any, labels: Any, column: str) -> None:
    if len(labels) != len(words):
        raise ConfigError(
            f"dataset: {len(words)} words in {column!r} have {len(labels)} labels: {words[:5]}; there must be one for "
            "each word."
        )
