"""Front end of llama.cpp's converter, run as a program of its own (see convert.py for its arguments).

The converter's classes are used as they are. A subclass made at run time differs in three points: an unknown
pre-tokenizer is named by definition, metadata can be set, and Pixtral's projector gets its row ends.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from dropforge.llama_cpp.convert import REPORT_MARK
from dropforge.llama_cpp.pre_tokenizer import recognise


def main(arguments: list[str]) -> int:
    """Arguments: converter folder, text or projector, model folder, target file, type, name, metadata as JSON."""
    converter, part, folder, target, gguf_type, name, metadata = arguments
    # The converter belongs to its own gguf-py, which is newer than the released one.
    sys.path[:0] = [converter, str(Path(converter) / "gguf-py")]
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    found: dict[str, str] = {}
    with torch.inference_mode():
        parameters = ModelBase.load_hparams(Path(folder), False)
        projector = part == "projector"
        architecture = get_model_architecture(parameters, ModelType.MMPROJ if projector else ModelType.TEXT)
        try:
            base = get_model_class(architecture, mmproj=projector)
        except NotImplementedError:
            print(f"llama.cpp's converter does not know the architecture {architecture}")
            return 1
        said = json.loads(metadata)
        model_class = _with_origin(base, said) if projector else _repaired(base, found, Path(folder), said)
        model = model_class(Path(folder), types[gguf_type], Path(target), model_name=name)
        model.write()
    print(REPORT_MARK + json.dumps(found))
    return 0


def _repaired(base: Any, found: dict[str, str], folder: Path, metadata: dict[str, bool | int | str]) -> Any:
    """Subclass of the converter's model class; `found` receives the pre-tokenizer and how it was recognised."""

    class Repaired(base):
        model_arch = base.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                name = str(super().get_vocab_base_pre(tokenizer))
            except NotImplementedError:
                name = recognise(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))) or ""
                if not name:
                    raise
                found.update(pre_tokenizer=name, pre_tokenizer_by="definition")
            else:
                found.update(pre_tokenizer=name, pre_tokenizer_by="hash")
            return name

        def set_vocab(self) -> None:
            super().set_vocab()
            _set(self.gguf_writer, metadata)

    return Repaired


def _with_origin(base: Any, metadata: dict[str, bool | int | str]) -> Any:
    """Subclass of the converter's class of a projector, which has no vocabulary to repair.

    Pixtral's class wants the embedding of the token between two rows of a picture, but this llama.cpp drops all tensors
    of the language model before that class sees them: the embedding is handed on to it.
    """
    ends_rows = getattr(base, "use_break_tok", False)

    class WithOrigin(base):
        model_arch = base.model_arch

        @classmethod
        def filter_tensors(cls, item: Any) -> Any:
            return item if ends_rows and item[0].endswith("embed_tokens.weight") else super().filter_tensors(item)

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            _set(self.gguf_writer, metadata)

    return WithOrigin


def _set(writer: Any, metadata: dict[str, bool | int | str]) -> None:
    for key, value in metadata.items():
        for values in writer.kv_data:
            values.pop(key, None)
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
