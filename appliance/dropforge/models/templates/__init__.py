"""Chat templates by name, one .jinja file each, written from the model's published prompt format.

Written for the Jinja that transformers and llama.cpp both run. A template says what its family's documentation says and
no more: dates are fixed (Llama 3.1, gpt-oss), so that the same data gives the same tokens every day.

Families whose format has no system turn put the system text into the first user turn, as their documentation does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from dropforge.models.templates.custom import CustomTemplate, is_custom, parse_custom

__all__ = ["ALIASES", "TEMPLATES", "CustomTemplate", "Template", "find_template", "is_custom", "parse_custom"]

_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_4 = (
    "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
    '<|"|>',
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Template:
    """One chat template and what a tokenizer must bring for it."""

    name: str
    file: str
    """The .jinja file's name without its suffix; several templates may share one."""
    end_of_turn: str | None
    """The marker that ends an answer; None when it is the tokenizer's own end token."""
    markers: tuple[str, ...] = ()
    """Markers that should be single tokens of the vocabulary."""
    stands_in: Mapping[str, str] = field(default_factory=dict)
    """Markers the family's vocabulary does not have, and those of the vocabulary that take their place."""
    settings: Mapping[str, str | bool] = field(default_factory=dict)
    """Variables set before the file's text."""
    lead: str = ""
    """What the model writes itself between the generation prompt and its answer (a space, an empty reasoning block)."""
    trims: bool = False
    """Contents lose blanks and line breaks around them, as in the published template."""
    aliases: tuple[str, ...] = ()
    source: str
    """Where the format is published."""
    inline: str | None = None
    """The Jinja text itself, for templates that are not files."""

    @property
    def text(self) -> str:
        """The Jinja text."""
        if self.inline is not None:
            return self.inline
        head = "".join(f"{{%- set {name} = {json.dumps(value)} %}}\n" for name, value in self.settings.items())
        return head + _read(self.file)

    @property
    def own_end(self) -> bool:
        """Whether an answer ends with the tokenizer's own end token."""
        return self.end_of_turn is None


@cache
def _read(name: str) -> str:
    return files("dropforge.models.templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def _coder(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}-coder" for name in names)


_ALL = (
    Template(name="chatml", file="chatml", end_of_turn="<|im_end|>", markers=_CHATML, source="OpenAI, ChatML"),
    Template(
        name="chatml-bos", file="chatml-bos", end_of_turn="<|im_end|>", markers=_CHATML,
        source="ChatML after the begin token",
    ),
    Template(name="yi-chat", file="chatml", end_of_turn="<|im_end|>", markers=_CHATML, source="01-ai/Yi-34B-Chat"),
    Template(name="zephyr", file="zephyr", end_of_turn=None, source="HuggingFaceH4/zephyr-7b-beta"),
    Template(name="mistral", file="mistral", end_of_turn=None, lead=" ", source="mistralai/Mistral-7B-Instruct-v0.1"),
    Template(
        name="llama", file="llama-2", end_of_turn=None, lead=" ", trims=True, aliases=("llama-2", "llama2"),
        source="meta-llama/Llama-2-7b-chat",
    ),
    Template(name="vicuna", file="vicuna", end_of_turn=None, lead=" ", source="lmsys/vicuna-7b-v1.5"),
    Template(name="vicuna_old", file="vicuna_old", end_of_turn=None, lead=" ", source="lmsys/vicuna-7b-delta-v0"),
    Template(name="alpaca", file="alpaca", end_of_turn=None, source="tatsu-lab/stanford_alpaca"),
    Template(name="unsloth", file="unsloth", end_of_turn=None, lead=" ", source="prompt format of the name in Unsloth"),
    Template(
        name="gemma", file="gemma", end_of_turn="<end_of_turn>", markers=_GEMMA, trims=True,
        aliases=("gemma2", "gemma-2", "gemma-3", "gemma3", "gemma-3n", "gemma3n"),
        source="google/gemma-3-1b-it; the same text for Gemma 1, 2 and 3n",
    ),
    Template(
        name="gemma_chatml", file="chatml-bos", end_of_turn="<|im_end|>", markers=_CHATML,
        stands_in={"<|im_start|>": "<start_of_turn>", "<|im_end|>": "<end_of_turn>"},
        aliases=("gemma2_chatml",), source="ChatML with Gemma's turn markers in place of ChatML's",
    ),
    Template(
        name="gemma-4", file="gemma-4", end_of_turn="<turn|>", markers=_GEMMA_4, trims=True,
        settings={"thinking": False}, aliases=("gemma4",),
        source="ai.google.dev/gemma/docs/core/prompt-formatting-gemma4",
    ),
    Template(
        name="gemma-4-thinking", file="gemma-4", end_of_turn="<turn|>", markers=_GEMMA_4, trims=True,
        settings={"thinking": True}, aliases=("gemma4-thinking",),
        source="ai.google.dev/gemma/docs/core/prompt-formatting-gemma4, thinking mode",
    ),
    Template(
        name="llama-3", file="llama-3", end_of_turn="<|eot_id|>", markers=_LLAMA_3, trims=True, aliases=("llama3",),
        source="meta-llama/Meta-Llama-3-8B-Instruct",
    ),
    Template(
        name="llama-3.1", file="llama-3.1", end_of_turn="<|eot_id|>", markers=_LLAMA_3, trims=True,
        aliases=("llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33"),
        source="meta-llama/Llama-3.1-8B-Instruct",
    ),
    Template(
        name="phi-3", file="phi-3", end_of_turn="<|end|>",
        markers=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        aliases=("phi-35", "phi-3.5"), source="microsoft/Phi-3.5-mini-instruct",
    ),
    Template(
        name="phi-4", file="phi-4", end_of_turn="<|im_end|>", markers=(*_CHATML, "<|im_sep|>"),
        source="microsoft/phi-4",
    ),
    Template(
        name="qwen-2.5", file="qwen-2.5", end_of_turn="<|im_end|>", markers=_CHATML,
        aliases=(
            "qwen-25", "qwen25", "qwen2.5", *_coder("qwen-2.5", "qwen-25", "qwen25", "qwen2.5"),
        ),
        source="Qwen/Qwen2.5-7B-Instruct",
    ),
    Template(
        name="qwen-3", file="qwen-3", end_of_turn="<|im_end|>", markers=_CHATML, settings={"thinking": "choice"},
        lead="<think>\n\n</think>\n\n", aliases=("qwen3",), source="Qwen/Qwen3-8B",
    ),
    Template(
        name="qwen3-instruct", file="qwen-3", end_of_turn="<|im_end|>", markers=_CHATML, settings={"thinking": "never"},
        source="Qwen/Qwen3-4B-Instruct-2507",
    ),
    Template(
        name="qwen3-thinking", file="qwen-3", end_of_turn="<|im_end|>", markers=_CHATML,
        settings={"thinking": "always"}, lead="\n</think>\n\n", source="Qwen/Qwen3-4B-Thinking-2507",
    ),
    Template(
        name="gpt-oss", file="gpt-oss", end_of_turn="<|return|>",
        markers=("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"),
        lead="<|channel|>final<|message|>", aliases=("gptoss",), source="openai/harmony",
    ),
    Template(
        name="lfm-2", file="lfm-2", end_of_turn="<|im_end|>", markers=_CHATML, settings={"tool_tags": True},
        source="LiquidAI/LFM2-1.2B",
    ),
    Template(
        name="lfm-2.5", file="lfm-2", end_of_turn="<|im_end|>", markers=_CHATML, settings={"tool_tags": False},
        source="LiquidAI/LFM2.5-1.2B-Instruct",
    ),
    Template(
        name="starling", file="starling", end_of_turn="<|end_of_turn|>", markers=("<|end_of_turn|>",), lead=" ",
        source="berkeley-nest/Starling-LM-7B-beta",
    ),
)  # fmt: skip

TEMPLATES: dict[str, Template] = {template.name: template for template in _ALL}
ALIASES: dict[str, str] = {alias: template.name for template in _ALL for alias in template.aliases}


def find_template(name: str) -> Template | None:
    """The template of a name or alias; None when there is none."""
    return TEMPLATES.get(ALIASES.get(name, name))
