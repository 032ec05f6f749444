"""Measures the operations against torch, torch.compile, Liger and Unsloth, and writes one CSV and one plot.

    PYTHONPATH=kernels python kernels/benchmarks/runner.py run --out DIR [--ops rms_norm,rope] [--engines base,liger]
    python kernels/benchmarks/runner.py plot DIR/FILE.csv     # pictures beside the file
    python kernels/benchmarks/runner.py docs DIR/FILE.csv     # the tables of the two results pages

Each file beside this one has ``cases(engines)``, a generator of ``Case``. Every engine runs in its own process
("base" = ours, torch and torch.compile; each peer alone; "again" = ours once more, last, so that a drift of the machine
shows). Each process first measures what a copy and a bf16 matrix product reach; shares are of the same process's
numbers. A case of ours whose parity check fails gets no speed.

Two times per row. ``gpu_us``: between two events, with the host's launches queued behind a spinning kernel, caches
flushed before each repeat, so it is the GPU's work alone. ``host_us``: what the call costs the host until it returns
(at small shapes this is the step's time).

``warm --part I/N`` runs every N-th case of an engine once without timing: started N times side by side before ``run``,
it fills the compilers' caches.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shape:
    """The sizes of one model that the operations see."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = (
    Shape("llama-8b", 4096, 14336, 32, 8, 128, 128256),
    Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936),
    Shape("gemma-3-4b", 2560, 10240, 8, 4, 256, 262208),
)
TOKENS = (1024, 4096, 16384, 32768)


@dataclass(frozen=True)
class Case:
    """One measured point. ``providers`` maps a provider's name to a call without arguments that does the work once.

    ``engines`` as given to ``cases``: {"ours", "torch", "compile"} or {"liger"} or {"unsloth"}; a case builds only
    those providers. ``bytes`` = the fewest bytes the operation must move (each input read once, each output written
    once), ``flops`` = the fewest floating-point operations; one of them is the yardstick. ``check`` raises when ours
    is wrong at this very shape. ``memory`` (optional) adds a column of peak extra GPU memory in bytes, measured by
    the runner around one call.
    """

    op: str
    direction: str
    shape: str
    tokens: int
    dtype: torch.dtype
    providers: Mapping[str, Callable[[], object]]
    bytes: int | None = None
    flops: int | None = None
    check: Callable[[], object] | None = None
    memory: bool = False


COLUMNS = (
    *("op", "direction", "shape", "tokens", "dtype", "provider", "gpu_us", "gpu_us_p20", "gpu_us_p80", "host_us"),
    *("gb_per_s", "share_of_copy", "tflop_per_s", "share_of_product", "extra_mib", "status", "engine_process"),
    *("copy_gb_per_s", "product_tflop_per_s", "gpu", "torch", "triton", "provider_version", "commit"),
)


SLOW_MS, SLOW_REPEATS = 4.0, 7
"""Calls that take longer are repeated less often: their times differ less from each other."""


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def gpu_times(call: Callable[[], object], repeats: int = 15) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the GPU's time for one call, in microseconds."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")  # 256 MiB, several times the L2 cache
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    repeats = repeats if _milliseconds(call) < SLOW_MS else SLOW_REPEATS
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host queues the whole call
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
    times = sorted(1e3 * s.elapsed_time(e) for s, e in pairs)
    return statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5]


def host_time(call: Callable[[], object], repeats: int = 30) -> float:
    """Median time until the call returns to Python, in microseconds, with an idle GPU and an empty launch queue."""
    times = []
    repeats = repeats if _milliseconds(call) < SLOW_MS else SLOW_REPEATS
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def extra_memory(call: Callable[[], object]) -> int:
    """Peak bytes allocated during one call beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> tuple[float, float]:
    """(GB/s of a device-to-device copy counting both directions, TFLOP/s of an 8192^3 bf16 product on random
    data).
    """
    source = torch.randn(1 << 29, device="cuda", dtype=torch.float32)  # 2 GiB
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / gpu_times(partial(target.copy_, source))[0] / 1e3
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / gpu_times(lambda: a @ b)[0] / 1e6
    return copy, product


def copy_of(nbytes: int) -> Callable[[], object]:
    """A device-to-device copy that moves ``nbytes`` in all, read and written: what is possible at a case's own size."""
    source = torch.randn(max(nbytes // 8, 1), device="cuda", dtype=torch.float32)
    return partial(torch.empty_like(source).copy_, source)


def measure(case: Case, common: dict[str, object]) -> Iterator[dict[str, object]]:
    """One row per provider of the case."""
    status = "ok"
    if case.check is not None and "ours" in case.providers:
        try:
            case.check()
        except AssertionError as error:
            status = f"parity failed: {error}"
    providers = dict(case.providers)
    if "ours" in providers and case.bytes is not None:
        providers["copy"] = copy_of(case.bytes)
    for provider, call in providers.items():
        row: dict[str, object] = {
            **common,
            "op": case.op,
            "direction": case.direction,
            "shape": case.shape,
            "tokens": case.tokens,
            "provider": provider,
            "dtype": str(case.dtype).removeprefix("torch."),
            "status": status if provider == "ours" else "ok",
        }
        if row["status"] == "ok":
            try:
                row |= _speeds(case, call, common)
            except (
                RuntimeError,
                TypeError,
                ValueError,
            ) as error:  # a peer that cannot run a shape is a result, not the end of the run
                row["status"] = f"error: {str(error).splitlines()[0][:200]}"
        yield row


def _speeds(case: Case, call: Callable[[], object], common: dict[str, object]) -> dict[str, object]:
    median, low, high = gpu_times(call)
    row: dict[str, object] = {"gpu_us": median, "gpu_us_p20": low, "gpu_us_p80": high, "host_us": host_time(call)}
    if case.bytes is not None:
        row["gb_per_s"] = case.bytes / median / 1e3
        row["share_of_copy"] = row["gb_per_s"] / common["copy_gb_per_s"]
    if case.flops is not None:
        row["tflop_per_s"] = case.flops / median / 1e6
        row["share_of_product"] = row["tflop_per_s"] / common["product_tflop_per_s"]
    if case.memory:
        row["extra_mib"] = extra_memory(call) / 2**20
    return row


ENGINES = {"base": ("ours", "torch", "compile"), "liger": ("liger",), "unsloth": ("unsloth",), "again": ("ours",)}
PACKAGES = {"base": (), "liger": ("liger-kernel",), "unsloth": ("unsloth", "unsloth_zoo"), "again": ()}


def op_files() -> list[str]:
    """Names of the benchmark files beside this one."""
    return sorted(
        p.stem
        for p in HERE.glob("*.py")
        if p.stem not in ("runner", "__init__", "peers") and not p.stem.startswith("_")
    )


def child(engine: str, ops: list[str], commit: str, limit_s: float) -> None:
    """Measures every case of ``ops`` with one engine; prints one JSON row per line."""
    deadline = time.monotonic() + limit_s
    copy, product = ceilings()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES[engine])
    common: dict[str, object] = {
        "copy_gb_per_s": copy,
        "product_tflop_per_s": product,
        "commit": commit,
        "engine_process": engine,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "provider_version": versions,
    }
    for op in ops:
        for case in importlib.import_module(op).cases(frozenset(ENGINES[engine])):
            if time.monotonic() > deadline:
                print(f"time limit of {limit_s:.0f} s reached before {op} {case.shape} {case.tokens}", file=sys.stderr)
                return
            if engine == "again" and "ours" not in case.providers:
                continue
            if engine == "again":
                case = replace(case, providers={"ours": case.providers["ours"]}, check=None)
            for row in measure(case, common):
                print("ROW " + json.dumps(row), flush=True)


def warm(engine: str, ops: list[str], part: str) -> None:
    """Runs what of an engine has to be compiled, once and without timing; every N-th case."""
    mine, parts = (int(n) for n in part.split("/"))
    index = 0
    for op in ops:
        for case in importlib.import_module(op).cases(frozenset(ENGINES[engine])):
            index += 1
            if index % parts != mine:
                continue
            for provider in case.providers.keys() - {"torch", "gemm"}:
                try:
                    case.providers[provider]()
                except (RuntimeError, TypeError, ValueError) as error:
                    print(f"{op} {case.shape} {case.tokens} {provider}: {str(error).splitlines()[0][:150]}")
    torch.cuda.synchronize()


def run(engines: Iterable[str], ops: list[str], commit: str, out: Path, limit_s: float) -> Path:
    """Runs each engine in its own process, appends the rows to a CSV in ``out`` as they come, returns the CSV."""
    path = out / f"{time.strftime('%Y-%m-%d')}-{torch.cuda.get_device_name().split()[-1].lower()}.csv"
    out.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for engine in engines:
            command = [
                sys.executable,
                __file__,
                "child",
                "--engines",
                engine,
                "--ops",
                ",".join(ops),
                "--commit",
                commit,
            ]
            process = subprocess.Popen([*command, "--limit-s", str(limit_s)], stdout=subprocess.PIPE, text=True)
            for line in process.stdout or ():
                if line.startswith("ROW "):
                    row = json.loads(line[4:])
                    writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
                    file.flush()
                else:
                    print(line, end="")
            print(f"{engine}: exit status {process.wait()}")
    return path


def main() -> None:
    """Command line: run, child (used by run), warm, table, docs, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "child", "warm", "table", "docs", "plot"))
    parser.add_argument("csv", nargs="?", type=Path)
    parser.add_argument("--engines", default="base,liger,unsloth,again")
    parser.add_argument("--ops", default="")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--limit-s", type=float, default=240.0, help="most seconds for one engine's process")
    parser.add_argument("--part", default="0/1", help="of warm: which of how many parts")
    args = parser.parse_args()
    ops = args.ops.split(",") if args.ops else op_files()
    sys.path.insert(0, str(HERE))
    import _report

    if args.command == "child":
        child(args.engines, ops, args.commit, args.limit_s)
    elif args.command == "warm":
        warm(args.engines, ops, args.part)
    elif args.command == "run":
        path = run(args.engines.split(","), ops, args.commit, args.out, args.limit_s)
        print(_report.table(path))
    elif args.command == "docs":
        import _tables

        for page in _tables.PAGES:
            page.write_text(_tables.fill(page.read_text(), args.csv))
    elif args.command == "table":
        print(_report.table(args.csv))
    else:
        print(*_report.plots(args.csv), sep="\n")


if __name__ == "__main__":
    main()
