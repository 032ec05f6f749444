"""Does a GGUF behave like the merged model? It is loaded in llama-server and asked the same things."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropforge.errors import ExportError
from dropforge.export.chat_format import render, token_ids
from dropforge.export.compare import Agreement, agreement
from dropforge.export.probes import RENDERED
from dropforge.export.reference import Answer, Judged
from dropforge.export.tolerances import bounds
from dropforge.llama_cpp.locate import LlamaCpp
from dropforge.llama_cpp.server import LlamaServer

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float32]]

LISTED_TOKENS = 4096
"""Log-probabilities asked per position; a bigger vocabulary's tail counts as one token."""
CONTEXT = 2048
NEAR_TIE = 0.05
"""Two first tokens closer than this (log-probability) may change places by rounding; texts are compared up to there."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the file must do, taken from the training tokenizer and the merged model."""

    tokenizer: Any
    template: str | None
    """Chat template as it was put into the file."""
    eos: str | None
    answers: list[Answer]
    texts: tuple[str, ...]
    """Plain texts that must be cut alike too."""
    judged: list[Judged] = field(default_factory=list)
    """Rows of the evaluation split with the merged model's predictions."""


def verify_gguf(
    path: Path, *, gguf_type: str, expected: Expected, tools: LlamaCpp, lora: Path | None = None
) -> dict[str, Any]:
    """All checks of one file, with the adapter `lora` applied at run time if given; returns the measured numbers.

    Raises ExportError: gguf-load, gguf-metadata, gguf-tokens, gguf-template, gguf-logits, gguf-text.
    """
    with LlamaServer(path, tools=tools, exact=True, context=CONTEXT, lora=lora) as server:
        _check_metadata(server, expected, path.name)
        conversations = _check_conversations(server, expected, path.name)
        texts = _check_texts(server, expected, path.name)
        close = _logits(server, expected)
        greedy = _greedy(server, expected.answers)
        over_eval = _judge(server, expected) if expected.judged else None
    checks: dict[str, Any] = {
        "type": gguf_type, "conversations_equal": conversations, "texts_equal": texts,
        "logits": close.as_dict(), "greedy_prompts": len(expected.answers), "greedy_equal": sum(greedy),
    }  # fmt: skip
    _check_logits(close, gguf_type=gguf_type, name=path.name)
    if over_eval is not None:
        checks["eval"] = over_eval.as_dict()
        _check_logits(over_eval, gguf_type=gguf_type, name=path.name)
    if bounds(gguf_type).greedy and not all(greedy):
        raise _failure("gguf-text", "the GGUF answers something else than the merged model", path.name, str(checks))
    return checks


def _failure(code: str, what: str, where: str, why: str) -> ExportError:
    return ExportError(
        what, code=code, where=where, why=why[:800],
        fix="use another export meanwhile, and please report this with provenance.json",
    )  # fmt: skip


def _check_metadata(server: LlamaServer, expected: Expected, name: str) -> None:
    found = server.properties()
    wanted = {"eos_token": expected.eos, "chat_template": expected.template}
    for key, value in wanted.items():
        if value is not None and found.get(key) != value:
            why = f"{key} is {str(found.get(key))[:200]!r}, expected {value[:200]!r}"
            raise _failure("gguf-metadata", f"the GGUF has another {key} than the training", name, why)


def _check_conversations(server: LlamaServer, expected: Expected, name: str) -> int:
    """Rendered text and token ids of whole conversations; returns how many were compared."""
    if expected.template is None:
        return 0
    compared = 0
    bos = expected.tokenizer.bos_token or ""
    for messages in RENDERED:
        wanted = render(expected.tokenizer, messages)
        if wanted is None:
            continue
        found = server.apply_template(list(messages))
        # llama.cpp leaves out the BOS that it adds again when it cuts the text into tokens.
        if wanted != found and wanted.removeprefix(bos) != found:
            raise _failure(
                "gguf-template", "the GGUF writes a conversation differently", name, f"{found!r}, expected {wanted!r}"
            )
        ids, own = server.tokenize(found, add_special=True), token_ids(expected.tokenizer, wanted)
        if ids != own:
            raise _failure(
                "gguf-tokens", "the GGUF cuts a conversation into other tokens", name,
                f"{wanted!r}: {ids[:40]}, expected {own[:40]}",
            )  # fmt: skip
        compared += 1
    return compared


def _check_texts(server: LlamaServer, expected: Expected, name: str) -> int:
    for text in expected.texts:
        ids, own = server.tokenize(text, add_special=False), token_ids(expected.tokenizer, text)
        if ids != own:
            raise _failure(
                "gguf-tokens", "the GGUF cuts a text into other tokens", name, f"{text!r}: {ids}, expected {own}"
            )
    return len(expected.texts)


def _logits(server: LlamaServer, expected: Expected) -> Agreement:
    """Next-token log-probabilities along the merged model's own greedy path."""
    plain = token_ids(expected.tokenizer, "a")[-1]
    rows = [_rows(server, answer, plain=plain) for answer in expected.answers]
    return agreement([answer.logprobs for answer in expected.answers], rows)


def _judge(server: LlamaServer, expected: Expected) -> Agreement:
    """Next-token log-probabilities in the rows of the evaluation split."""
    plain = token_ids(expected.tokenizer, "a")[-1]
    truth = [row.logprobs for row in expected.judged if row.logprobs is not None]
    asked = [[row.ids[: place + 1] for place in row.positions] for row in expected.judged]
    found = [
        _predicted(server, prompts, shape=rows.shape, plain=plain) for prompts, rows in zip(asked, truth, strict=True)
    ]
    return agreement(truth, found)


def _rows(server: LlamaServer, answer: Answer, *, plain: int) -> Array:
    """float32 [T, V], NaN where the runtime listed no value."""
    prompts = [answer.prompt + answer.tokens[:step] for step in range(len(answer.tokens))]
    return _predicted(server, prompts, shape=answer.logprobs.shape, plain=plain)


def _predicted(server: LlamaServer, prompts: list[list[int]], *, shape: tuple[int, ...], plain: int) -> Array:
    """float32 of `shape` [len(prompts), V]: what follows each prompt, NaN where the runtime listed no value."""
    import numpy as np

    rows = np.full(shape, np.nan, dtype=np.float32)
    size = int(shape[-1])
    for step, prompt in enumerate(prompts):
        found = server.next_logprobs(prompt, listed=min(size, LISTED_TOKENS), plain_token=plain)
        for token, value in found.items():
            if token < size:  # a vocabulary padded in the file has more
                rows[step, token] = value
    return rows


def _greedy(server: LlamaServer, answers: list[Answer]) -> list[bool]:
    """Whether each greedy continuation is the same, up to the first near tie of the merged model."""
    results = []
    for answer in answers:
        ties = [step for step, margin in enumerate(answer.margins) if margin < NEAR_TIE]
        length = min([answer.end, *ties])
        tokens = server.continue_greedily(answer.prompt, max_tokens=length) if length else []
        results.append(tokens == answer.tokens[:length])
    return results


def _check_logits(close: Agreement, *, gguf_type: str, name: str) -> None:
    limit = bounds(gguf_type)
    if not (close.relative_error <= limit.relative_error and close.mean_kl <= limit.mean_kl):
        raise _failure(
            "gguf-logits", "the GGUF predicts something else than the merged model", name,
            f"relative error {close.relative_error:.4g} (allowed {limit.relative_error:g}), "
            f"mean KL {close.mean_kl:.4g} (allowed {limit.mean_kl:g}) over {close.positions} positions",
        )  # fmt: skip
