"""Ask a result: its GGUF through llama-server with the template inside the file, else its merged folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dropforge.errors import CommandError
from dropforge.gguf_names import finished_projector, is_projector
from dropforge.paths import ResultFolder

Message = dict[str, Any]
"""One turn: role and content, which is a text or (with pictures) a list of parts."""
Reply = Callable[[list[Message]], str]

MAX_TOKENS = 512
CONTEXT = 4096
# The first of these that a result holds answers: small and close first, 16 bits last.
PREFERRED = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "BF16", "F16", "F32")
LEAVE = {"/exit", "/quit", "/bye"}


def answer(
    result: Path,
    prompts: list[str],
    *,
    max_tokens: int = MAX_TOKENS,
    system: str | None = None,
    temperature: float = 0.0,
    images: tuple[Path, ...] = (),
) -> list[str]:
    """One answer per prompt, each a conversation of its own, in order. Temperature 0 is greedy.

    `result` is a result folder, a GGUF file or a merged folder; `images` are PNG or JPEG files shown before each
    prompt. Raises CommandError: chat-nothing (no model), chat-image (an unreadable file, or there is no projector).
    """
    pictures = [_picture(path) for path in images]
    if pictures and projector_of(result) is None:
        raise CommandError(
            "this result cannot look at pictures", code="chat-image", where=str(result),
            why="there is no projector (mmproj) beside its GGUF",
            fix="for a model that reads pictures, run `dropforge export RESULT gguf:q8_0` first",
        )  # fmt: skip
    with model_of(result, max_tokens=max_tokens, temperature=temperature) as reply:
        start: list[Message] = [{"role": "system", "content": system}] if system else []
        return [reply([*start, {"role": "user", "content": _content(prompt, pictures)}]) for prompt in prompts]


def _picture(path: Path) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise CommandError(
            f"{path} cannot be read", code="chat-image", where="--image", why=str(error), fix="name a PNG or JPEG file"
        ) from error
    if not found.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        raise CommandError(
            f"{path.name} is no PNG or JPEG file", code="chat-image", where="--image", fix="convert it, then ask again"
        )
    return found


def _content(prompt: str, pictures: list[bytes]) -> str | list[dict[str, Any]]:
    if not pictures:
        return prompt
    from dropforge.llama_cpp.server import picture_part

    return [*map(picture_part, pictures), {"type": "text", "text": prompt}]


def converse(
    result: Path, *, max_tokens: int = MAX_TOKENS, system: str | None = None, temperature: float = 0.0,
    read: Callable[[], str | None] | None = None, write: Callable[[str], None] = print,
) -> int:  # fmt: skip
    """A conversation that remembers, until end of input or /exit; /clear forgets. Returns exit status 0.

    `read` gives the next message or None at the end; by default a line of the terminal.
    """
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    ask = read or _read_line
    with model_of(result, max_tokens=max_tokens, temperature=temperature) as reply:
        while (text := ask()) is not None and text.strip() not in LEAVE:
            if text.strip() == "/clear":
                messages = list(start)
                continue
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": reply(messages)})
            write(messages[-1]["content"])
    return 0


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


@contextmanager
def model_of(result: Path, *, max_tokens: int, temperature: float) -> Iterator[Reply]:
    """A function from a conversation to its answer, while the block lasts."""
    gguf = choose_gguf(result)
    if gguf is not None:
        from dropforge.llama_cpp.server import LlamaServer

        with LlamaServer(gguf, context=CONTEXT, projector=projector_of(result)) as server:
            yield lambda messages: server.chat(messages, max_tokens=max_tokens, temperature=temperature)
        return
    merged = next(
        (folder for folder in (ResultFolder(result).merged, result) if (folder / "config.json").is_file()), None
    )
    if merged is None:
        raise CommandError(
            "there is nothing to talk to", code="chat-nothing", where=str(result),
            why="the result holds neither a GGUF nor a merged model",
            fix="run `dropforge export RESULT gguf:q8_0` first",
        )  # fmt: skip
    with _transformers(merged, max_tokens=max_tokens, temperature=temperature) as reply:
        yield reply


def choose_gguf(result: Path) -> Path | None:
    """The GGUF that answers for a result: Q8_0 first, else the next in PREFERRED, else any; None when there is none."""
    if result.is_file():
        return result
    folder = ResultFolder(result).gguf
    files = [path for path in sorted(folder.glob("*.gguf")) if not is_projector(path)]
    files += sorted(folder.glob("*/*-00001-of-*.gguf"))
    ranks = {name: place for place, name in enumerate(PREFERRED)}

    def rank(path: Path) -> int:
        return ranks.get(path.stem.partition("-00001-of-")[0].rpartition("-")[2], len(ranks))

    return min(files, key=rank, default=None)


def projector_of(result: Path) -> Path | None:
    """The projector beside the GGUF of a result folder, or beside a GGUF file; None without one."""
    return finished_projector(result.parent if result.is_file() else ResultFolder(result).gguf)


@contextmanager
def _transformers(folder: Path, *, max_tokens: int, temperature: float) -> Iterator[Reply]:
    import torch
    from transformers import AutoTokenizer

    from dropforge.models.pictures import auto_class

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: Any
    with warnings.catch_warnings():
        # The import of compressed-tensors, for FP8 folders, touches what torch deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        model = auto_class(folder).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    model = model.eval()

    def reply(messages: list[Message]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.no_grad():
            output = model.generate(
                **inputs, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    yield reply
