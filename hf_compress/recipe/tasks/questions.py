"""Answers that are parts of a text, as in SQuAD: long contexts are read in parts that overlap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_compress.config import DatasetConfig
from hf_compress.config.tasks import TASK_COLUMNS
from hf_compress.errors import ConfigError
from hf_compress.metrics.table import load_metric
from hf_compress.recipe.splits import Splits, drop_incomplete
from hf_compress.recipe.tasks.base import Evaluation, Task
from hf_compress.recipe.tasks.texts import TextEncoder, text_limit

MAX_ANSWER_TOKENS = 30
NUM_CANDIDATES = 20
"""So many starts and ends are combined with each other."""

CONTEXT = 1
"""The context is the second of the two texts."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Questions:
    """Evaluation data: what the parts of all contexts belong to, and the right answers."""

    contexts: Sequence[str]
    answers: Sequence[Sequence[str]]
    """By question; none where the text has no answer."""

    owners: Sequence[int]
    """By part: the number of its question."""

    offsets: Sequence[Sequence[Span | None]]
    """By part and token: the characters of the context, None for tokens of anything else."""

    def answer(self, starts: Any, ends: Any) -> list[str]:
        """Return the best answer to each question, "" for none.

        Args:
            starts: [parts, tokens], logits of an answer's first token; padding may follow.
            ends: The same for its last token.
        """
        best: list[tuple[float, str]] = [(-numpy.inf, "")] * len(self.contexts)
        nothing = numpy.full(len(self.contexts), numpy.inf)
        for part, (owner, offsets) in enumerate(zip(self.owners, self.offsets, strict=True)):
            start, end = (numpy.asarray(logits[part][: len(offsets)], dtype="float64") for logits in (starts, ends))
            nothing[owner] = min(nothing[owner], start[0] + end[0])
            score, span = best_span(start, end, offsets)
            if span is not None and score > best[owner][0]:
                best[owner] = (score, self.contexts[owner][span[0] : span[1]])
        may_lack = not all(self.answers)
        return ["" if may_lack and nothing[owner] > score else text for owner, (score, text) in enumerate(best)]

    def score(self, starts: Any, ends: Any) -> dict[str, float]:
        """Return ``exact_match`` and ``f1`` in percent."""
        found: dict[str, float] = load_metric("squad").compute(
            predictions=self.answer(starts, ends), references=[list(each) for each in self.answers]
        )
        return found


def best_span(start: Any, end: Any, offsets: Sequence[Span | None]) -> tuple[float, Span | None]:
    """Return the sum of the logits, and the characters, of the best answer within the context; None if there is none.

    Args:
        start: [tokens], logits of an answer's first token.
        end: [tokens], logits of its last token.
        offsets: By token, see ``Questions``.
    """
    inside = numpy.array([each is not None for each in offsets])
    places = [numpy.argsort(numpy.where(inside, each, -numpy.inf))[::-1][:NUM_CANDIDATES] for each in (start, end)]
    best: tuple[float, Span | None] = (-numpy.inf, None)
    for first in places[0]:
        for last in places[1]:
            begins, ends = offsets[first], offsets[last]
            if begins is None or ends is None or not first <= last < first + MAX_ANSWER_TOKENS:
                continue
            if start[first] + end[last] > best[0]:
                best = (float(start[first] + end[last]), (begins[0], ends[1]))
    return best


class QuestionAnswering(Task):
    """Where in a text the answer to a question is."""

    name = hub_name = "question-answering"
    auto_class = AutoModelForQuestionAnswering

    def load_processor(self, name: str) -> Any:
        """Return the tokenizer; it pads on the right, so that labels are the places of tokens in a batch, too."""
        tokenizer = super().load_processor(name)
        tokenizer.padding_side = "right"
        return tokenizer

    def encode(self, splits: Splits, data: DatasetConfig, processor: Any, model_config: Any) -> Splits:
        """Tokenize questions with contexts; labels are the first and the last token of the first answer."""
        if not isinstance(processor, PreTrainedTokenizerFast):
            raise ConfigError(
                f"{type(processor).__name__}: does not say where tokens come from, which question-answering needs. "
                "Use a model whose tokenizer is one of the tokenizers library."
            )
        column = data.label_column or str(TASK_COLUMNS[self.name].label)
        splits = drop_incomplete(splits, [*data.text_columns, column])
        reader = _Reader(TextEncoder(processor, data, text_limit(processor, model_config)), column)
        return splits.with_parts(
            splits.train.map(reader.rows, batched=True, remove_columns=splits.train.column_names),
            splits.evaluation.map(reader.rows, batched=True, remove_columns=splits.evaluation.column_names),
            references=reader.questions(splits.evaluation),
        )

    def collator(self, processor: Any, model: PreTrainedModel) -> Callable[[Any], Any]:
        """Return what pads texts."""
        return DataCollatorWithPadding(processor)

    def trainer_options(self, processor: Any, splits: Splits, args: TrainingArguments) -> dict[str, Any]:
        """Return exact match and F1."""
        return {"compute_metrics": lambda predicted: splits.references.score(*predicted.predictions[:2])}

    def evaluate(self, model: PreTrainedModel, evaluation: Evaluation) -> dict[str, float]:
        """Return exact match and F1."""
        starts: list[Any] = []
        ends: list[Any] = []
        with evaluation.outputs(model) as outputs:
            for found, _ in outputs:
                starts.extend(found.start_logits.float().cpu().numpy())
                ends.extend(found.end_logits.float().cpu().numpy())
        scores = evaluation.references.score(starts, ends)
        return {"F1 (%)": scores["f1"], "exact match (%)": scores["exact_match"]}


@dataclass(frozen=True)
class _Reader:
    """Reads rows of questions, contexts and answers."""

    encoder: TextEncoder
    answer_column: str

    def rows(self, batch: Any) -> dict[str, Any]:
        """Return parts with their labels; 0, the first token's place, where the answer is not in the part."""
        encoded = self._encode(batch)
        spans = [
            _tokens_of(_offsets(encoded, part), _first_answer(batch[self.answer_column][owner], self.answer_column))
            for part, owner in enumerate(encoded["overflow_to_sample_mapping"])
        ]
        inputs = {name: encoded[name] for name in self.encoder.tokenizer.model_input_names if name in encoded}
        return {**inputs, "start_positions": [each[0] for each in spans], "end_positions": [each[1] for each in spans]}

    def questions(self, rows: Dataset) -> Questions:
        """Return what answers are compared with."""
        encoded = self._encode(rows[:])
        owners = list(encoded["overflow_to_sample_mapping"])
        return Questions(
            contexts=list(rows[self.encoder.data.text_columns[1]]),
            answers=[list(each["text"]) for each in rows[self.answer_column]],
            owners=owners,
            offsets=[_offsets(encoded, part) for part in range(len(owners))],
        )

    def _encode(self, batch: Any) -> Any:
        question, context = self.encoder.data.text_columns
        length = self.encoder.max_length()
        stride = self.encoder.data.stride
        try:
            return self.encoder.tokenizer(
                [text.lstrip() for text in batch[question]],
                list(batch[context]),
                truncation="only_second",
                max_length=length,
                stride=length // 3 if stride is None else stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
        except BaseException as error:  # the library's own panics are no Exception
            if not isinstance(error, Exception) and "anic" not in type(error).__name__:
                raise
            raise ConfigError(
                f"dataset: a question and a part of its context do not fit in {length} tokens with a stride of "
                f"{length // 3 if stride is None else stride}: {' '.join(str(error).split())}. Raise max_length, or "
                "lower stride."
            ) from error


def _offsets(encoded: Any, part: int) -> list[Span | None]:
    sequences = encoded.sequence_ids(part)
    return [
        tuple(span) if sequence == CONTEXT else None
        for span, sequence in zip(encoded["offset_mapping"][part], sequences, strict=True)
    ]


def _first_answer(answers: Any, column: str) -> Span | None:
    """Return the characters of the first answer, or None if there is none."""
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        raise ConfigError(
            f"dataset: column {column!r} holds {answers!r}; answers as in SQuAD are needed: "
            '{"text": [...], "answer_start": [...]}.'
        )
    if not answers["text"]:
        return None
    start = answers["answer_start"][0]
    return start, start + len(answers["text"][0])


def _tokens_of(offsets: Sequence[Span | None], answer: Span | None) -> Span:
    """Return the first and the last token of an answer, both 0 if it is not wholly there."""
    if answer is None:
        return 0, 0
    touched = [
        token for token, span in enumerate(offsets) if span is not None and span[0] < answer[1] and span[1] > answer[0]
    ]
    if not touched:
        return 0, 0
    first, last = offsets[touched[0]], offsets[touched[-1]]
    whole = first is not None and last is not None and first[0] <= answer[0] and last[1] >= answer[1]
    return (touched[0], touched[-1]) if whole else (0, 0)
