"""``hf-compress inspect --sensitivity`` measures on the data of a recipe."""

import json

import pytest
import recipe_files
from PIL import Image
from transformers import AutoModelForSequenceClassification

from hf_compress import QuantizationConfig, cli, quantization_sensitivity
from hf_compress.config import Recipe
from hf_compress.recipe.trainer import prepare


def test_the_command_writes_a_table_and_a_picture(tmp_path, capsys) -> None:
    recipe = recipe_files.classification(tmp_path, quantization={"scheme": "int8_static", "exclude": ["layer.0"]})
    Recipe.from_dict(recipe).save(tmp_path / "recipe.yaml")
    arguments = ["inspect", recipe["model"], "--sensitivity", str(tmp_path / "recipe.yaml"), "--bits", "4", "2"]
    assert cli.main([*arguments, "--batches", "1", "--output", str(tmp_path / "found")]) == 0
    out = capsys.readouterr().out
    stored = json.loads((tmp_path / "found" / "sensitivity.json").read_text())
    assert stored["roles"] == ["weights", "inputs"] and len(stored["layers"]) == 8
    assert (tmp_path / "found" / "sensitivity.txt").read_text().strip() in out
    with Image.open(tmp_path / "found" / "sensitivity.png") as image:
        assert image.height > 300

    prepared = prepare(Recipe.from_dict(recipe), tmp_path / "scratch")
    batch = next(iter(prepared.batches()))
    model = AutoModelForSequenceClassification.from_pretrained(recipe["model"])
    assert stored["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    config = QuantizationConfig(scheme="int8_static", method="ptq", exclude=["layer.0"])
    assert quantization_sensitivity(model, [batch], (4, 2), config).to_dict() == stored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "4"], "--bits: has no effect without --sensitivity"),
        (["--sensitivity", "{recipe}", "--json"], "--json: has no effect with --sensitivity"),
        (["--sensitivity", "{recipe}", "--bits", "9"], "different ints from 2 to 8"),
        (["--sensitivity", "{broken}"], "task"),
    ],
)
def test_wrong_options(options: list[str], message: str, tmp_path, capsys) -> None:
    recipe = recipe_files.classification(tmp_path)
    Recipe.from_dict(recipe).save(tmp_path / "recipe.yaml")
    Recipe(model=recipe["model"], pruning=recipe["pruning"]).save(tmp_path / "broken.yaml")
    files = {"recipe": str(tmp_path / "recipe.yaml"), "broken": str(tmp_path / "broken.yaml")}
    assert cli.main(["inspect", recipe["model"], *(option.format(**files) for option in options)]) == 2
    assert message in capsys.readouterr().err
