"""Merge an 8B-shaped random model, export it to q4_k_m and FP8, and let vLLM run the FP8 folders: times and memory.

    python tests/export/gpu_export_8b.py --shape 8b --folder /tmp/export --out OUT --stages write,merge
    python tests/export/gpu_export_8b.py --shape 8b --folder /tmp/export --out OUT --stages gguf
    python tests/export/gpu_export_8b.py --shape 8b --folder /tmp/export --out OUT --stages fp8,vllm --vllm-site SITE

The stages of one run share --folder and may be separate calls; OUT/export-SHAPE.json and .csv hold the numbers of all
so far. Every export is made and verified as a job does it. What a later stage does not need is removed at once: 8b
needs 35 GiB of disk at most. Needs the built llama.cpp (DROPFORGE_LLAMA_CPP).

Memory is sampled over the whole process tree: *anonymous* is what cannot be given back; *resident* also counts pages of
mapped files, which the kernel takes back when memory is short.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from shaped_model import SHAPES, write_adapter, write_base  # found through the line above

STAGES = ("write", "merge", "gguf", "fp8", "fp8:block", "vllm")
KINDS = {"merge": "merged", "gguf": "gguf:q4_k_m", "fp8": "fp8", "fp8:block": "fp8:block"}
SAMPLE_SECONDS = 0.05
LINE = 110


class Memory:
    """Peaks of the process tree's memory while it is watched."""

    def __init__(self) -> None:
        self.peaks = {"anonymous_gib": 0, "resident_gib": 0}
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> dict[str, float]:
        """The peaks since the last call, in GiB."""
        found = {name: round(value / 2**30, 3) for name, value in self.peaks.items()}
        self.peaks = dict.fromkeys(self.peaks, 0)
        return found

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            time.sleep(SAMPLE_SECONDS)
            anonymous = resident = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    continue
                values = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Rss")}
                anonymous += 1024 * (int(values.get("RssAnon", 0)) + int(values.get("RssShmem", 0)))
                resident += 1024 * sum(map(int, values.values()))
            self.peaks["anonymous_gib"] = max(self.peaks["anonymous_gib"], anonymous)
            self.peaks["resident_gib"] = max(self.peaks["resident_gib"], resident)


class Record:
    """Numbers of a run in its folder, so that several calls add to them, and in --out."""

    def __init__(self, folder: Path, out: Path, *, shape: str) -> None:
        self._path = folder / "numbers.json"
        self._outs = [out / f"export-{shape}.json", out / f"export-{shape}.csv"]
        self._folder = folder
        self._memory = Memory()
        self._open: tuple[str, str, float, float] | None = None
        self.found = json.loads(self._path.read_text()) if self._path.exists() else {"shape": shape, "steps": []}
        self.found["machine"] = {
            "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
            "torch": _version("torch"), "transformers": _version("transformers"),
        }  # fmt: skip

    def begin(self, stage: str, step: str) -> None:
        """Close the step that is open and begin one."""
        self.end()
        self._memory.reset()
        self._open = (stage, step, time.monotonic(), _cpu_seconds())
        print(f"  {stage}: {step}", flush=True)

    def end(self) -> None:
        if self._open is not None:
            stage, step, start, cpu = self._open
            entry = {"stage": stage, "step": step, "s": round(time.monotonic() - start, 1)}
            entry |= {"cpu_s": round(_cpu_seconds() - cpu, 1), **self._memory.reset()}
            entry["disk_used_gib"] = round(_used(self._folder) / 2**30, 2)
            self.found["steps"].append(entry)
            print(f"      {json.dumps({k: v for k, v in entry.items() if k not in {'stage', 'step'}})}", flush=True)
            self._open = None
        self.save()

    def save(self) -> None:
        for path in (self._path, self._outs[0]):
            path.write_text(json.dumps(self.found, indent=1))
        with self._outs[1].open("w", newline="") as stream:
            writer = csv.DictWriter(
                stream,
                ("stage", "step", "s", "cpu_s", "anonymous_gib", "resident_gib", "disk_used_gib"),
                lineterminator="\n",
            )
            writer.writeheader()
            writer.writerows(self.found["steps"])


def _cpu_seconds() -> float:
    """Of this process and of children that have ended."""
    return sum(os.times()[:4])


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _used(folder: Path) -> int:
    """Bytes on disk; a file with two names counts once."""
    seen = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            seen[status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


class Run:
    """One model in one folder, taken through the stages."""

    def __init__(self, folder: Path, record: Record, *, shape: dict) -> None:
        self.folder, self.record, self.shape = folder, record, shape
        self.base, self.merged = folder / "base", folder / "merged.pickle"

    def write(self) -> None:
        from transformers import AutoTokenizer

        self.record.begin("write", "random weights and adapter")
        self.record.found["parameters"] = write_base(self.base, self.shape)
        write_adapter(self.folder / "adapter", self.shape)
        AutoTokenizer.from_pretrained(self.base).save_pretrained(self.folder / "tokenizer")

    def export(self, name: str) -> None:
        """One export, as a job makes and verifies it; then what nobody needs any more is removed."""
        from dropforge.export import ExportRequest, export_one
        from dropforge.export.stage import Stage
        from dropforge.paths import ResultFolder

        kind = KINDS[name]
        result = ResultFolder(self.folder / "result")
        result.path.mkdir(exist_ok=True)
        request = ExportRequest(
            base_path=self.base if name == "merge" else result.merged, adapter=self.folder / "adapter",
            tokenizer=self.folder / "tokenizer", result=result, work=self.folder / "work", kinds=(kind,),
            name="Random", slug="random", model_id="random:llama",
        )  # fmt: skip
        self.record.begin(name, "start")
        stage = Stage(request, log=lambda text: self.record.begin(name, text))
        if name != "merge":
            # What the merge found out about itself, in an earlier call.
            stage._results["merged"] = pickle.loads(self.merged.read_bytes())
        report = export_one(stage, kind)
        self.record.end()
        self.record.found.setdefault("exports", {})[kind] = report.as_dict()
        if name == "merge" and report.ok:
            self.merged.write_bytes(pickle.dumps(stage.merged))
            for path in self.base.glob("*.safetensors"):
                path.unlink()
        for path in self.folder.glob("work/*.gguf"):
            path.unlink()
        shutil.rmtree(self.folder / "work" / "gguf-view", ignore_errors=True)
        self.record.save()
        if not report.ok:
            raise SystemExit(f"{kind} failed: {report.problem}")

    def vllm(self, site: Path) -> None:
        """Both FP8 folders in vLLM, whose predictions are compared with the merged model's."""
        import numpy as np
        from dropforge.export.compare import agreement

        merged = pickle.loads(self.merged.read_bytes())
        prompts = [
            answer.prompt + answer.tokens[:step] for answer in merged.answers for step in range(len(answer.tokens))
        ]
        truth = [row[None] for answer in merged.answers for row in answer.logprobs]
        (self.folder / "prompts.json").write_text(json.dumps(prompts))
        program = Path(__file__).with_name("ask_vllm.py")
        for folder in sorted(self.folder.glob("result/fp8*")):
            self.record.begin("vllm", folder.name)
            answers = self.folder / f"vllm-{folder.name}"
            done = subprocess.run(
                [sys.executable, program, folder, self.folder / "prompts.json", answers],
                env={**os.environ, "PYTHONPATH": str(site)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, check=False,
            )  # fmt: skip
            self.record.end()
            found = {
                "ok": done.returncode == 0,
                "said": "\n".join(line[: LINE * 2] for line in done.stdout.splitlines()[-25:]),
            }
            if found["ok"]:
                found = {"ok": True, **json.loads(answers.with_suffix(".json").read_text())}
                rows = [row[None] for row in np.load(answers.with_suffix(".npy"))]
                found["agreement_with_merged"] = agreement(truth, rows).as_dict()
                found["greedy_all_equal"] = all(tokens == found["greedy"][0] for tokens in found["greedy"])
            self.record.found.setdefault("vllm", {})[folder.name] = found
            self.record.save()
            print(json.dumps(found)[:3000], flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="so many instead of the shape's own")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; the stage write makes it anew")
    parser.add_argument("--out", type=Path, required=True, help="folder the numbers go to")
    parser.add_argument("--stages", default="write,merge,gguf,fp8", help=f"some of {','.join(STAGES)}")
    parser.add_argument("--whole-bytes", type=int, help="float32 bytes up to which a model is held in memory")
    parser.add_argument("--vllm-site", type=Path, help="folder with vLLM's packages")
    options = parser.parse_args()
    stages = options.stages.split(",")
    if not set(stages) <= set(STAGES) or ("vllm" in stages and options.vllm_site is None):
        parser.error(f"stages are {', '.join(STAGES)}; vllm needs --vllm-site")
    warnings.simplefilter("ignore")
    if "write" in stages:
        shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.whole_bytes is not None:
        from dropforge.export import reference

        reference.WHOLE_BYTES = options.whole_bytes
    shape = dict(SHAPES[options.shape])
    if options.layers:
        shape["num_hidden_layers"] = options.layers
    record = Record(options.folder, options.out, shape=options.shape)
    record.found["layers"] = shape["num_hidden_layers"]
    run = Run(options.folder, record, shape=shape)
    for stage in stages:
        if stage == "write":
            run.write()
        elif stage == "vllm":
            run.vllm(options.vllm_site)
        else:
            run.export(stage)
    record.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
