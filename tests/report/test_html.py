"""The page: complete, well-formed, self-contained, and harmless whatever the files say."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import report_folders
from page import Page

from hf_compress import ConfigError, Recipe, cli, write_report
from hf_compress.recipe import result, stages
from hf_compress.report import folders, logs
from hf_compress.report.style import STYLE

HOSTILE = """</title><script>alert("1")</script>"'><img src=x onerror=alert(2)>&amp;"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return report_folders.write_run(tmp_path_factory.mktemp("runs") / "staged")


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page(write_report(run))


def edited(run: Path, to: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a run with a changed JSON file."""
    folder = Path(shutil.copytree(run, to / "copy"))
    data = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps(change(data)), encoding="utf-8")
    return folder


def test_the_page_is_in_the_folder_unless_another_file_is_given(run, tmp_path) -> None:
    assert write_report(run) == run / "report.html"
    other = write_report(str(run), tmp_path / "other.html")
    assert other.read_bytes() == (run / "report.html").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["other.html"]


def test_nothing_is_loaded_from_elsewhere(page) -> None:
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?:|url\(|@import|//[a-z]", page.source)
    assert {attributes["href"][1:] for attributes in page.all("a")} <= {each["id"] for each in page.all("section")}


def test_every_number_of_the_comparison_is_in_its_table(page) -> None:
    for row in report_folders.comparison().rows():
        for cell in row:
            assert cell in page.cells or not cell
    assert {"2.11 M (49%)", "83.75 (-0.57)", "14.40 ms", "2.05x"} <= set(page.cells)


def test_the_summary_says_how_the_result_compares(page) -> None:
    assert (
        "The model models/tiny was compressed in 2 stages on data/reviews.csv by pruning and distillation." in page.text
    )
    assert (
        "The result (compressed) has 49% of the parameters of the dense model (33% of those in the encoder)"
        in page.text
    )
    assert "Its accuracy (%) is 83.75, 0.57 worse than that of the dense model (84.32)." in page.text
    assert "It is 2.05 times as fast at batch 1." in page.text


def test_perplexity_is_better_where_it_is_lower(tmp_path) -> None:
    metrics = {"perplexity of targets": {"dense": 12.5, "stage-1": 11.0, "compressed": 11.25}}
    page = Page(write_report(report_folders.write_run(tmp_path / "a", report_folders.comparison(metrics=metrics))))
    assert "Its perplexity of targets is 11.25, 1.25 better than that of the dense model (12.50)." in page.text
    assert "No other model beats: 2, 3." in page.text


def test_charts_of_further_metrics_are_folded(tmp_path) -> None:
    metrics = {"F1 (%)": {"dense": 80.5, "compressed": 79.25}, "exact match (%)": {"dense": 70.5, "compressed": 71.0}}
    page = Page(write_report(report_folders.write_run(tmp_path / "run", report_folders.comparison(metrics=metrics))))
    assert len(page.all("details")) == 1
    assert "The same for exact match (%)" in page.text
    titles = [text for text in page.texts if text.startswith(("F1 (%): ", "exact match (%): "))]
    assert len(titles) == 10 and len(set(titles)) == 10
    assert "Its exact match (%) is 71.00, 0.50 better than that of the dense model (70.50)." in page.text


def test_what_every_layer_kept_is_there_for_every_stage(page) -> None:
    titles = [each["title"] for each in page.all("td") if "title" in each]
    assert "bert.encoder.layer.1.heads: 2 of 4 kept (50%)" in titles
    assert "bert.encoder.layer.0.ffn: 20 of 44 kept (45%)" in titles
    assert {"6 of 8 (75%)", "44 of 88 (50%)", "88 of 88 (100%)"} <= set(page.cells)


def test_curves_go_over_the_steps_of_all_stages(page) -> None:
    curves = {each["data-name"]: each for each in page.all("g") if "data-name" in each}
    assert curves["loss"]["data-x"] == "1 4 5 8"
    assert curves["loss"]["data-y"] == "0.731 0.523 0.512 0.401"
    assert curves["eval_accuracy"]["data-x"] == "4 8"
    assert {"heads_sparsity", "ffn_sparsity", "distillation_loss", "learning_rate", "eval_loss"} <= set(curves)
    assert not {"epoch", "eval_runtime", "train_loss", "total_flos"} & set(curves)
    assert page.text.count("target") >= 2
    assert "Over 8 optimizer steps in 2 stages: heads_sparsity from 0 to 0.25 (target 0.25)" in page.text


def test_recipe_environment_seeds_snippet_and_notes_are_there(page, run) -> None:
    assert " ".join((run / "recipe.yaml").read_text(encoding="utf-8").split()) in page.text
    for part in ("9.8.7", "Imaginary 9000", "17, then 18", "labels: up, down", "timed on a quiet machine"):
        assert part in page.text
    assert 'AutoModelForSequenceClassification.from_pretrained("path/or/hub-name")' in page.text
    assert "the logits are the same after reloading" in page.text


def test_names_and_headings_are_there_for_those_who_listen(page) -> None:
    assert len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h\d", name)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(each.get("scope") in ("col", "row") for each in page.all("th"))
    ids = [each["id"] for _, each in page.elements if "id" in each]
    assert len(ids) == len(set(ids))
    drawings = [each for each in page.all("svg") if each.get("aria-hidden") != "true"]
    assert len(drawings) > 8
    for each in drawings:
        assert each["role"] == "img" and set(each["aria-labelledby"].split()) <= set(ids)
    for name, each in page.elements:
        if each.get("class") == "scroll" or name == "pre":
            assert each["tabindex"] == "0" and each["aria-label"]


@pytest.mark.parametrize("theme", range(3), ids=["light", "dark", "print"])
def test_colors_are_apart_enough(theme: int) -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for curves and marks."""
    block = re.findall(r":root \{(.*?)\}", STYLE, flags=re.DOTALL)[theme]
    colors = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))
    pairs = [(ink, paper) for ink in ("ink", "muted", "accent") for paper in ("page", "surface")]
    pairs += [("ink", "kept"), ("ink", "gone"), ("muted", "stage")]
    assert {pair: ratio for pair in pairs if (ratio := contrast(*(colors[name] for name in pair))) < 4.5} == {}
    curves = [(f"s{number}", paper) for number in range(6) for paper in ("page", "stage")]
    assert {pair: ratio for pair in curves if (ratio := contrast(*(colors[name] for name in pair))) < 3} == {}


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def plain_counts(page: Page) -> dict[str, int]:
    return {name: len(page.all(name)) for name in ("script", "style", "img", "h1", "section", "a", "title", "iframe")}


def test_hostile_names_stay_text(tmp_path, page) -> None:
    sizes = {"dense": 3_000_000, "compressed": 2_000_000, f"c{HOSTILE}": 1_900_000}
    table = report_folders.comparison(
        sizes,
        {HOSTILE: {"dense": 1.0, "compressed": 2.0}},
        notes=(HOSTILE,),
        environment={HOSTILE: HOSTILE},
        latency_ms={HOSTILE: {"dense": 2.0, "compressed": 1.0}},
        speedup={HOSTILE: {"compressed": 2.0}},
    )
    dataset = {"path": HOSTILE, "text_columns": HOSTILE, "label_column": f"label {HOSTILE}"}
    run = report_folders.write_run(tmp_path / "run", table, {"model": HOSTILE, "dataset": dataset})
    unit = {"name": HOSTILE, "kept": 1, "total": 2}
    report_folders.results(
        "compressed",
        table,
        kept={HOSTILE: [unit]},
        checks=(HOSTILE,),
        task=HOSTILE,
        dataset=HOSTILE,
        base_model=HOSTILE,
    ).save(run / "compressed" / "results.json")
    log = [{"step": 1, f"{HOSTILE}_loss": 0.5}, {"step": 2, HOSTILE: 1.0}]
    report_folders.write_json(run / "compressed" / "log_history.json", log)
    found = Page(write_report(run))
    counts, safe = plain_counts(found), plain_counts(page)
    assert {**counts, "title": 0} == {**safe, "title": 0}
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert found.text.count(HOSTILE) > 10
    assert found.all("title") and "</title><script>" not in found.source


def test_hostile_folders_of_several_runs_stay_text(tmp_path) -> None:
    name = HOSTILE.replace("/", "-")
    report_folders.write_run(tmp_path / name)
    report_folders.write_run(tmp_path / "b", recipe={"training": {"seed": 3, "run_name": HOSTILE}})
    found = Page(write_report(tmp_path))
    assert len(found.all("script")) == 1 and found.all("img") == []
    assert name in found.cells and HOSTILE in found.cells


def test_characters_that_no_page_may_hold_are_replaced(tmp_path) -> None:
    table = report_folders.comparison(notes=("nul \0, bell \a, half \ud83d, whole \U0001f600",))
    page = Page(write_report(report_folders.write_run(tmp_path / "run", table)))
    assert "nul \ufffd, bell \ufffd, half \ufffd, whole \U0001f600" in page.text


def test_a_folder_of_one_model_has_fewer_parts(tmp_path) -> None:
    report_folders.results("stage-1").save(tmp_path / "results.json")
    page = Page(write_report(tmp_path))
    assert "The result (stage-1) has 80% of the parameters" in page.text
    assert "There are no curves: no log of training was kept." in page.text
    assert "criterion: taylor" in page.text and "6 of 8 (75%)" in page.cells
    report_folders.write_json(tmp_path / "log_history.json", report_folders.LOGS["stage-1"])
    assert "(target 0.25)" in Page(write_report(tmp_path)).text


def test_the_folder_of_a_runs_model_is_a_model_and_no_unfinished_run(run) -> None:
    """A recipe lies beside it as well."""
    folder = run / "stage-1"
    assert {"recipe.yaml", "results.json"} <= {path.name for path in folder.iterdir()}
    page = Page(write_report(folder, run.parent / "stage-1.html"))
    assert "not finished" not in page.text
    assert "The result (stage-1) has 80% of the parameters" in page.text


@pytest.mark.parametrize("content", ["[1]", '{"schema_version": 77}', "{"])
def test_damaged_results_of_a_single_model_are_an_error(tmp_path, content) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("model: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"results\.json"):
        write_report(tmp_path)


def test_a_run_that_is_not_finished_shows_what_its_checkpoints_know(tmp_path) -> None:
    run = report_folders.write_run(tmp_path / "run")
    (run / "run.json").unlink()
    shutil.rmtree(run / "compressed")
    for step in (2, 10):
        log = [{"step": 1, "loss": 0.25}, {"step": step, "loss": step / 100}]
        state = {"log_history": log, "global_step": step}
        report_folders.write_json(run / "checkpoints" / "stage-2" / f"checkpoint-{step}" / "trainer_state.json", state)
    page = Page(write_report(run))
    assert "The run is not finished: there is no comparison with the dense model yet." in page.text
    assert "There is no comparison: the run is not finished." in page.text
    curves = {each["data-name"]: each for each in page.all("g") if "data-name" in each}
    assert curves["loss"]["data-x"] == "1 4 5 14"
    assert curves["loss"]["data-y"] == "0.731 0.523 0.25 0.1"


def test_what_is_absent_is_said(tmp_path) -> None:
    run = report_folders.write_run(tmp_path / "run", report_folders.comparison(metrics={}))
    (run / "recipe.yaml").unlink()
    for name in report_folders.KEPT:
        shutil.rmtree(run / name)
    text = Page(write_report(run)).text
    for sentence in (
        "There is no chart: there are no two models",
        "Nothing is known about single layers",
        "There are no curves: no log of training was kept.",
        "How to load the model is not known",
        "There is no recipe.",
    ):
        assert sentence in text


def test_numbers_that_are_none_break_no_chart(tmp_path) -> None:
    metrics = {"perplexity": {"dense": 20.5, "stage-1": float("inf"), "compressed": float("nan")}}
    page = Page(write_report(report_folders.write_run(tmp_path / "run", report_folders.comparison(metrics=metrics))))
    assert "Its perplexity is nan." in page.text and {"inf (+inf)", "nan (+nan)"} <= set(page.cells)
    assert "no two models that differ in cost and have a metric" in page.text


def without(key: str) -> Callable[[Any], Any]:
    return lambda data: {name: value for name, value in data.items() if name != key}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", without("comparison")),
        ("run.json", lambda data: [data]),
        ("run.json", lambda data: {**data, "notes": 3}),
        ("run.json", lambda data: {**data, "folders": ["a"]}),
        ("run.json", lambda data: {**data, "comparison": {**data["comparison"], "profiles": {}}}),
        ("run.json", lambda data: {**data, "comparison": {**data["comparison"], "metrics": {"a": {"dense": "<b>"}}}}),
        ("run.json", lambda data: {**data, "comparison": {**data["comparison"], "environment": 3}}),
        ("compressed/results.json", lambda data: {**data, "model": "other"}),
        ("compressed/results.json", lambda data: {**data, "kept": {"ffn": [{"name": "a", "kept": "1", "total": 2}]}}),
        ("compressed/results.json", lambda data: {**data, "num_evaluation_examples": "many"}),
        ("stage-1/log_history.json", lambda data: {"log": data}),
        ("stage-1/log_history.json", lambda data: [{"loss": 1.0}]),
        ("stage-1/stage.json", lambda data: {**data, "optimizer_steps": None}),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(run, tmp_path, name: str, change: Any) -> None:
    folder = edited(run, tmp_path, name, change)
    before = (folder / "report.html").read_bytes() if (folder / "report.html").exists() else None
    with pytest.raises(ConfigError, match=re.escape(str(folder / name))):
        write_report(folder)
    after = (folder / "report.html").read_bytes() if (folder / "report.html").exists() else None
    assert after == before


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "compressed/results.json", "stage-1/log_history.json"])
def test_half_a_file_is_an_error_that_names_it(run, tmp_path, name: str) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    half = (folder / name).read_bytes()[:40]
    (folder / name).write_bytes(half + b"\xff")
    with pytest.raises(ConfigError, match=re.escape(str(folder / name))):
        write_report(folder)


def test_there_has_to_be_something_to_report(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to report.*Give the output folder of a run"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        write_report(tmp_path / "missing")


def test_a_page_that_cannot_be_written_is_an_error(run, tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(run, tmp_path / "missing" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(run, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_that_is_no_page_is_not_overwritten(run, tmp_path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"model.safetensors: is there already.*not overwritten"):
        write_report(run, weights)
    assert weights.read_bytes() == b"weights"
    page = tmp_path / "mine.html"
    page.write_text("<html>my own</html>", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine.html: is there already, and no report"):
        write_report(run, page)
    assert page.read_text(encoding="utf-8") == "<html>my own</html>"


def test_several_runs_are_one_table_and_one_set_of_charts(tmp_path) -> None:
    for name, size in (("a", 2_000_000), ("b", 1_500_000)):
        table = report_folders.comparison({"dense": 4_000_000, "compressed": size})
        report_folders.write_run(tmp_path / name, table, {"training": {"seed": size % 7}})
    half = report_folders.write_run(tmp_path / "half")
    (half / "run.json").unlink()
    (tmp_path / "something else").mkdir()
    page = Page(write_report(tmp_path))
    assert "2 finished runs left 2 compressed models." in page.text
    assert "half: holds a recipe and no result" in page.text
    assert {"2.00 M (50%)", "1.50 M (38%)", "83.75", "2.00x", "2.67x", "6.67 ms"} <= set(page.cells)
    points = [text for text in page.texts if re.match(r"\d: [ab] (dense|compressed), accuracy", text)]
    assert len({text.split(",")[0] for text in points}) == 4
    assert {"training.seed", str(2_000_000 % 7), str(1_500_000 % 7)} <= set(page.cells)
    assert "output" not in page.cells and "Imaginary 9000" in page.text


def test_a_damaged_run_is_named_and_the_others_are_shown(tmp_path) -> None:
    for name in ("a", "b"):
        report_folders.write_run(tmp_path / name)
    (tmp_path / "b" / "run.json").write_text("{", encoding="utf-8")
    page = Page(write_report(tmp_path))
    assert "1 finished runs left 2 compressed models." in page.text
    assert "b: not shown." in page.text and "is damaged" in page.text
    (tmp_path / "a" / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="is damaged"):
        write_report(tmp_path)


def test_runs_of_several_seeds_have_means_and_no_line_between_them(tmp_path) -> None:
    for name, seed, steps, accuracy in (("a", 0, 4, 80.0), ("b", 1, 4, 84.0), ("c", 0, 5, 90.0)):
        scores = {"accuracy (%)": {"dense": 91.0 + seed, "compressed": accuracy}}
        table = report_folders.comparison({"dense": 4_000_000, "compressed": 500_000 * steps}, scores)
        report_folders.write_run(tmp_path / name, table, {"training": {"seed": seed, "max_steps": steps}})
    page = Page(write_report(tmp_path))
    assert {"a, b", "82.00 \u00b1 2.83", "91.50 \u00b1 0.71"} <= set(page.cells)
    assert "A line joins models of one seed only." in page.text
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", source, re.S)
    fronts = [chart.count('class="front"') for chart in charts if 'class="front"' in chart]
    assert fronts and set(fronts) == {2}
    assert "No other model of the same seed beats" in page.text


def test_names_of_axes_are_above_their_numbers(tmp_path) -> None:
    """And a number at the right end has room for half its width."""
    report_folders.write_run(tmp_path / "a")
    source = write_report(tmp_path).read_text(encoding="utf-8")
    names = [float(y) for y in re.findall(r'<text class="label" x="4" y="([\d.]+)"', source)]
    ticks = re.findall(r'<text class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', source)
    letters = 11
    assert names and max(names) + letters <= min(float(y) for _, y, anchor, _ in ticks if anchor == "end")
    ends = [float(x) + 0.3 * letters * len(text) for x, _, anchor, text in ticks if anchor == "middle"]
    assert max(ends) <= 340


def test_runs_that_were_measured_elsewhere_are_told_apart(tmp_path) -> None:
    report_folders.write_run(tmp_path / "a")
    other = report_folders.comparison(environment={"python": "3.12.99", "torch": "9.8.7", "cpu": "Fantastic 1"})
    report_folders.write_run(tmp_path / "b", other)
    page = Page(write_report(tmp_path))
    assert "Not all runs were measured alike" in page.text
    assert {"Fantastic 1", "Imaginary 9000"} <= set(page.cells)
    assert "In no setting that is stored." in page.text


def test_the_command_writes_the_page(run, tmp_path, capsys) -> None:
    assert cli.main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n"
    assert Page(tmp_path / "page.html").all("h1")
    assert cli.main(["report", str(tmp_path / "missing")]) == cli.EXIT_ERROR
    assert "is no folder" in capsys.readouterr().err


def test_the_command_explains_itself(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "report [-h] [--output FILE] DIR" in out and "finished or not" in out and "report.html in DIR" in out


def test_files_and_stages_are_called_what_runs_call_them(tmp_path) -> None:
    assert (folders.RESULT_FILE, folders.RECIPE_FILE, folders.CHECKPOINTS, folders.LAST) == (
        result.RESULT_FILE,
        result.RECIPE_FILE,
        result.CHECKPOINTS,
        stages.SMALL,
    )
    assert (logs.HISTORY_FILE, logs.FACTS_FILE) == (stages.HISTORY_FILE, stages.FACTS_FILE)
    single = {**report_folders.RECIPE, "stages": None, "teacher": None, "pruning": {"structures": {"ffn": 0.5}}}
    for recipe in map(Recipe.from_dict, (report_folders.RECIPE, single)):
        found = {each.name: each.checkpoints for each in stages.stages_of(recipe, tmp_path)}
        assert {name: tmp_path / inside for name, inside in folders.stage_folders(recipe).items()} == found
