"""One container under test: start it, look into it, wait for things, take it away."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE = os.environ.get("DROPFORGE_TEST_IMAGE", "dropforge:cpu")
DEVICE = {"DROPFORGE_DEVICE": os.environ["DROPFORGE_TEST_DEVICE"]} if "DROPFORGE_TEST_DEVICE" in os.environ else {}
"""To test an image for GPUs on a machine without one: DROPFORGE_TEST_DEVICE=cpu."""
READY = "=" * 74
ENGINE = Path(__file__).parents[2] / "docker" / "engine.sh"


def client() -> str:
    return subprocess.run([ENGINE, "client"], capture_output=True, text=True, check=True).stdout.strip()


def docker(
    *arguments: str | Path, check: bool = True, timeout: float = 300, input: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the client; stdout and stderr as text. Fails with both when `check` and the status is not 0."""
    done = subprocess.run(
        [client(), *map(str, arguments)], capture_output=True, text=True, timeout=timeout, input=input, check=False
    )
    assert not check or done.returncode == 0, f"docker {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
    return done


def until(seconds: float, what: str, condition: Callable[[], Any], *, every: float = 0.3) -> Any:
    """The first true value of `condition`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"not within {seconds:g} s: {what}")


@dataclass(frozen=True)
class Container:
    id: str
    work: Path
    """The data root, on this side of the mount."""
    seconds_to_ready: float = 0.0

    @classmethod
    def start(
        cls, label: str, *arguments: str, work: Path, env: dict[str, str] | None = None, ready: bool = True,
        command: tuple[str, ...] = (), mount: bool = True,
    ) -> Container:  # fmt: skip
        """docker run -d; with `ready`, wait for the ready block. Variables go by name, so that values are taken as is."""
        began = time.monotonic()
        env = {**DEVICE, **(env or {})}
        words = ["run", "--detach", "--label", label, "--publish", "127.0.0.1::8888", "--publish", "127.0.0.1::22"]
        if mount:
            words += ["--volume", f"{work}:/workspace/work"]
        for name in env:
            words += ["--env", name]
        done = subprocess.run(
            [client(), *words, *arguments, IMAGE, *command],
            capture_output=True, text=True, timeout=120, env={**os.environ, **env}, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        container = cls(done.stdout.strip(), work)
        if not ready:
            return container
        try:
            container.wait_ready()
        except AssertionError:
            log = container.logs()
            container.remove()
            raise AssertionError(f"it did not get ready:\n{log}") from None
        return cls(container.id, work, time.monotonic() - began)

    def wait_ready(self, *, times: int = 1) -> None:
        """Until the ready block has been printed `times` times."""
        until(60, "the ready block", lambda: self.logs().count(READY) >= times or not self.running)
        assert self.running, self.logs()

    def logs(self) -> str:
        done = docker("logs", self.id)
        return done.stdout + done.stderr

    def inspect(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(docker("inspect", self.id).stdout)[0]
        return value

    @property
    def running(self) -> bool:
        return bool(self.inspect()["State"]["Running"])

    def wait_exit(self, seconds: float = 60) -> int:
        return int(docker("wait", self.id, timeout=seconds).stdout)

    def port(self, inner: int) -> int:
        return int(self.inspect()["NetworkSettings"]["Ports"][f"{inner}/tcp"][0]["HostPort"])

    def exec(self, *command: str, check: bool = True, user: str | None = None, input: str | None = None) -> str:
        words = [
            "exec",
            *(["--interactive"] if input is not None else []),
            *(["--user", user] if user else []),
            self.id,
        ]
        return docker(*words, *command, check=check, input=input).stdout

    def health(self) -> tuple[int, str]:
        """Status and text of the healthcheck, run now."""
        done = docker("exec", self.id, "/opt/venv/bin/python", "/opt/dropforge/healthcheck.py", check=False)
        return done.returncode, done.stdout + done.stderr

    def pid(self, service: str) -> int:
        text = self.exec(
            "/opt/venv/bin/supervisorctl", "-c", "/run/dropforge/supervisord.conf", "pid", service, check=False
        )
        return int(text) if text.strip().isdigit() else 0

    def jobs(self) -> list[dict[str, Any]]:
        value: list[dict[str, Any]] = json.loads(self.exec("dropforge", "status", "--json"))
        return value

    def job(self, file: str) -> dict[str, Any]:
        """The newest job made from inbox/`file`; empty when there is none yet."""
        return next((job for job in reversed(self.jobs()) if job["file"] == file), {})

    def wait_job(self, file: str, *states: str, seconds: float = 180) -> dict[str, Any]:
        """Until that job is in one of `states`; fails at once when it ends in another."""
        ends = {"succeeded", "partial", "failed", "rejected", "cancelled", "held"}

        def arrived() -> dict[str, Any]:
            job = self.job(file)
            state = job.get("state", "")
            assert state in states or state not in ends, (
                f"{job}\n{self.exec('dropforge', 'logs', job['id'], check=False)}"
            )
            return job if state in states else {}

        found: dict[str, Any] = until(seconds, f"{file}: {' or '.join(states)}", arrived, every=0.7)
        return found

    def remove(self) -> None:
        docker("rm", "--force", "--volumes", self.id, check=False)
