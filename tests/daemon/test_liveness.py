"""`dropforge status` after a kill or a power cut: it says what is true, in words that need no manual."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from daemon_harness import DaemonProcess, drop, only_ticket, places, runner_pid, spec_text, trains, wait_until
from dropforge.checkpoints import CheckpointStore
from dropforge.cli import main
from dropforge.daemon import process
from dropforge.daemon.control import Switch, request, set_switch
from dropforge.daemon.crash_points import CRASH_POINTS
from dropforge.daemon.liveness import runs_now, serving
from dropforge.daemon.singleton import daemon_is_alive, read_heartbeat
from dropforge.events import utc_now
from dropforge.files import write_json
from dropforge.paths import DataRoot


def said(root: DataRoot, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["status", *arguments, "--data", str(root.path)]) == 0
    return capsys.readouterr().out


def killed_in_training(root: DataRoot, *, words: str) -> str:
    """Everything dead in the middle of a training, as after a power cut. Returns the job's id."""
    drop(root, "job.yaml", spec_text(f"good steps-100000 delay-5 {words}"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running"))
        run = root.run(only_ticket(root)[1])
        wait_until(lambda: trains(run))
        if words != "save-100000":
            wait_until(lambda: CheckpointStore(run.checkpoints).all())
        pid = runner_pid(run)
        os.kill(daemon.child.pid, 19)  # SIGSTOP: it shall not see its job die
        process.kill(pid)
        daemon.kill()
    return run.id


def test_a_power_cut_in_training_is_not_called_training(root: DataRoot, capsys) -> None:
    job_id = killed_in_training(root, words="save-10")
    text = said(root, capsys)
    assert "NOT running" in text and "dropforge watch" in text
    assert "training" not in text
    newest = CheckpointStore(root.run(job_id).checkpoints).all()[-1].step
    assert f"interrupted  was cut off; goes on from step {newest}, its last checkpoint" in text
    assert "NOT running" in said(root, capsys, job_id)
    (job,) = json.loads(said(root, capsys, "--json"))
    assert (job["state"], job["status"]) == ("interrupted", {}), "no numbers of a process that is gone"


def test_before_the_first_checkpoint_it_says_so(root: DataRoot, capsys) -> None:
    killed_in_training(root, words="save-100000")
    assert "starts again from the beginning" in said(root, capsys)


def test_after_the_training_it_says_that_only_exports_are_left(root: DataRoot, capsys) -> None:
    job_id = killed_in_training(root, words="save-10")
    root.run(job_id).trained.mkdir()
    write_json(root.run(job_id).trained / "record.json", {})
    assert "training is complete and safe" in said(root, capsys)


ACTIVE = {"preparing", "training", "exporting", "cancelling"}


@pytest.mark.parametrize("label", CRASH_POINTS)
def test_wherever_the_plug_is_pulled_every_file_is_shown_once_and_nothing_seems_to_run(
    root: DataRoot, capsys, label: str
) -> None:
    drop(root, "good.yaml", spec_text("good steps-3"))
    drop(root, "bad.yaml", spec_text("bad", extra="nonsense: 1\n"))
    with DaemonProcess(root, die_at=label) as daemon:
        if label == "control.done":
            wait_until(lambda: places(root).get("running"))
            request(root, only_ticket(root)[1], "checkpoint")
        assert daemon.wait() == -9
    wait_until(lambda: not [run for run in (root.path / "runs").iterdir() if runs_now(root.run(run.name))])
    rows = [line.split() for line in said(root, capsys).splitlines()[3:]]
    for word in ("good", "bad"):
        assert len([row for row in rows if word in row[0]]) == 1, rows
    assert not ACTIVE & {row[1] for row in rows}, rows


def test_a_job_that_was_being_cancelled_is_not_said_to_go_on(root: DataRoot, capsys) -> None:
    drop(root, "job.yaml", spec_text("good steps-100000 delay-5 deaf"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running"))
        run = root.run(only_ticket(root)[1])
        wait_until(lambda: trains(run))
        request(root, run.id, "cancel")
        wait_until(lambda: (run.attempt(1) / "stop.json").exists())
        os.kill(daemon.child.pid, 19)
        process.kill(runner_pid(run))
        daemon.kill()
    text = said(root, capsys)
    assert "you asked to stop it" in text
    assert "goes on from" not in text and "from the beginning" not in text


def test_a_job_that_outlives_its_daemon_is_not_called_dead(root: DataRoot, capsys) -> None:
    drop(root, "job.yaml", spec_text("good steps-100000 delay-5 deaf"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running"))
        run = root.run(only_ticket(root)[1])
        wait_until(lambda: trains(run))
        daemon.kill()
    try:
        text = said(root, capsys)
        assert "Dropforge itself was ended; this job saves" in text or "training" in text
        assert "was cut off" not in text
    finally:
        process.kill(runner_pid(run))


def test_what_waits_in_the_inbox_is_listed(root: DataRoot, capsys) -> None:
    drop(root, "first.yaml")
    text = said(root, capsys)
    assert "first.yaml  in inbox  becomes a job when Dropforge runs" in text
    assert "no jobs yet" not in text
    for number in range(60):
        drop(root, f"more-{number}.yaml")
    assert "and 11 more" in said(root, capsys)


def test_a_file_in_the_inbox_is_found_by_its_name(root: DataRoot, capsys) -> None:
    drop(root, "half.yaml", "version: 1\nname")
    for name in ("half", "half.yaml"):
        assert said(root, capsys, name) == "half.yaml is in inbox: it becomes a job when Dropforge runs\n"
    assert json.loads(said(root, capsys, "half", "--json"))["state"] == "in inbox"
    with DaemonProcess(root):
        wait_until(lambda: "half.yaml is in inbox: it waits for its missing part" in said(root, capsys, "half"))
    assert main(["status", "other", "--data", str(root.path)]) == 2


def test_what_was_asked_while_nobody_was_there_is_shown(root: DataRoot, capsys) -> None:
    set_switch(root, Switch.PAUSE, on=True)
    drop(root, "job.yaml")
    with DaemonProcess(root):
        wait_until(lambda: places(root).get("queue") and only_ticket(root))
        wait_until(lambda: (root.run(only_ticket(root)[1])).status.exists())
    assert main(["cancel", only_ticket(root)[1], "--data", str(root.path)]) == 0
    assert "(cancel is asked, and done when Dropforge runs)" in said(root, capsys)


def test_a_living_daemon_says_how_it_is(root: DataRoot, capsys) -> None:
    with DaemonProcess(root):
        wait_until(lambda: daemon_is_alive(root) and read_heartbeat(root).get("state") == "running")
        assert "Dropforge is running." in said(root, capsys)
        set_switch(root, Switch.PAUSE, on=True)
        wait_until(lambda: read_heartbeat(root).get("state") == "paused")
        assert "Dropforge is paused" in said(root, capsys)
    assert "NOT running" in said(root, capsys)


@pytest.mark.parametrize(
    ("beat", "alive"),
    [
        ({"host": "elsewhere", "updated": "now", "state": "running", "problems": ["disk full"]}, True),
        ({"host": "elsewhere", "updated": "2020-01-01T00:00:00+00:00", "state": "running"}, False),
        ({"host": "elsewhere", "updated": "now", "state": "stopped"}, False),
        ({"host": "elsewhere", "updated": "nonsense", "state": "running"}, False),
        ({"host": "here", "updated": "now", "state": "running", "process": {"pid": 1, "start_time": 0, "boot_id": "x"}}, False),
    ],
)  # fmt: skip
def test_a_daemon_where_locks_do_not_reach(root: DataRoot, beat: dict, alive: bool) -> None:
    beat = {
        key: utc_now() if text == "now" else os.uname().nodename if text == "here" else text
        for key, text in beat.items()
    }
    write_json(root.state / "daemon.json", beat)
    assert serving(root).alive is alive
    assert serving(root).problems == tuple(beat.get("problems", ())) or not alive


def test_asking_leaves_no_trace_and_needs_no_rights(root: DataRoot, capsys, tmp_path: Path) -> None:
    drop(root, "job.yaml")
    before = sorted((path, path.stat().st_mtime_ns) for path in root.path.rglob("*"))
    said(root, capsys)
    assert sorted((path, path.stat().st_mtime_ns) for path in root.path.rglob("*")) == before
