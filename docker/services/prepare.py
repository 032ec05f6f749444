"""Before the services start: read the variables, refuse bad ones, write what the services read. Runs as their user.

Everything goes to /run/dropforge (gone with the container) except what must outlive it, which goes to the data root:
SSH host keys, a generated Jupyter password, sample notebooks. Secrets end up in files of mode 0600.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent
RUN = Path("/run/dropforge")
SHELL_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DROPFORGE_CACHE", "DROPFORGE_DATA", "DROPFORGE_DEVICE", "DROPFORGE_LLAMA_CPP",
    "DROPFORGE_VARIANT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "LOGNAME",
    "NVIDIA_VISIBLE_DEVICES", "PATH", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "TZ", "USER",
)  # fmt: skip
"""All that SSH sessions and `dropforge-shell` get to see of the container's environment. No secret may be here."""
GRACE_MARGIN_SECONDS = 10


class RefusedError(Exception):
    """A variable that cannot be used. The message says which, why, and what to do; never its value if it is secret."""


def main() -> int:
    from dropforge.errors import DropforgeError

    env = os.environ
    try:
        stop_seconds = seconds_to_stop()
        data = Path(env["DROPFORGE_DATA"])
        facts: dict[str, Any] = {
            "data": str(data),
            "persistent": on_mount(data),
            "jupyter_port": port(env, "JUPYTER_PORT", 8888),
            "ssh_port": port(env, "SSH_PORT", 22) if ssh_keys(env) else None,
            "gpus": gpus(env, data),
        }
        facts["jupyter_password"] = jupyter(env, data)
        if facts["ssh_port"]:
            ssh(env, data, port=facts["ssh_port"])
        keep_secrets(env)
    except (RefusedError, DropforgeError) as refusal:
        print(f"dropforge: ERROR: {refusal}", file=sys.stderr)
        return 64
    render("supervisord.conf", RUN / "supervisord.conf", ssh=str(bool(facts["ssh_port"])).lower(),
           stop_seconds=str(stop_seconds))  # fmt: skip
    (RUN / "env.sh").write_text(
        "".join(f"export {name}={shlex.quote(env[name])}\n" for name in SHELL_VARIABLES if name in env),
        encoding="utf-8",
    )
    (RUN / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    sample_notebooks(data)
    return 0


def port(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise RefusedError(f"{name}={text!r} is not a port; give a number from 1 to 65535")
    lowest = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if int(text) < lowest:
        raise RefusedError(
            f"{name}: this engine lets only root listen below port {lowest}, and services never run as root; "
            f"start with -e {name}={int(text) + 8000}, or with --sysctl net.ipv4.ip_unprivileged_port_start=0"
        )
    return int(text)


def on_mount(folder: Path) -> bool:
    """True when the folder, or one above it other than /, is a mount."""
    return any(os.path.ismount(path) for path in (folder, *folder.parents) if path != Path("/"))


def gpus(env: Mapping[str, str], data: Path) -> int:
    """How many GPUs there are. Raises RefusedError when there must be one and none can be used."""
    from dropforge.doctor.driver import ask_nvidia_smi, driver_version, no_gpu, packaged_cuda
    from dropforge.hardware import probe

    hardware = probe(data)
    if env.get("DROPFORGE_DEVICE", "auto") == "cpu":
        return len(hardware.gpus)
    found = driver_version(hardware.gpus[0].driver, cuda=packaged_cuda()) if hardware.gpus else no_gpu(ask_nvidia_smi())
    if not hardware.gpus or found.level == "fault":
        raise RefusedError(
            f"there is no usable GPU: {found.what.removeprefix('GPU: ')}\n  fix: {found.fix}\n"
            "  or:  ask for the CPU with -e DROPFORGE_DEVICE=cpu, which suits tiny models"
        )
    return len(hardware.gpus)


def secret(name: str, text: str) -> str:
    if any(ord(character) < 32 and character != "\t" for character in text):
        raise RefusedError(f"{name} holds a line break or another control character, which no login form can send")
    return text


def jupyter(env: Mapping[str, str], data: Path) -> dict[str, str]:
    """Hash the password into a private file. Returns how to log in, with the password itself only when it is new."""
    from jupyter_server.auth import passwd

    kept = data / "state" / "jupyter_password"
    password, told = secret("JUPYTER_PASSWORD", env.get("JUPYTER_PASSWORD", "")), {"source": "JUPYTER_PASSWORD"}
    if not password and kept.exists():
        password, told = kept.read_text(encoding="utf-8").strip(), {"source": str(kept)}
    if not password:
        password = secrets.token_urlsafe(15)
        write_private(kept, password + "\n")
        told = {"source": str(kept), "password": password}
    write_private(RUN / "jupyter_password_hash", passwd(password))
    return told


def ssh_keys(env: Mapping[str, str]) -> list[str]:
    """The public keys of SSH_KEY and PUBLIC_KEY, one per line."""
    lines = "\n".join(env.get(name, "") for name in ("SSH_KEY", "PUBLIC_KEY")).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def ssh(env: Mapping[str, str], data: Path, *, port: int) -> None:
    """Check the keys, take or make the host key, write sshd's files."""
    keys = ssh_keys(env)
    for number, key in enumerate(keys, start=1):
        check_key(key, number)
    if os.getuid() < 500:
        raise RefusedError(f"SSH needs a user id of 500 or more, not {os.getuid()}; set PUID, or leave SSH_KEY unset")
    forwarding = env.get("SSH_FORWARDING", "no")
    if forwarding not in ("yes", "no", "local", "remote"):
        raise RefusedError(f"SSH_FORWARDING={forwarding!r}: choose yes, local, remote or no")
    folder = RUN / "ssh"
    folder.mkdir(mode=0o700)
    write_private(folder / "authorized_keys", "\n".join(keys) + "\n")
    # A copy, because the data root may be on a mount that shows every file as open to all, which sshd refuses.
    write_private(folder / "ssh_host_ed25519_key", host_key(data).read_text(encoding="ascii"))
    known = {name: env[name] for name in SHELL_VARIABLES if name in env and '"' not in env[name]}
    render(
        "sshd_config", folder / "sshd_config", ssh_port=str(port), forwarding=forwarding,
        environment=" ".join(f'{name}="{value}"' for name, value in known.items()),
    )  # fmt: skip


def check_key(key: str, number: int) -> None:
    """Raises RefusedError for anything sshd would silently ignore. It is not shown: it may be a private one."""
    if "PRIVATE KEY" in key:
        raise RefusedError(
            "SSH_KEY holds a private key; keep that to yourself and give the public one, from the .pub file"
        )
    done = subprocess.run(
        ["ssh-keygen", "-l", "-f", "-"], input=key + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RefusedError(
            f"SSH_KEY: line {number} is not a public key; each line must look like `ssh-ed25519 AAAA... name`, "
            "as in the file ~/.ssh/id_ed25519.pub"
        )


def host_key(data: Path) -> Path:
    """The host key of this data root, made once. Raises RefusedError when broken: a new one looks like an attack."""
    path = data / "state" / "ssh" / "ssh_host_ed25519_key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(f".new-{secrets.token_hex(4)}")
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "dropforge", "-f", str(fresh)], check=True, timeout=60
        )
        fresh.with_name(fresh.name + ".pub").rename(path.with_name(path.name + ".pub"))
        fresh.rename(path)
    probe = RUN / "host_key_check"
    write_private(probe, path.read_text(encoding="ascii", errors="replace"))
    done = subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", str(probe)], capture_output=True, check=False)
    probe.unlink()
    if done.returncode != 0:
        raise RefusedError(f"the SSH host key {path} is broken; restore it, or delete it to get a new one")
    return path


def keep_secrets(env: Mapping[str, str]) -> None:
    """Tokens into files: HF_TOKEN_PATH leads Hugging Face's libraries to theirs, the daemon reads the other."""
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        if env.get(name):
            write_private(RUN / "secrets" / name, secret(name, env[name].strip()))


def seconds_to_stop() -> int:
    """How long supervisord waits for the daemon. Raises EnvironmentFault for settings that make no sense."""
    from dropforge.settings import settings

    return int(settings().grace_seconds) + GRACE_MARGIN_SECONDS


def render(name: str, target: Path, **values: str) -> None:
    write_private(target, Template((HERE / name).read_text(encoding="utf-8")).substitute(values))


def write_private(path: Path, text: str) -> None:
    """Whole file at once, mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text)
    scratch.rename(path)


def sample_notebooks(data: Path) -> None:
    """Put the image's notebooks where they outlive it; never over a file that is there."""
    target = data / "notebooks"
    target.mkdir(exist_ok=True)
    for notebook in sorted((HERE / "notebooks").glob("*.ipynb")):
        if not (target / notebook.name).exists():
            shutil.copyfile(notebook, target / notebook.name)


if __name__ == "__main__":
    sys.exit(main())
