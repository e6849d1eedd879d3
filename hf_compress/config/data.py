"""Which data a run reads, and which columns of it."""

from dataclasses import dataclass
from typing import Any

from hf_compress.config.base import Config


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Config):
    """A data set, its splits and its columns."""

    path: str
    """Hub name, a .csv, .tsv, .json, .jsonl, .parquet or .txt file, a folder of such files, or a folder written by
    ``save_to_disk``. Relative paths start at the working directory."""

    name: str | None = None
    """Configuration of a Hub data set, such as ``"sst2"`` of ``"nyu-mll/glue"``."""

    eval_file: str | None = None
    """File of the evaluation data, of the same kind as the file that ``path`` names."""

    train_split: str = "train"
    """Split to train on; a lone file is one split, ``"train"``."""

    eval_split: str | None = None
    """Split to evaluate on. ``None``: the first of test, validation and dev that has labels; without one, a tenth of
    the training examples is held out."""

    text_columns: tuple[str, ...] = ("text",)
    """Column of the text; two for a classification of pairs, and for question-answering, which has the question first.
    Lists of words for token-classification. ``"translation.en"`` is the part ``en`` of a column that has several."""

    label_column: str | None = None
    """Column of the class, of the words' classes, or of answers as SQuAD has them. ``None``: ``"label"`` for
    text-classification and image-classification, ``"labels"`` for token-classification, ``"answers"`` for
    question-answering."""

    target_column: str | None = None
    """Column of the text to write, for seq2seq-lm only."""

    image_column: str | None = None
    """Column of the image, for image-classification only. ``None``: ``"image"``, or ``"img"``."""

    prefix: str | None = None
    """Put before each text, for seq2seq-lm only: ``"translate English to Romanian: "`` for T5."""

    stride: int | None = None
    """Tokens that two parts of a long context share, for question-answering only. ``None``: a third of ``max_length``,
    or less."""

    flip: bool = False
    """Mirror images at random while training, for image-classification only."""

    max_length: int | None = None
    """Longer texts are cut to this many tokens. ``None``: 128, or less where the model cannot read as many."""

    max_target_length: int | None = None
    """The same for ``target_column``."""

    max_train_examples: int | None = None
    """Train on so many examples, chosen at random by ``training.seed``."""

    max_eval_examples: int | None = None
    """Evaluate on so many examples, the first ones."""

    def _validate(self) -> None:
        for name in ("path", "train_split"):
            self._check_text(name)
        self._check_bool("flip")
        for name in ("name", "eval_file", "eval_split", "label_column", "target_column", "image_column", "prefix"):
            if getattr(self, name) is not None:
                self._check_text(name)
        for name in ("max_length", "max_target_length", "stride", "max_train_examples", "max_eval_examples"):
            if getattr(self, name) is not None:
                self._check_count(name)
        if self.eval_file is not None and self.eval_split is not None:
            raise self._error("eval_split", self.eval_split, "None with an eval_file, which is one split")
        columns: Any = (self.text_columns,) if isinstance(self.text_columns, str) else self.text_columns
        texts = isinstance(columns, list | tuple) and all(isinstance(each, str) and each for each in columns)
        if not texts or len(columns) not in (1, 2):
            raise self._error("text_columns", self.text_columns, "the name of a column, or a list of one or two")
        object.__setattr__(self, "text_columns", tuple(columns))
        if self.max_target_length is not None and self.target_column is None:
            raise self._error("max_target_length", self.max_target_length, "None without a target_column")
