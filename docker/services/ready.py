"""One block in the log once the services answer: where to go, how to log in, what is kept. Then the last hooks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from healthcheck import problems, read_facts

WAIT_SECONDS = 60.0
DOCTOR_SECONDS = 120.0
HOOKS = "/etc/dropforge/after-start.d"


def main() -> int:
    facts, started = read_facts(), time.monotonic()
    doctor = subprocess.Popen(["/opt/venv/bin/dropforge", "doctor", "--json"], stdout=subprocess.PIPE)
    while (faults := problems(facts)) and time.monotonic() - started < WAIT_SECONDS:
        time.sleep(0.3)
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
    lines.append(f"  drop jobs  into {facts['data']}/inbox; results come out in {facts['data']}/results")
    if facts["persistent"]:
        lines += [f"  kept       {facts['data']}, all of it", "  not kept   everything else"]
    else:
        lines.append(f"  NOT KEPT   nothing is mounted at {facts['data']}: all goes when the container is removed")
    lines.append(f"  user       uid {os.getuid()}, gid {os.getgid()}")
    for finding in found:
        if finding["level"] != "ok" or finding["what"].startswith("GPU"):
            sign = "FAULT" if finding["level"] == "fault" else "note"
            lines.append(f"  {sign:<10} {finding['what']}" + (f" (fix: {finding['fix']})" if finding["fix"] else ""))
    return "\n".join([*lines, "=" * 74, ""])


if __name__ == "__main__":
    sys.exit(main())
