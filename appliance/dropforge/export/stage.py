"""What several exports share, made once when first asked for: the verified merged folder and its 16-bit GGUF."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dropforge.errors import DropforgeError
from dropforge.export.base_license import origin
from dropforge.export.base_weights import BaseWeights, base_weights
from dropforge.export.calibration import InputStatistics, input_statistics
from dropforge.export.chat_format import file_template, render, stops, token_ids, turn_end
from dropforge.export.go_template import OllamaTemplate, ollama_template
from dropforge.export.imatrix import write_imatrix
from dropforge.export.merge import merge
from dropforge.export.probes import ANSWERED, TEXTS
from dropforge.export.processor_files import compare_towers, write_processor
from dropforge.export.reference import Answer, Judged, spread_positions
from dropforge.export.request import ExportRequest
from dropforge.export.tokenizer_files import end_generation, is_sentencepiece, set_eos, space_prefix, write_tokenizer
from dropforge.export.verify_gguf import Expected, verify_gguf
from dropforge.export.verify_merged import VerifiedMerge, verify_merged
from dropforge.files import read_json, write_json, write_text
from dropforge.llama_cpp.convert import Conversion, convert
from dropforge.llama_cpp.locate import LlamaCpp, find_llama_cpp

SAMPLES = 2
SAMPLE_TOKENS = 256
"""So many prompts of the training data are asked, each cut to so many tokens: the check stays short."""
EVAL_ROWS = 8
EVAL_POSITIONS = 8
"""Agreement is measured in so many rows of the evaluation split, at so many places of each."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The merged, repaired, verified 16-bit folder."""

    folder: Path
    checks: dict[str, Any]
    answers: list[Answer]
    judged: list[Judged]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class BaseGguf:
    """The 16-bit GGUF every other GGUF is made from."""

    path: Path
    gguf_type: str
    conversion: Conversion
    expected: Expected
    checks: dict[str, Any]
    """Its own verification, with the strict bounds of 16 bits: what is made from it starts right."""


@dataclass(frozen=True, kw_only=True)
class GgufInputs:
    """What every conversion to GGUF takes: the folder as the converter must see it, and what the file must then do."""

    view: Path
    metadata: dict[str, bool | int | str]
    gguf_type: str
    """16-bit type of the merged weights."""
    expected: Expected


class Stage:
    """Shared intermediate products below `request.work`. A step that failed fails again with the same error."""

    def __init__(self, request: ExportRequest, *, log: Callable[[str], None]) -> None:
        self.request = request
        self.log = log
        self._results: dict[str, Any] = {}
        request.work.mkdir(parents=True, exist_ok=True)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._results:
            try:
                self._results[name] = make()
            except DropforgeError as error:
                self._results[name] = error
        result = self._results[name]
        if isinstance(result, DropforgeError):
            raise result
        return result

    @cached_property
    def tokenizer(self) -> Any:
        """The training tokenizer, as transformers loads it."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.request.tokenizer, local_files_only=True, trust_remote_code=False)

    @cached_property
    def tools(self) -> LlamaCpp:
        return find_llama_cpp()

    @cached_property
    def stops(self) -> list[str]:
        return stops(self.tokenizer)

    @cached_property
    def end_token(self) -> str | None:
        """The token that ends an answer: the template's turn end, else the vocabulary's end token."""
        found: str | None = turn_end(self.tokenizer) or self.tokenizer.eos_token
        return found

    @cached_property
    def ollama_template(self) -> OllamaTemplate:
        return ollama_template(self.tokenizer)

    def has(self, name: str) -> bool:
        """Whether the product of this name (base, merged, base gguf ...) has been made."""
        return name in self._results and not isinstance(self._results[name], DropforgeError)

    @property
    def base(self) -> BaseWeights:
        """The 16-bit weights the adapter belongs onto."""
        request = self.request
        result: BaseWeights = self._once(
            "base",
            lambda: base_weights(
                request.base_path, originals=request.originals, work=request.work / "base-16-bit", log=self.log
            ),
        )
        return result

    @property
    def merged(self) -> Merged:
        result: Merged = self._once("merged", self._merge)
        return result

    @property
    def gguf_inputs(self) -> GgufInputs:
        result: GgufInputs = self._once("gguf inputs", self._gguf_inputs)
        return result

    @property
    def base_gguf(self) -> BaseGguf:
        result: BaseGguf = self._once("base gguf", self._convert)
        return result

    @property
    def imatrix(self) -> tuple[Path, int]:
        """The importance matrix of the training rows, and how many tokens they are."""
        result: tuple[Path, int] = self._once("imatrix", self._imatrix)
        return result

    @property
    def statistics(self) -> InputStatistics:
        """What the training rows feed every linear layer of the merged model with."""
        result: InputStatistics = self._once(
            "statistics", lambda: input_statistics(self.merged.folder, self.request.samples)
        )
        return result

    def _imatrix(self) -> tuple[Path, int]:
        target = self.request.work / "imatrix.gguf"
        self.log("computing the importance matrix from the training data")
        tokens = write_imatrix(self.merged.folder, self.request.samples, gguf=self.base_gguf.path, target=target)
        return target, tokens

    def prompts(self) -> list[list[int]]:
        """Token ids of what the model is asked: built-in prompts, then prompts of the training data."""
        if self.tokenizer.chat_template is None:
            texts: list[str | None] = list(TEXTS[-4:])
        else:
            texts = [render(self.tokenizer, messages) for messages in ANSWERED]
        asked = [row.ids[: row.prompt][:SAMPLE_TOKENS] for row in self.request.samples if row.prompt]
        distinct = [list(ids) for ids in dict.fromkeys(asked)]
        return [*(token_ids(self.tokenizer, text) for text in texts if text), *distinct[:SAMPLES]]

    def judged(self) -> list[Judged]:
        """Rows of the evaluation split and the places in them whose next token is learnt; without predictions."""
        rows: list[Judged] = []
        for row in self.request.eval_samples:
            ids = list(row.ids[:SAMPLE_TOKENS])
            start = max(row.prompt - 1, 0)
            if len(ids) - 1 > start and len(rows) < EVAL_ROWS:
                places = [start + place for place in spread_positions(len(ids) - 1 - start, most=EVAL_POSITIONS)]
                rows.append(Judged(ids=ids, positions=places))
        return rows

    def _merge(self) -> Merged:
        request = self.request
        folder = _fresh(request.work / "merged")
        self.log("merging the trained weights into 16-bit weights")
        base = request.base_path if request.full else self.base.folder
        report = merge(request.full or base, request.adapter, folder)
        repairs = write_tokenizer(request.tokenizer, folder, base=request.base_path)
        write_processor(request.base_path, folder)
        end = self.tokenizer.convert_tokens_to_ids(self.end_token) if self.end_token else None
        end_generation(folder, end)
        self.log("comparing the merged weights with the trained model")
        verified: VerifiedMerge = verify_merged(
            folder, base=base, adapter=request.adapter, full=request.full, prompts=self.prompts(),
            stop=end, judged=self.judged(),
        )  # fmt: skip
        checks = {**asdict(report), **verified.checks, "repairs": repairs}
        towers = compare_towers(folder, base=self.base.folder, adapter=request.adapter)
        if towers is not None:
            checks["tensors_for_pictures_unchanged"] = towers
        return Merged(
            folder=folder, checks=checks, answers=verified.answers, judged=verified.judged, dtype=report.dtype
        )

    def _gguf_inputs(self) -> GgufInputs:
        template = self._file_template()
        view = self._converter_view(template)
        definition = read_json(view / "tokenizer.json")
        prefix = space_prefix(definition) if is_sentencepiece(definition) else "never"
        expected = Expected(
            tokenizer=self.tokenizer, template=template, eos=self.end_token, answers=self.merged.answers,
            judged=self.merged.judged, texts=self._texts(prefix),
        )  # fmt: skip
        gguf_type = {"float16": "f16", "bfloat16": "bf16"}[self.merged.dtype]
        return GgufInputs(
            view=view,
            metadata=self._flags(definition, prefix) | origin(self.request.model_id, base=self.request.base_path),
            gguf_type=gguf_type,
            expected=expected,
        )

    def _convert(self) -> BaseGguf:
        inputs, request = self.gguf_inputs, self.request
        gguf_type = inputs.gguf_type
        target = request.work / f"base-{gguf_type}.gguf"
        self.log(f"converting to GGUF ({gguf_type})")
        conversion = convert(
            inputs.view, target, gguf_type=gguf_type, name=request.name, tools=self.tools, metadata=inputs.metadata
        )
        self.log(f"comparing the GGUF ({gguf_type}) with the merged model")
        checks = verify_gguf(target, gguf_type=gguf_type, expected=inputs.expected, tools=self.tools)
        return BaseGguf(
            path=target, gguf_type=gguf_type, conversion=conversion, expected=inputs.expected, checks=checks
        )

    def _flags(self, definition: dict[str, Any], prefix: str) -> dict[str, bool | int | str]:
        """Metadata that must follow from how the chat template uses the vocabulary."""
        flags: dict[str, bool | int | str] = {}
        if is_sentencepiece(definition):
            # "first" means the start of the whole text; llama.cpp would also put a space after each marker of a chat.
            flags["tokenizer.ggml.add_space_prefix"] = prefix == "always" or (prefix == "first" and not self._chats)
        if self._chats and not self._begins_with_bos():
            flags["tokenizer.ggml.add_bos_token"] = False
        return flags

    def _texts(self, prefix: str) -> tuple[str, ...]:
        """Plain texts the file must cut like the tokenizer.

        With a space prefix, texts that begin with a space differ by design (transformers adds none, llama.cpp and
        SentencePiece do). A prefix that is off for the sake of chats leaves no plain text to compare.
        """
        if prefix == "never":
            return TEXTS
        if prefix == "first" and self._chats:
            return ()
        return tuple(text for text in TEXTS if not text.startswith(" "))

    @property
    def _chats(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _converter_view(self, template: str | None) -> Path:
        """The merged folder as the converter must see it: no code, the turn's end as end token, this template."""
        merged = self.merged
        view = _fresh(self.request.work / "gguf-view")
        for path in merged.folder.iterdir():
            if path.suffix == ".safetensors":
                os.link(path, view / path.name)
            else:
                shutil.copyfile(path, view / path.name)
        config = read_json(view / "config.json")
        config.pop("auto_map", None)
        write_json(view / "config.json", config)
        if template is not None:
            write_text(view / "chat_template.jinja", template)
        if self.end_token:
            set_eos(view / "tokenizer_config.json", self.end_token)
        return view

    def _begins_with_bos(self) -> bool:
        """False when the chat template writes no BOS, so that llama.cpp must not add one to chats either."""
        bos, text = self.tokenizer.bos_token, render(self.tokenizer, ANSWERED[0])
        return text is None or (bos is not None and text.startswith(bos))

    def _file_template(self) -> str | None:
        template: str | None = self.tokenizer.chat_template
        return template and file_template(template, beside=self.ollama_template.text is not None)


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder
