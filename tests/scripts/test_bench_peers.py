"""The comparison with other libraries: what it concludes, that it goes on where it was, and what it skips."""

import importlib
import json
import sys
from pathlib import Path

import numpy
import pytest
import tiny_models
import torch

import hf_compress

OWN = "hf_compress: taylor while training, with a teacher"
BENCH = Path(hf_compress.__file__).parent.parent / "scripts" / "bench"
SETTINGS = {
    "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "examples": 8, "calibration_batches": 2, "plain_steps": 2,
    "rounds": 2, "threads": 1,
}  # fmt: skip


@pytest.fixture
def load(monkeypatch):
    """``load(name)``: a module of the benchmark or of its workers."""
    for folder in (BENCH.parent, BENCH, BENCH / "peers"):
        monkeypatch.syspath_prepend(str(folder))
    for name in ("peers", "peers_report", "peers_list", "peers_plot", "common", "architectures", "with_hf_compress"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def pruned(peer: str, variant: str, after: float, **more: object) -> dict[str, object]:
    found = {
        "peer": peer, "kind": "prune", "variant": variant, "sparsity": 0.5, "seed": 0, "before": 0.4, "after": after,
        "encoder_parameters": 50, "dense_encoder_parameters": 100, "bytes": 2_000_000, "prune_seconds": 1.0,
        "cpu_milliseconds": {"dense": [8.0, 9.0], "pruned": [4.0, 3.0]}, "peak_bytes": 3 * 2**20,
        "step_seconds": {"method": 0.5, "plain": 1.0}, "versions": {"torch": "1"}, "cpu_seconds": 60.0,
        "reload": {"plain": {"loads": False, "error": "RuntimeError: shapes"}},
    }  # fmt: skip
    return {**found, **more}


def results(ours: float, theirs: float) -> dict[str, object]:
    plain = {"kind": "plain", "sparsity": 0.0, "seed": 0, "peak_bytes": 2 * 2**20}
    quantized = {
        "kind": "quantize", "sparsity": 0.0, "seed": 0, "bytes": 1_000_000, "about": "",
        "cpu_milliseconds": {"fp32 eager": [8.0], "int8": [2.0]}, "reload": {"plain": {"loads": True}},
    }  # fmt: skip
    kinds = {"BERT": {"outcome": "handled", "about": ""}, "T5": {"outcome": "handled", "about": ""}}
    failed = {**kinds, "T5": {"outcome": "error", "about": "ValueError: no"}}
    asked = {"kind": "architectures", "variant": "", "sparsity": 0.0, "seed": 0}
    loads = {"plain": {"loads": False, "error": "x"}, "imported": {"loads": True}}
    return {
        "environment": {"cpu": "a CPU"},
        "settings": {**SETTINGS, "examples": 1000},
        "skipped": {"nni": "needs Python 3.10, which is not here"},
        "runs": [
            {**plain, "peer": "hf_compress", "variant": "dense", "before": 0.7, "after": 0.75, "examples": 1000},
            {**plain, "peer": "hf_compress", "variant": ""},
            pruned("hf_compress", "default", ours, reload=loads),
            pruned("torch-pruning", "taylor", theirs, prune_seconds=0.5),
            {**quantized, "peer": "hf_compress", "variant": "ptq", "after": 0.7, "reload_by": "from_pretrained"},
            {**quantized, "peer": "openvino", "variant": "ptq", "after": 0.7, "reload_by": "read_model",
             "cpu_milliseconds": {"fp32 eager": [8.0], "int8": [1.0]}},
            {**asked, "peer": "hf_compress", "architectures": kinds},
            {**asked, "peer": "torch-pruning", "architectures": failed},
            {"peer": "modelopt", "kind": "quantize", "variant": "qat", "sparsity": 0.0, "seed": 0,
             "failed": "ValueError"},
        ],
    }  # fmt: skip


def test_tables_and_winners_come_from_the_numbers(load) -> None:
    made = load("peers_report")
    text = made.report(results(0.68, 0.60), "![picture](x.png)")
    row = "hf_compress: taylor while training, with a teacher | 40.0 | 68.0 | 50.0 % | 2.50x | 2.0"
    assert f"| {row} | after `import hf_compress` | 1.00 | 0.50 | +1 MiB |" in text
    assert "ours is ahead by 8.0 points" in text
    assert f"shortest cut, 50%: {OWN} 1.00 s, Torch-Pruning: taylor 0.50 s: **the peer wins**." in text
    assert "int8, speed beside fp32 eager: ours 4.00, OpenVINO: ptq 8.00: **the peer wins**." in text
    assert "| handled | 2 of 2 | 1 of 2 |" in text
    assert "- Torch-Pruning, T5: ValueError: no" in text
    assert "NNI is left out: needs Python 3.10, which is not here" in text
    assert "ModelOpt: trained, with a teacher, quantize: failed, ValueError" in text
    assert "70.0 % on 1,000 examples" in text and "75.0 % when it is trained on" in text


@pytest.mark.parametrize(
    ("ours", "theirs", "said"), [(0.60, 0.68, "**the peer wins** by 8.0"), (0.6, 0.605, "**even**")]
)
def test_it_says_when_a_peer_wins(load, ours, theirs, said) -> None:
    text = load("peers_report").compared(results(ours, theirs))
    assert f"- 50% sparse: hf_compress: taylor while training, with a teacher reaches {100 * ours:.1f} %" in text
    assert said in text
    assert "- NNI: needs Python 3.10" in text


def test_means_over_seeds_decide_and_not_the_luckiest_seed(load) -> None:
    made, data = load("peers_report"), results(0.70, 0.60)
    lucky = {**pruned("torch-pruning", "taylor", 0.74, prune_seconds=0.5), "seed": 1}
    data["runs"] += [{**pruned("hf_compress", "default", 0.72), "seed": 1}, lucky]
    text = made.compared(data)
    assert f"{OWN} reaches 71.0 %, the best peer (Torch-Pruning: taylor) 67.0 %: ours is ahead by 4.0 points" in text
    assert "Pruned models: means over 2 seeds." in text
    assert "Pruned models: one seed." in made.compared(results(0.70, 0.60))


def test_a_lead_has_to_be_more_than_the_standard_error_of_a_difference(load) -> None:
    """Of two accuracies on 1,000 examples, which is 1.4 times that of one."""
    text = load("peers_report").compared(results(0.66, 0.642))
    assert "**even**, 1.8 points are within one standard error of a difference, 2.1" in text


def test_the_advised_way_is_compared_even_where_another_of_ours_is_cheaper(load) -> None:
    data = results(0.70, 0.60)
    data["runs"].append({**pruned("hf_compress", "l2", 0.5), "step_seconds": {"method": 0.2, "plain": 1.0}})
    text = load("peers_report").compared(data)
    assert "cheapest training step, 50%: hf_compress: l2, at once 0.20 of a plain one" in text
    assert f"cheapest training step, 50%: {OWN} 0.50 of a plain one" in text


def call(bench, monkeypatch, path, *more) -> None:
    sizes = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["peers.py", "--json", str(path), "--model", "unused", *sizes, *more])
    bench.main()


def test_it_goes_on_where_it_was_and_keeps_failures(load, tmp_path, monkeypatch, capsys) -> None:
    bench, path = load("peers"), tmp_path / "out" / "peers.json"
    done: list[tuple[str, str]] = []

    def do(python, key, settings, cache, model):
        done.append((key["peer"], key["variant"]))
        if key["variant"] == "taylor":
            return {"failed": "ValueError: once"}
        result = pruned(key["peer"], key["variant"], 0.6)
        return {name: value for name, value in result.items() if name not in key}

    monkeypatch.setattr(bench, "do", do)
    monkeypatch.setattr(bench, "install", lambda peer, folder: (Path("python"), ""))
    only = ("--peers", "torch-pruning", "--kinds", "prune", "--sparsities", "0.5")
    call(bench, monkeypatch, path, *only)
    assert [variant for _, variant in done] == ["", *bench.PEERS["torch-pruning"].prune]
    call(bench, monkeypatch, path, *only)
    assert len(done) == 4
    call(bench, monkeypatch, path, *only, "--retry")
    assert done[4:] == [("torch-pruning", "taylor")]
    data = json.loads(path.read_text())
    assert len(data["runs"]) == 4 and data["settings"] == SETTINGS
    assert "failed, ValueError: once" in path.with_suffix(".md").read_text(encoding="utf-8")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="results of other settings"):
        call(bench, monkeypatch, path, *only, "--steps", "7")


def test_rows_stand_in_the_order_of_the_peers_whenever_they_were_run(load) -> None:
    found = load("peers_report")
    ways = [("torch-pruning", "taylor"), ("hf_compress", "l2"), ("torch-pruning", "magnitude"), ("hf_compress", "even")]
    runs = [pruned(*way, 0.6) for way in ways]
    ordered = [(run["peer"], run["variant"]) for run in found.good({"runs": runs}, "prune")]
    assert ordered == [ways[3], ways[1], ways[2], ways[0]]


def test_a_peer_that_does_not_install_is_skipped_with_the_reason(load, tmp_path, monkeypatch, capsys) -> None:
    bench, known = load("peers"), load("peers_list")
    path = tmp_path / "peers.json"
    broken = known.Peer("Broken", "with_broken.py", (str(tmp_path / "not_there.whl"),), ("broken",), prune=("l1",))
    monkeypatch.setitem(bench.PEERS, "torch-pruning", broken)
    monkeypatch.setenv("HF_COMPRESS_CACHE", str(tmp_path / "cache"))
    call(bench, monkeypatch, path, "--peers", "torch-pruning")
    reason = json.loads(path.read_text())["skipped"]["torch-pruning"]
    assert "not_there.whl" in reason and reason.startswith("ERROR")
    assert f"without torch-pruning: {reason}" in capsys.readouterr().err
    assert f"Broken is left out: {reason}" in path.with_suffix(".md").read_text(encoding="utf-8")


def test_a_python_that_is_not_here_is_a_reason(load, tmp_path) -> None:
    known = load("peers_list")
    peer = known.Peer("Old", "with_old.py", ("old",), python="1.5")
    assert known.install(peer, tmp_path) == (None, "needs Python 1.5, which is not here")
    assert known.interpreter(f"{sys.version_info.major}.{sys.version_info.minor}")


def test_the_readme_holds_what_was_measured(load) -> None:
    bench = load("peers")
    measured = bench.ROOT / "model_cards" / "benchmarks" / "peers.json"
    data = json.loads(measured.read_text(encoding="utf-8"))
    bench.readme(measured, data, check=True)
    data["skipped"]["nni"] = "another reason"
    with pytest.raises(SystemExit, match="the comparison differs"):
        bench.readme(measured, data, check=True)


def job_of(load, tmp_path, **more):
    common = load("common")
    generator = numpy.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 12), ("test", 8)):
        arrays[f"{part}_input_ids"] = generator.integers(3, 60, (count, 6))
        arrays[f"{part}_attention_mask"] = numpy.ones((count, 6), dtype=numpy.int64)
        arrays[f"{part}_lengths"] = numpy.array([6, 4] * (count // 2))
        arrays[f"{part}_labels"] = numpy.arange(count) % 2
    numpy.savez(tmp_path / "data.npz", **arrays)
    tiny_models.bert(num_labels=2).save_pretrained(tmp_path / "dense")
    given = {"settings": SETTINGS, "dense": str(tmp_path / "dense"), "data": str(tmp_path / "data.npz"), **more}
    (tmp_path / "job.json").write_text(json.dumps(given))
    return common.Job(tmp_path / "job.json")


def test_what_differs_less_than_from_run_to_run_is_even(load) -> None:
    data, module = results(0.68, 0.6), load("peers_report")
    for run in data["runs"]:
        if run["kind"] == "prune":
            run["prune_seconds"] = 0.9 if run["peer"] == "hf_compress" else 0.6
    text = module.compared(data)
    assert f"shortest cut, 50%: {OWN} 0.90 s, Torch-Pruning: taylor 0.60 s: **even**, the same code differs" in text


def test_layers_alike_are_compared_on_their_own(load) -> None:
    data = results(0.68, 0.6)
    data["runs"].append(pruned("hf_compress", "even", 0.5))
    text = load("peers_report").compared(data)
    assert "- 50% sparse: hf_compress: taylor, at once, all layers alike reaches 50.0 %" in text


@pytest.mark.parametrize("variant", ["l2", "default"])
def test_our_worker_prunes_trains_and_saves(load, tmp_path, variant) -> None:
    job = job_of(load, tmp_path, kind="prune", variant=variant, sparsity=0.5)
    found = load("with_hf_compress").pruning(job)
    assert found["encoder_parameters"] < 0.8 * found["dense_encoder_parameters"]
    assert set(found["milliseconds"]) == {"dense", "pruned"} and len(found["milliseconds"]["pruned"]) == 2
    assert (found["before"] is None) == (variant == "default")
    assert found["bytes"] > 0 and found["peak_bytes"] > 0
    reload = load("reload")
    assert reload.loaded(tmp_path, "hf_compress") == {"loads": True}


def test_everybody_gets_the_same_batches(load, tmp_path) -> None:
    job = job_of(load, tmp_path, kind="prune", variant="l2", sparsity=0.5)
    assert [len(batch["labels"]) for batch in job.batches("train")] == [4, 4, 4]
    first = job.batches("train")[0]
    assert first["labels"].tolist() == [0, 1, 0, 1]
    assert first["input_ids"][1, 4:].tolist() == [0, 0] == first["attention_mask"][1, 4:].tolist()
    assert [batch["input_ids"].shape[1] for batch in job.batches("test")] == [6]


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_heads_and_units_add_up_to_the_sparsity(load, sparsity) -> None:
    heads, units = load("common").targets(sparsity)
    assert (heads / 12 + 2 * units / 1536) / 3 == pytest.approx(1 - sparsity, abs=1e-3)


def test_verdicts_on_architectures(load) -> None:
    made, ours = load("architectures"), load("with_hf_compress")
    assert made.verdict("BERT", ours.cut) == {"outcome": "handled", "about": ""}
    assert made.verdict("BERT", lambda request: request.model)["outcome"] == "wrong"

    def masked(request):
        with torch.no_grad():
            for name in request.readers():
                weight = request.model.get_submodule(name).weight
                weight[:, : weight.shape[1] // 2] = 0
        return request.model

    assert made.verdict("BERT", masked)["outcome"] == "partly"

    def raises(request):
        raise KeyError("no")

    assert made.verdict("BERT", raises) == {"outcome": "error", "about": "KeyError: 'no'"}
    made.ARCHITECTURES["Future"] = ("FutureConfig", "FutureModel", {})
    assert made.verdict("Future", raises)["outcome"] == "absent"


@pytest.mark.parametrize(
    "name", ["DeBERTa-v2", "GPT-2", "Llama (GQA)", "Mixtral", "T5", "BART", "Swin", "ViT", "Whisper"]
)
def test_every_architecture_names_what_goes(load, name) -> None:
    request = load("architectures").Request(name)
    assert request.attention and (request.feed_forward or name == "Mixtral")
    with torch.no_grad():
        difference = (request.tensor(request.model(**request.inputs)) - request.expected).abs().max()
    assert difference > 1e-3
    assert request.removed() > 0
