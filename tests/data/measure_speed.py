"""Rows per second and peak memory of reading, rendering, tokenising and masking. Run by hand; not a test.

    python tests/data/measure_speed.py --rows 200000 --workers 2 [--tokenizer tiny-qwen3] [--folder DIR]

Prints one JSON line. The rows are short questions and answers (JSON lines of {"prompt", "completion"}); peak memory is
that of this process and of its workers, added up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import psutil

WORDS = "river city gold iron water stone light north south metal salt glass paper green capital length".split()  # noqa: SIM905


def write_rows(path: Path, count: int) -> None:
    generator = random.Random(1)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            words = generator.choices(WORDS, k=6)
            row = {"prompt": f"What is the {words[0]} of {words[1]} {number}?", "completion": " ".join(words[2:]) + "."}
            stream.write(json.dumps(row) + "\n")


def _cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of the workers that ended: what counts on a machine that others use too."""
    return time.process_time(), sum(os.times()[2:4])


class Workers:
    """The most memory the data workers hold together, looked at four times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._over = Event()
        self._watcher = Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(0.25):
            held = 0
            for child in own.children():
                with suppress(psutil.Error):
                    held += child.memory_info().rss
            self.peak = max(self.peak, held)

    def __enter__(self) -> Workers:
        self._watcher.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._over.set()
        self._watcher.join()


def own_peak() -> int:
    """Bytes this process has held at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def main() -> None:
    import datasets  # noqa: F401  (seconds to import; a job has done it before)
    from dropforge.data import prepare_data
    from dropforge.models.builtin import build_builtin
    from dropforge.models.tokenizer import load_tokenizer
    from dropforge.spec import Spec

    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", default="tiny-llama")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--cached", action="store_true", help="prepare a second time from the cache")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        (folder / "work").mkdir()
        (folder / "model").mkdir()
        build_builtin(chosen.tokenizer, folder / "model")
        tokenizer, _ = load_tokenizer(folder / "model")
        write_rows(folder / "rows.jsonl", chosen.rows)
        spec = Spec.model_validate(
            {
                "version": 1,
                "name": "speed",
                "model": f"builtin:{chosen.tokenizer}",
                "data": "rows.jsonl",
                "export": ["adapter"],
            }
        )
        cache = folder / "cache" if chosen.cached else None
        for _ in range(2 if chosen.cached else 1):
            started, cpu = time.perf_counter(), _cpu()
            with Workers() as helpers:
                data = prepare_data(
                    spec, tokenizer, locate=folder.joinpath, work=folder / "work", workers=chosen.workers, cache=cache
                )
            seconds = time.perf_counter() - started
            here, there = (after - before for after, before in zip(_cpu(), cpu, strict=True))
            print(
                json.dumps(
                    {
                        "rows": data.report.rows, "seconds": round(seconds, 2), "rows_per_second": round(chosen.rows / seconds),
                        "cpu_microseconds_per_row": round(1e6 * (here + there) / chosen.rows, 1),
                        "of_these_in_workers": round(1e6 * there / chosen.rows, 1),
                        "tokens_per_row": round(data.report.mean_length, 1), "tokenizer": chosen.tokenizer,
                        "workers": chosen.workers, "peak_mib": own_peak() >> 20, "peak_mib_of_all_workers": helpers.peak >> 20,
                        "load": round(os.getloadavg()[0], 1),
                    }
                )
            )  # fmt: skip


if __name__ == "__main__":
    main()
