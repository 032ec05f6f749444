"""Loss on answers only, for rows that are tokens already: the answers are found by the markers around them.

Rows that the job path makes are masked while they are rendered (render.py), which needs no markers. This file serves
scripts, whose trainer has tokenised the texts before anybody asks for masks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dropforge.data.render import Renderer
from dropforge.data.tokenize import IGNORED
from dropforge.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = ("user", "assistant", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Text before an answer, and what ends it: `end` (which is part of the answer) or the next `instruction`."""

    response: str
    more: str = ""
    """Text that may follow `response` and is given to the model too."""
    instruction: str | None = None
    end: str | None = None
    loose: bool = False
    """As many of the signs of `more` as are there are given to the model, not all or none; and an answer does not end
    with the blanks before the next `instruction`.
    """


def given_markers(instruction: str, response: str, *, exact: bool) -> Markers:
    """Markers named by hand; not `exact`: without the blanks and line breaks around them.

    Raises DataError api-no-markers for one that is nothing but blanks then.
    """
    if exact:
        return Markers(response=response, instruction=instruction)
    if not response.strip() or not instruction.strip():
        raise _no_markers("a marker holds nothing but blanks, which force_match=False leaves away")
    more = response[len(response.rstrip()) :]
    return Markers(response=response.strip(), more=more, instruction=instruction.strip(), loose=True)


def find_markers(tokenizer: PreTrainedTokenizerBase) -> Markers:
    """The markers of the tokenizer's chat template, read off a rendered probe.

    `response` is the generation prompt (what the model is given before it answers), `end` the text up to and with the
    first special token behind an answer. Raises DataError api-no-markers when the template has no such marker.
    """
    if not tokenizer.chat_template:
        raise _no_markers("the tokenizer has no chat template")
    renderer = Renderer(tokenizer)
    before, more = renderer.before_answer(_PROBE)
    if not before.strip():
        raise _no_markers("the chat template writes nothing between a question and its answer")
    if renderer.end_of_turn:
        return Markers(response=before, more=more, end=renderer.end_of_turn)
    after = renderer.after_answer(_PROBE)
    if not after.strip():
        raise _no_markers("the chat template writes nothing behind an answer")
    return Markers(response=before, more=more, instruction=after)


def response_labels(
    input_ids: Sequence[int],
    tokenizer: Any,
    *,
    markers: Markers,
    last_only: bool = False,
    never: Collection[int] = (),
    labels: Sequence[int] | None = None,
) -> list[int]:
    """input_ids with -100 wherever a token does not end inside an answer.

    A token that also covers the blank before the answer is what the model produces there, so it counts.

    Args:
        last_only: only the last answer of the row counts.
        never: token ids that are never learnt.
        labels: labels the row has already; their -100 stay.
    """
    text, spans = _text_and_spans(list(input_ids), tokenizer)
    answers = list(_answers(text, markers))
    if last_only:
        answers = answers[-1:]
    kept = []
    for index, (token, (start, end)) in enumerate(zip(input_ids, spans, strict=True)):
        inside = start < end and any(begin < end <= stop for begin, stop in answers)
        masked = not inside or token in never or (labels is not None and labels[index] == IGNORED)
        kept.append(IGNORED if masked else token)
    return kept


def _answers(text: str, markers: Markers) -> Iterator[tuple[int, int]]:
    position = 0
    while (found := text.find(markers.response, position)) >= 0:
        begin = found + len(markers.response)
        begin += _given(text, begin, markers)
        if markers.end is not None:
            at = text.find(markers.end, begin)
            stop = len(text) if at < 0 else at + len(markers.end)
        else:
            at = text.find(markers.instruction or "", begin)
            stop = len(text) if at < 0 else at
            if markers.loose and at >= 0:
                stop = max(begin, len(text[:at].rstrip()))
        yield begin, stop
        position = stop


def _given(text: str, begin: int, markers: Markers) -> int:
    """How many characters behind the marker are given to the model too."""
    if text.startswith(markers.more, begin):
        return len(markers.more)
    if not markers.loose:
        return 0
    return next(length for length in range(len(markers.more), -1, -1) if text.startswith(markers.more[:length], begin))


def _text_and_spans(input_ids: list[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The row as text, and the characters of each token in it."""
    text = tokenizer.decode(input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if again["input_ids"] == input_ids:
        return text, again["offset_mapping"]
    # The tokenizer does not give back the ids it decoded (a row cut inside a character, say): what each token adds to
    # the text is then measured by decoding ever longer beginnings.
    spans, length = [], 0
    for count in range(1, len(input_ids) + 1):
        part = tokenizer.decode(input_ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append((length, len(part)))
        length = len(part)
    return text, spans


def _no_markers(why: str) -> DataError:
    return DataError(
        "the markers of an answer cannot be found", code="api-no-markers", where="tokenizer.chat_template", why=why,
        fix="call get_chat_template first, or give instruction_part and response_part",
    )  # fmt: skip
