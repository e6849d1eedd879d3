"""Classes of images."""

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from datasets import Image
from PIL import ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from hf_compress.config import DatasetConfig
from hf_compress.errors import ConfigError, choices
from hf_compress.loading import loading
from hf_compress.recipe.labels import LABELS
from hf_compress.recipe.splits import Splits, drop_incomplete
from hf_compress.recipe.tasks.classification import ClassificationTask
from hf_compress.recipe.tasks.texts import Columns

IMAGE_COLUMNS = ("image", "img")
"""Names by default, the first one that there is."""

PIXELS = "pixel_values"
MODES = {1: "L", 3: "RGB"}
"""Number of the model's channels -> mode of the images."""


class ImageClassification(ClassificationTask):
    """The class of an image. Images are read and resized when they are used, since all at once may fill the disk."""

    name = hub_name = "image-classification"
    auto_class = AutoModelForImageClassification
    default_arguments: ClassVar[Mapping[str, Any]] = {"remove_unused_columns": False}  # no model reads the image

    def load_processor(self, name: str) -> Any:
        """Return the image processor."""
        with loading(f"{name}: image processor"):
            loader: Any = AutoImageProcessor
            return loader.from_pretrained(name, trust_remote_code=False)

    def encode(self, splits: Splits, data: DatasetConfig, processor: Any, model_config: Any) -> Splits:
        """Have images become pixel values when they are read; the training images mirrored at random if asked for."""
        column = _image_column(splits, data)
        splits = drop_incomplete(splits, [column])
        for which, part in splits.named().items():
            if not isinstance(part.features[column], Image):
                raise ConfigError(
                    f"dataset: column {column!r} of the {which} data holds {part.features[column]}; images are needed."
                )
        mode = MODES.get(getattr(model_config, "num_channels", 3), "RGB")

        def reader(flip: bool) -> Callable[[Columns], Columns]:
            def read(batch: Columns) -> Columns:
                images = [each.convert(mode) for each in batch[column]]
                if flip:
                    images = [ImageOps.mirror(each) if random.random() < 0.5 else each for each in images]
                return {PIXELS: processor(images, return_tensors="pt")[PIXELS], LABELS: batch[LABELS]}

            return read

        train, evaluation = splits.train, splits.evaluation
        return splits.with_parts(train.with_transform(reader(data.flip)), evaluation.with_transform(reader(False)))

    def collator(self, processor: Any, model: PreTrainedModel) -> Callable[[Any], Any]:
        """Return what stacks images."""
        return _stack

    def length(self, splits: Splits) -> None:
        """Images have no tokens."""
        return


def _stack(rows: Any) -> dict[str, torch.Tensor]:
    return {
        PIXELS: torch.stack([torch.as_tensor(row[PIXELS]) for row in rows]),
        LABELS: torch.tensor([row[LABELS] for row in rows]),
    }


def _image_column(splits: Splits, data: DatasetConfig) -> str:
    names = splits.train.column_names
    found = data.image_column or next((each for each in IMAGE_COLUMNS if each in names), None)
    if found is None or found not in names:
        raise ConfigError(f"dataset: no column {found or IMAGE_COLUMNS[0]!r} of images; {choices(str(found), names)}.")
    return found
