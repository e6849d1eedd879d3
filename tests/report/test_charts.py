"""The parts of charts: scales, thinned curves, fronts, marks, targets."""

import pytest
import report_folders
from page import Page

from hf_compress import Recipe
from hf_compress.report import compare
from hf_compress.report.curves import training_charts
from hf_compress.report.frame import NUM_STYLES, SHAPES
from hf_compress.report.heatmap import heat_maps
from hf_compress.report.lines import thinned
from hf_compress.report.logs import StageLog, offsets, targets_of
from hf_compress.report.markup import breakable, tag, text
from hf_compress.report.plots import KeptUnits
from hf_compress.report.scales import Scale, limits, short, ticks
from hf_compress.report.style import STYLE
from hf_compress.report.tradeoff import front, is_better_small


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.3, 0.9, [0.4, 0.6, 0.8]),
        (-120, 2300, [0, 500, 1000, 1500, 2000]),
        (84.4, 84.9, [84.4, 84.5, 84.6, 84.7, 84.8, 84.9]),
        (1e-5, 3.2e-5, [1e-5, 1.5e-5, 2e-5, 2.5e-5, 3e-5]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, -2.0], [1e9, 1e9 + 1e-3], [0.1, 0.7]])
def test_limits_leave_room_for_ticks(values: list[float]) -> None:
    low, high = limits(values, 0.1)
    assert low < min(values) <= max(values) < high
    assert len(ticks(low, high)) >= 2


def test_scales_map_both_ends_and_turn_around() -> None:
    scale = Scale(10, 20, 200, 0)
    assert [scale(value) for value in (10, 15, 20)] == [200, 100, 0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, "0.25"),
        (12_345, "12.35 k"),
        (22_713_986, "22.71 M"),
        (1.397e9, "1.397 G"),
        (2e-5, "2e-05"),
        (-1500, "-1.5 k"),
    ],
)
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short(value) == expected


def test_thinned_curves_keep_ends_and_peaks() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321], points[7777] = (4321.0, 9.0), (7777.0, -9.0)
    found = thinned(points, 200)
    assert len(found) <= 200 and found == sorted(found)
    assert {points[0], points[4321], points[7777], points[-1]} <= set(found)
    assert thinned(points[:200], 200) == points[:200]


def test_the_front_is_what_nothing_beats() -> None:
    points = [(5, 80), (3, 70), (4, 70), (1, 60), (3, 70), (6, 80), (2, 50)]
    assert [points[index] for index in front(points)] == [(1, 60), (3, 70), (3, 70), (5, 80)]
    brute = {i for i, (a, b) in enumerate(points) if not any(c <= a and d >= b and (c, d) != (a, b) for c, d in points)}
    assert set(front(points)) == brute


def test_less_is_better_of_perplexity_and_losses_alone() -> None:
    assert all(map(is_better_small, ("perplexity", "perplexity of targets", "Loss", "word error rate")))
    assert not any(map(is_better_small, ("accuracy (%)", "F1", "accuracy of words (%)", "closeness")))


def test_every_style_differs_in_more_than_color() -> None:
    assert len(set(SHAPES)) == NUM_STYLES
    dashes = [f".line.s{number} {{ stroke-dasharray:" in STYLE for number in range(NUM_STYLES)]
    assert dashes == [False] + [True] * (NUM_STYLES - 1)


def test_markup_escapes_all_but_itself() -> None:
    assert text(["<b>", tag("i", "&"), 3, None]) == "&lt;b&gt;<i>&amp;</i>3"
    assert tag("a", class_="\"'<", aria_label=None, x=1) == '<a class="&quot;&#x27;&lt;" x="1"></a>'
    assert breakable("a_<b_c") == "a_<wbr/>&lt;b_<wbr/>c"


def test_targets_are_those_of_the_recipe() -> None:
    rules = [{"match": ["layer.0"], "structures": {"ffn": 0.2}}, {"match": ["layer.1"], "min_units": 2}]
    pruning = {"structures": {"heads": 0.5, "ffn": 0.7}, "rules": rules}
    assert targets_of(Recipe.from_dict({"pruning": pruning})) == {
        "heads_sparsity": 0.5,
        "ffn_sparsity": 0.7,
        "ffn_rule0_sparsity": 0.2,
        "heads_rule1_sparsity": 0.5,
        "ffn_rule1_sparsity": 0.7,
    }
    assert targets_of(Recipe.from_dict({"pruning": {"structures": ["ffn"], "target_flops": 0.4}})) == {
        "flops_kept": 0.4
    }
    assert targets_of(Recipe.from_dict({"pruning": {"structures": ["ffn"], "target_params": 9}})) == {"parameters": 9}
    assert targets_of(Recipe.from_dict({"pruning": {"structures": ["ffn"], "target_speedup": 2.0}})) == {}
    assert targets_of(Recipe.from_dict({"quantization": {}})) == {}


def log(entries: list[dict], steps: int = 10, name: str = "compressed") -> StageLog:
    return StageLog(name=name, entries=entries, steps=steps, targets={})


def parsed(charts: list[str], tmp_path) -> Page:
    path = tmp_path / "charts.html"
    path.write_text(f"<div>{''.join(charts)}</div>", encoding="utf-8")
    return Page(path)


def test_no_chart_has_more_curves_than_styles(tmp_path) -> None:
    keys = [f"part{number}_loss" for number in range(2 * NUM_STYLES + 1)]
    charts = training_charts([log([{"step": 1, **dict.fromkeys(keys, 0.5)}])])
    assert len(charts) == 3
    page = parsed(charts, tmp_path)
    assert [each["data-name"] for each in page.all("g") if "data-name" in each] == keys


def test_curves_are_not_joined_across_stages(tmp_path) -> None:
    entries = [{"step": 1, "loss": 2.0}, {"step": 9, "loss": 1.0}]
    logs = [log(entries, name="stage-1"), log([{"step": 5, "other": 1.0}], name="stage-2"), log(entries)]
    assert offsets(logs) == [0, 10, 20, 30]
    page = parsed(training_charts(logs), tmp_path)
    loss = next(each for each in page.all("g") if each.get("data-name") == "loss")
    assert loss["data-x"] == "1 9 21 29"
    assert [len(each["points"].split()) for each in page.all("polyline")] == [2, 2, 1]
    assert "stage-2: steps 10 to 20" in page.text


def test_stacks_of_layers_have_tables_of_their_own(tmp_path) -> None:
    def units(stack: str, *kept: int) -> list[KeptUnits]:
        return [KeptUnits(name=f"{stack}.{i}.self.heads", kept=each, total=1200) for i, each in enumerate(kept)]

    both = {"heads": [*units("encoder.layers", 1200, 3), *units("decoder.layers", 600, 0)]}
    page = parsed(heat_maps({"stage-1": {"ffn": []}, "compressed": both}), tmp_path)
    assert len(page.all("table")) == 2
    assert [each["style"] for each in page.all("td") if "style" in each] == [
        "--share:100%", "--share:100%", "--share:100%", "--share:0%",
        "--share:100%", "--share:100%", "--share:50%", "--share:0%",
    ]  # fmt: skip
    assert {"1,203 of 2,400 (50%)", "600 of 2,400 (25%)", "1,200", "3"} <= set(page.cells)


def test_numbers_of_a_table_survive_being_stored() -> None:
    table = report_folders.comparison()
    assert compare.Comparison.from_dict(table.to_dict()).rows() == table.rows()
