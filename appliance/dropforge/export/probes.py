"""The texts and conversations every export is asked, so that its answers can be compared with the trained model's.

They hold what tokenizers and templates get wrong: leading and doubled spaces, blank lines, digits, contractions, code,
scripts other than Latin, emoji, markers in plain text. All are in Unicode normal form C, because llama.cpp does not
normalise and byte-level tokenizers such as Qwen's do. None holds another family's end marker (</s> in Qwen's vocabulary
is plain text): llama.cpp takes a list of them for markers in every vocabulary.
"""

from __future__ import annotations

from dropforge.export.request import Message

TEXTS: tuple[str, ...] = (
    "Hello world", "hello  world", " leading space", "   three leading spaces", "trailing space ", "tab\there",
    "line\nbreak", "two\n\nbreaks", "\nfirst a break", "a\r\nwindows break", "   \n  \n ", "1", "12", "123",
    "1234567890", "3.14159", "1,000,000", "I'm you're we'VE it'S he'd they'll", "don't DON'T",
    "CamelCaseWord snake_case_word", "ALL CAPS HERE", "def f(x):\n    return x ** 2\n",
    "if (a && b) { c += 1; } // note", "https://example.org/a?b=c&d=e", "user@example.org", "100% of $5 #1 @home",
    "(brackets) [and] {braces}", "\"double\" 'single' `back`", "a-b_c/d\\e|f", "Grüße aus Köln", "déjà vu à la carte",
    "Ελληνικά", "Русский текст", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "你好，世界",
    "こんにちは世界", "안녕하세요", "ไทย", "😀", "👩\u200d👩\u200d👧 family", "½ ¾ ™ © €",
    "…—–", "\xa0no-break", "zero\u200bwidth",
    "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaa", "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France?", "<b>not a marker</b>", "x = {'k': [1, 2, 3]}",
)  # fmt: skip

_PROMPTS: tuple[str, ...] = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "2 + 2 =",
)

ANSWERED: tuple[tuple[Message, ...], ...] = tuple(({"role": "user", "content": text},) for text in _PROMPTS)
"""Conversations the model is asked to continue."""


def _turns(*pairs: str) -> tuple[Message, ...]:
    """`S:`, `U:` and `A:` in front of a text say whose turn it is."""
    roles = {"S": "system", "U": "user", "A": "assistant"}
    return tuple({"role": roles[text[0]], "content": text[2:]} for text in pairs)


RENDERED: tuple[tuple[Message, ...], ...] = (
    _turns("U:Hi"),
    _turns("S:You are brief.", "U:Hi"),
    _turns("U:Hi", "A:Hello.", "U:And now?"),
    _turns("S:Sys", "U:One", "A:1", "U:Two", "A:2", "U:Three"),
    _turns("U:  padded  ", "A: yes ", "U:\nbreak first"),
    _turns("S:two\n\nparagraphs", "U:Grüße, 你好 😀", "A:…", "U:ok"),
    _turns("U:{{ .Content }} {% raw %} <b>[INST]"),
)
"""Conversations whose rendered text is compared; each ends with a user turn, so the generation prompt follows."""
