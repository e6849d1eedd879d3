"""Fashion-MNIST, ten classes of small grey images: in the place of CIFAR-10."""

import gzip
from pathlib import Path

import numpy
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from stand_ins.packages import StandInError, debian, folder_of, made_once, save_data
from stand_ins.training import train_dense

PACKAGE = "dataset-fashion-mnist"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
PREFIXES = {"train": "train", "test": "t10k"}
SIDE = 28
UNSIGNED_BYTE = 0x08
"""The only type of numbers in these files."""


def read_idx(path: Path) -> numpy.ndarray:
    """Return the array of a compressed IDX file: two zeros, type, number of dimensions, big-endian sizes, values.

    Raises:
        StandInError: If it is not such a file of bytes.
    """
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise StandInError(f"{path}: starts with {data[:4].hex()}; a file of bytes in the IDX format starts 000008.")
    values_at = 4 + 4 * data[3]
    shape = tuple(numpy.frombuffer(data[4:values_at], ">u4").tolist())
    values = numpy.frombuffer(data, numpy.uint8, offset=values_at)
    if values.size != numpy.prod(shape):
        raise StandInError(f"{path}: says that it holds {shape}, but holds {values.size} values.")
    return values.reshape(shape)


def images_of(folder: Path) -> DatasetDict:
    """Return the images and their classes, from the four files of a folder.

    Raises:
        StandInError: If a file is damaged.
    """
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    parts = {}
    for split, prefix in PREFIXES.items():
        images, labels = (read_idx(folder / f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        parts[split] = Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)
    return DatasetDict(parts)


def data_folder() -> Path:
    """Return the folder of the data, downloading them on first use.

    Raises:
        StandInError: If that fails.
    """

    def make(folder: Path) -> None:
        with debian(PACKAGE) as package:
            source = package.find("train-images-idx3-ubyte.gz")[0].parent
            save_data(images_of(source), folder, {PACKAGE: package.version})

    return made_once(folder_of("fashion-mnist") / "data", make)


def untrained(folder: Path) -> None:
    """Save a small ViT with random weights, and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=8, intermediate_size=128, image_size=SIDE,
        patch_size=4, num_channels=1, num_labels=len(CLASSES), hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, do_resize=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)


def model_folder() -> Path:
    """Return the folder of a small ViT, trained on the data on first use.

    Raises:
        StandInError: If the data cannot be downloaded.
    """

    def make(folder: Path) -> None:
        untrained(folder)
        training = {
            "max_steps": 2400, "per_device_train_batch_size": 128, "learning_rate": 2e-3, "warmup_steps": 120,
            "weight_decay": 0.01, "lr_scheduler_type": "cosine",
        }  # fmt: skip
        train_dense(folder, folder, "image-classification", {"path": str(data_folder())}, training)

    return made_once(folder_of("fashion-mnist") / "model", make)
