"""The demo's arguments."""

from dataclasses import dataclass, field

from hf_compress import DistillationConfig, PruningConfig, QuantizationConfig, Recipe


@dataclass
class Settings:
    """Every argument of the demo."""

    model: str | None = field(default=None, metadata={"help": "Hub name or folder; default: all-MiniLM-L6-v2"})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub name, .csv/.tsv/.json/.jsonl/.parquet file or folder; default: movie-review snippets"},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a Hub data set"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    text_pair_column: str | None = field(default=None, metadata={"help": "column that holds a second text"})
    label_column: str = field(default="label", metadata={"help": "column that holds the class"})
    test_split: str | None = field(
        default=None, metadata={"help": "split to evaluate on; default: test, else validation"}
    )
    output: str = field(default="runs/demo", metadata={"help": "folder for models, cards and results"})
    max_length: int = field(default=64, metadata={"help": "tokens; longer texts are cut"})
    train_examples: int | None = field(default=None, metadata={"help": "use this many training examples only"})
    batch_size: int = field(default=32, metadata={"help": "examples per training step"})
    teacher_epochs: float = field(
        default=1.0, metadata={"help": "epochs of dense fine-tuning; 0: use --model as it is"}
    )
    teacher_learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate of the dense model"})
    epochs: float = field(default=1.25, metadata={"help": "epochs of the compression run"})
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate of the compression run"})
    heads: float = field(default=0.58, metadata={"help": "fraction of attention heads to remove"})
    ffn: float = field(default=0.62, metadata={"help": "fraction of feed-forward units to remove"})
    seed: int = field(default=0, metadata={"help": "seed of initialization, order and dropout"})
    refresh: bool = field(default=False, metadata={"help": "train the teacher again even if it is cached"})

    def recipe(self) -> Recipe:
        """Return what the compression run does."""
        structures = {kind: value for kind, value in {"heads": self.heads, "ffn": self.ffn}.items() if value}
        return Recipe(
            pruning=PruningConfig(
                structures=structures,
                criterion="taylor",
                allocation="global",
                begin=0.02,
                end=0.4,
                multiple_of=16,
            ),
            distillation=DistillationConfig(alpha=0.9, temperature=2.0),
            quantization=QuantizationConfig(scheme="int8_dynamic", method="qat", begin=0.4),
        )
