"""Modelfiles: what is written reads back, and what Ollama cannot read is left out and said."""

from __future__ import annotations

import dataclasses

import pytest
from dropforge.export.modelfile import Modelfile, read_modelfile, unwritable, write_modelfile

FULL = Modelfile(
    gguf="./gguf/a-Q8_0.gguf",
    template="{{- range .Messages }}{{ .Content }}\n{{ end }}\n",
    system='Two lines,\n\none "quoted" word, ünïcödé 你好.',
    stops=("<|im_end|>", "</s>"),
    context=4096,
    license="apache-2.0",
)


def test_reads_back():
    text, said = write_modelfile(FULL)
    assert said == FULL
    assert said.left_out == ()
    assert read_modelfile(text) == FULL
    assert "REQUIRES" not in text


def test_without_a_template_a_new_ollama_is_required():
    text, said = write_modelfile(Modelfile(gguf="./gguf/a.gguf", stops=("<|im_end|>",)))
    assert "REQUIRES 0.30.0" in text
    assert "TEMPLATE" not in text
    assert read_modelfile(text) == said


def test_a_projector_is_a_second_from_and_needs_a_new_ollama():
    wanted = dataclasses.replace(FULL, projector="./gguf/a-mmproj-F16.gguf")
    text, said = write_modelfile(wanted)
    assert text.startswith("FROM ./gguf/a-Q8_0.gguf\nFROM ./gguf/a-mmproj-F16.gguf\nREQUIRES 0.30.0\nTEMPLATE")
    assert read_modelfile(text) == said == wanted
    with pytest.raises(ValueError, match="not understood"):
        read_modelfile("FROM a\nFROM b\nFROM c\n")


@pytest.mark.parametrize(
    ("system", "why"),
    [
        ('say """hi"""', "three double quotes"),
        ('ends with "quotes"', "double quote"),
        ("a\u00a0no-break space", "U+00A0"),
        ("a\ttab", "U+0009"),
        ("a\u200djoiner", "U+200D"),
    ],
)
def test_what_ollama_cannot_read_is_left_out(system, why):
    text, said = write_modelfile(Modelfile(gguf="./g.gguf", system=system, stops=("</s>",)))
    assert why in unwritable(system)
    assert said.system is None
    assert len(said.left_out) == 1 and said.left_out[0].startswith("SYSTEM is left out: ")
    assert "SYSTEM" not in text
    assert read_modelfile(text).stops == ("</s>",)


@pytest.mark.parametrize("text", ["", "SYSTEM x\n", "FROM ./a.gguf\nADAPTER ./b\n", 'FROM ./a\nSYSTEM """open\n'])
def test_a_broken_modelfile_is_not_read_as_a_good_one(text):
    try:
        found = read_modelfile(text)
    except ValueError:
        return
    assert found.system == '"""open', (
        "an unclosed quote is part of the value, so a comparison with what was meant fails"
    )
