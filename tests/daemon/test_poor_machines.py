"""Small and odd machines: few file handles, one core, another umask, foreign files, a proxy (tests 23, 24, 39)."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from daemon_harness import HERE, Harness, drop, expected_sum, places, spec_text, wait_until
from dropforge.paths import DataRoot

HEALTHCHECK = Path(__file__).resolve().parents[2] / "docker" / "services" / "healthcheck.py"


def narrow() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.umask(0o077)


def test_few_file_handles_one_core_and_a_strict_umask(root: DataRoot) -> None:
    for number in range(3):
        drop(root, f"{number}.yaml", spec_text(f"job{number} steps-4 child"))
    child = subprocess.Popen([sys.executable, str(HERE / "daemon_process.py"), str(root.path)], preexec_fn=narrow,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_until(lambda: len(places(root).get("done", [])) == 3, seconds=60)
    finally:
        child.terminate()
        child.wait(30)
    assert child.returncode == 143
    for job_id in places(root)["done"]:
        assert (root.run(job_id).path / "final").read_text() == expected_sum(4)
        assert (root.run(job_id).path / "final").stat().st_mode & 0o077 == 0, "the umask is kept to"


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_a_file_that_belongs_to_somebody_else_becomes_a_job(root: DataRoot) -> None:
    path = drop(root, "foreign.yaml", spec_text("steps-2"))
    os.chown(path, 12345, 12345)
    path.chmod(0o400)
    with Harness(root) as harness:
        harness.until_in("done")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_any_user_without_a_name_or_a_home(root: DataRoot) -> None:
    for path in (root.path, *root.path.rglob("*")):
        os.chown(path, 54321, 54321)
    for path in root.path.parents:
        if path.stat().st_mode & 0o5 != 0o5 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    drop(root, "job.yaml", spec_text("steps-2")).chmod(0o644)

    def become() -> None:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)

    try:
        subprocess.run([sys.executable, "-c", "import dropforge"], preexec_fn=become, env={}, check=True)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip("this checkout or its interpreter is not readable for others")
    child = subprocess.Popen([sys.executable, "-B", str(HERE / "daemon_process.py"), str(root.path)], preexec_fn=become,
                             env={}, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_until(lambda: places(root).get("done"), seconds=60)
    finally:
        child.terminate()
        child.wait(30)
    (job_id,) = places(root)["done"]
    assert (root.run(job_id).path / "final").stat().st_uid == 54321


class Jupyter(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "4"}')

    def log_message(self, *arguments) -> None:
        pass


def test_the_healthcheck_goes_past_every_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    found = importlib.util.spec_from_file_location("healthcheck", HEALTHCHECK)
    assert found is not None and found.loader is not None
    healthcheck = importlib.util.module_from_spec(found)
    found.loader.exec_module(healthcheck)
    with HTTPServer(("127.0.0.1", 0), Jupyter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert healthcheck.jupyter(server.server_port) == []
        server.shutdown()
    assert healthcheck.jupyter(9) != []
