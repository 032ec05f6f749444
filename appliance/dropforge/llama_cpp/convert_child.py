"""Front end of llama.cpp's converter, run as a program of its own (see convert.py for its arguments).

The converter's classes are used as they are. A subclass made at run time differs in two points: an unknown
pre-tokenizer is named by definition, and metadata can be set.
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
    """Arguments: converter folder, model folder, target file, type, model name, metadata as JSON."""
    converter, folder, target, gguf_type, name, metadata = arguments
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
    }
    found: dict[str, str] = {}
    with torch.inference_mode():
        parameters = ModelBase.load_hparams(Path(folder), False)
        architecture = get_model_architecture(parameters, ModelType.TEXT)
        try:
            base = get_model_class(architecture)
        except NotImplementedError:
            print(f"llama.cpp's converter does not know the architecture {architecture}")
            return 1
        model = _repaired(base, found, Path(folder), json.loads(metadata))(
            Path(folder), types[gguf_type], Path(target), model_name=name
        )
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
            for key, value in metadata.items():
                for values in self.gguf_writer.kv_data:
                    values.pop(key, None)
                if isinstance(value, bool):
                    self.gguf_writer.add_bool(key, value)
                elif isinstance(value, int):
                    self.gguf_writer.add_uint32(key, value)
                else:
                    self.gguf_writer.add_string(key, value)

    return Repaired


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
