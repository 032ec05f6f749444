"""A runner with a fake job: the real protocol, a training loop of sleeps. Started by tests as a child process.

The job reads its behaviour from the spec's name: `steps-20 delay-50 ...` (letters, digits, dashes, spaces).
    steps-N        optimizer steps (default 5)
    delay-MS       per step (default 10)
    save-N         a checkpoint every N steps (default 2)
    fail-at-N      raises a DropforgeError at step N
    crash-at-N     raises an unexpected error at step N
    segv-at-N      dies of SIGSEGV at step N
    stuck-at-N     makes no further step after step N, in this attempt; only once with `once`
    offline        fails for lack of a network; only in the first attempt with `once`
    lose-gpu       raises what the CUDA driver says about a lost device
    full-at-N      meets a full disk at step N, after half a checkpoint; only in the first attempt with `once`
    partial        ends partial
    disk           fails for lack of disk
    deaf           ignores SIGTERM
    child          leaves a grandchild behind that left the session
    slow-prepare   half a second before training
    slow-export    a second before its result is written
    leak           says secrets/HF_TOKEN in every way it can, then fails
    flood-N        prints N MiB, with what a terminal would obey
    eval-MS        an evaluation of that length after the first step, a batch every 20 ms
"""

from __future__ import annotations

import base64
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from dropforge.checkpoints import CheckpointStore
from dropforge.daemon import runner
from dropforge.errors import EnvironmentFault, JobStopped, Reason, TrainingError
from dropforge.events import RunLog
from dropforge.files import read_json, write_json, write_text
from dropforge.paths import DataRoot, RunFolder
from dropforge.states import State
from dropforge.stop import StopSignal


def fake_job(run: RunFolder, *, root: DataRoot, attempt: int, log: RunLog, stop: StopSignal) -> State:
    words = f"-{read_json(run.path / 'ticket.json')['ticket']['name'].replace(' ', '-')}-"

    def number(word: str, default: int) -> int:
        found = re.search(rf"-{word}-(\d+)-", words)
        return int(found[1]) if found else default

    log.state(State.PREPARING, attempt=attempt)
    if "-deaf-" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "-child-" in words:
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        write_text(run.path / "sleeper", str(sleeper.pid))
    if "-slow-prepare-" in words:
        time.sleep(0.5)
    if "-disk-" in words:
        raise EnvironmentFault("disk too small", code="disk-too-small", reason=Reason.DISK, fix="free space")
    if "-offline-" in words and (attempt == 1 or "-once-" not in words):
        raise EnvironmentFault("the hub cannot be reached", code="hub-offline", reason=Reason.OFFLINE)
    if "-lose-gpu-" in words:
        raise RuntimeError("CUDA error: GPU is lost. Reboot the system to recover this GPU")
    stop.raise_if_requested()
    if "-leak-" in words:
        leak((root.secrets / "HF_TOKEN").read_text(), log)
    for number_of_lines in [number("flood", 0) * 1024]:
        for _ in range(number_of_lines):
            print("\x1b[31m<b>" + "x" * 1015)
    log.state(State.TRAINING)
    stuck_at = number("stuck-at", -1) if attempt == 1 or "-once-" not in words else -1
    full_at = number("full-at", -1) if attempt == 1 or "-once-" not in words else -1
    train(run, log, stop, number, stuck_at, full_at)
    if "-partial-" in words:
        return State.PARTIAL
    log.state(State.EXPORTING)
    if "-slow-export-" in words:
        time.sleep(1.0)
    write_text(run.path / "final", (run.path / "sum").read_text())
    return State.SUCCEEDED


def leak(secret: str, log: RunLog) -> None:
    encoded = base64.b64encode(secret.encode()).decode()
    print(f"plain {secret}, in base64 {encoded}, in an address {quote(secret, safe='')}", flush=True)
    print(secret, file=sys.stderr, end="")
    subprocess.run([sys.executable, "-c", f"print('from a child', {secret!r})"], check=True)
    log.event("note", text=f"a note with {secret}")
    log.progress(loss=0.5, note={"deep": [secret]})
    raise TrainingError(f"it failed at {secret}", code="train-nan", reason=Reason.NAN_LOSS, why=encoded)


def evaluate(log: RunLog, seconds: float) -> None:
    for batch in range(int(seconds / 0.02)):
        time.sleep(0.02)
        log.fields["eval_batches"] = batch
        log.flush()


def train(run: RunFolder, log: RunLog, stop: StopSignal, number, stuck_at: int, full_at: int) -> None:
    """`sum` is the model: it depends on every step, so a lost or doubled step shows."""
    store = CheckpointStore(run.checkpoints)
    run.checkpoints.mkdir(exist_ok=True)
    store.clean()
    newest, _ = store.newest_good()
    step, value = (newest.step, int((newest.path / "sum").read_text())) if newest else (0, 0)
    log.event("resumed" if newest else "began", step=step)

    def save() -> None:
        store.clean()
        write_text(store.partial / "sum", str(value))
        store.commit(store.partial, step)
        log.event("checkpoint", step=step)
        log.progress(checkpoint_step=step)

    while step < number("steps", 5):
        if stop.requested:
            save()
            raise JobStopped("asked to stop", code="job-stopped", reason=stop.reason)
        time.sleep(number("delay", 10) / 1000)
        step += 1
        value = (value * 31 + step) % 1_000_003
        log.progress(step=step, total_steps=number("steps", 5), loss=1.0 / step)
        log.metrics(step=step, loss=1.0 / step)
        if step == 1 and number("eval", 0):
            evaluate(log, number("eval", 0) / 1000)
        if step == number("fail-at", -1):
            raise TrainingError("the loss became nan", code="train-nan", reason=Reason.NAN_LOSS, fix="lower the rate")
        if step == full_at:
            store.clean()
            write_text(store.partial / "half", "x")
            raise OSError(errno.ENOSPC, "No space left on device")
        if step == number("crash-at", -1):
            raise RuntimeError("a bug in the job")
        if step == number("segv-at", -1):
            log.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        while step == stuck_at and not stop.requested:
            time.sleep(0.01)
        if step % number("save", 2) == 0 or stop.take_checkpoint_request():
            save()
    write_json(run.path / "steps.json", step)
    write_text(run.path / "sum", str(value))


if __name__ == "__main__":
    runner.WARM_MODULES = ()
    arguments = sys.argv[1:]
    if arguments[:1] == ["--journal"]:
        import disk_recorder  # beside this file

        disk_recorder.install(Path(arguments[arguments.index("--data") + 1]), Path(arguments[1]))
        arguments = arguments[2:]
    sys.exit(runner.main(arguments, job=fake_job))
