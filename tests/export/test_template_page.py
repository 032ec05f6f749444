"""docs/reference/ollama-templates.md says what is found when a template is tried again."""

from __future__ import annotations

import re
import shutil

import pytest
import template_proof
from dropforge.models.templates import TEMPLATES


def rows() -> dict[str, list[str]]:
    lines = template_proof.PAGE.read_text(encoding="utf-8").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ") and " of " in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_every_named_template_is_on_the_page_and_thirty_are_proven():
    found = rows()
    assert {name for name, row in found.items() if row[0] == "Dropforge"} == set(TEMPLATES)
    proven = [name for name, row in found.items() if not row[2].startswith("**")]
    assert len(proven) >= 30
    first = f"{len(proven)} of {len(found)} templates have a proven path"
    assert first in template_proof.PAGE.read_text(encoding="utf-8")


def test_a_template_in_a_copy_of_a_gguf(llama, llama_cpp, tmp_path):
    """One of each path is tried again: a Go template, and a Jinja template with a date in it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama.tokenizer)
    gguf = tmp_path / "base.gguf"
    shutil.copyfile(llama.stage.base_gguf.path, gguf)
    for name in ("phi-3", "llama-3.1"):
        verdict = template_proof.judge(
            name, TEMPLATES[name].text, origin="Dropforge", tokenizer=tokenizer, gguf=gguf, tools=llama_cpp
        )
        row = rows()[name]
        assert (verdict.go is not None) == (row[1] == "TEMPLATE")
        assert f"{verdict.equal} of {verdict.compared}" == row[2] == "7 of 7"
        assert verdict.tools == row[3]


def test_a_template_that_differs_is_no_pass(llama, llama_cpp, tmp_path):
    """llama.cpp says another value of this variable than transformers: the verdict must say so."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama.tokenizer)
    gguf = tmp_path / "base.gguf"
    shutil.copyfile(llama.stage.base_gguf.path, gguf)
    text = "{% for m in messages %}{{ m['content'] ~ (datetime is defined) }}{% endfor %}"
    verdict = template_proof.judge("x", text, origin="test", tokenizer=tokenizer, gguf=gguf, tools=llama_cpp)
    assert (verdict.equal, verdict.proven) == (0, False)


@pytest.mark.slow
def test_all_named_templates_again(llama, llama_cpp, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama.tokenizer)
    gguf = tmp_path / "base.gguf"
    shutil.copyfile(llama.stage.base_gguf.path, gguf)
    found = rows()
    for name, template in TEMPLATES.items():
        verdict = template_proof.judge(
            name, template.text, origin="Dropforge", tokenizer=tokenizer, gguf=gguf, tools=llama_cpp
        )
        assert f"{verdict.equal} of {verdict.compared}" == found[name][2].strip("*"), name
