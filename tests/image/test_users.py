"""Who the container runs as, and how little it needs: any uid, read-only root, no capabilities, no network, tiny shm."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from image_container import Container, docker, until

JOB = """\
version: 1
name: tiny
model: {id: "builtin:tiny-llama", max_seq_length: 32}
data: {train: [{path: rows.jsonl}], format: messages}
train: {max_steps: 2, effective_batch_size: 2, optim: adamw_torch}
export: [adapter]
"""
ROW = '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}]}\n'


def folder(path: Path, owner: int) -> Path:
    work = path / "work"
    work.mkdir()
    os.chown(work, owner, owner)
    return work


def train(container: Container, owner: int) -> None:
    """A whole job runs, and all of it belongs to `owner`."""
    (container.work / "datasets" / "rows.jsonl").write_text(ROW * 8)
    (container.work / "inbox" / "tiny.yaml").write_text(JOB)
    container.wait_job("tiny.yaml", "succeeded")
    assert {path.stat().st_uid for name in ("runs", "results") for path in (container.work / name).rglob("*")} == {
        owner
    }


def test_any_uid_without_any_right_and_without_network(
    start: Callable[..., Container], tmp_path: Path, ssh_key: Path
) -> None:
    folder(tmp_path, 7007)
    container = start(
        "--user", "7007:7007", "--read-only", "--tmpfs", "/tmp", "--tmpfs", "/run/dropforge", "--cap-drop", "ALL",
        "--security-opt", "no-new-privileges", "--shm-size", "1m", "--network", "none",
        env={"SSH_KEY": ssh_key.with_suffix(".pub").read_text(), "DROPFORGE_SETTLE_SECONDS": "1"},
    )  # fmt: skip
    assert container.health() == (0, "healthy\n")
    assert container.exec("id").startswith("uid=7007(dropforge) gid=7007(dropforge)")
    assert "uid 7007, gid 7007" in container.logs()
    train(container, 7007)


def test_a_read_only_root_file_system_when_started_as_root(start: Callable[..., Container], tmp_path: Path) -> None:
    container = start("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/run/dropforge")
    assert container.health() == (0, "healthy\n")
    assert container.exec("dropforge-shell", "id", "-u").strip() == "1000"


def test_puid_and_pgid_decide(start: Callable[..., Container], tmp_path: Path) -> None:
    """Docker makes the missing mount folder as root; the container gives it to PUID."""
    container = start(env={"PUID": "1234", "PGID": "2345"})
    made = container.work.stat()
    assert (made.st_uid, made.st_gid) == (1234, 2345)
    assert container.exec("dropforge-shell", "id", "-u").strip() == "1234"
    assert {path.stat().st_gid for path in (container.work / "state").iterdir()} == {2345}


def test_what_root_put_into_the_folder_beforehand_can_be_used(start: Callable[..., Container], tmp_path: Path) -> None:
    (tmp_path / "work" / "inbox").mkdir(parents=True)
    (tmp_path / "work" / "datasets").mkdir()
    (tmp_path / "work" / "datasets" / "rows.jsonl").write_text(ROW * 8)
    (tmp_path / "work" / "inbox" / "tiny.yaml").write_text(JOB)
    container = start()
    container.wait_job("tiny.yaml", "succeeded")


def test_without_a_mount_it_says_that_nothing_is_kept(start: Callable[..., Container]) -> None:
    container = start(mount=False)
    assert "NOT KEPT   nothing is mounted at /workspace/work" in container.logs()


def test_sudo_is_off_without_a_password(start: Callable[..., Container]) -> None:
    container = start(env={"JUPYTER_PASSWORD": "x"})
    said = docker("exec", container.id, "dropforge-shell", "sudo", "-n", "id", check=False)
    assert said.returncode != 0 and "password is required" in said.stderr
    said = docker("exec", "-i", container.id, "dropforge-shell", "sudo", "-S", "id", input="\n", check=False)
    assert said.returncode != 0 and "uid=0" not in said.stdout


def test_commands_instead_of_services(start: Callable[..., Container], tmp_path: Path) -> None:
    container = start(ready=False, command=("dropforge", "doctor"))
    assert container.wait_exit() == 0
    assert "A job can run here." in container.logs()
    assert (tmp_path / "work" / "inbox").stat().st_uid == 1000


def test_hooks_run_and_a_failing_one_stops_the_start(start: Callable[..., Container], tmp_path: Path) -> None:
    for name, text in (("before", "echo before as $(id -u)"), ("after", "echo after as $(id -u)"), ("bad", "exit 7")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "10-hook").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name / "10-hook").chmod(0o755)
        (tmp_path / name / "ignored.txt").write_text("not executable")
    before, after = "/etc/dropforge/before-start.d:ro", "/etc/dropforge/after-start.d:ro"
    good = start("-v", f"{tmp_path}/before:{before}", "-v", f"{tmp_path}/after:{after}")
    assert "before as 0" in good.logs()
    assert "after as 1000" in good.logs()
    docker("rm", "-f", good.id)
    bad = start("-v", f"{tmp_path}/bad:{before}", ready=False)
    assert bad.wait_exit() == 65
    assert "10-hook ended with status 7" in bad.logs()
    warned = start("-v", f"{tmp_path}/bad:{before}", env={"HOOK_ERRORS": "go"}, ready=False)
    until(20, "it starts all the same", lambda: "supervisord started" in warned.logs())
    assert "10-hook ended with status 7" in warned.logs()


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBuPqZ4wDkcYf0kSgvTzQ6S6xq1Tg4vWkYy5kqg7mS9s somebody"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"JUPYTER_PORT": "eighty"}, "JUPYTER_PORT='eighty' is not a port"),
        ({"JUPYTER_PORT": "70000"}, "JUPYTER_PORT='70000' is not a port"),
        ({"JUPYTER_PASSWORD": "two\nlines"}, "JUPYTER_PASSWORD holds a line break"),
        ({"JUPYTER_PASSWORD_FILE": "/nowhere"}, "JUPYTER_PASSWORD_FILE: /nowhere is not a file"),
        ({"SSH_KEY": KEY + "\nssh-ed25519 AAAAbroken somebody"}, "SSH_KEY: line 2 is not a public key"),
        ({"SSH_KEY": "-----BEGIN OPENSSH PRIVATE KEY-----\nverysecret"}, "SSH_KEY holds a private key"),
        ({"SSH_KEY": KEY, "SSH_FORWARDING": "maybe"}, "SSH_FORWARDING='maybe'"),
        ({"PUID": "0"}, "PUID not 0"),
        ({"PUID": "me"}, "PUID=me"),
        ({"DROPFORGE_GRACE_SECONDS": "soon"}, "DROPFORGE_GRACE_SECONDS must be a number of seconds"),
        ({"DROPFORGE_DEVICE": "auto"}, "there is no usable GPU"),
        ({"DROPFORGE_DATA": "/elsewhere"}, "the folder /elsewhere does not exist"),
    ],
)
def test_bad_variables_stop_the_start_and_are_named(
    start: Callable[..., Container], variables: dict[str, str], said: str
) -> None:
    container = start(env=variables, ready=False)
    assert container.wait_exit() == 64
    assert said in container.logs()
    assert "verysecret" not in container.logs() and "Traceback" not in container.logs()


@pytest.mark.parametrize(
    ("owner", "arguments", "said"),
    [
        (3003, ("--user", "7007:7007"), "cannot be written by uid 7007, gid 7007; it belongs to 3003:3003"),
        (3003, ("--env", "PUID=7007"), "fix: docker run -e PUID=3003 -e PGID=3003"),
        (3003, ("--cap-drop", "ALL"), "fix: docker run --user 3003:3003"),
        (7007, ("--user", "7007:7007", "--env", "USER_PASSWORD=x"), "sudo needs a container started as root"),
        (7007, ("--user", "7007:7007", "--read-only"), "give --tmpfs /run/dropforge --tmpfs /tmp"),
        (7007, ("--read-only",), "give --tmpfs /run/dropforge --tmpfs /tmp"),
    ],
)
def test_a_folder_or_user_that_cannot_work_is_explained(
    start: Callable[..., Container], tmp_path: Path, owner: int, arguments: tuple[str, ...], said: str
) -> None:
    folder(tmp_path, owner)
    container = start(*arguments, ready=False)
    assert container.wait_exit() == 64
    assert said in container.logs()


def test_a_read_only_data_folder_is_explained(start: Callable[..., Container], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    container = start("--volume", f"{tmp_path}/work:/workspace/work:ro", mount=False, ready=False)
    assert container.wait_exit() == 64
    assert "/workspace/work cannot be written" in container.logs()


def test_secrets_from_files_that_only_root_can_read(start: Callable[..., Container], tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("from a file\n")
    secret.chmod(0o400)
    from image_jupyter import Browser

    container = start(
        "-v", f"{secret}:/run/secrets/password:ro", env={"JUPYTER_PASSWORD_FILE": "/run/secrets/password"}
    )
    assert Browser(container.port(8888)).login("from a file") == 302


def test_a_broken_host_key_is_not_replaced(start: Callable[..., Container], tmp_path: Path, ssh_key: Path) -> None:
    broken = tmp_path / "work" / "state" / "ssh" / "ssh_host_ed25519_key"
    broken.parent.mkdir(parents=True)
    broken.write_text("not a key\n")
    for path in (tmp_path / "work").rglob("*"):
        os.chown(path, 1000, 1000)
    container = start(env={"SSH_KEY": ssh_key.with_suffix(".pub").read_text()}, ready=False)
    assert container.wait_exit() == 64
    assert "ssh_host_ed25519_key is broken" in container.logs() and broken.read_text() == "not a key\n"
