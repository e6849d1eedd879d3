import os

import pytest

from hf_compress.errors import ExportError
from hf_compress.export import saving
from hf_compress.export.saving import STAGING_PREFIX, check_target, staged


def fill(folder, text: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(text)


def texts(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def file_systems(monkeypatch) -> None:
    """Every folder is a file system of its own, as a mounted one is: nothing can be moved out of it, but to below."""
    move = os.replace

    def within(source, target) -> None:
        if not os.path.realpath(source).startswith(os.path.realpath(os.path.dirname(target)) + os.sep):
            raise OSError(18, "Invalid cross-device link")
        move(source, target)

    monkeypatch.setattr(saving.os, "replace", within)


@pytest.mark.parametrize("linked", [False, True])
def test_a_model_on_another_file_system_is_replaced_and_not_lost(linked, tmp_path, file_systems) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    fill(folder, "old")
    target = tmp_path / "elsewhere" / "link" if linked else folder
    if linked:
        target.parent.mkdir()
        target.symlink_to(folder, target_is_directory=True)
    with staged(target) as staging:
        fill(staging, "new")
    assert texts(folder) == {"config.json": "new", "model.safetensors": "new"}


def test_an_error_leaves_the_earlier_model(tmp_path) -> None:
    fill(tmp_path, "old")
    with pytest.raises(ZeroDivisionError), staged(tmp_path) as staging:
        fill(staging, "new")
        1 / 0  # noqa: B018
    assert texts(tmp_path) == {"config.json": "old", "model.safetensors": "old"}


def test_a_new_folder_appears_when_it_is_whole(tmp_path) -> None:
    with staged(tmp_path / "out") as staging:
        fill(staging, "new")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path) -> None:
    (tmp_path / f"{STAGING_PREFIX}abc").mkdir()
    check_target(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds files but no model"):
        check_target(tmp_path)
