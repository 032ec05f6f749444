"""What a job prints: clean, capped, without secrets, and there to the last word."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from daemon_harness import DaemonProcess, Harness, drop, only_ticket, places, runner_pid, spec_text, trains, wait_until
from dropforge.daemon import process
from dropforge.daemon.log_pump import LINE_CHARACTERS, CappedFile, Pump, older, visible
from dropforge.events import RunLog
from dropforge.files import regular_files
from dropforge.paths import DataRoot

SECRET = "hf_Canary+/=7Qx&9zL"


def pumped(*chunks: bytes, secrets=(SECRET,)) -> str:
    written: list[str] = []
    pump = Pump(written.append, secrets=secrets)
    for chunk in chunks:
        pump.feed(chunk)
    pump.feed(b"", final=True)
    return "".join(written)


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert pumped(b"\x1b]0;title\x07 \x1b[2J red\n") == "\\x1b]0;title\\x07 \\x1b[2J red\n"
    assert visible("50%\r100%\r\nend\ttab") == "50%\n100%\nend\ttab"
    assert visible("\u202egnp.exe \x9b1A") == "\\u202egnp.exe \\x9b1A"


def test_bytes_that_are_not_utf8_are_replaced_and_cut_characters_are_joined() -> None:
    assert pumped(b"a\xff\n", "\u00fc".encode()[:1], "\u00fc".encode()[1:], b"\n") == "a\ufffd\n\u00fc\n"


@pytest.mark.parametrize("form", [SECRET, base64.b64encode(SECRET.encode()).decode(), quote(SECRET, safe="")])
@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_secret_is_taken_out_however_it_arrives(form: str, cut: int) -> None:
    text = f"before {form} after\n".encode()
    assert pumped(text[: 7 + cut], text[7 + cut :]) == "before [redacted] after\n"
    without_end = b"x" * (LINE_CHARACTERS - 10) + form.encode() + b"y" * LINE_CHARACTERS
    assert form not in pumped(without_end[: LINE_CHARACTERS + cut], without_end[LINE_CHARACTERS + cut :]).replace(
        "\n", ""
    )


def test_a_file_never_grows_beyond_its_cap_and_keeps_the_newest(tmp_path: Path) -> None:
    log = CappedFile(tmp_path / "log.txt", max_bytes=1000)
    for number in range(500):
        log.write(f"line {number}\n")
    log.close()
    assert (tmp_path / "log.txt").stat().st_size <= 1000
    assert older(tmp_path / "log.txt").stat().st_size <= 1000
    text = older(tmp_path / "log.txt").read_text() + (tmp_path / "log.txt").read_text()
    assert text.endswith("line 498\nline 499\n")


def test_a_log_that_was_replaced_by_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "log.txt").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic"):
        CappedFile(tmp_path / "log.txt")
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_canary_is_found_nowhere(root: DataRoot) -> None:
    """Printed, in base64, URL-quoted, by a child, in events, status and the error: test 33."""
    (root.secrets / "HF_TOKEN").write_text(SECRET)
    drop(root, "leak.yaml", spec_text("leak"))
    with Harness(root) as harness:
        harness.until_in("failed")
        harness.tick(3.0)
    _, job_id = only_ticket(root)
    forms = [form.encode() for form in (SECRET, base64.b64encode(SECRET.encode()).decode(), quote(SECRET, safe=""))]
    searched = [path for path in regular_files(root.path) if path.parent != root.secrets]
    assert not [path for path in searched if any(form in path.read_bytes() for form in forms)]
    log = (root.run(job_id).attempt(1) / "log.txt").read_text()
    assert log.count("[redacted]") >= 5 and "from a child [redacted]" in log
    assert "it failed at [redacted]" in (root.run(job_id).path / "ERROR.txt").read_text()
    assert "it failed at [redacted]" in root.status_page.read_text().replace("\\", "")


def test_a_flood_of_output_is_capped_and_the_job_ends_well(root: DataRoot) -> None:
    drop(root, "flood.yaml", spec_text("flood-40 steps-2"))
    with Harness(root) as harness:
        harness.until_in("done")
    attempt = root.run(only_ticket(root)[1]).attempt(1)
    sizes = {path.name: path.stat().st_size for path in attempt.glob("log*")}
    assert set(sizes) == {"log.txt", "log.1.txt"}
    assert max(sizes.values()) <= 16 << 20
    assert "\x1b" not in (attempt / "log.txt").read_text()


@pytest.mark.slow
def test_ten_gigabytes_of_output_are_capped(tmp_path: Path, record_property) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "dropforge.daemon.log_pump",
        "--data",
        str(tmp_path),
        "--log",
        str(tmp_path / "log.txt"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as pump:
        assert pump.stdin is not None
        chunk = (b"\x1b[1m" + b"z" * 1019 + b"\n") * 1024
        for _ in range(10 * 1024):
            pump.stdin.write(chunk)
        pump.stdin.close()
        assert pump.wait() == 0
    total = sum(path.stat().st_size for path in tmp_path.glob("log*"))
    record_property("measured", f"10 GiB printed, {total / (1 << 20):.0f} MiB kept")
    assert total <= 32 << 20


def test_the_last_words_of_a_job_that_dies_are_in_its_log(harness: Harness) -> None:
    drop(harness.root, "segv.yaml", spec_text("segv-at-2 steps-4"))
    harness.until_in("held")
    log = harness.root.run(only_ticket(harness.root)[1]).attempt(1) / "log.txt"
    wait_until(lambda: "Segmentation fault" in log.read_text())


def test_a_runner_outlives_the_pump_and_the_daemon(root: DataRoot) -> None:
    """The daemon is killed: the runner still saves and says so in its log."""
    drop(root, "long.yaml", spec_text("steps-1000 delay-20 save-1000"))
    with DaemonProcess(root) as daemon:
        wait_until(lambda: places(root).get("running") and trains(root.run(places(root)["running"][0])))
        run = root.run(places(root)["running"][0])
        pid = runner_pid(run)
        daemon.kill()
    wait_until(lambda: process.ProcessId.of(pid) is None)
    assert "asked to stop" in (run.attempt(1) / "log.txt").read_text()


def test_events_and_metrics_are_capped(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropforge.events.MAX_BYTES", 1000)
    run = root.run("000001-x-00000000")
    run.path.mkdir()
    log = RunLog(run)
    for step in range(100):
        log.metrics(step=step)
        log.event("note", text=str(step))
    for path in (run.events, run.metrics):
        assert path.stat().st_size <= 1200
        assert older(path).stat().st_size <= 1200
    assert run.metrics.read_text().splitlines()[-1].endswith('"step": 99}')
