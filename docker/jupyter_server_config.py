"""JupyterLab in the container. What depends on the user's variables comes from prepare.py, through facts.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, "/opt/dropforge")  # for login_throttle and status_route, which Jupyter imports by name

RUN = Path("/run/dropforge")
facts = json.loads((RUN / "facts.json").read_text(encoding="utf-8"))

c: Any = get_config()  # type: ignore[name-defined]  # noqa: F821  # Jupyter puts it here
c.ServerApp.ip = "*"
c.ServerApp.port = facts["jupyter_port"]
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.root_dir = "/workspace"
c.FileContentsManager.preferred_dir = "/workspace/notebooks"
c.ServerApp.allow_remote_access = True
c.ServerApp.quit_button = False
c.ServerApp.cookie_secret_file = str(Path(facts["data"]) / "state" / "jupyter_cookie_secret")
c.ServerApp.terminado_settings = {"shell_command": ["/bin/bash", "-l"]}
c.ServerApp.identity_provider_class = "login_throttle.ThrottledLogin"
c.ThrottledLogin.hashed_password = (RUN / "jupyter_password_hash").read_text(encoding="ascii")
c.ThrottledLogin.token = ""
c.ThrottledLogin.allow_password_change = False
c.FileContentsManager.delete_to_trash = False
c.ServerApp.jpserver_extensions = {"status_route": True}  # the page /dropforge/
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"

os.environ.pop("JUPYTER_TOKEN", None)  # would open a second way in
