"""Data sets of `datasets` as conversations: columns merged into a question, and other people's key names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dropforge.data.column_template import parse
from dropforge.data.values import to_text
from dropforge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

INSPECTED_ROWS = 10
SYSTEM = ("system", "developer")
USER = ("user", "human", "input", "prompter")
ASSISTANT = ("assistant", "gpt", "output", "model", "chatgpt", "bot")
TOOL = ("tool", "function", "observation", "ipython")


def merge_columns(
    dataset: Dataset,
    *,
    merged_prompt: str,
    merged_column_name: str,
    output_column_name: str,
    remove_unused_columns: bool,
    conversation_extension: int,
    random_state: int,
) -> Dataset:
    """See `dropforge.chat_templates.to_sharegpt`."""
    from datasets import Dataset as Made

    if "conversations" in dataset.column_names and len(dataset) and isinstance(dataset[0]["conversations"], list):
        raise TypeError("the data set holds conversations already; standardize_sharegpt reads them")
    template = parse(merged_prompt) if merged_prompt else parse("{" + merged_column_name + "}")
    for column in (*template.columns, output_column_name):
        if column not in dataset.column_names:
            raise KeyError(f"there is no column {column!r}; the columns are {', '.join(dataset.column_names)}")

    def turns(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        names = list(rows)
        made = []
        for values in zip(*rows.values(), strict=True):
            fields = dict(zip(names, values, strict=True))
            answer = to_text(fields[output_column_name])
            made.append([{"from": "human", "value": template.fill(fields)}, {"from": "gpt", "value": answer}])
        return {"conversations": made}

    unused = dataset.column_names if remove_unused_columns else None
    single: Dataset = dataset.map(turns, batched=True, remove_columns=unused, desc="columns to conversations")
    if conversation_extension <= 1:
        return single
    orders = [single] + [single.shuffle(seed=random_state + i) for i in range(conversation_extension - 1)]
    columns = [order["conversations"] for order in orders]
    joined = [[turn for part in parts for turn in part] for parts in zip(*columns, strict=True)]
    if remove_unused_columns:
        return Made.from_dict({"conversations": joined})
    return single.remove_columns("conversations").add_column("conversations", joined)


class TurnKeys:
    """Which key of a turn is the role and which the text, learnt from the first rows, and what the roles mean."""

    def __init__(
        self,
        rows: Iterable[Sequence[Mapping[str, Any]]],
        *,
        system: Sequence[str] = SYSTEM,
        user: Sequence[str] = USER,
        assistant: Sequence[str] = ASSISTANT,
    ) -> None:
        self.names = {_plain(name): "tool" for name in TOOL}
        for role, aliases in (("system", system), ("user", user), ("assistant", assistant)):
            self.names |= {_plain(alias): role for alias in aliases}
        self.role, self.text = self._keys([turn for turns in rows for turn in turns])

    def _keys(self, turns: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        keys = dict.fromkeys(key for turn in turns for key in turn)
        for role, text in (("role", "content"), ("from", "value")):
            if role in keys and text in keys:
                return role, text
        if len(keys) != 2:
            raise DataError(
                "a turn has neither from and value nor role and content", code="api-sharegpt", where="row 1",
                why=f"its keys are {', '.join(sorted(keys)) or 'none'}; a turn needs two, who speaks and what is said",
            )  # fmt: skip
        seen = {key: [_plain(turn.get(key)) for turn in turns] for key in keys}
        unknown = {key: not set(seen[key]) <= set(self.names) for key in keys}
        first, second = sorted(keys, key=lambda key: (unknown[key], key not in ("role", "from"), len(set(seen[key]))))
        return first, second

    def read(self, turn: Mapping[str, Any], *, row: int) -> dict[str, Any]:
        """One turn as role and content. Other keys of turns that have role and content are kept (tool calls)."""
        if self.role not in turn:
            raise DataError(
                "a turn has neither from and value nor role and content", code="api-sharegpt", where=f"row {row + 1}",
                why=f"its keys are {', '.join(sorted(turn))}",
            )  # fmt: skip
        name = self.names.get(_plain(turn[self.role]))
        if name is None:
            raise DataError(
                f"nobody is called {turn[self.role]!r} in a conversation", code="api-sharegpt-role",
                where=f"row {row + 1}", fix=f"known: {', '.join(sorted(self.names))}",
            )  # fmt: skip
        rest = {key: value for key, value in turn.items() if key not in (self.role, self.text)}
        return {"role": name, "content": turn.get(self.text), **rest}


def _plain(value: Any) -> str:
    return str(value).strip().lower()
