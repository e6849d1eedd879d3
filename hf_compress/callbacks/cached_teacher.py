"""A teacher whose answers are on disk."""

from collections.abc import Mapping
from typing import Any

from hf_compress.callbacks.base import Run
from hf_compress.callbacks.heads import Head
from hf_compress.callbacks.preview import first_batch
from hf_compress.callbacks.same_task import Task, check_same_task
from hf_compress.callbacks.teachers import Lesson
from hf_compress.config import DistillationConfig, Ramp
from hf_compress.config.distillation import AUTO
from hf_compress.errors import ConfigError, TrainingError
from hf_compress.teachers.cached import TeacherCache
from hf_compress.teachers.outputs import SparseLogits


class CachedTeacher:
    """Looks answers up.

    Args:
        cache: The answers.
        config: What they are compared by.
        run: The run.

    Raises:
        ConfigError: If the config asks for more than the cache holds.
        TrainingError: If the cache is of another task, or does not know the first batch.
    """

    def __init__(self, cache: TeacherCache, config: DistillationConfig, run: Run) -> None:
        self.cache = cache
        self.temperature = _temperature(cache, config)
        self.task = _task(cache)
        check_same_task(self.task, run.model, padded=config.padded_vocabulary)
        batch = first_batch(run.trainer)
        if batch is not None:
            self.cache.outputs(batch, temperature=self.temperature)
            self.cache.check()

    def teach(self, inputs: Mapping[str, Any], head: Head, labels: Any = None) -> Lesson:
        """Return what is stored for the examples of a batch."""
        answer = self.cache.outputs(inputs, labels=labels, temperature=self.temperature)
        logits = answer.outputs.get("logits")
        if isinstance(logits, SparseLogits):
            return Lesson(logits, answer.counts)
        if any(isinstance(each, SparseLogits) for each in answer.outputs.values()):
            raise TrainingError(f"{self.cache.directory}: only logits may be cached with top_k. Make it without.")
        return Lesson(head.logits(answer.outputs, inputs, "teacher"), _of_positions(answer.counts, head))

    def end_step(self) -> None:
        """Check that all examples were found."""
        self.cache.check()

    def check(self) -> None:
        """Check that all examples were found."""
        self.cache.check()

    def vocabulary_sizes(self) -> tuple[int | None, ...]:
        """Return that of the model that the answers are of."""
        return (self.task.vocab_size,)

    def fingerprint(self) -> str:
        """Return what tells caches apart."""
        return self.cache.fingerprint()

    def describe(self) -> str:
        """Return what it is."""
        return self.cache.describe()


def _task(cache: TeacherCache) -> Task:
    """Return the task of the model that the answers are of, whose class may be unknown here."""
    try:
        return Task.stored(cache.manifest.teacher["config"])
    except ValueError as error:
        raise TrainingError(
            f"{cache.directory}: damaged: the stored config of the teacher is none: {error}. Delete the directory and "
            "make the cache anew with cache_teacher_outputs."
        ) from error


def _of_positions(counts: Any, head: Head) -> Any:
    return None if head.speaks_of_whole_texts else counts


def _temperature(cache: TeacherCache, config: DistillationConfig) -> float | None:
    """Return the temperature to look up, None if it does not matter."""
    if config.features:
        raise ConfigError(
            "DistillationConfig.features: a cache holds the teacher's answers, and nothing of its layers; allowed: (). "
            "Give the teacher itself."
        )
    if cache.manifest.content.top_k is None:
        return None
    if config.loss not in (AUTO, "kl"):
        raise ConfigError(
            f"DistillationConfig.loss: got {config.loss!r}; allowed: 'kl' with {cache.directory}, which holds only the "
            "largest logits. Make the cache without top_k."
        )
    if isinstance(config.temperature, Ramp):
        raise ConfigError(
            f"DistillationConfig.temperature: got a Ramp; allowed: one of {cache.manifest.content.temperatures} with "
            f"{cache.directory}, which holds only the largest logits."
        )
    return config.temperature
