"""A whole job as a user runs it: every kind of export, the numbers on its card, the push to the (stand-in) hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from dropforge.chat import answer
from hub_stand_in import TOKEN, StandIn

SPEC = """version: 1
name: Sums
model: builtin:tiny-llama
data: {{train: sums.jsonl, eval: {{fraction: 0.2}}}}
train: {{learning_rate: 2e-3, effective_batch_size: 4, max_steps: {steps}}}
publish: {{hub: {{repo: stand-in/sums, private: false{hub}}}}}
export: [{export}]
"""


def dropforge(root, *arguments, hub, token=TOKEN):
    environment = {
        **os.environ, "DROPFORGE_DATA": str(root), "DROPFORGE_DEVICE": "cpu", "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(root / "hf"), "HF_TOKEN": token,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "dropforge", *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def hub():
    with StandIn().running() as hub:
        yield hub


@pytest.fixture
def root(tmp_path):
    (tmp_path / "datasets").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"{a} plus {b}?"}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(5) for b in range(5)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "datasets" / "sums.jsonl").write_text(text)
    return tmp_path


def result_of(root):
    name = (root / "results" / "sums" / "latest").read_text().strip()
    return root / "results" / "sums" / name


def run(root, hub, *, export, extra="", steps=8, **options):
    (root / "job.yaml").write_text(SPEC.format(export=export, hub=extra, steps=steps))
    return dropforge(root, "run", str(root / "job.yaml"), hub=hub, **options)


def card_rows(result) -> dict[str, list[str]]:
    lines = (result / "MODEL_CARD.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.mark.slow
def test_every_export_of_the_issue(root, hub, llama_cpp):
    done = run(root, hub, export='adapter, merged, "gguf:q4_k_m,q8_0,iq4_xs", fp8, ollama', steps=80)
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(root)
    rows = card_rows(result)
    files = ["gguf/sums-Q4_K_M.gguf", "gguf/sums-Q8_0.gguf", "gguf/sums-IQ4_XS.gguf", "fp8", "merged"]
    for name in files:
        size, verdict, kl, first, over = rows[name]
        assert verdict == "yes" and float(size.split()[0]) > 0
        assert 0 <= float(kl) < 0.5 and float(first.rstrip("%")) > 50
        assert over.endswith("tokens of the evaluation split")
    assert float(rows["merged"][2]) < float(rows[files[1]][2]) < float(rows[files[0]][2])
    assert {"stand-in/sums", "stand-in/sums-lora", "stand-in/sums-GGUF", "stand-in/sums-FP8"} == set(hub.repos)
    for name in ("gguf/sums-Q4_K_M.gguf", "gguf/sums-Q8_0.gguf", "gguf/sums-IQ4_XS.gguf", "merged", "fp8"):
        assert answer(result / name, ["2 plus 3?"], max_tokens=8)[0].strip(), name


@pytest.mark.slow
def test_a_push_that_failed_is_all_that_a_retry_does(root, hub, llama_cpp):
    hub.fail = ("/commit/", 403)
    done = run(root, hub, export="merged")
    assert done.returncode == 1, done.stdout + done.stderr
    result = result_of(root)
    assert not (result / "COMPLETE").exists() and not (result / "hub.json").exists()
    made = (result / "merged" / "model.safetensors").stat().st_mtime_ns
    hub.fail = None
    again = dropforge(root, "export", result.name, "merged", hub=hub)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (result / "COMPLETE").exists()
    assert (result / "merged" / "model.safetensors").stat().st_mtime_ns == made, "the merge was not made again"
    files = hub.repos["stand-in/sums"]["files"]
    assert files["model.safetensors"] == (result / "merged" / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "tokens of the evaluation split" in card and "license: apache-2.0" in card
    assert "base_model:" not in card, "a builtin model is none of the hub's"


def test_without_a_token_nothing_is_trained(root, hub):
    done = run(root, hub, export="adapter", token="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "held" in done.stderr and "secrets/HF_TOKEN" in done.stdout
    assert hub.requests == []
    assert not list(root.glob("runs/*/trained"))
