"""One container with hard passwords and every secret set: the drop folder, Jupyter, SSH, and what must not leak."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from image_container import READY, Container, docker, until
from image_jupyter import Browser

EXAMPLE = Path(__file__).parents[2] / "examples" / "elements"
PASSWORD = """ it's "100%", a+b&c=d; $HOME `x` \\n 密码 ñ %(ENV_PATH)s """
CANARIES = {
    "JUPYTER_PASSWORD": PASSWORD,
    "USER_PASSWORD": "canary-sudo-4Kq!%,\"'",
    "HF_TOKEN": "hf_canary7Lw2Zx91",
    "WANDB_API_KEY": "canary0123456789abcdef0123456789abcdef01",
}
BAD_LINE = re.compile(r"\b(WARN|WARNING|ERROR|CRIT|CRITICAL|FATAL|Traceback|\w+Warning|\w+Error)\b|\[[WEC] ")
SMALL_JOB = """\
version: 1
name: small
model: {id: "builtin:tiny-llama", max_seq_length: 64}
data: elements.jsonl
train: {max_steps: 6, effective_batch_size: 8, optim: adamw_torch}
export: [adapter, "gguf:q8_0"]
"""
OWNER = 4321
ENVIRONMENTS = """
from pathlib import Path
parents = {}
for folder in Path("/proc").glob("[0-9]*"):
    try:
        parents[folder.name] = (folder / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        pass
for pid in parents:
    ancestor = pid
    while ancestor not in ("1", "0"):
        ancestor = parents.get(ancestor, "0")
    if ancestor == "1":  # one of the container's own processes, not of this `docker exec`, which gets every variable
        try:
            print((Path("/proc") / pid / "environ").read_bytes().replace(bytes(1), bytes([10])).decode())
        except (FileNotFoundError, ProcessLookupError):
            pass
"""
"""Prints the environments of PID 1 and all below it; as their own user, who sees what each program of theirs could."""


@pytest.fixture(scope="module")
def running(run_label: str, ssh_keys: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """The work folder belongs to a host user of its own, as it does on people's machines."""
    work = tmp_path_factory.mktemp("services") / "work"
    work.mkdir()
    os.chown(work, OWNER, OWNER)
    public = [key.with_suffix(".pub").read_text().strip() for key in ssh_keys]
    container = Container.start(
        run_label, "--health-interval", "2s", "--health-start-period", "1s", work=work,
        env={**CANARIES, "SSH_KEY": f"{public[0]}\n# the office machine\n\n  {public[1]}  ", "PUBLIC_KEY": public[2],
             "DROPFORGE_SETTLE_SECONDS": "1"},
    )  # fmt: skip
    yield container
    container.remove()


@pytest.fixture(scope="module")
def finished(running: Container) -> dict[str, object]:
    """A job that was copied into the mounted folder from the host, at its end."""
    (running.work / "datasets").mkdir(exist_ok=True)
    shutil.copy(EXAMPLE / "elements.jsonl", running.work / "datasets")
    (running.work / "inbox" / "small.yaml").write_text(SMALL_JOB)
    return running.wait_job("small.yaml", "succeeded")


@pytest.fixture(scope="module")
def browser(running: Container) -> Browser:
    visitor = Browser(running.port(8888))
    assert visitor.login(PASSWORD) == 302
    return visitor


def ssh(
    container: Container, key: Path, *command: str, options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    known = key.with_name("known_hosts")
    words = ["ssh", "-F", "none", "-i", str(key), "-p", str(container.port(22)), "-o", f"UserKnownHostsFile={known}",
             "-o", "StrictHostKeyChecking=accept-new", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes",
             "-o", "IdentityAgent=none", *options]  # fmt: skip
    return subprocess.run(
        [*words, "dropforge@127.0.0.1", *command], capture_output=True, text=True, timeout=60, check=False
    )


def test_it_is_ready_within_20_seconds_and_says_so_once(running: Container) -> None:
    assert running.seconds_to_ready < 20
    log = running.logs()
    assert log.count(READY) == 1
    block = log[log.index("=== Dropforge is ready") :]
    for promised in ("http://localhost:8888/", "JUPYTER_PASSWORD", "port 22 here", "/workspace/work/inbox", "uid 4321",
                     "kept       /workspace/work, all of it", "GPU: not used, because DROPFORGE_DEVICE=cpu", "/dropforge/"):  # fmt: skip
        assert promised in block


def test_docker_calls_it_healthy(running: Container) -> None:
    until(30, "healthy", lambda: running.inspect()["State"]["Health"]["Status"] == "healthy")


def test_nothing_runs_as_root(running: Container) -> None:
    assert {line.split()[0] for line in running.exec("ps", "-eo", "uid=,pid=,args=").splitlines() if " ps " not in line} \
        == {str(OWNER)}  # fmt: skip


def test_a_dropped_job_comes_out_as_gguf_owned_by_the_folders_owner(
    running: Container, finished: dict[str, object]
) -> None:
    result = running.work / str(finished["result"])
    gguf = list((result / "gguf").glob("*.gguf"))
    assert len(gguf) == 1 and gguf[0].read_bytes()[:4] == b"GGUF"
    assert (result / "COMPLETE").exists()
    owners = {path.stat().st_uid for folder in ("results", "runs", "queue", "done", "inbox", "state", "home", "cache")
              for path in (running.work / folder).rglob("*")}  # fmt: skip
    assert owners == {OWNER}
    assert not list((running.work / "inbox").glob("*.yaml"))


def test_the_command_line_talks_to_the_result(running: Container, finished: dict[str, object]) -> None:
    said = json.loads(running.exec("dropforge", "chat", "small", "--prompt", "Hello", "--max-tokens", "4", "--json"))
    assert isinstance(said[0]["answer"], str)


def test_submit_through_exec_writes_as_the_services_user(running: Container, finished: dict[str, object]) -> None:
    running.exec("sh", "-c", "cat > /tmp/second.yaml", input=SMALL_JOB.replace("small", "second"))
    running.exec("dropforge", "submit", "/tmp/second.yaml")
    until(20, "the job is taken", lambda: [job for job in running.jobs() if job["name"] == "second"])
    job = next(job for job in running.jobs() if job["name"] == "second")
    assert {path.stat().st_uid for path in (running.work / "runs" / job["id"]).rglob("*")} == {OWNER}
    running.exec("dropforge", "cancel", job["id"])


@pytest.mark.parametrize("wrong", ["", PASSWORD.strip(), PASSWORD.replace("ñ", "n"), "dropforge"])
def test_jupyter_refuses_another_password(running: Container, browser: Browser, wrong: str) -> None:
    assert browser.api("/api/status")["kernels"] >= 0  # the visitor who is logged in stays so
    visitor = Browser(running.port(8888))
    assert visitor.login(wrong) == 401
    assert visitor.ask("GET", "/api/contents").status == 403
    assert Browser(running.port(8888)).login(PASSWORD) == 302  # which also forgets the failures


def test_jupyter_shows_strangers_nothing(running: Container) -> None:
    stranger = Browser(running.port(8888))
    for path in ("/api/contents", "/api/kernels", "/api/terminals", "/api/sessions", "/files/work/STATUS.md", "/lab"):
        answer = stranger.ask("GET", path)
        assert answer.status == 403 or (answer.status == 302 and "/login" in (answer.headers["Location"] or "")), path
    for token in ("", "dropforge", "None"):
        assert stranger.ask("GET", f"/api/contents?token={token}").status == 403
    with pytest.raises(ConnectionRefusedError, match="403"):
        stranger.websocket("/api/kernels/00000000-0000-0000-0000-000000000000/channels")
    with pytest.raises(ConnectionRefusedError, match="403"):
        stranger.websocket("/terminals/websocket/1")


def test_a_notebook_cell_runs_and_finds_the_library(browser: Browser) -> None:
    said = browser.run_cell(
        "import os, pathlib, dropforge, torch\n"
        "print(int((torch.ones(3) * 7).sum()), os.getuid(), pathlib.Path.home(), os.environ['HF_TOKEN_PATH'])\n"
        "print(sorted(name for name in os.environ if name in "
        "('JUPYTER_PASSWORD', 'USER_PASSWORD', 'HF_TOKEN', 'WANDB_API_KEY', 'SSH_KEY')))"
    )
    assert said.splitlines() == [f"21 {OWNER} /workspace/work/home /run/dropforge/secrets/HF_TOKEN", "[]"]


def test_notebooks_are_in_place_and_run(running: Container, browser: Browser) -> None:
    """Every cell of the sample, in order, on a job with six steps instead of its own."""
    assert (running.work / "notebooks" / "first-job.ipynb").exists()
    notebook = browser.api("/api/contents/notebooks/first-job.ipynb")
    cells = ["".join(cell["source"]) for cell in notebook["content"]["cells"] if cell["cell_type"] == "code"]
    short = running.work / "home" / "short"
    short.mkdir()
    (short / "job.yaml").write_text(SMALL_JOB.replace("name: small", "name: elements"))
    shutil.copy(EXAMPLE / "elements.jsonl", short)
    said = browser.run_cell("\n".join([cells[0], "examples = Path('/workspace/work/home/short')", *cells[1:]]))
    assert "version: 1" in said and "succeeded" in said and "Traceback" not in said
    assert list((running.work / "results" / "elements").rglob("*.gguf"))


def test_the_terminal_is_a_login_shell_with_the_command(browser: Browser) -> None:
    terminal = browser.api("/api/terminals", method="POST", body={})
    channel = browser.websocket(f"/terminals/websocket/{terminal['name']}")
    channel.send(json.dumps(["stdin", "dropforge --version; id -un; echo en''d\r"]))
    said = ""
    while "\nend" not in said:
        text = "".join(str(part) for part in json.loads(channel.receive())[1:])
        said += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", text)
    channel.close()
    assert re.search(r"^dropforge \d+\.\d+\.\d+\ndropforge\nend$", said, re.MULTILINE)


def test_the_status_page_is_behind_the_login_and_true(
    running: Container, browser: Browser, finished: dict[str, object]
) -> None:
    stranger = Browser(running.port(8888))
    for path in ("/dropforge/", "/dropforge/queue.json"):
        answer = stranger.ask("GET", path)
        assert answer.status == 302 and answer.headers["Location"].startswith("/login?")
        assert str(finished["id"]) not in answer.text  # type: ignore[attr-defined]
    (running.work / "inbox" / "<script>alert(1)<b>.txt.yaml").write_text("version: 1\nname: [\n")
    until(30, "both on the page", lambda: all(
        word in browser.ask("GET", "/dropforge/").text  # type: ignore[attr-defined]
        for word in ("&lt;script&gt;", f"<td>{finished['id']}</td><td>succeeded</td>")
    ))  # fmt: skip
    page = browser.ask("GET", "/dropforge/")
    assert page.headers["Content-Type"].startswith("text/html") and "<script" not in page.text  # type: ignore[attr-defined]
    assert re.search(r"the daemon is running; written \d s ago", page.text)  # type: ignore[attr-defined]
    assert "small" in {job["name"] for job in browser.api("/dropforge/queue.json")["ended"]}
    assert browser.ask("POST", "/dropforge/", body={}).status == 405, "it is to be read only"


def test_guessing_closes_the_login_but_not_the_session(running: Container, browser: Browser) -> None:
    guesser = Browser(running.port(8888))
    statuses = [guesser.login(f"guess {number}") for number in range(7)]
    assert statuses[:5] == [401] * 5 and statuses[5:] == [429] * 2
    answer = guesser.ask("POST", "/login", form={"_xsrf": guesser.cookies["_xsrf"], "password": PASSWORD})
    assert answer.status == 429 and 20 <= int(answer.headers["Retry-After"]) <= 31
    assert browser.api("/api/status")["kernels"] >= 0


def test_ssh_lets_in_the_key_and_its_environment_holds_no_secret(running: Container, ssh_key: Path) -> None:
    done = ssh(running, ssh_key, "id -u; pwd; dropforge --version; env")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(OWNER) and lines[1] == "/workspace/work/home" and lines[2].startswith("dropforge ")
    names = {line.partition("=")[0] for line in lines[3:]}
    assert {"DROPFORGE_DATA", "HF_HOME", "HF_TOKEN_PATH"} <= names
    assert not {name for name in names if name.endswith(("TOKEN", "KEY", "PASSWORD", "SECRET"))}


def test_every_one_of_several_keys_gets_in(running: Container, ssh_keys: list[Path]) -> None:
    """Two lines of SSH_KEY, with a comment and blanks between them, and PUBLIC_KEY."""
    assert [ssh(running, key, "id -un").stdout.strip() for key in ssh_keys] == ["dropforge"] * 3


def test_ssh_gives_a_terminal_and_copies_files(running: Container, ssh_key: Path, tmp_path: Path) -> None:
    done = ssh(running, ssh_key, "tty", options=("-tt",))
    assert "/dev/pts/" in done.stdout
    (tmp_path / "up.txt").write_text("over sftp\n")
    subprocess.run(
        ["scp", "-F", "none", "-q", "-i", ssh_key, "-P", str(running.port(22)), "-o",
         f"UserKnownHostsFile={ssh_key.with_name('known_hosts')}", tmp_path / "up.txt", "dropforge@127.0.0.1:work-up.txt"],
        check=True, timeout=60,
    )  # fmt: skip
    assert (running.work / "home" / "work-up.txt").read_text() == "over sftp\n"


def test_ssh_refuses_passwords_other_keys_root_and_tunnels(running: Container, ssh_key: Path, tmp_path: Path) -> None:
    password = ssh(running, ssh_key, "true", options=("-o", "PubkeyAuthentication=no"))
    assert password.returncode == 255 and "Permission denied (publickey)" in password.stderr
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    assert "Permission denied (publickey)" in ssh(running, other, "true").stderr
    assert "Permission denied (publickey)" in ssh(running, ssh_key, "true", options=("-l", "root")).stderr
    tunnel = ssh(running, ssh_key, options=("-W", "127.0.0.1:8888"))
    assert tunnel.returncode != 0 and "administratively prohibited" in tunnel.stderr


def test_exec_as_root_hands_on_no_secret_and_sessions_may_change_settings(running: Container, ssh_key: Path) -> None:
    environment = running.exec("dropforge-shell", "env")
    assert "DROPFORGE_DATA=/workspace/work" in environment.splitlines()
    assert not [name for name, canary in CANARIES.items() if canary in environment or f"{name}=" in environment]
    changed = ssh(running, ssh_key, "mkdir -p /tmp/other; DROPFORGE_DATA=/tmp/other dropforge status")
    assert "drop a spec into /tmp/other/inbox" in changed.stdout


def test_sudo_works_with_the_password_only(running: Container) -> None:
    right = CANARIES["USER_PASSWORD"] + "\n"
    assert running.exec("dropforge-shell", "sudo", "-kS", "-p", "", "id", "-u", input=right).strip() == "0"
    assert running.exec("dropforge-shell", "sudo", "-kS", "-p", "", "id", "-u", input="wrong\n", check=False) == ""


def test_secrets_are_found_nowhere(running: Container, finished: dict[str, object]) -> None:
    log = running.logs()
    everything = running.exec("sh", "-c", "ps -eo args=; cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    environments = running.exec("python", "-c", ENVIRONMENTS, user=f"{OWNER}:{OWNER}")
    assert environments.count("HF_TOKEN_PATH=") >= 4  # it can look into them
    history = docker("history", "--no-trunc", running.inspect()["Config"]["Image"]).stdout
    for name, canary in CANARIES.items():
        for where, text in (("log", log), ("process list", everything), ("image history", history)):
            assert canary not in text, f"{name} in {where}"
        if name != "WANDB_API_KEY":  # the daemon's jobs report with it
            assert canary not in environments, f"{name} in a process's environment"
        needle = canary.encode()
        for path in running.work.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert needle not in path.read_bytes(), f"{name} in {path.relative_to(running.work)}"
    files = running.exec(
        "grep", "-rlF", "-f", "/dev/stdin", "/etc", "/root", "/run", "/tmp", "/var", "/dev/shm",
        user="0:0", input="\n".join(CANARIES.values()) + "\n", check=False,
    )  # fmt: skip
    assert sorted(files.split()) == [f"/run/dropforge/secrets/{name}" for name in ("HF_TOKEN", "WANDB_API_KEY")]
    modes = running.exec(
        "find", "/run/dropforge/secrets", "/run/dropforge/jupyter_password_hash", "-type", "f", "-printf", "%m %u\\n"
    )
    assert set(modes.splitlines()) == {f"600 {'dropforge'}"}


def test_a_clean_start_and_job_log_no_warning(running: Container, finished: dict[str, object]) -> None:
    log = running.logs()
    ready = log.index(READY) + len(READY)
    start, daemon = log[:ready], [line for line in log[ready:].splitlines() if " small-" in line or "-small-" in line]
    bad = [line for line in [*start.splitlines(), *daemon] if BAD_LINE.search(line)]
    assert bad == []
    assert len(daemon) >= 3
