"""A GGUF that is not the merged model must not pass: each fault the converter or a hand could make is tried."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from dropforge.errors import ExportError
from dropforge.export.verify_gguf import verify_gguf
from dropforge.export.verify_weights import compare_weights
from dropforge.llama_cpp.quantize import quantize
from export_harness import edit_gguf


@pytest.fixture
def base(bench, llama_cpp):
    """The shared 16-bit GGUF and what it must do."""
    return bench.stage.base_gguf


@pytest.fixture
def file(base, tmp_path):
    return shutil.copyfile(base.path, tmp_path / "model-F16.gguf")


def fails(path, base, llama_cpp, gguf_type="f16") -> ExportError:
    with pytest.raises(ExportError) as error:
        verify_gguf(path, gguf_type=gguf_type, expected=base.expected, tools=llama_cpp)
    return error.value


def replace_bytes(path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_the_untouched_file_passes(base, file, llama_cpp):
    checks = verify_gguf(file, gguf_type="f16", expected=base.expected, tools=llama_cpp)
    assert checks["logits"]["relative_error"] < 0.002


def test_another_chat_template(base, file, llama_cpp):
    replace_bytes(file, b"{{ '<|im_start|>assistant\\n' }}", b"{{ '<|im_start|>assistant  ' }}")
    error = fails(file, base, llama_cpp)
    assert error.code == "gguf-metadata" and "chat_template" in error.problems[0].what


def test_another_end_token(base, file, llama_cpp):
    field = edit_gguf(file).fields["tokenizer.ggml.eos_token_id"]
    field.parts[-1][0] = 1
    error = fails(file, base, llama_cpp)
    assert error.code == "gguf-metadata" and "eos_token" in error.problems[0].what


def test_two_tokens_swapped(base, file, llama_cpp):
    field = edit_gguf(file).fields["tokenizer.ggml.tokens"]
    texts = [bytes(field.parts[index]) for index in field.data]
    first = next(i for i, t in enumerate(texts) if t == b"e")
    second = next(i for i, t in enumerate(texts) if t == b"o")
    one, two = (field.parts[field.data[i]] for i in (first, second))
    one[:], two[:] = np.frombuffer(b"o", np.uint8), np.frombuffer(b"e", np.uint8)
    assert fails(file, base, llama_cpp).code == "gguf-tokens"


def test_pieces_without_scores(llama, llama_cpp, tmp_path):
    """What the converter makes of a SentencePiece vocabulary that lost its tokenizer.model."""
    base = llama.stage.base_gguf
    file = shutil.copyfile(base.path, tmp_path / "model-F16.gguf")
    field = edit_gguf(file).fields["tokenizer.ggml.scores"]
    for index in field.data:
        field.parts[index][0] = 0.0
    assert fails(file, base, llama_cpp).code == "gguf-tokens"


def test_a_space_prefix_after_markers(llama, llama_cpp, tmp_path):
    base = llama.stage.base_gguf
    file = shutil.copyfile(base.path, tmp_path / "model-F16.gguf")
    field = edit_gguf(file).fields["tokenizer.ggml.add_space_prefix"]
    field.parts[-1][0] = True
    assert fails(file, base, llama_cpp).code == "gguf-tokens"


def test_another_pre_tokenizer(qwen, llama_cpp, tmp_path):
    base = qwen.stage.base_gguf
    file = shutil.copyfile(base.path, tmp_path / "model-F16.gguf")
    replace_bytes(file, b"qwen2\x1a", b"gpt-2\x1a") if b"qwen2\x1a" in file.read_bytes() else replace_bytes(
        file, b"\x05\x00\x00\x00\x00\x00\x00\x00qwen2", b"\x05\x00\x00\x00\x00\x00\x00\x00gpt-2"
    )
    assert fails(file, base, llama_cpp).code == "gguf-tokens"


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.0.attn_q.weight", "token_embd.weight"])
def test_one_changed_tensor(base, file, llama_cpp, name):
    tensor = next(t for t in edit_gguf(file).tensors if t.name == name)
    tensor.data[:] = tensor.data[::-1].copy()
    assert fails(file, base, llama_cpp).code == "gguf-logits"


@pytest.mark.parametrize("gguf_type", ["q8_0", "q4_k_m"])
def test_one_changed_tensor_below_a_quantised_file(base, file, llama_cpp, tmp_path, gguf_type):
    tensor = next(t for t in edit_gguf(file).tensors if t.name == "token_embd.weight")
    tensor.data[:] = tensor.data[::-1].copy()
    quantize(file, tmp_path / "small.gguf", gguf_type=gguf_type, tools=llama_cpp, threads=1)
    assert fails(tmp_path / "small.gguf", base, llama_cpp, gguf_type).code == "gguf-logits"


@pytest.mark.parametrize("gguf_type", ["f16", "q8_0", "q4_k_m", "q2_k"])
def test_one_changed_matrix_is_named(base, file, llama_cpp, tmp_path, gguf_type):
    """Row by row against the 16-bit file: this does not depend on how much the logits notice."""
    quantize(base.path, tmp_path / "good.gguf", gguf_type=gguf_type, tools=llama_cpp, threads=1)
    assert compare_weights(tmp_path / "good.gguf", source=base.path)["worst_weight_error"] < 0.35
    tensor = next(t for t in edit_gguf(file).tensors if t.name == "blk.1.attn_k.weight")
    tensor.data[:] = tensor.data[::-1].copy()
    quantize(file, tmp_path / "bad.gguf", gguf_type=gguf_type, tools=llama_cpp, threads=1)
    with pytest.raises(ExportError) as error:
        compare_weights(tmp_path / "bad.gguf", source=base.path)
    assert error.value.code == "gguf-weights"
    assert error.value.problems[0].why.startswith("blk.1.attn_k.weight")


def test_tensors_of_another_model_are_named(llama, qwen, llama_cpp):
    with pytest.raises(ExportError) as error:
        compare_weights(llama.stage.base_gguf.path, source=qwen.stage.base_gguf.path)
    assert error.value.code == "gguf-weights"


def test_a_smaller_type_than_it_says(base, llama_cpp, tmp_path):
    quantize(base.path, tmp_path / "small.gguf", gguf_type="q2_k", tools=llama_cpp, threads=1)
    assert fails(tmp_path / "small.gguf", base, llama_cpp, "q8_0").code == "gguf-logits"


def test_not_a_number(base, file, llama_cpp):
    tensor = next(t for t in edit_gguf(file).tensors if t.name == "output_norm.weight")
    tensor.data[:] = np.nan
    assert fails(file, base, llama_cpp).code in {"gguf-logits", "llama-server"}


@pytest.mark.parametrize("size", [0, 1000, 1_000_000])
def test_a_truncated_file(base, file, llama_cpp, size):
    os.truncate(file, size)
    error = fails(file, base, llama_cpp)
    assert error.code == "gguf-load"
    assert "llama-server said last" in error.problems[0].why
