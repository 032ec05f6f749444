"""The whole-step benchmark: its search, its sorting of kernels, its page; and, marked slow, one tiny run of all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "appliance", ROOT / "kernels", ROOT / "kernels" / "benchmarks"]


@pytest.fixture(autouse=True)
def steps_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDERS[-1]))


@pytest.mark.parametrize("limit", [300, 5000, 78_475, 400_000])
@pytest.mark.parametrize("start", [1024, 65_536, 1_000_000])
def test_the_search_finds_the_limit(limit, start):
    from steps.longest import search

    tried: list[int] = []

    def trains(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = search(trains, start=start, resolution=0.02, growth=1.5, most=1_048_576, allowed=lambda length: True)
    assert found <= limit and limit - found <= max(512, 0.03 * limit)
    assert len(tried) == len(set(tried)) <= 30 and all(length % 256 == 0 for length in tried)


def test_the_search_stops_when_there_is_no_time_and_at_the_most():
    from steps.longest import search

    options = {"start": 1024, "resolution": 0.02, "growth": 2.0, "most": 8192}
    assert search(lambda length: True, allowed=lambda length: length < 3000, **options) == 2048
    assert search(lambda length: True, allowed=lambda length: True, **options) == 8192
    assert search(lambda length: False, allowed=lambda length: True, **options) == 0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_NNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix product"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob", "attention"),
        ("packed_attention_forward_kernel", "attention"),
        ("nf4_group_kernel", "dequantise"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequantise"),
        ("rms_norm_forward_kernel", "norm, rotation, activation"),
        ("heads_backward_kernel", "norm, rotation, activation"),
        ("sink_backward_kernel", "attention"),
        ("_adamw_kernel", "optimizer"),
        ("packed_query_kernel", "attention"),
        ("shared_row_loss_kernel", "loss"),
        ("Memcpy DtoH (Device -> Pinned)", "copy to or from the host"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "other memory-bound"),
        ("ncclDevKernel_AllReduce_Sum", "between GPUs"),
        ("spin_kernel", "other"),
    ],
)  # fmt: skip
def test_kernels_are_sorted_by_name(kernel, kind):
    from _kernel_kinds import kind_of

    assert kind_of(kernel) == kind


def test_overlapping_kernels_count_once():
    from _kernel_kinds import summary, union

    assert union([(0, 10), (5, 12), (20, 21), (20.5, 20.7)]) == 13
    text = summary([("nvjet_a", 30.0, 3), ("memset", 10.0, 5)], step_ms=50.0, busy_ms=38.0)
    assert "75.0%" in text and "step 50.0 ms" in text


def test_out_of_memory_steps_back_until_it_fits_or_cannot(monkeypatch):
    import torch
    from steps import measure
    from steps.engines import Loaded
    from steps.models import BatchShape

    failures = iter([True, True, False])

    def timed(*arguments: object, **options: object) -> dict[str, object]:
        if next(failures):
            raise torch.OutOfMemoryError("no memory")
        return {"step_ms": 1.0}

    monkeypatch.setattr(measure, "_timed", timed)
    monkeypatch.setattr(measure, "Bench", lambda loaded, shape: None)
    plans = iter([{"memory_plan": "second"}, {"memory_plan": "third"}, None])
    loaded = Loaded(
        torch.nn.Linear(1, 1), "cpu", prepare=lambda shape: {"memory_plan": "first"}, retreat=lambda: next(plans)
    )
    row = measure.measure(loaded, BatchShape(1, 8), seconds=1, deadline=0)
    assert row == {"batch": 1, "length": 8, "memory_plan": "third", "status": "ok", "step_ms": 1.0}
    failures = iter([True])
    assert measure.measure(loaded, BatchShape(1, 8), seconds=1, deadline=0)["status"] == "oom"


def rows() -> list[dict[str, object]]:
    def step(engine: str, setting: str, speed: float, gib: float, **more: object) -> dict[str, object]:
        return {
            "kind": "step", "model": "llama-3.1-8b", "layers": 32, "engine": engine, "setting": setting, "weights": "nf4",
            "batch": 8, "length": 2048, "status": "ok", "tok_per_s": speed, "step_ms": 16384e3 / speed, "gpu": "G",
            "peak_allocated_gib": gib, "commit": "abc", **more,
        }  # fmt: skip

    return [
        step("ours", "planner", 18000.0, 60.0),
        step("unsloth", "", 10000.0, 10.0, peer="unsloth 1"),
        step("ours", "planner", 20000.0, 60.0),
        step("ours", "equal", 12000.0, 11.0),
        step("ours", "recompute", 11990.0, 13.0),
        {"kind": "longest", "engine": "ours", "setting": "planner", "weights": "nf4", "card_gib": 24.0, "batch": 1,
         "length": 120_064, "status": "longest", "tok_per_s": 3000.0, "gpu": "G"},
    ]  # fmt: skip


def test_the_page_tells_met_and_missed(tmp_path):
    from _kernel_kinds import summary
    from steps.page import table
    from steps.records import append
    from steps.report import page

    for row in rows():
        append(tmp_path / "steps.csv", row)
    (tmp_path / "steps-notes.md").write_text("## Notes\n\nwhy it was missed\n")
    table_of_kinds = summary([("nvjet_a", 30.0, 3)], step_ms=50.0, busy_ms=30.0)
    (tmp_path / "profile-ours-nf4-8x2048.txt").write_text(f"common\nversions\n8x2048: 32 keep\n{table_of_kinds}\n")
    text = page(tmp_path / "steps.csv")
    assert "8x2048: 32 keep" in text and "matrix product" in text and "longest kernels" not in text
    assert "| QLoRA, planner, 8x2048 | 1.45 x Unsloth | 1.90 x (`ours:planner`) | 60.0 / 10.0 GiB | met |" in text
    assert (
        "| QLoRA, Unsloth's recompute policy, 8x2048 | 1.1 x Unsloth, at most its memory | 1.20 x (`ours:equal`) | 11.0 / 10.0 GiB | **missed** |"
        in text
    )
    assert "| offloaded layer inputs, nf4, 8x2048 | at most 0.5% slower | -0.08% | | met |" in text
    assert "| longest context, QLoRA, 24 GiB emulated | 100,000 tokens | 120,064 tokens | | met |" in text
    assert "bf16 LoRA, planner, 8x2048 | 1.45 x Unsloth | not measured | | open |" in text
    assert "why it was missed" in text
    assert "1.90" in table(tmp_path / "steps.csv")


def test_the_page_in_the_documentation_is_that_of_the_latest_rows():
    from steps.report import DOCS, PAGE, page

    latest = sorted((FOLDERS[-1] / "results").glob("*-steps.csv"))[-1]
    assert (DOCS / PAGE).read_text() == page(latest) + "\n", f"python -m steps publish {latest.name} mends this"


def test_publishing_writes_the_page(tmp_path, monkeypatch):
    from steps import report
    from steps.records import append

    def no_plot(path):
        raise ModuleNotFoundError("matplotlib")

    for row in rows():
        append(tmp_path / "steps.csv", row)
    (tmp_path / "reference").mkdir()
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "plot", no_plot)
    assert "no plot" in report.publish(tmp_path / "steps.csv")
    assert (tmp_path / report.PAGE).read_text() == report.page(tmp_path / "steps.csv") + "\n"


def test_an_unknown_column_is_refused(tmp_path):
    from steps.records import append

    with pytest.raises(KeyError, match="speed"):
        append(tmp_path / "x.csv", {"speed": 1})


def test_engines_and_processes():
    from steps.models import parse_engines, parse_shapes, same_process

    engines = parse_engines("ours,ours:equal,unsloth,ours:ops,ours")
    assert same_process(engines) == [["ours:planner", "ours:equal"], ["unsloth"], ["ours:ops"], ["ours:planner"]]
    assert [shape.tokens for shape in parse_shapes("2x2048,1x32768")] == [4096, 32768]
    with pytest.raises(SystemExit, match="sloth"):
        parse_engines("sloth")


def test_each_engine_finds_its_own_packages_alone():
    from steps.__main__ import _environment, parser

    args = parser().parse_args(["run", "--peer-path", "/peers", "--ours-path", "/fa4:/dsl"])
    paths = {engine: _environment(args, engine)["PYTHONPATH"] for engine in ("ours:lean", "unsloth", "liger", "hf")}
    assert paths["ours:lean"].startswith("/fa4:/dsl:") and "/peers" not in paths["ours:lean"]
    assert all(paths[peer].startswith("/peers:") and "/fa4" not in paths[peer] for peer in ("unsloth", "liger"))
    assert "/peers" not in paths["hf"] and "/fa4" not in paths["hf"]


@pytest.mark.slow
def test_a_tiny_run_of_everything(tmp_path):
    command = [sys.executable, "-P", "-m", "steps", "run", "--tiny", "--device", "cpu", "--weights", "nf4",
               "--engines", "ours,ours:equal,hf", "--shapes", "2x32", "--seconds", "0.5", "--work", str(tmp_path / "work"),
               "--out", str(tmp_path / "out.csv")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(map(str, FOLDERS)), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    from steps.records import read

    found = read(tmp_path / "out.csv")
    assert [(row["engine"], row["setting"], row["status"]) for row in found] == [
        ("ours", "planner", "ok"), ("ours", "equal", "ok"), ("hf", "", "ok"),
    ]  # fmt: skip
    assert all(row["parity"].startswith("ok") for row in found[:2])
    losses, norms = ([float(row[column]) for row in found] for column in ("loss", "grad_norm"))
    assert max(losses) - min(losses) < 2e-3 * losses[0] and max(norms) - min(norms) < 0.01 * norms[0]
    assert all(float(row["host_ms"]) > 0 and int(row["steps"]) >= 3 for row in found)
