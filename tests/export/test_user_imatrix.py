"""An importance matrix that the user brings: the good ones are used, the others refused before anything is trained."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from dropforge.errors import ExportError
from dropforge.export.beforehand import refuse_beforehand
from dropforge.export.export_gguf import export_gguf
from dropforge.export.stage import Stage
from dropforge.export.user_imatrix import check_imatrix, read_imatrix
from dropforge.models.source import ModelSource
from dropforge.paths import DataRoot
from dropforge.spec_check import check
from export_harness import edit_json

WIDTHS = {
    "attn_q": 256,
    "attn_k": 256,
    "attn_v": 256,
    "attn_output": 256,
    "ffn_gate": 256,
    "ffn_up": 256,
    "ffn_down": 768,
}
NAMES = tuple(f"blk.{layer}.{name}.weight" for layer in range(2) for name in WIDTHS)


def values(names=NAMES, **changes) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        name: generator.random(changes.get(name.split(".")[2], WIDTHS[name.split(".")[2]]), dtype=np.float32) + 0.1
        for name in names
    }


def write_gguf(path, entries, *, kind="imatrix"):
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["mine"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, value in entries.items():
        writer.add_tensor(f"{name}.in_sum2", value[None])
        writer.add_tensor(f"{name}.counts", np.array([[512.0]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_older(path, entries):
    data = struct.pack("<i", len(entries))
    for name, value in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(value)) + value.tobytes()
    path.write_bytes(data)
    return path


def wrong(llama, path) -> str:
    with pytest.raises(ExportError) as error:
        check_imatrix(path, base=llama.base)
    assert error.value.code == "export-imatrix"
    assert path.name in error.value.problems[0].what
    return f"{error.value.problems[0].what}: {error.value.problems[0].why}"


def test_both_formats_are_read(llama, tmp_path):
    entries = values()
    for path in (write_gguf(tmp_path / "new.gguf", entries), write_older(tmp_path / "old.dat", entries)):
        check_imatrix(path, base=llama.base)
        found = read_imatrix(path)
        assert set(found) == set(NAMES)
        assert all(np.array_equal(found[name][0], entries[name]) for name in NAMES)


def test_what_is_no_importance_matrix_is_refused(llama, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not at all what it should be")
    assert "cannot be read" in wrong(llama, text)
    cut = write_older(tmp_path / "cut.dat", values())
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "cut short" in wrong(llama, cut)
    short = write_gguf(tmp_path / "cut.gguf", values())
    short.write_bytes(short.read_bytes()[:200])
    assert "cannot be read" in wrong(llama, short)
    assert "of the type model" in wrong(llama, write_gguf(tmp_path / "model.gguf", values(), kind="model"))
    assert "no entry" in wrong(llama, write_older(tmp_path / "empty.dat", {}))


def test_another_models_is_refused(llama, tmp_path):
    more = (*NAMES, "blk.2.attn_q.weight")
    assert "knows 3 layers, the model has 2" in wrong(llama, write_gguf(tmp_path / "deep.gguf", values(more)))
    assert "has 512 columns, not 256" in wrong(llama, write_gguf(tmp_path / "wide.gguf", values(attn_q=512)))
    assert "has 512 columns, not 768" in wrong(llama, write_gguf(tmp_path / "thin.gguf", values(ffn_down=512)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_values_that_are_no_sums_are_refused(llama, tmp_path, bad):
    entries = values()
    entries[NAMES[3]][7] = bad
    assert NAMES[3] in wrong(llama, write_gguf(tmp_path / "bad.gguf", entries))


def test_it_is_used_and_leaves_no_path_in_the_file(llama, llama_cpp, tmp_path):
    path = write_gguf(tmp_path / "mine.gguf", values())
    stage = Stage(llama.request((), work=tmp_path / "work", imatrix=path), log=llama.log.append)
    (tmp_path / "out").mkdir()
    made = export_gguf(stage, tmp_path / "out", "iq2_xxs")
    assert made.checks["imatrix"] == "the one given with the job"
    fields = gguf.GGUFReader(made.path).fields
    assert fields["quantize.imatrix.file"].contents() == "mine.gguf"
    assert fields["quantize.imatrix.entries_count"].contents() == len(NAMES)


def test_a_job_is_refused_before_it_trains(llama, tmp_path):
    root = DataRoot(tmp_path)
    (tmp_path / "datasets").mkdir()
    run = root.run("000001-x-00000000")
    run.path.mkdir(parents=True)
    text = b"version: 1\nname: x\nmodel: builtin:tiny-llama\ndata: a.jsonl\nimatrix: mine.gguf\nexport: [gguf:q4_k_m]\n"
    spec = check(text, filename="job.yaml").resolved
    source = ModelSource(id="builtin:tiny-llama", path=llama.base, revision=None, kind="builtin")

    def refused() -> str:
        with pytest.raises(ExportError) as error:
            refuse_beforehand(spec, spec.export, run=run, root=root, source=source)
        assert error.value.code == "export-imatrix" and not run.imatrix.exists()
        return str(error.value)

    assert "does not exist" in refused()
    place = tmp_path / "datasets" / "mine.gguf"
    write_gguf(place, values(attn_q=512))
    assert "belongs to another model" in refused()
    place.unlink()
    place.symlink_to(write_gguf(tmp_path / "elsewhere.gguf", values()))
    assert "symbolic link" in refused()
    place.unlink()
    write_gguf(place, values())
    refuse_beforehand(spec, spec.export, run=run, root=root, source=source)
    assert run.imatrix.read_bytes() == place.read_bytes()


def test_it_needs_a_gguf_to_be_for():
    text = b"version: 1\nname: x\nmodel: builtin:tiny-llama\ndata: a.jsonl\nimatrix: mine.gguf\nexport: [merged]\n"
    with pytest.raises(Exception, match="imatrix is for GGUF files"):
        check(text, filename="job.yaml")


def test_nested_configurations_are_read(llama, tmp_path):
    """Models of several parts keep the language model's numbers one level down."""
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", text_config={"num_hidden_layers": 5, "hidden_size": 256})
    with pytest.raises(ExportError, match="another model"):
        check_imatrix(write_gguf(tmp_path / "a.gguf", values()), base=tmp_path)
