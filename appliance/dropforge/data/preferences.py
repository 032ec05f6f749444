"""Preference data (two answers, one better), single answers with a verdict, and prompts with the answer to be found.

All become messages in TRL's shapes: prompt, chosen, rejected; or prompt, completion, label; or prompt and what else the
row has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from dropforge.data.convert import Dropped, Turn, read_side
from dropforge.data.detect import Match, detect
from dropforge.data.rows import Row
from dropforge.data.sources import Locate, open_source
from dropforge.data.tools import bad_row
from dropforge.data.values import to_text
from dropforge.errors import DataError
from dropforge.spec import ColumnsFormat, DataSpec, SourceSpec

if TYPE_CHECKING:
    import datasets

SAMPLE_ROWS = 100
KINDS = ("preference", "unpaired_preference", "prompt")
YES = {"1", "true", "yes", "good", "up", "chosen", "desirable", "+1"}
NO = {"0", "false", "no", "bad", "down", "rejected", "undesirable", "-1"}
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


@dataclass(kw_only=True)
class PreparedExamples:
    """`rows` has the columns of `kind`; nothing is tokenised. `dropped` counts rows by reason, `first` names some."""

    rows: datasets.Dataset
    kind: str
    dropped: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, str]] = field(default_factory=list)


def prepare_examples(
    data: DataSpec, sources: Sequence[SourceSpec], *, locate: Locate, log: Callable[[str], None] = lambda text: None
) -> PreparedExamples:
    """Read sources of preference data or prompts. All files must be of one kind.

    Raises DataError: data-format-unknown, data-row-invalid, data-empty, data-all-masked, with file and row.
    """
    import datasets

    found: list[dict[str, Any]] = []
    kinds: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    first: list[tuple[str, str]] = []
    for row, match in _rows(data, sources, locate=locate, log=log):
        kinds.setdefault(match.format, row.file)
        if len(kinds) > 1:
            raise DataError(
                "files of different kinds cannot be mixed", code="data-format-mixed", where=row.where,
                why=" and ".join(f"{name} is {kind}" for kind, name in kinds.items()), fix="use one kind per job",
            )  # fmt: skip
        item = read_example(row, match, system=data.system)
        if isinstance(item, Dropped):
            dropped[item.why] += 1
            first.append((row.where, item.why))
        else:
            found.append(item)
    if not found:
        raise DataError(
            "no row has anything to learn", code="data-all-masked", where=first[0][0] if first else "data.train",
            why="; ".join(f"{count} rows: {why}" for why, count in dropped.most_common(3)), fix="fill in the answers",
        )  # fmt: skip
    return PreparedExamples(
        rows=datasets.Dataset.from_list(found), kind=next(iter(kinds)), dropped=dropped, first=first[:20]
    )


def _rows(
    data: DataSpec, sources: Sequence[SourceSpec], *, locate: Locate, log: Callable[[str], None]
) -> Iterator[tuple[Row, Match]]:
    for source in sources:
        for part in open_source(source, locate=locate, warn=log):
            rows = part.rows()
            sample = list(islice(rows, SAMPLE_ROWS))
            if not sample:
                raise DataError(f"{part.name} holds no rows", code="data-empty", where=part.name)
            forced = "auto" if isinstance(data.format, ColumnsFormat) else data.format
            match = detect([row.fields for row in sample], file=part.name, forced=forced, kinds=KINDS)
            log(f"{part.name}: format {match.format}, because {match.reason}")
            for row in chain(sample, rows):
                yield row, match


def read_example(row: Row, match: Match, *, system: str | None = None) -> dict[str, Any] | Dropped:
    """One row as messages; see the module's docstring for the columns. Raises DataError data-row-invalid."""
    if match.format == "preference":
        item = _pair(row, match)
    elif match.format == "unpaired_preference":
        item = _verdict(row, match)
    else:
        rest = {name: value for name, value in row.fields.items() if name != match.columns["prompt"]}
        item = {"prompt": _side(row, match.columns["prompt"], "user"), **rest}
    prompt: list[Turn] = item["prompt"]
    if not any(turn["content"].strip() for turn in prompt):
        return Dropped(row=row, why="the prompt is empty")
    for name in ("chosen", "rejected", "completion"):
        if name in item and not any(turn["content"].strip() for turn in item[name]):
            return Dropped(row=row, why=f"{name} is empty")
    if "chosen" in item and item["chosen"] == item["rejected"]:
        return Dropped(row=row, why="chosen and rejected are the same")
    if system and prompt[0]["role"] != "system":
        item["prompt"] = [{"role": "system", "content": system}, *prompt]
    return item


def _pair(row: Row, match: Match) -> dict[str, Any]:
    chosen = _side(row, match.columns["chosen"], "assistant")
    rejected = _side(row, match.columns["rejected"], "assistant")
    if "prompt" in match.columns:
        prompt = _side(row, match.columns["prompt"], "user")
        # Some sets repeat the prompt in front of both answers.
        if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == 0:
        raise bad_row(row, "chosen and rejected begin differently, and there is no column prompt")
    common = min(common, len(chosen) - 1, len(rejected) - 1)
    return {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def _verdict(row: Row, match: Match) -> dict[str, Any]:
    value = to_text(row.fields.get(match.columns["label"])).strip().lower()
    if value not in YES | NO:
        raise bad_row(row, f"the label {value!r} is neither true nor false")
    return {
        "prompt": _side(row, match.columns["prompt"], "user"),
        "completion": _side(row, match.columns["completion"], "assistant"),
        "label": value in YES,
    }


def _side(row: Row, column: str, role: str) -> list[Turn]:
    """A text, a list of messages, or a transcript with `Human:` and `Assistant:`."""
    value = row.fields.get(column)
    if isinstance(value, list):
        return read_side(row, value)
    text = to_text(value)
    if "\n\nHuman:" in "\n\n" + text and "\n\nAssistant:" in text:
        _, *pieces = _SPEAKER.split(text)
        names = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": names[who], "content": said.strip()} for who, said in zip(pieces[0::2], pieces[1::2], strict=True)
        ]
    return [{"role": role, "content": text}]
