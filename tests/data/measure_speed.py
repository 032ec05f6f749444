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
import resource
import tempfile
import time
from pathlib import Path

WORDS = "river city gold iron water stone light north south metal salt glass paper green capital length".split()  # noqa: SIM905


def write_rows(path: Path, count: int) -> None:
    generator = random.Random(1)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            words = generator.choices(WORDS, k=6)
            row = {"prompt": f"What is the {words[0]} of {words[1]} {number}?", "completion": " ".join(words[2:]) + "."}
            stream.write(json.dumps(row) + "\n")


def _cpu() -> float:
    """CPU seconds of this process and of the workers that ended: what counts on a machine that others use too."""
    return time.process_time() + sum(os.times()[2:4])


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
            data = prepare_data(
                spec, tokenizer, locate=folder.joinpath, work=folder / "work", workers=chosen.workers, cache=cache
            )
            seconds = time.perf_counter() - started
            used = _cpu() - cpu
            peak = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            print(
                json.dumps(
                    {
                        "rows": data.report.rows, "seconds": round(seconds, 2), "rows_per_second": round(chosen.rows / seconds),
                        "cpu_microseconds_per_row": round(1e6 * used / chosen.rows, 1),
                        "tokens_per_row": round(data.report.mean_length, 1), "tokenizer": chosen.tokenizer,
                        "workers": chosen.workers, "peak_mib": peak[0] // 1024, "peak_mib_of_a_worker": peak[1] // 1024,
                    }
                )
            )  # fmt: skip


if __name__ == "__main__":
    main()
