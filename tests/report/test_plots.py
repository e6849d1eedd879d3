import pytest
from matplotlib import image

from hf_compress.errors import ConfigError
from hf_compress.report.plots import KEPT_COLOR, KeptUnits, plot_kept_units


def units(*kept: int, total: int = 12) -> list[KeptUnits]:
    return [KeptUnits(name=f"layer.{i}.heads", kept=value, total=total) for i, value in enumerate(kept)]


def share_of_color(path) -> float:
    pixels = (image.imread(path)[..., :3] * 255).round().astype(int)
    wanted = [int(KEPT_COLOR[i : i + 2], 16) for i in (1, 3, 5)]
    return float((pixels == wanted).all(axis=-1).mean())


@pytest.mark.parametrize("num_layers", [1, 6, 48, 200])
def test_any_number_of_layers(tmp_path, num_layers: int) -> None:
    kept = units(*range(1, num_layers + 1), total=num_layers)
    path = plot_kept_units({"heads": kept, "ffn": kept}, tmp_path / "kept.png")
    height, width, _ = image.imread(path).shape
    assert width <= 18 * 150
    assert height == round(2 * 2.3 * 150)


def test_bars_show_what_was_kept(tmp_path) -> None:
    few = share_of_color(plot_kept_units({"heads": units(1, 1, 1)}, tmp_path / "few.png"))
    many = share_of_color(plot_kept_units({"heads": units(11, 11, 11)}, tmp_path / "many.png"))
    assert 5 < many / few < 13


def test_same_data_same_bytes(tmp_path) -> None:
    for suffix in ("png", "svg"):
        first = plot_kept_units({"heads": units(3, 4)}, tmp_path / f"a.{suffix}").read_bytes()
        if suffix == "png":
            assert plot_kept_units({"heads": units(3, 4)}, tmp_path / "b.png").read_bytes() == first
        assert len(first) > 1000


def test_nothing_to_draw_is_an_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_kept_units({"heads": []}, tmp_path / "none.png")
