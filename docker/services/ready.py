"""One block in the log once the services answer: where to go, how to log in, what is kept. Then the last hooks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from healthcheck import problems, read_facts

WAIT_SECONDS = 60.0
DOCTOR_SECONDS = 120.0
GPU_NAME, GPU_TRIAL = re.compile(r"GPU \d+ "), re.compile(r"GPU \d+: ")
HOOKS = "/etc/dropforge/after-start.d"


def main() -> int:
    facts, started = read_facts(), time.monotonic()
    doctor = subprocess.Popen(["/opt/venv/bin/dropforge", "doctor", "--json"], stdout=subprocess.PIPE)
    while (faults := problems(facts, ask_sshd=False)) and time.monotonic() - started < WAIT_SECONDS:
        time.sleep(0.3)
    faults = faults or problems(facts)
    print(block(facts, faults, findings(doctor)), flush=True)
    subprocess.run(["/opt/dropforge/hooks.sh", HOOKS], check=False)
    return 1 if faults else 0


def findings(doctor: subprocess.Popen[bytes]) -> list[dict[str, str]]:
    """What `dropforge doctor` says about this machine; one fault when it cannot say."""
    try:
        said, _ = doctor.communicate(timeout=DOCTOR_SECONDS)
        found: list[dict[str, str]] = json.loads(said)["findings"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        doctor.kill()
        return [{"level": "fault", "what": "dropforge doctor gave no answer", "fix": "run it by hand"}]
    return found


def block(facts: dict[str, Any], faults: list[str], found: list[dict[str, str]]) -> str:
    """The whole text. Secrets appear in it only once: a password that was generated at this very start."""
    login = facts["jupyter_password"]
    lines = ["", f"=== Dropforge is ready ({os.environ.get('DROPFORGE_VARIANT', '')}) " + "=" * 40]
    if faults:
        lines[1] = "=== Dropforge started, but NOT everything answers " + "=" * 30
        lines += [f"  FAULT      {fault}" for fault in faults]
    lines.append(f"  JupyterLab http://localhost:{facts['jupyter_port']}/   (published under another port? that one)")
    if "password" in login:
        lines.append(f"  password   {login['password']}   generated, shown this once; kept in {login['source']}")
    else:
        lines.append(f"  password   the one in {login['source']}")
    ssh = facts["ssh_port"]
    lines.append(f"  SSH        ssh -p PORT dropforge@HOST, with your key; port {ssh} here" if ssh else
                 "  SSH        off; give SSH_KEY to turn it on")  # fmt: skip
    lines.append(f"  status     http://localhost:{facts['jupyter_port']}/dropforge/, or {facts['data']}/STATUS.md")
    other = served_by_another(Path(facts["data"]))
    if other:
        lines.append(f"  STANDBY    {other} serves this folder already; nothing is started here until that ends")
    lines.append(f"  drop jobs  into {facts['data']}/inbox; results come out in {facts['data']}/results")
    if facts["persistent"]:
        lines += [f"  kept       {facts['data']}, all of it", "  not kept   everything else"]
    else:
        lines.append(f"  NOT KEPT   nothing is mounted at {facts['data']}: all goes when the container is removed")
    lines.append(f"  user       uid {os.getuid()}, gid {os.getgid()}")
    return "\n".join([*lines, *verdict(found), "=" * 74, ""])


def verdict(found: list[dict[str, str]]) -> list[str]:
    """Each GPU in a line, whatever is not well, and one line when all that was tried on them is right."""
    lines = []
    for finding in found:
        if finding["level"] != "ok":
            sign = "FAULT" if finding["level"] == "fault" else "note"
            lines.append(f"  {sign:<10} {finding['what']}" + (f" (fix: {finding['fix']})" if finding["fix"] else ""))
        elif GPU_NAME.match(finding["what"]):
            lines.append(f"  GPU        {finding['what'].removeprefix('GPU ')}")
    tried = [finding["what"] for finding in found if GPU_TRIAL.match(finding["what"])]
    if tried and not any(finding["level"] == "fault" for finding in found):
        lines.append(f"  GPU        ready: {len(tried)} trials with real kernels gave the right answer")
    return lines


def served_by_another(data: Path) -> str:
    """The name of the container or machine whose daemon serves this folder; empty when it is this one's."""
    try:
        host = str(json.loads((data / "state" / "daemon.json").read_text(encoding="utf-8"))["host"])
    except (OSError, ValueError, KeyError):
        return ""
    return "" if host == os.uname().nodename else host


if __name__ == "__main__":
    sys.exit(main())
