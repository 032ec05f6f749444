"""Is everything alive? Exit status 0, or 1 with one line per fault. Docker runs it every 30 s; ready.py uses it too.

Looked at: supervisord's own view of each service, an answer from Jupyter, sshd's greeting, the age of the daemon's
heartbeat, and whether the GPUs that were there at the start still answer.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
import xmlrpc.client
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RUN = Path("/run/dropforge")
PROBE_SECONDS = 5.0
GPU_SECONDS = 8.0
STALE_SECONDS = 30.0
"""The daemon beats every 5 s."""
SSHD_ASKED = RUN / "sshd-asked"
SSHD_SECONDS = 600.0
"""sshd writes two lines into the log for everyone who asks and leaves; between two questions its process counts."""


def main() -> int:
    faults = problems(read_facts(), ask_sshd=not asked_lately())
    print("\n".join(faults) or "healthy")
    return 1 if faults else 0


def read_facts() -> dict[str, Any]:
    """What prepare.py found; empty before it has run."""
    try:
        facts: dict[str, Any] = json.loads((RUN / "facts.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return facts


def problems(facts: dict[str, Any], *, ask_sshd: bool = True) -> list[str]:
    """Every fault in words; empty when all is well."""
    if not facts:
        return ["the services were not started yet"]
    found = services(with_sshd=facts["ssh_port"] is not None) + jupyter(facts["jupyter_port"])
    if facts["ssh_port"] is not None and ask_sshd:
        found += sshd(facts["ssh_port"])
    return found + daemon(Path(facts["data"])) + gpus(facts["gpus"])


def services(*, with_sshd: bool) -> list[str]:
    from supervisor.xmlrpc import SupervisorTransport

    # The address only keeps xmlrpc quiet; the transport goes to the socket.
    server = xmlrpc.client.ServerProxy(
        "http://127.0.0.1",
        transport=SupervisorTransport("dropforge", "dropforge", f"unix://{RUN / 'supervisor.sock'}"),
    )
    try:
        states: Any = server.supervisor.getAllProcessInfo()
    except (OSError, http.client.HTTPException, xmlrpc.client.Error) as error:
        return [f"supervisord does not answer: {error}"]
    required = {"jupyter", "daemon", "exit_on_fatal"} | ({"sshd"} if with_sshd else set())
    return [
        f"{state['name']} is {state['statename']}: {state['description']}"
        for state in states
        if state["name"] in required and state["statename"] != "RUNNING"
    ]


def jupyter(port: int) -> list[str]:
    # Plain http.client, because it knows nothing of proxy variables.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", "/api")
        answer = connection.getresponse()
        version = json.loads(answer.read())["version"] if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return [f"JupyterLab does not answer on port {port}: {error}"]
    finally:
        connection.close()
    return [] if version else [f"JupyterLab answers with status {answer.status} on port {port}"]


def sshd(port: int) -> list[str]:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PROBE_SECONDS) as connection:
            greeting = connection.recv(4)
    except OSError as error:
        return [f"sshd does not answer on port {port}: {error}"]
    if greeting != b"SSH-":
        return [f"what listens on port {port} is not sshd"]
    with contextlib.suppress(OSError):  # it is only about fewer lines in the log
        SSHD_ASKED.touch()
    return []


def asked_lately() -> bool:
    """True when sshd gave the right answer a short while ago."""
    try:
        return 0 <= time.time() - SSHD_ASKED.stat().st_mtime < SSHD_SECONDS
    except OSError:
        return False


def daemon(data: Path) -> list[str]:
    try:
        heartbeat = json.loads((data / "state" / "daemon.json").read_text(encoding="utf-8"))
        age = (datetime.now(UTC) - datetime.fromisoformat(heartbeat["updated"])).total_seconds()
    except (OSError, ValueError, KeyError) as error:
        return [f"the daemon's heartbeat cannot be read: {error}"]
    if heartbeat["state"] == "stopped":
        return ["the daemon has stopped (after a drain it stays down until the container is started again)"]
    return [f"the daemon's last heartbeat is {age:.0f} s old"] if age > STALE_SECONDS else []


def gpus(expected: int) -> list[str]:
    """Containers are known to lose their GPUs when the host reloads its services."""
    if not expected:
        return []
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=GPU_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not answer: {error}"]
    seen = done.stdout.count("GPU ")
    lost = done.returncode != 0 or seen < expected
    return [f"{seen} of {expected} GPUs answer; restart the container"] if lost else []


if __name__ == "__main__":
    sys.exit(main())
