"""Rows that a block type cannot take: llama.cpp stores them in another type, and the result names every such tensor."""

from __future__ import annotations

import pytest
from dropforge.errors import ExportError
from dropforge.export import ExportReport, export_one
from dropforge.export.stage import Stage
from dropforge.llama_cpp.quantize import fallbacks
from dropforge.model_card import _enlarged
from export_harness import Bench
from shaped_model import write_adapter, write_base

SHAPE = {
    "hidden_size": 224, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "head_dim": 56,
}  # fmt: skip
SAID = """warning: blk.0.attn_k.weight   - ncols    224 not divisible by 256 (required for type    q4_K) -> falling back to    q5_0
llama_model_quantize_impl: WARNING: {count} of 21 tensor(s) required fallback quantization
"""


def test_the_result_and_its_card_name_the_tensors(llama_cpp, tmp_path):
    from transformers import AutoTokenizer

    bench = Bench(name="narrow", folder=tmp_path)
    write_base(bench.base, SHAPE)
    write_adapter(bench.adapter, SHAPE)
    AutoTokenizer.from_pretrained(bench.base).save_pretrained(bench.tokenizer)
    bench.result.path.mkdir()
    stage = Stage(bench.request(("gguf:q4_k_m",)), log=bench.log.append)
    report = export_one(stage, "gguf:q4_k_m")
    assert report.ok, report.problem
    found = report.checks["tensors_stored_larger"]
    assert found["blk.0.attn_q.weight"] == "q4_K -> q5_0"
    assert set(found) >= {f"blk.0.{name}.weight" for name in ("attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")}
    assert "blk.0.ffn_down.weight" not in found, "its rows have 512 columns"
    shown = "\n".join(_enlarged((report,)))
    assert "`blk.0.attn_k.weight`" in shown and "as q5_0" in shown and "q4_K's blocks" in shown


def test_a_file_that_is_what_its_name_says_needs_no_remark():
    report = ExportReport(
        kind="gguf:q4_k_m", ok=True, path="gguf/x.gguf", bytes=1, seconds=1.0, checks={"type": "q4_k_m"}
    )
    assert _enlarged((report,)) == []


def test_a_report_that_cannot_be_read_is_no_success():
    assert fallbacks(SAID.format(count=1)) == {"blk.0.attn_k.weight": "q4_K -> q5_0"}
    assert fallbacks("nothing of the kind") == {}
    with pytest.raises(ExportError, match="could not be read"):
        fallbacks(SAID.format(count=2))
