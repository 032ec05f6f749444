"""Does llama.cpp see with a projector what transformers sees? Both are shown the same made-up pictures.

The pictures have a size that neither runtime changes, so that only the projector and its arithmetic are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.compare import Agreement, agreement
from dropforge.export.picture import png
from dropforge.export.picture_reference import AFTER, BEFORE, PictureReader, Shown, after_picture
from dropforge.export.reference import merged_model
from dropforge.export.tolerances import Bounds, bounds
from dropforge.export.verify_gguf import CONTEXT, LISTED_TOKENS, NEAR_TIE
from dropforge.llama_cpp.locate import LlamaCpp
from dropforge.llama_cpp.server import LlamaServer, Sight

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float32]]

PICTURES = 3
ANSWER_TOKENS = 8


def verify_projector(
    path: Path, *, gguf_type: str, text: Path, text_type: str, reader: PictureReader, tools: LlamaCpp
) -> dict[str, Any]:
    """All checks of the projector in `path` with the language model's 16-bit GGUF `text`; returns the numbers.

    `reader` is of the merged folder that both were made from.

    Raises ExportError: gguf-load, projector-blind, projector-tokens, projector-logits, projector-text.
    """
    seen: list[tuple[Shown, list[Sight]]] = []
    with LlamaServer(text, tools=tools, exact=True, context=CONTEXT, projector=path) as server:
        if not server.properties().get("modalities", {}).get("vision"):
            raise _failure(
                "llama.cpp does not read pictures with this projector", code="projector-blind", where=path.name, why=""
            )
        bos = server.tokenize("a", add_special=True)[: -len(server.tokenize("a", add_special=False))]
        plain = server.tokenize("a", add_special=False)[-1]
        for seed in range(PICTURES):
            shown = reader.show(seed, bos=bos)
            sights = [_look(server, shown, reader, plain=plain), _look(server, shown, reader, plain=None)]
            if sights[0].read != len(shown.ids):
                raise _failure(
                    "llama.cpp cuts a text with a picture in it differently", code="projector-tokens",
                    where=path.name, why=f"{sights[0].read} places, expected {len(shown.ids)}",
                )  # fmt: skip
            seen.append((shown, sights))
    with merged_model(reader.folder) as (model, _):
        truth = [after_picture(model, shown, sights[1].tokens, family=reader.family) for shown, sights in seen]
    return _judge(path, seen, truth, gguf_type=gguf_type, text_type=text_type)


def _look(server: LlamaServer, shown: Shown, reader: PictureReader, *, plain: int | None) -> Sight:
    """The prediction right after the text when `plain` is given, else the greedy continuation."""
    first, last = reader.family.around
    return server.look(
        png(shown.picture), before=BEFORE + first, after=last + AFTER, plain_token=plain,
        max_tokens=ANSWER_TOKENS if plain is None else 1, listed=min(len(reader.tokenizer), LISTED_TOKENS),
    )  # fmt: skip


def _judge(
    path: Path, seen: list[tuple[Shown, list[Sight]]], truth: list[Array], *, gguf_type: str, text_type: str
) -> dict[str, Any]:
    """Log-probabilities along the runtime's greedy path, and whether that path is the merged model's."""
    import numpy as np

    rows, found, greedy = [], [], 0
    for (_, sights), expected in zip(seen, truth, strict=True):
        steps = [sights[0].steps[0], *sights[1].steps[1:]]
        listed = np.full((len(steps), expected.shape[1]), np.nan, dtype=np.float32)
        for place, step in enumerate(steps):
            for token, value in step.items():
                if token < expected.shape[1]:
                    listed[place, token] = value
        rows.append(expected[: len(steps)])
        found.append(listed)
        greedy += int(_follows(sights[1].tokens, expected))
    close = agreement(rows, found)
    limit = _allowed(gguf_type, text_type)
    # What another picture changes: where that is less than the limit, the comparison says little.
    other = agreement([row[:1] for row in truth], [row[:1] for row in truth[1:] + truth[:1]])
    checks = {
        "type": gguf_type, "text_type": text_type, "pictures": len(seen), "logits": close.as_dict(),
        "greedy_equal": greedy, "another_picture": round(other.relative_error, 6),
    }  # fmt: skip
    if not _within(close, limit):
        raise _failure(
            "with this projector llama.cpp sees something else than the merged model", code="projector-logits",
            where=path.name,
            why=f"relative error {close.relative_error:.4g} (allowed {limit.relative_error:g}), mean KL "
            f"{close.mean_kl:.4g} (allowed {limit.mean_kl:g}) over {close.positions} positions",
        )  # fmt: skip
    if limit.greedy and greedy < len(seen):
        raise _failure(
            "llama.cpp answers something else about a picture", code="projector-text", where=path.name, why=str(checks)
        )
    return checks


def _follows(tokens: list[int], expected: Array) -> bool:
    """Every token is the merged model's likeliest, up to the first near tie."""
    for token, row in zip(tokens, expected, strict=False):
        if float(row.max() - row[token]) > NEAR_TIE:
            return False
        if int(row.argmax()) != token:
            return True  # a tie decided otherwise: what follows is another text
    return True


def _allowed(*types: str) -> Bounds:
    """The wider bounds of the two files."""
    limits = [bounds(gguf_type) for gguf_type in types]
    return Bounds(
        max(limit.relative_error for limit in limits), max(limit.mean_kl for limit in limits),
        all(limit.greedy for limit in limits),
    )  # fmt: skip


def _within(close: Agreement, limit: Bounds) -> bool:
    return close.relative_error <= limit.relative_error and close.mean_kl <= limit.mean_kl


def _failure(what: str, *, code: str, where: str, why: str) -> ExportError:
    return ExportError(
        what, code=code, where=where, why=why[:800],
        fix="the language model's GGUF stays usable for text; please report this with provenance.json",
    )  # fmt: skip
