"""The plan is pure: the same inputs, the same numbers; fallbacks and shortages are said."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
from dropforge.facts import DataFacts, ModelFacts, data_facts, model_facts, safetensors_shapes
from dropforge.hardware import GIB, Gpu, Hardware
from dropforge.locate import data_locator
from dropforge.paths import DataRoot
from dropforge.plan import make_plan
from dropforge.spec_check import check
from dropforge_kernels.modules.model_shape import ModelShape

CPU = Hardware(
    cpu_cores=2, memory_total=8 * GIB, memory_available=6 * GIB, disk_free=50 * GIB, gpus=(), gpu_note="no driver"
)
H200 = Gpu(uuid="GPU-1", name="H200", memory_total=139 * GIB, memory_free=130 * GIB, driver="580")
FACTS = ModelFacts(
    parameters=1_000_000, linear_shapes=((64, 32), (32, 64)), embedding_shape=(100, 32), hidden_size=32, num_layers=2,
    on_disk=True, source="the model's files",
)  # fmt: skip
ROWS = DataFacts(rows=100, bytes=1000, missing=())


def spec(extra: str = ""):
    text = f"version: 1\nname: n\nmodel: org/model\ndata: t.jsonl\n{extra}\nexport: [merged, 'gguf:q8_0']\n"
    return check(text.encode(), filename="job.yaml").resolved


def plan(extra: str = "", *, hardware=CPU, model=FACTS, data=ROWS):
    return make_plan(spec(extra), hardware=hardware, model=model, data=data)


def test_pure_and_json_able():
    assert plan() == plan()
    assert json.loads(json.dumps(plan().as_dict()))["rows"] == 100


def test_devices_and_dtypes():
    gpu = replace(CPU, gpus=(H200,), gpu_note="")
    assert (plan().device, plan().weight_dtype) == ("cpu", "float32")
    assert (plan(hardware=gpu).device, plan(hardware=gpu).weight_dtype) == ("cuda", "bfloat16")
    assert plan("adapter: {type: full}", hardware=gpu).weight_dtype == "float32"
    assert (
        plan("model: {id: a/b, quantization: nf4}".replace("model", "rerun: false\n#model"), hardware=gpu).optim
        == "adamw_8bit"
    )


def test_paged_optimizers_fall_back_on_the_cpu_and_say_so():
    made = plan("train: {optim: paged_adamw_8bit}")
    assert made.optim != "paged_adamw_8bit"
    assert any("paged_adamw_8bit" in note for note in made.notes)


@pytest.mark.parametrize(
    ("extra", "rows", "steps"),
    [("", 100, 7), ("train: {num_train_epochs: 2.5}", 100, 18), ("train: {max_steps: 3}", None, 3), ("", None, None),
     ("data: {train: t.jsonl, eval: {fraction: 0.2}}", 100, 5)],
)  # fmt: skip
def test_steps(extra, rows, steps):
    text = extra if not extra.startswith("data") else "rerun: false"
    made_spec = spec(text)
    if extra.startswith("data"):
        raw = "version: 1\nname: n\nmodel: org/model\n" + extra + "\nexport: [merged]\n"
        made_spec = check(raw.encode(), filename="job.yaml").resolved
    made = make_plan(made_spec, hardware=CPU, model=FACTS, data=replace(ROWS, rows=rows))
    assert made.steps == steps


def test_trained_parameters_of_lora_and_full():
    assert plan().trainable_parameters == 16 * (64 + 32) * 2
    assert plan("adapter: {modules_to_save: [lm_head]}").trainable_parameters == 16 * (64 + 32) * 2 + 100 * 32
    full = check(
        b"version: 1\nname: n\nmodel: org/m\ndata: t.jsonl\nadapter: {type: full}\nexport: [merged]\n",
        filename="j.yaml",
    ).resolved
    assert make_plan(full, hardware=CPU, model=FACTS, data=ROWS).trainable_parameters == 1_000_000


def test_what_does_not_fit_is_said_with_numbers():
    huge = replace(FACTS, parameters=70_000_000_000)
    notes = " ".join(plan(model=huge).notes)
    assert "may not fit" in notes and "disk too small" in notes and "GiB" in notes


def test_facts_from_names_and_files(tmp_path):
    named = model_facts(spec().model.model_copy(update={"id": "Qwen/Qwen3-0.6B"}), folder=None)
    assert named.parameters == 600_000_000
    assert model_facts(spec().model, folder=None).parameters is None
    header = json.dumps({
        "model.layers.0.q.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [8, 2], "data_offsets": [32, 96]},
        "__metadata__": {"format": "pt"},
    }).encode()  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(96))
    (tmp_path / "config.json").write_text('{"hidden_size": 2, "num_hidden_layers": 1}')
    facts = model_facts(spec().model, folder=tmp_path)
    assert (facts.parameters, facts.linear_shapes, facts.embedding_shape) == (24, ((4, 2),), (8, 2))
    assert set(safetensors_shapes(tmp_path)) == {"model.layers.0.q.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [("a.jsonl", "{}\n{}\n{}", 3), ("a.csv", "x,y\n1,2\n3,4\n", 2), ("a.json", "[]", None), ("a.jsonl", "", 0)],
)  # fmt: skip
def test_rows_are_counted_without_reading_them_into_memory(tmp_path, name, text, rows):
    root = DataRoot(tmp_path).create()
    (root.datasets / name).write_text(text)
    data = spec().data.model_copy(update={"train": (spec().data.train[0].model_copy(update={"path": name}),)})
    assert data_facts(data, data_locator(root)).rows == rows


def test_a_missing_file_is_named_not_raised(tmp_path):
    root = DataRoot(tmp_path).create()
    assert data_facts(spec().data, data_locator(root)).missing == ("t.jsonl",)


def test_layers_are_planned_for_lora_on_a_gpu_whose_model_is_known():
    shape = ModelShape(layers=32, hidden=4096, intermediate=14336, queries=4096, keys=1024, heads=32, vocabulary=128256)
    facts = replace(FACTS, parameters=8_030_000_000, hidden_size=4096, num_layers=32, shape=shape)
    large = plan(hardware=replace(CPU, gpus=(H200,), memory_available=100 * GIB), model=facts)
    assert any("everything kept" in line for line in large.memory_lines)
    assert large.memory_needed is not None and 30 * GIB < large.memory_needed < 60 * GIB
    small = plan(
        hardware=replace(CPU, gpus=(replace(H200, memory_free=23 * GIB),), memory_available=64 * GIB), model=facts
    )
    assert any("host memory" in line for line in small.memory_lines)
    assert small.memory_needed is not None and small.memory_needed <= 23 * GIB
    tiny = plan(hardware=replace(CPU, gpus=(replace(H200, memory_free=8 * GIB),)), model=facts)
    assert any(note.startswith("may not fit") for note in tiny.notes) and "does not fit" in tiny.memory_lines[-1]
    for without in (plan(model=facts), plan("adapter: {type: full}", hardware=replace(CPU, gpus=(H200,)), model=facts)):
        assert without.memory_lines == ()
