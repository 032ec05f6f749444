"""The same through the job path: a job spec with an alpaca-like JSONL, `dropforge run`, and what status and result say.

    PYTHONPATH=appliance:kernels python3 -m benchmarks.trainers.job DATA_ROOT qwen3-0.6b [--packing true] [--steps 60]

One byte is one token here, so the lengths are those of benchmarks.trainers.documents.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.trainers.documents import documents
from benchmarks.trainers.models import MODELS, write

SPEC = """version: 1
name: packed-speed
model: {{id: {model}, max_seq_length: 2048}}
data: {{train: rows.jsonl, format: text, packing: {packing}}}
train: {{max_steps: {steps}, effective_batch_size: {batch}, learning_rate: 2e-4, logging_steps: 2}}
export: [adapter]
"""


def main() -> None:
    """Run the job and print the last status, the engine's report and the last metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--packing", default="auto", choices=("auto", "true", "false"))
    parser.add_argument("--data", default="alpaca")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    write(args.model, args.root / "models")
    (args.root / "datasets").mkdir(parents=True, exist_ok=True)
    rows = ["".join(chr(97 + token % 26) for token in row) for row in documents(args.data, count=6000)]
    (args.root / "datasets" / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    spec = args.root / "packed-speed.yaml"
    spec.write_text(SPEC.format(model=args.model, packing=args.packing, steps=args.steps, batch=args.batch))
    # The job's own process works in a folder of its own.
    places = [str(Path(place).absolute()) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dropforge", "run", str(spec)],
        env=dict(os.environ, DROPFORGE_DATA=str(args.root), HF_HUB_OFFLINE="1", PYTHONPATH=os.pathsep.join(places)),
    )
    run = max((args.root / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    print("STATUS", (run / "status.json").read_text())
    print("METRICS", *(run / "metrics.jsonl").read_text().splitlines()[-2:], sep="\n")
    for line in (run / "events.jsonl").read_text().splitlines():
        if json.loads(line)["action"] in ("engine", "note"):
            print("EVENT", json.loads(line)["text"])
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
