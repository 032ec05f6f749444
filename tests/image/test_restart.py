"""Stop during training, restart, a new container on the same folder, another password."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from image_container import Container, docker, until
from image_jupyter import Browser

EXAMPLE = Path(__file__).parents[2] / "examples" / "elements"
LONG_JOB = """\
version: 1
name: long
model: {id: "builtin:tiny-llama", max_seq_length: 64}
data: elements.jsonl
train: {max_steps: 90, effective_batch_size: 16, optim: adamw_torch}
export: [adapter]
"""
STOP_SECONDS = 60


def drop(container: Container, name: str, text: str) -> None:
    (container.work / "datasets").mkdir(exist_ok=True)
    shutil.copy(EXAMPLE / "elements.jsonl", container.work / "datasets")
    staged = container.work / "inbox" / ".staging" / name
    staged.write_text(text)
    staged.rename(container.work / "inbox" / name)


def host_keys(container: Container) -> str:
    done = subprocess.run(
        ["ssh-keyscan", "-p", str(container.port(22)), "-t", "ed25519", "127.0.0.1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split("ssh-ed25519")[1].strip()


def test_stop_saves_start_resumes_and_everything_is_still_there(start: Callable[..., Container], ssh_key: Path) -> None:
    variables = {"SSH_KEY": ssh_key.with_suffix(".pub").read_text(), "JUPYTER_PASSWORD": "first"}
    container = start(env=variables)
    drop(container, "long.yaml", LONG_JOB)
    until(120, "some steps", lambda: (container.job("long.yaml").get("status") or {}).get("step", 0) >= 10)
    key, mine = host_keys(container), container.work / "notebooks" / "mine.ipynb"
    mine.write_text("{}")

    began = time.monotonic()
    docker("stop", "--time", str(STOP_SECONDS), container.id)
    assert time.monotonic() - began < STOP_SECONDS - 10, "stopping did not wait to be killed"
    assert container.inspect()["State"]["ExitCode"] == 0
    (run,) = (container.work / "runs").iterdir()
    saved = [path.name for path in (run / "checkpoints").iterdir()]
    assert saved, "a checkpoint was saved while stopping"

    docker("start", container.id)
    container.wait_ready(times=2)
    assert host_keys(container) == key
    resumed = container.wait_job("long.yaml", "succeeded")
    assert sorted(path.name for path in (run / "attempts").iterdir()) == ["001", "002"]
    assert resumed["status"]["step"] == 90
    assert (container.work / resumed["result"] / "COMPLETE").exists()

    docker("stop", container.id)
    docker("rm", container.id)
    other = start(env={**variables, "JUPYTER_PASSWORD": "second"})
    assert host_keys(other) == key
    assert other.job("long.yaml")["state"] == "succeeded"
    assert mine.read_text() == "{}"
    assert Browser(other.port(8888)).login("first") == 401
    assert Browser(other.port(8888)).login("second") == 302


def test_a_generated_password_is_shown_once_and_kept(start: Callable[..., Container]) -> None:
    container = start()
    kept = container.work / "state" / "jupyter_password"
    password = kept.read_text().strip()
    assert len(password) >= 16 and kept.stat().st_mode & 0o777 == 0o600
    assert container.logs().count(password) == 1
    assert Browser(container.port(8888)).login(password) == 302
    docker("restart", "--time", "30", container.id)
    container.wait_ready(times=2)
    assert container.logs().count(password) == 1
    assert "the one in /workspace/work/state/jupyter_password" in container.logs()
    assert Browser(container.port(8888)).login(password) == 302


def test_a_second_container_on_the_same_folder_stands_by_and_says_why(start: Callable[..., Container]) -> None:
    """It shows status and starts nothing; its daemon takes over when the first one ends."""
    first = start()
    second = start()
    until(30, "the second daemon to say why it waits", lambda: "another daemon serves" in second.logs())
    assert "standing by" in second.logs()
    assert f"STANDBY    {first.inspect()['Config']['Hostname']} serves this folder already" in second.logs()
    assert first.health() == second.health() == (0, "healthy\n")
    docker("stop", "--time", "30", first.id)
    until(30, "its turn", lambda: "serving /workspace/work" in second.logs())
    drop(second, "long.yaml", LONG_JOB.replace("90", "2"))
    second.wait_job("long.yaml", "succeeded")


@pytest.mark.parametrize("seconds", [0, 0.5, 1.5])
def test_a_stop_while_it_still_starts_is_heard(start: Callable[..., Container], seconds: float) -> None:
    """PID 1 has no handlers of its own, so the entrypoint must; else Docker waits for the whole grace and kills."""
    for last in (False, True):  # between two programs there are a few milliseconds without a handler
        container = start(ready=False)
        time.sleep(seconds)
        docker("stop", "--time", "40", container.id)
        status = container.inspect()["State"]["ExitCode"]
        if status == 0 or last:
            break
    assert status == 0


def test_an_init_of_dockers_own_below_pid_1_is_no_trouble(start: Callable[..., Container]) -> None:
    """docker run --init, as some people always write: nothing warns, and a stop reaches the services through both."""
    container = start("--init")
    assert "WARN" not in container.logs() and "Zombie" not in container.logs()
    docker("stop", "--time", "60", container.id)
    assert container.inspect()["State"]["ExitCode"] == 0


def test_asking_sshd_whether_it_lives_does_not_fill_the_log(victim: Container) -> None:
    """It writes two lines for everyone who leaves after its greeting; Docker asks every 30 s, for months."""
    until(30, "healthy", lambda: victim.health()[0] == 0)
    before = victim.logs().count("kex_exchange_identification")
    assert before <= 3, "ready.py, Docker, this test"
    for _ in range(3):
        assert victim.health() == (0, "healthy\n")
    assert victim.logs().count("kex_exchange_identification") == before


@pytest.fixture(scope="module")
def victim(run_label: str, ssh_key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    work = tmp_path_factory.mktemp("victim") / "work"
    container = Container.start(run_label, work=work, env={"SSH_KEY": ssh_key.with_suffix(".pub").read_text()})
    yield container
    container.remove()


@pytest.mark.parametrize("service", ["jupyter", "sshd", "daemon", "exit_on_fatal"])
def test_a_killed_service_is_seen_and_comes_back(victim: Container, service: str) -> None:
    until(30, "healthy", lambda: victim.health()[0] == 0)
    before = victim.pid(service)
    victim.exec("kill", "-9", str(before))
    status, text = victim.health()
    assert status == 1 and (service in text or "heartbeat" in text), text
    until(40, "healthy again", lambda: victim.health()[0] == 0)
    assert victim.pid(service) not in (0, before)
    assert victim.running


def test_a_daemon_that_is_asked_to_end_alone_comes_back(victim: Container) -> None:
    """Somebody's kill: nobody but supervisord stops the daemon for long."""
    until(30, "healthy", lambda: victim.health()[0] == 0)
    before = victim.pid("daemon")
    victim.exec("kill", "-TERM", str(before))
    until(40, "another daemon", lambda: victim.pid("daemon") not in (0, before))
    until(40, "healthy again", lambda: victim.health()[0] == 0)
    assert "exited: daemon (exit status 143; not expected)" in victim.logs()


def test_a_daemon_that_hangs_is_seen(victim: Container) -> None:
    """Alive for supervisord, but its heart does not beat."""
    until(30, "healthy", lambda: victim.health()[0] == 0)
    victim.exec("kill", "-STOP", str(victim.pid("daemon")))
    until(60, "unhealthy", lambda: "heartbeat is" in victim.health()[1], every=2)
    page = (
        "import status_route as s, pathlib, datetime as d;"
        "print(s.page(s.read_queue(pathlib.Path('/workspace/work')), now=d.datetime.now(d.UTC)))"
    )
    assert "what follows is old" in victim.exec("env", "PYTHONPATH=/opt/dropforge", "/opt/venv/bin/python", "-c", page)
    victim.exec("kill", "-CONT", str(victim.pid("daemon")))
    until(20, "healthy again", lambda: victim.health()[0] == 0)


def test_a_drained_daemon_stays_down_until_the_container_starts_again(victim: Container) -> None:
    (victim.work / "control" / "drain").touch()
    until(30, "drained", lambda: "exited: daemon (exit status 0; expected)" in victim.logs())
    status, text = victim.health()
    assert status == 1 and "daemon is EXITED" in text and "after a drain it stays down" in text
    docker("restart", "--time", "30", victim.id)
    victim.wait_ready(times=2)
    assert victim.health() == (0, "healthy\n")


def test_a_service_that_cannot_be_kept_up_ends_the_container(start: Callable[..., Container], ssh_key: Path) -> None:
    container = start(env={"SSH_KEY": ssh_key.with_suffix(".pub").read_text()})
    container.exec("sh", "-c", "echo nonsense > /run/dropforge/ssh/sshd_config")
    container.exec("kill", "-9", str(container.pid("sshd")))
    assert container.wait_exit() == 70
    assert "sshd cannot be kept up" in container.logs()


def test_supervisord_killed_ends_the_container(start: Callable[..., Container]) -> None:
    container = start()
    container.exec("sh", "-c", "kill -9 $(cat /run/dropforge/supervisord.pid)")
    assert container.wait_exit() == 137
