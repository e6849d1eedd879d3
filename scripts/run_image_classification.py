"""Compress a classifier of images, by a recipe.

usage: python scripts/run_image_classification.py --recipe scripts/recipes/vit_cifar10.yaml --output_dir runs/cifar10
       python scripts/run_image_classification.py --recipe RECIPE --model_name_or_path google/vit-base-patch16-224
           --dataset_name photos --output_dir runs/photos

A folder has one folder of images for every class, perhaps within ``train`` and ``test``. All of TrainingArguments are
arguments as well, and take the place of the recipe's.
"""

from dataclasses import dataclass, field
from typing import Any

from recipe_script import main


@dataclass
class ImageArguments:
    """Which columns there are."""

    image_column_name: str | None = field(default=None, metadata={"help": "column of the image (default: image, img)"})
    label_column_name: str | None = field(default=None, metadata={"help": "column of the class (default: label)"})
    flip: bool | None = field(default=None, metadata={"help": "mirror images at random while training"})


def columns(given: Any) -> dict[str, Any]:
    """Return what the arguments say of the data."""
    return {"image_column": given.image_column_name, "label_column": given.label_column_name, "flip": given.flip}


if __name__ == "__main__":
    main("image-classification", ImageArguments, columns)
