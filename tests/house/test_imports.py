"""STYLE.md rule 3: importing does nothing; and what must start fast never imports torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ("dropforge", "dropforge.spec", "dropforge.plan", "dropforge.daemon.loop", "dropforge.cli", "dropforge.spec_check",
         "dropforge.cli.spec_commands", "dropforge.cli.queue_commands", "dropforge_kernels")  # fmt: skip

PROBE = """
import json, logging, os, signal, sys, warnings
warnings.simplefilter("ignore")
before = dict(os.environ), list(logging.getLogger().handlers), list(warnings.filters), signal.getsignal(signal.SIGTERM)
faults = []
for name in sys.argv[1:]:
    __import__(name)
    now = dict(os.environ), list(logging.getLogger().handlers), before[2], signal.getsignal(signal.SIGTERM)
    if now != before:
        faults.append(name)
        before = now
torch = sys.modules.get("torch")
print(json.dumps({"faults": faults, "torch": torch is not None,
                  "cuda": bool(torch and torch.cuda.is_initialized()), "hf_kernels": "kernels" in sys.modules}))
"""


def probe(modules: list[str], *, cwd: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, *modules], capture_output=True, text=True, cwd=cwd, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_do_not_import_torch(name, tmp_path):
    assert probe([name], cwd=tmp_path)["torch"] is False


def test_no_import_has_side_effects(sources, tmp_path):
    """Every module of ours, imported one after the other: environment, logging and signals stay as they were.

    Third-party libraries are imported first: what they do at import is theirs.
    """
    ours = [source.module for source in sources if not source.module.endswith(("__main__", "convert_child"))]
    theirs = ["torch", "transformers", "trl", "peft", "datasets", "triton"]
    answer = probe([*theirs, *ours], cwd=tmp_path)
    assert [name for name in answer["faults"] if name not in theirs] == []
    assert answer["cuda"] is False


@pytest.mark.parametrize("where", ["clean folder", "repository root"])
def test_our_folder_is_never_imported_as_kernels(where, tmp_path):
    """transformers, bitsandbytes and others look for Hugging Face's package of that name."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    # Without -P, so that the current folder is on the path, as in a notebook started there.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=ROOT if where == "repository root" else tmp_path)  # fmt: skip
    origin = done.stdout.strip()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels"), origin


def test_transformers_models_import_beside_us_in_both_orders(tmp_path):
    code = "from transformers.models.llama import modeling_llama"
    for lines in (f"import dropforge, dropforge_kernels; {code}", f"{code}; import dropforge, dropforge_kernels"):
        done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]


def test_help_is_fast(tmp_path):
    command = [sys.executable, "-P", "-m", "dropforge", "--help"]
    times = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        times.append(time.perf_counter() - started)
        assert done.returncode == 0
    assert min(times) < 0.3, f"dropforge --help took {min(times):.2f} s at best"
