"""Specs that are torn, hostile or ask for power: refused, quickly and cheaply (tests 9, 26, 29, 30)."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import pytest
from daemon_harness import Harness
from dropforge.errors import SpecError
from dropforge.paths import DataRoot
from dropforge.spec_check import check, check_in_child, to_yaml

FULL = """version: 1
name: every byte
model: {id: "builtin:tiny-llama", max_seq_length: 128}
adapter: {r: 8, lora_alpha: 16}
data:
  train: [{path: rows.jsonl, weight: 2}]
train:
  learning_rate: 1e-5
  max_steps: 10
resources: {priority: 60}
export: [adapter]
"""
AS_JSON = json.dumps({"version": 1, "name": "every byte", "model": "builtin:tiny-llama", "data": "rows.jsonl",
                      "train": {"max_steps": 10}, "export": ["adapter"]})  # fmt: skip
AS_TOML = """version = 1
name = "every byte"
model = "builtin:tiny-llama"
data = "rows.jsonl"
export = ["adapter"]
[train]
max_steps = 10
"""


@pytest.mark.parametrize(("name", "text"), [("a.yaml", FULL), ("a.json", AS_JSON), ("a.toml", AS_TOML)])
def test_cut_at_every_byte_it_is_refused_or_shows_every_default(name: str, text: str) -> None:
    taken = []
    for end in range(len(text) + 1):
        try:
            checked = check(text[:end].encode(), filename=name)
        except SpecError:
            continue
        taken.append(end)
        assert checked.spec.export, "a required section is never made up"
        assert {"learning_rate", "seed", "save_minutes"} <= set(check(to_yaml(checked.resolved).encode(), filename="a.yaml")
                                                                  .spec.train.model_fields_set)  # fmt: skip
    required_ends_at = text.index("adapter]") + len("adapter]") if "adapter]" in text else text.index('"adapter"]')
    assert all(end >= required_ends_at for end in taken), "nothing is taken before its last required key is whole"
    assert len(text) in taken


HOSTILE = {
    "alias bomb": b"a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: [*c, *c, *c]\n",
    "deep nesting": b"[" * 100_000,
    "deep mappings": b"".join(b" " * depth + b"a:\n" for depth in range(400)),
    "one long line": b"name: " + b"x" * 250_000,
    "many keys": b"".join(b"k%d: 1\n" % number for number in range(20_000)),
    "NUL bytes": b"version: 1\nname: a\0b\n",
    "duplicate keys": b"version: 1\nversion: 1\n",
    "Latin-1": "version: 1\nname: ü\n".encode("latin-1"),
    "UTF-16": FULL.encode("utf-16"),
    "a tag that builds an object": b"version: 1\nname: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "several documents": b"version: 1\n---\nversion: 1\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_cost_little(case: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(SpecError):
        check_in_child(HOSTILE[case], filename="a.yaml")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1.5, f"{seconds:.2f} s of CPU time, of which about 0.3 are the start of the child"


def test_hostile_bytes_need_little_memory() -> None:
    """Peak of one process that is asked about all of them, one after another.

    Not getrusage: what a process was before exec, a copy of this one, counts there.
    """
    code = ("import sys\nsys.path.insert(0, sys.argv[1])\nfrom test_hostile_specs import HOSTILE\n"
            "from dropforge.spec_check import answer\n"
            "for raw in HOSTILE.values(): assert answer(raw, filename='a.yaml')['problems']\n"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, __file__.rpartition("/")[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 * 1024


def test_a_file_of_a_gigabyte_is_not_read(root: DataRoot) -> None:
    with (root.inbox / "huge.yaml").open("wb") as stream:
        stream.truncate(1 << 30)
    with Harness(root) as harness:
        began = time.monotonic()
        harness.tick(0.1, times=5)
        assert time.monotonic() - began < 2
        harness.tick(70.0, times=2)
    (error,) = root.rejected.glob("*/ERROR.txt")
    assert "256 KiB" in error.read_text()


@pytest.mark.parametrize(
    "line",
    ["env: {PATH: /tmp}", "plugins: [os]", "callbacks: [evil.Callback]", "output_dir: /etc", "hub_token: hf_secret",
     "train: {output_dir: /tmp/x}", "train: {report_to: wandb, hub_token: x}", "model: {id: a/b, token: hf_x}",
     "publish: {hub: {repo: a/b, token: hf_x}}", "data: {train: [{path: a, loader: evil.py}]}",
     "adapter: {target_modules: all-linear, class_path: os.system}", "push_to_hub: true", "import: os"],
)  # fmt: skip
def test_power_that_a_spec_does_not_have(line: str) -> None:
    key = line.partition(":")[0]
    kept = [text for text in ("version: 1", "name: x", "model: builtin:tiny-llama", "data: rows.jsonl")
            if not text.startswith(f"{key}:")]  # fmt: skip
    with pytest.raises(SpecError) as caught:
        check("\n".join([*kept, line, "export: [adapter]\n"]).encode(), filename="a.yaml")
    assert "hf_" not in str(caught.value), "a token is not repeated in the message"
    assert any(problem.code == "spec-unknown-key" for problem in caught.value.problems), caught.value.problems
