"""Ollama's Modelfile: written, read back, and only then handed out.

Values stand between three double quotes, and there is no escape: a text that holds three double quotes cannot be
written, and characters Go calls unprintable are dropped by Ollama's reader. Such a value is left out and reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

QUOTES = '"""'
JINJA_VERSION = "0.30.0"
"""First Ollama that runs the Jinja template inside a GGUF."""


@dataclass(frozen=True, kw_only=True)
class Modelfile:
    """What a Modelfile says. `template` None means that Ollama uses the chat template inside the GGUF."""

    gguf: str
    """Path relative to the Modelfile, such as ./gguf/name-Q8_0.gguf."""
    projector: str = ""
    """The same of what reads pictures; a second FROM line. Needs the Ollama that runs GGUFs in llama-server."""
    template: str | None = None
    system: str | None = None
    stops: tuple[str, ...] = ()
    context: int | None = None
    license: str = ""
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """What could not be written, one sentence each."""


def unwritable(text: str) -> str:
    """Why Ollama's reader would not give `text` back, or an empty string."""
    if QUOTES in text:
        return "it holds three double quotes"
    if text.startswith('"') or text.endswith('"'):
        return "it begins or ends with a double quote"
    odd = sorted({character for character in text if not (character.isprintable() or character == "\n")})
    if odd:
        return "it holds characters that Ollama drops: " + ", ".join(f"U+{ord(character):04X}" for character in odd[:5])
    return ""


def write_modelfile(wanted: Modelfile) -> tuple[str, Modelfile]:
    """The text, and what it says after values that cannot be written were left out (`left_out` says which and why)."""
    left_out: list[str] = []

    def usable(name: str, text: str | None) -> str | None:
        if not text:
            return None
        why = unwritable(text)
        if why:
            left_out.append(f"{name} is left out: {why}")
        return None if why else text

    template, system = usable("TEMPLATE", wanted.template), usable("SYSTEM", wanted.system)
    license_text = usable("LICENSE", wanted.license) or ""
    stops = tuple(stop for stop in wanted.stops if usable(f"stop {stop!r}", stop))
    lines = [f"FROM {path}" for path in (wanted.gguf, wanted.projector) if path]
    if template is None or wanted.projector:
        lines.append(f"REQUIRES {JINJA_VERSION}")
    if template is not None:
        lines.append(f"TEMPLATE {QUOTES}{template}{QUOTES}")
    if system is not None:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    lines += [f"PARAMETER stop {QUOTES}{stop}{QUOTES}" for stop in stops]
    if wanted.context is not None:
        lines.append(f"PARAMETER num_ctx {wanted.context}")
    if license_text:
        lines.append(f"LICENSE {QUOTES}{license_text}{QUOTES}")
    said = Modelfile(
        gguf=wanted.gguf, projector=wanted.projector, template=template, system=system, stops=stops,
        context=wanted.context, license=license_text, left_out=tuple(left_out),
    )  # fmt: skip
    return "\n".join(lines) + "\n", said


_COMMAND = re.compile(
    r"^(?P<word>FROM|REQUIRES|TEMPLATE|SYSTEM|LICENSE|PARAMETER (?P<name>\w+)) +"
    r'(?:"""(?P<quoted>.*?)"""|(?P<bare>[^\n]*))\s*?$',
    re.MULTILINE | re.DOTALL,
)


def read_modelfile(text: str) -> Modelfile:
    """Read a Modelfile of the form above; unknown words are not understood and raise ValueError."""
    values: dict[str, str] = {}
    stops: list[str] = []
    files: list[str] = []
    position = 0
    for match in _COMMAND.finditer(text):
        if text[position : match.start()].strip():
            raise ValueError(f"not understood: {text[position : match.start()].strip()[:80]!r}")
        position = match.end()
        value = match["quoted"] if match["quoted"] is not None else match["bare"]
        if match["name"] == "stop":
            stops.append(value)
        elif match["word"] == "FROM":
            files.append(value)
        else:
            values[match["name"] or match["word"]] = value
    if text[position:].strip() or len(files) not in (1, 2):
        raise ValueError(f"not understood: {text[position:].strip()[:80]!r}")
    return Modelfile(
        gguf=files[0], projector=files[1] if len(files) > 1 else "", template=values.get("TEMPLATE"),
        system=values.get("SYSTEM"), stops=tuple(stops),
        context=int(values["num_ctx"]) if "num_ctx" in values else None, license=values.get("LICENSE", ""),
    )  # fmt: skip
