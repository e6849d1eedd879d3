"""Language models: texts that go on, and texts that become others."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)

from hf_compress.config import DatasetConfig
from hf_compress.errors import ConfigError
from hf_compress.metrics.table import load_metric
from hf_compress.recipe.labels import IGNORED, LABELS
from hf_compress.recipe.splits import Splits
from hf_compress.recipe.tasks.base import Evaluation, Task
from hf_compress.recipe.tasks.texts import Columns, TextEncoder, encode_texts, text_limit

BLEU = "BLEU"


class CausalLm(Task):
    """Texts that go on."""

    name = "causal-lm"
    hub_name = "text-generation"
    auto_class = AutoModelForCausalLM
    may_have_new_head = False

    def encode(self, splits: Splits, data: DatasetConfig, processor: Any, model_config: Any) -> Splits:
        """Tokenize texts; labels are the tokens themselves, which the model shifts."""
        encoder = TextEncoder(processor, data, text_limit(processor, model_config))
        (column,) = data.text_columns

        def rows(batch: Columns) -> Columns:
            encoded = processor(batch[column], **encoder.options())
            return {**encoded, LABELS: [list(ids) for ids in encoded["input_ids"]]}

        return _drop_short(encode_texts(splits, data, rows))

    def collator(self, processor: Any, model: PreTrainedModel) -> Callable[[Any], Any]:
        """Return what pads texts; an end-of-sequence token has a label, also where padding is done with it."""
        return DataCollatorForSeq2Seq(processor)

    def evaluate(self, model: PreTrainedModel, evaluation: Evaluation) -> dict[str, float]:
        """Return the perplexity of the next token."""
        with evaluation.outputs(model) as outputs:
            return {"perplexity": perplexity((found.logits[:, :-1], batch[LABELS][:, 1:]) for found, batch in outputs)}


class Seq2SeqLm(Task):
    """Texts that become others."""

    name = "seq2seq-lm"
    hub_name = "text2text-generation"
    auto_class = AutoModelForSeq2SeqLM
    trainer_class = Seq2SeqTrainer
    arguments_class = Seq2SeqTrainingArguments
    may_have_new_head = False

    def encode(self, splits: Splits, data: DatasetConfig, processor: Any, model_config: Any) -> Splits:
        """Tokenize texts, and the texts to write as labels."""
        encoder = TextEncoder(processor, data, text_limit(processor, model_config))
        (column,) = data.text_columns

        def rows(batch: Columns) -> Columns:
            encoded = processor([f"{data.prefix or ''}{text}" for text in batch[column]], **encoder.options())
            targets = processor(text_target=batch[str(data.target_column)], **encoder.options("max_target_length"))
            return {**encoded, LABELS: targets["input_ids"]}

        return encode_texts(splits, data, rows)

    def collator(self, processor: Any, model: PreTrainedModel) -> Callable[[Any], Any]:
        """Return what pads texts, and makes what the decoder reads of the labels."""
        return DataCollatorForSeq2Seq(processor, model=model)

    def trainer_options(self, processor: Any, splits: Splits, args: TrainingArguments) -> dict[str, Any]:
        """Return BLEU if the recipe has ``predict_with_generate``."""
        if not getattr(args, "predict_with_generate", False):
            return {}

        def compute_metrics(predicted: Any) -> dict[str, float]:
            return {"bleu": bleu(processor, predicted.predictions, predicted.label_ids)}

        return {"compute_metrics": compute_metrics}

    def evaluate(self, model: PreTrainedModel, evaluation: Evaluation) -> dict[str, float]:
        """Return the perplexity of the target's tokens, and BLEU if the recipe has ``predict_with_generate``."""
        with evaluation.outputs(model) as outputs:
            found = {"perplexity of targets": perplexity((each.logits, batch[LABELS]) for each, batch in outputs)}
        if getattr(evaluation.args, "predict_with_generate", False):
            found = {BLEU: self._bleu(model, evaluation), **found}
        return found

    def _bleu(self, model: PreTrainedModel, evaluation: Evaluation) -> float:
        args: Any = evaluation.args
        options = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
        options = {name: value for name, value in options.items() if value is not None}
        metric = load_metric("sacrebleu")
        model.eval().to(args.device)  # type: ignore[no-untyped-call]
        for batch in evaluation.on_device():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
            written = model.generate(**inputs, **options)  # type: ignore[operator]
            metric.add_batch(
                predictions=_texts(evaluation.processor, written),
                references=[[text] for text in _texts(evaluation.processor, batch[LABELS])],
            )
        model.to("cpu")  # type: ignore[arg-type]
        return float(metric.compute()["bleu"])


def bleu(processor: Any, predictions: Any, labels: Any) -> float:
    """Return the BLEU of token numbers."""
    texts, wanted = _texts(processor, predictions), _texts(processor, labels)
    return float(load_metric("sacrebleu").compute(predictions=texts, references=wanted)["bleu"])


def _texts(processor: Any, ids: Any) -> list[str]:
    rows = [[token for token in row if token != IGNORED] for row in ids.tolist()]
    return [text.strip() for text in processor.batch_decode(rows, skip_special_tokens=True)]


def perplexity(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the perplexity of labels, given the logits at their places, batch by batch."""
    metric = load_metric("perplexity")
    for logits, labels in pairs:
        flat = logits.reshape(-1, logits.shape[-1]).float()
        sums = nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")
        metric.add_batch(predictions=[float(sums)], references=[int((labels != IGNORED).sum())])
    return float(metric.compute()["perplexity"])


def _drop_short(splits: Splits) -> Splits:
    """Leave texts of one token out: a causal language model has nothing to predict in them."""
    notes = []

    def long_enough(part: Any, which: str) -> Any:
        long = [i for i, ids in enumerate(part["input_ids"]) if len(ids) > 1]
        if not long:
            raise ConfigError(f"dataset: no text of the {which} data has two tokens or more: nothing to learn.")
        if len(long) < len(part):
            notes.append(f"{len(part) - len(long):,} {which} examples of less than two tokens were left out")
        return part.select(long)

    parts = {which: long_enough(part, which) for which, part in splits.named().items()}
    return splits.with_parts(parts["training"], parts["evaluation"], notes)
