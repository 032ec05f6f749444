"""The demo: the daemon runs, a job is dropped into its inbox, the exported GGUF answers ten questions of the data.

    make demo

Fails unless nine of the ten answers are exactly those of the training data. Everything it makes lies in .demo/.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1] / ".demo"
QUESTIONS = 10
MUST_BE_RIGHT = 9
MINUTES = 15


def dropforge(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "dropforge", *arguments]


def main() -> int:
    started = time.monotonic()
    environment = {**os.environ, "DROPFORGE_DATA": str(ROOT)}
    (ROOT / "datasets").mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "elements.jsonl", ROOT / "datasets")

    say(f"starting the daemon on {ROOT}")
    with (ROOT / "daemon.log").open("a") as log:
        daemon = subprocess.Popen(dropforge("watch"), env=environment, stdout=log, stderr=log)
    try:
        say("dropping examples/elements/job.yaml into the inbox")
        (ROOT / "inbox").mkdir(exist_ok=True)
        dropped = ROOT / "inbox" / f"elements-{int(time.time())}.yaml"
        shutil.copy(HERE / "job.yaml", dropped)
        job = wait(environment, dropped.name, daemon)
        say(f"the job ended: {job['state']} ({job['message'] or 'no complaints'})")
        if job["state"] != "succeeded":
            subprocess.run(dropforge("logs", job["id"]), env=environment, check=False)
            return 1
        result = ROOT / job["result"]
        say(f"results in {result}:")
        for path in sorted(p for p in result.rglob("*") if p.is_file()):
            print(f"    {path.relative_to(result)!s:<52} {path.stat().st_size / 1e6:8.2f} MB")
        right = ask(environment, result)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(timeout=120)
    seconds = time.monotonic() - started
    say(f"{right} of {QUESTIONS} answers are exactly those of the training data; {seconds:.0f} s in all")
    if right < MUST_BE_RIGHT:
        say(f"that is fewer than {MUST_BE_RIGHT}: the demo FAILED")
        return 1
    say(f"ask it yourself: .venv/bin/dropforge chat {result}")
    return 0


def wait(environment: dict[str, str], file: str, daemon: subprocess.Popen[bytes]) -> dict:
    """Follow the job made from `file` to its end."""
    deadline, shown = time.monotonic() + MINUTES * 60, ("", 0.0)
    while time.monotonic() < deadline:
        if daemon.poll() is not None:
            raise SystemExit(f"the daemon ended with status {daemon.returncode}; see {ROOT / 'daemon.log'}")
        done = subprocess.run(
            dropforge("status", "--json"), env=environment, capture_output=True, text=True, check=True
        )
        jobs = [job for job in json.loads(done.stdout) if job["file"] == file]
        if jobs:
            job = jobs[-1]
            now = time.monotonic()
            if job["state"] != shown[0] or now - shown[1] > 10:
                status = job["status"]
                step = f", step {status['step']}/{status['total_steps']}" if status.get("total_steps") else ""
                training = job["state"] == "training"
                print(f"    {job['id']}: {job['state']}{step if training else ''}", flush=True)
                shown = (job["state"], now)
            if job["state"] in {"succeeded", "partial", "failed", "rejected", "cancelled", "held"}:
                return job
        time.sleep(0.5)
    raise SystemExit(f"the job did not end within {MINUTES} minutes")


def ask(environment: dict[str, str], result: Path) -> int:
    """Ask the GGUF ten questions drawn from the training data; returns how many answers are exact."""
    rows = [json.loads(line)["messages"] for line in (HERE / "elements.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = random.Random(2026).sample(rows, QUESTIONS)
    command = dropforge("chat", str(result), "--json", "--max-tokens", "32")
    for question, _ in chosen:
        command += ["--prompt", question["content"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"chat failed:\n{done.stderr}{done.stdout}")
    right = 0
    say("asking the exported GGUF:")
    for (question, expected), answer in zip(chosen, json.loads(done.stdout), strict=True):
        good = answer["answer"].strip() == expected["content"]
        right += good
        verdict = "right" if good else f"WRONG, it is {expected['content']}"
        print(f"    {question['content']:<58} {answer['answer'].strip()!r:<18} {verdict}")
    return right


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
