"""`training/bench.py` on a CPU: every row is there, figures agree with one another, and options did what their labels say."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from training import bench, benching
from training.bench_cases import CASES, Case, Settings, candidates, case_of, variations
from training.bench_report import Report, data_sheet_tflops
from training.parallel.hardware import accelerator
from training.parallel.offload import Offload
from training.parallel.overlap import read_trace
from training.parallel.rates import rates_of
from waver_core.dit import preset
from waver_core.dit.flops import step_flops
from waver_core.errors import UserError
from waver_core.shapes import VideoShape

CPU = torch.device("cpu")
NARROW = preset("waver_12b", heads=4, head_dim=32, text_dims=(64, 96), dual_blocks=1, single_blocks=2, full_blocks=1)


def run(*words):
    result = CliRunner().invoke(bench.app, ["--quick", "--repeats", "2", "--device", "cpu", *words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A whole run without the compiler, which has a test of its own; and which blocks it would have compiled."""
    folder = tmp_path_factory.mktemp("bench")
    compiled = []
    patch = pytest.MonkeyPatch()
    patch.setattr(benching, "compile_block", lambda block, backend: compiled.append(backend))
    count = benching.Bench._attention_calls
    patch.setattr(benching.Bench, "_attention_calls", lambda self, step, compiled: count(self, step, False))
    torch.set_num_threads(1)
    try:
        printed = run("--output", str(folder / "figures.json"), "--trace", str(folder / "traces"))
    finally:
        patch.undo()
    return json.loads((folder / "figures.json").read_text()), printed, compiled, folder


def rows_of(figures, name):
    (case,) = (c for c in figures["cases"] if c["name"] == name)
    return case, {json.dumps(row["settings"]): row for row in case["rows"]}


def row_with(rows, **settings):
    return rows[json.dumps(vars(Settings(**settings)))]


def forwards(row):
    return sum(count for name, count in row["attention_calls"].items() if not name.endswith("_backward"))


def test_every_case_has_its_rows_and_none_failed(ran):
    figures, printed, compiled, _ = ran
    assert [case["name"] for case in figures["cases"]] == list(CASES)
    for case in figures["cases"]:
        assert [row["error"] for row in case["rows"]] == [None] * len(case["rows"])
        asked = [row["option"] for row in case["rows"]]
        assert asked[:3] == ["checkpointing"] * 3
        assert {"compile", "offload"} <= set(asked)
        assert ("packing" in asked) == (case["samples"] > 1)
        assert ("windows" in asked) == (case["name"] == "1080p")
        for row in case["rows"]:
            assert row["label"] in printed or len(row["label"]) > 45
    compiled_rows = sum(row["settings"]["compile"] for case in figures["cases"] for row in case["rows"])
    assert compiled == ["aot_eager"] * (3 * compiled_rows)


def test_figures_agree_with_one_another(ran):
    figures = ran[0]
    assert figures["peak_from"] == "measured matrix product"
    assert figures["peak_tflops"] == figures["ceilings"]["matmul_tflops"] > 0
    for told in figures["cases"]:
        flops, ceilings = told["flops"], told["ceilings"]
        assert flops["linear"] + flops["attention"] + flops["modulation"] + flops["embedding"] == flops["forward"]
        assert flops["training"] == 3 * flops["forward"]
        case = case_of(told["name"], quick=True)
        for row in told["rows"]:
            windowed = row["settings"]["windowed"]
            count = step_flops(replace(NARROW, windowed=windowed), case.shapes, case.text_lengths)
            assert windowed != told["windowed"] or count.training == flops["training"]
            step_s = row["step_ms"] / 1e3
            assert row["mfu"] == pytest.approx(count.training / step_s / 1e12 / figures["peak_tflops"], rel=1e-3)
            attention = count.attention / ceilings["attention_forward_tflops"]
            attention += 2 * count.attention / ceilings["attention_backward_tflops"]
            products = 3 * (count.forward - count.attention) / figures["ceilings"]["matmul_tflops"]
            assert row["share_of_ceiling"] == pytest.approx((attention + products) / 1e12 / step_s, rel=1e-3)
            assert all(math.isfinite(t) and t > 0 for t in row["steps_ms"])
            assert row["peak_memory_gib"] is None  # a CPU does not tell
        fastest = min(row["step_ms"] for row in told["rows"] if row["settings"]["windowed"] == told["windowed"])
        assert told["best"]["step_ms"] == fastest


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_computes_attention_twice_in_full_only(ran, name):
    _, rows = rows_of(ran[0], name)
    windowed = name == "1080p"
    none, selective, full = (
        forwards(row_with(rows, checkpointing=mode, windowed=windowed)) for mode in ("none", "selective", "full")
    )
    assert none == selective == full / 2
    if name in ("480p", "720p"):
        assert none == 3  # blocks


def test_offloading_moves_bytes_and_leaves_a_trace(ran):
    figures, _, _, folder = ran
    for case in figures["cases"]:
        for row in case["rows"]:
            assert ("offloaded_gib" in row) == row["settings"]["offload"]
            if row["settings"]["offload"]:
                assert row["offloaded_gib"] > 0
                assert read_trace(folder / "traces" / row["trace"])
                assert row["overlap"]["hidden_share"] is None  # no stream of its own on a CPU
    _, rows = rows_of(figures, "480p")
    all_kept, selective = (row_with(rows, checkpointing=mode, offload=True) for mode in ("none", "selective"))
    assert all_kept["offloaded_gib"] > 1.5 * selective["offloaded_gib"]


def test_packing_switched_off_runs_every_sample_alone(ran):
    case, rows = rows_of(ran[0], "192p")
    alone = next(row for row in rows.values() if not row["settings"]["packed"])
    again = 2 if alone["settings"]["checkpointing"] == "full" else 1
    assert forwards(alone) == case["samples"] * 3 * again
    packed = row_with(rows, checkpointing=alone["settings"]["checkpointing"])
    assert forwards(packed) < forwards(alone)  # groups of like length


def test_windows_switched_off_is_full_attention(ran):
    case, rows = rows_of(ran[0], "1080p")
    full = next(row for row in rows.values() if not row["settings"]["windowed"])
    windowed = rows[json.dumps({**full["settings"], "windowed": True})]
    again = 2 if full["settings"]["checkpointing"] == "full" else 1
    assert forwards(full) == 3 * again
    assert forwards(windowed) > 3 * again  # windows of two sizes and the text
    assert case["window_gain"] == pytest.approx(full["step_ms"] / windowed["step_ms"], rel=1e-3)


def test_the_cost_model_reads_what_was_measured(ran):
    figures, _, _, folder = ran
    rates = rates_of(accelerator("H200"), str(folder / "figures.json"))
    assert rates.matmul.value == pytest.approx(figures["ceilings"]["matmul_tflops"] * 1e12)
    longest = figures["cases"][-1]["ceilings"]
    assert rates.attention_backward.value == pytest.approx(longest["attention_backward_tflops"] * 1e12)
    assert rates.memory.source.startswith("measured")


def test_compiled_blocks_are_graphs_and_eager_ones_are_not():
    case = case_of("480p", quick=True)
    measuring = benching.Bench(CPU, torch.float32, repeats=1, compiler="aot_eager")
    graph = measuring.row(case, NARROW, Settings(compile=True))
    assert graph["error"] is None
    assert graph["graphs"] == 2  # one for each kind of block
    assert "graphs" not in measuring.row(case, NARROW, Settings(compile=False))


def test_without_a_choice_the_least_recomputation_that_runs_is_taken(monkeypatch, tmp_path):
    tried = []

    def measured(self, case, config, settings):
        tried.append(settings.checkpointing)
        if settings.checkpointing == "none":
            raise torch.OutOfMemoryError("no more")
        return {"step_ms": 1.0}

    monkeypatch.setattr(benching.Bench, "_measured", measured)
    monkeypatch.setattr(bench, "print_case", lambda console, case: None)
    path = tmp_path / "figures.json"
    run("--cases", "480p", "--options", "compile", "--output", str(path))
    assert tried == ["none", "selective", "selective"]
    assert json.loads(path.read_text())["cases"][0]["rows"][0]["error"] == "out of memory"


def test_a_row_that_fails_is_told_and_the_next_one_runs(monkeypatch):
    wrap = Offload.wrap
    failures = iter([torch.OutOfMemoryError("no more"), ValueError("two\nlines")])

    def fail(self, block):
        raise next(failures)

    case, measuring = case_of("480p", quick=True), benching.Bench(CPU, torch.float32, repeats=1)
    monkeypatch.setattr(Offload, "wrap", fail)
    assert measuring.row(case, NARROW, Settings(compile=False, offload=True))["error"] == "out of memory"
    assert measuring.row(case, NARROW, Settings(compile=False, offload=True))["error"] == "ValueError: two lines"
    monkeypatch.setattr(Offload, "wrap", wrap)
    assert measuring.row(case, NARROW, Settings(compile=False, offload=True))["error"] is None


def test_a_file_goes_on_with_other_cases_and_refuses_another_machine(tmp_path):
    path = tmp_path / "figures.json"
    for case in ("480p", "720p", "480p"):
        run("--cases", case, "--options", "compile", "--max-minutes", "1e-9", "--output", str(path))
    figures = json.loads(path.read_text())
    assert [case["name"] for case in figures["cases"]] == ["720p", "480p"]
    assert {row["error"] for case in figures["cases"] for row in case["rows"]} == {"left out: --max-minutes"}
    assert figures["command"].count(";") == 2
    path.write_text(json.dumps({**figures, "versions": {"torch": "1.0"}}))
    with pytest.raises(UserError, match="another versions: give another --output"):
        Report.begin(path, CPU, figures["model"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cases", "480"], "did you mean '480p'"),
        (["--options", "ofload"], "did you mean 'offload'"),
        (["--options", " , "], "is empty"),
        (["--blocks", "2x5"], "as 2,5"),
        (["--device", "tpu"], "cuda or cpu"),
        (["--compiler", "gcc"], "known: aot_eager, inductor"),
    ],
)
def test_wrong_words_are_one_line(words, told):
    with pytest.raises(UserError, match=told):
        run(*words)


def test_cases_are_what_the_stages_train():
    pack = case_of("192p")
    assert len(set(pack.lengths)) > 3
    assert 0.9 * 65_536 < sum(pack.lengths) <= 65_536
    assert {s[1:] for s in pack.shapes} == {(24, 44)}
    for name, pixels in (("480p", (77, 480, 864)), ("720p", (117, 720, 1280)), ("1080p", (69, 1080, 1920))):
        case = case_of(name)
        assert case == Case(name, (VideoShape(*pixels).latent,), ((256, 256),), windowed=name == "1080p")
        wide = preset("waver_12b", windowed=case.windowed)
        assert all(n <= most for n, most in zip(case.shapes[0].grid, wide.max_grid, strict=True))


def test_a_gpu_is_also_asked_for_each_kernel():
    cuda = torch.device("cuda")
    names = {s.attention for _, s in variations(case_of("720p"), candidates(case_of("720p"))[0], cuda)}
    assert names == {"default", "cudnn", "flash", "efficient"}
    for name in ("192p", "1080p"):
        case = case_of(name)
        assert {s.attention for _, s in variations(case, candidates(case)[0], cuda)} == {"default", "each", "padded"}


@pytest.mark.parametrize("name", ["each", "padded"])
def test_ways_around_the_kernel_for_variable_lengths_compute_the_same(name):
    torch.manual_seed(0)
    from waver_core.dit import attention as module

    plan = module.AttentionPlan((7, 4, 6), (9, 4, 8))
    q, k, v = (torch.randn(n, 2, 8) for n in (17, 21, 21))
    expected = module.segmented(q, k, v, plan)
    before = module._variable_length
    with benching.attention_by(name):
        assert module._variable_length is not before
        torch.testing.assert_close(module._variable_length(q, k, v, plan), expected)
    assert module._variable_length is before


def test_blocks_fill_the_memory_in_the_models_ratio(monkeypatch):
    config, cuda = preset("waver_12b"), torch.device("cuda")
    found = {}
    for gib in (40, 80, 140):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gib=gib: (gib * 2**30, gib * 2**30))
        found[gib] = bench.fitting_blocks(config, case_of("480p"), cuda, 790.0)
    assert found[40][0] < found[80][0] < found[140][0]
    assert all(2 * single == 5 * dual for dual, single in found.values())
    assert bench.with_blocks(config, case_of("1080p"), "2,5", cuda, 790.0, quick=False).full_blocks == 1
    with pytest.raises(UserError, match="--quick"):
        bench.fitting_blocks(config, case_of("480p"), CPU, 790.0)


def test_data_sheets_are_those_of_the_form_that_was_measured():
    assert data_sheet_tflops("NVIDIA H200") == data_sheet_tflops("NVIDIA H100 80GB HBM3") == 989
    assert data_sheet_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert data_sheet_tflops("NVIDIA H100 PCIe") is None
    assert data_sheet_tflops("NVIDIA H100 NVL") is None
    assert data_sheet_tflops("AMD EPYC") is None


def test_it_needs_torch_and_a_terminal_only():
    told = "import training.bench, sys; print(sorted({'ray', 'av', 'cv2', 'pyarrow', 'pydantic', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.strip() == "[]"
