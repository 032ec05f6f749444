"""Which language a text is in, roughly: by its letters, and for Latin letters by its most frequent small words.

Good enough to say "mostly German, some English" in a report; not for deciding about rows.
"""

from __future__ import annotations

import re
from collections import Counter

LOOKED_AT = 2000
ENOUGH_WORDS = 2
"""One small word alone says nothing: many languages share it."""
_RANGES = (
    ("ja", "\u3040", "\u30ff"),
    ("ko", "\uac00", "\ud7af"),
    ("zh", "\u4e00", "\u9fff"),
    ("ru", "\u0400", "\u04ff"),
    ("ar", "\u0600", "\u06ff"),
    ("he", "\u0590", "\u05ff"),
    ("hi", "\u0900", "\u097f"),
    ("th", "\u0e00", "\u0e7f"),
    ("el", "\u0370", "\u03ff"),
)
_WORDS = {
    "en": "the of and to is in that it for was on are with as you this have not what how can which from",
    "de": "der die das und ist nicht ein eine zu den mit von auf wie was ich sie es dem für auch wird",
    "fr": "le la les des est et une un dans que qui pour pas sur avec ce vous je il au du quelle",
    "es": "el los las es una un que por con para como del se su más qué está al lo cuál",
    "it": "il che di una un per non sono con del della è come più gli nel qual questo si",
    "pt": "o os as uma um não que para com como do da em é mais por seu você qual ao",
    "nl": "de het een van en is niet dat op te voor met zijn wat hoe ik je aan er",
    "pl": "jest nie się na to że w z do jak co dla przez są od czy ale po",
    "tr": "bir ve bu için ne ile mi çok nasıl olarak değil var da de daha gibi",
}
_VOTES: dict[str, list[str]] = {}
for _name, _words in _WORDS.items():
    for _word in _words.split():
        _VOTES.setdefault(_word, []).append(_name)
_WORD = re.compile(r"[^\W\d_]+")


def language(text: str) -> str:
    """A two-letter code, or `?` when the text is too short or too strange to tell."""
    text = text[:LOOKED_AT].lower()
    letters = sum(map(str.isalpha, text))
    if not letters:
        return "?"
    for name, first, last in () if text.isascii() else _RANGES:
        share = sum(first <= letter <= last for letter in text) / letters
        if share > (0.05 if name == "ja" else 0.4):
            return name
    votes: Counter[str] = Counter()
    for word in _WORD.findall(text):
        found = _VOTES.get(word, ())
        for name in found:
            votes[name] += 1
    name, most = votes.most_common(1)[0] if votes else ("?", 0)
    return name if most >= ENOUGH_WORDS else "?"
