"""The projector of a model that reads pictures: made, checked, refused when damaged, and where it goes."""

from __future__ import annotations

import dataclasses
import io
import shutil

import pytest
from dropforge.chat import answer, choose_gguf, projector_of
from dropforge.errors import CommandError, ExportError
from dropforge.export import export_all, export_one, picture_families, reference
from dropforge.export.hub_plan import plan_uploads
from dropforge.export.modelfile import read_modelfile
from dropforge.export.picture import make_picture, png
from dropforge.export.picture_reference import PictureReader
from dropforge.export.precheck import precheck, with_projector
from dropforge.export.projector_weights import compare_projector
from dropforge.export.verify_projector import verify_projector
from dropforge.files import read_json
from dropforge.llama_cpp.convert import convert_projector
from dropforge.model_card import _commands
from dropforge.models.source import ModelSource
from dropforge.paths import ResultFolder
from export_harness import copy, edit_gguf, edit_json, edit_tensors, measured
from picture_models import FAMILIES, load, picture_bench

NOT_CONVERTED = "llava"
OTHERS = [name for name in FAMILIES if name not in ("gemma3", NOT_CONVERTED)]
PROJECTOR = "gguf/test-model-mmproj-F16.gguf"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return picture_bench("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def reports(gemma, llama_cpp):
    """Reports by kind of what `export: [merged, "gguf:q8_0", ollama]` makes."""
    kinds = with_projector(("merged", "gguf:q8_0", "ollama"), base=gemma.base)
    precheck(kinds, base=gemma.base)
    made = {report.kind: report for report in export_all(gemma.request(kinds), log=gemma.log.append)}
    assert {kind: str(report.problem) for kind, report in made.items() if not report.ok} == {}
    return made


@pytest.fixture
def projector(gemma, reports, tmp_path):
    """A copy to damage."""
    return copy_file(gemma.result.path / PROJECTOR, tmp_path)


def copy_file(path, folder):
    shutil.copyfile(path, folder / path.name)
    return folder / path.name


def test_a_gguf_brings_its_projector(gemma):
    assert with_projector(("gguf:q4_k_m",), base=gemma.base) == ("gguf:q4_k_m", "mmproj")
    assert with_projector(("ollama", "merged"), base=gemma.base) == ("merged", "mmproj", "ollama")
    assert with_projector(("gguf:f16", "mmproj:q8_0"), base=gemma.base) == ("gguf:f16", "mmproj:q8_0")
    assert with_projector(("adapter", "merged", "lora_gguf"), base=gemma.base) == ("adapter", "merged", "lora_gguf")


def test_a_model_of_text_has_none(llama, llama_cpp):
    assert with_projector(("gguf:f16", "ollama"), base=llama.base) == ("gguf:f16", "ollama")
    with pytest.raises(ExportError, match="reads no pictures"):
        precheck(("mmproj",), base=llama.base)


def test_what_was_measured(reports):
    checks = reports["mmproj"].checks
    assert reports["mmproj"].path == PROJECTOR
    assert (checks["type"], checks["text_type"]) == ("f16", "bf16")
    assert checks["pictures"] == checks["greedy_equal"] == 3
    assert checks["logits"]["positions"] == 24
    assert checks["logits"]["relative_error"] < 0.01
    assert checks["another_picture"] > 0.5, "else the comparison would say nothing"
    assert checks["worst_weight_error"] < 1e-4 and sum(checks["tensors_by_type"].values()) == 39


def test_ollama_is_given_both_files(gemma, reports):
    text = gemma.result.modelfile.read_text()
    assert text.startswith(f"FROM ./gguf/test-model-Q8_0.gguf\nFROM ./{PROJECTOR}\nREQUIRES 0.30.0\n")
    said = read_modelfile(text)
    assert (said.gguf, said.projector) == ("./gguf/test-model-Q8_0.gguf", f"./{PROJECTOR}")
    assert reports["ollama"].checks["projector"] == f"./{PROJECTOR}"
    assert said.context == 2048, "the language model's, from text_config"


def test_the_hub_and_the_card(gemma, reports):
    uploads = {upload.kind: upload for upload in plan_uploads(gemma.result, tuple(reports.values()), repo="me/x")}
    files = [name for name, _ in uploads["gguf"].files]
    assert uploads["gguf"].repo == "me/x-GGUF"
    assert files == ["Modelfile", "test-model-Q8_0.gguf", "test-model-mmproj-F16.gguf"], files
    more = dataclasses.replace(reports["mmproj"], path="gguf/test-model-mmproj-BF16.gguf")
    lines = _commands((more, *reports.values()), base="BASE")
    assert f"llama-server -m gguf/test-model-Q8_0.gguf --mmproj {PROJECTOR}" in lines


def test_talking_about_a_picture(gemma, reports, tmp_path):
    assert choose_gguf(gemma.result.path).name == "test-model-Q8_0.gguf"
    assert projector_of(gemma.result.path) == gemma.result.path / PROJECTOR
    files = []
    for seed in range(2):
        files.append(tmp_path / f"{seed}.png")
        files[-1].write_bytes(png(make_picture(112, seed=seed)))
    told = [answer(gemma.result.path, ["?"], max_tokens=6, images=(path,)) for path in files]
    assert told[0] != told[1], "the answer follows the picture"
    assert told[0] != answer(gemma.result.path, ["?"], max_tokens=6)
    for wrong, why in ((tmp_path / "none.png", "cannot be read"), (gemma.result.modelfile, "no PNG or JPEG")):
        with pytest.raises(CommandError, match=why):
            answer(gemma.result.path, ["?"], images=(wrong,))


def test_talking_about_a_picture_without_projector(memorised, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png(make_picture(32, seed=0)))
    with pytest.raises(CommandError, match="cannot look at pictures"):
        answer(memorised[0].path, ["?"], images=(path,))


def _tensors(path):
    return {tensor.name: tensor for tensor in edit_gguf(path).tensors}


def zeroed(tensors):
    tensors["v.blk.1.ffn_up.weight"].data[:] = 0


def swapped(tensors):
    one, other = tensors["v.blk.0.attn_q.weight"].data, tensors["v.blk.1.attn_q.weight"].data
    kept = one.copy()
    one[:], other[:] = other, kept


def transposed(tensors):
    data = tensors["v.blk.0.attn_out.weight"].data
    data[:] = data.T.copy()


def a_nan(tensors):
    tensors["mm.soft_emb_norm.weight"].data[3] = float("nan")


def without_gemmas_one(tensors):
    tensors["mm.soft_emb_norm.weight"].data[:] -= 1


@pytest.mark.parametrize("damage", [zeroed, swapped, transposed, a_nan, without_gemmas_one])
def test_a_damaged_tensor_is_found(gemma, projector, damage):
    reader = PictureReader(gemma.result.merged)
    compare_projector(projector, merged=gemma.result.merged, reader=reader)
    damage(_tensors(projector))
    with pytest.raises(ExportError) as error:
        compare_projector(projector, merged=gemma.result.merged, reader=reader)
    assert error.value.code == "projector-weights"


@pytest.mark.parametrize("damage", [swapped, without_gemmas_one])
def test_what_it_sees_is_compared_too(gemma, projector, llama_cpp, damage):
    base = gemma.stage.base_gguf
    arguments = {
        "gguf_type": "f16", "text": base.path, "text_type": base.gguf_type, "tools": llama_cpp,
        "reader": PictureReader(gemma.result.merged),
    }  # fmt: skip
    assert verify_projector(projector, **arguments)["greedy_equal"] == 3
    damage(_tensors(projector))
    with pytest.raises(ExportError) as error:
        verify_projector(projector, **arguments)
    assert error.value.code == "projector-logits"


def test_another_models_projector_is_refused(gemma, reports, llama_cpp, tmp_path):
    """Of the same shapes, so that only its values tell."""
    other = picture_bench("gemma3", tmp_path / "other", seed=1)
    path = tmp_path / "other-mmproj-F16.gguf"
    convert_projector(other.base, path, gguf_type="f16", name="other", tools=llama_cpp)
    with pytest.raises(ExportError) as error:
        compare_projector(path, merged=gemma.result.merged, reader=PictureReader(gemma.result.merged))
    assert error.value.code == "projector-weights"


def test_a_failed_projector_leaves_the_text_and_fails_ollama(gemma, llama_cpp, tmp_path, monkeypatch):
    from dropforge.export import export_projector

    def fail(*_, **__):
        raise ExportError("damaged", code="projector-weights")

    monkeypatch.setattr(export_projector, "compare_projector", fail)
    kinds = ("gguf:q8_0", "mmproj", "ollama")
    made = {
        report.kind: report for report in gemma.export(kinds, result=ResultFolder(tmp_path / "r"), work=tmp_path / "w")
    }
    assert {kind: report.ok for kind, report in made.items()} == {"gguf:q8_0": True, "mmproj": False, "ollama": False}
    assert [path.name for path in (tmp_path / "r" / "gguf").iterdir()] == ["test-model-Q8_0.gguf"]
    assert "no projector" in made["ollama"].problem.what


def test_read_from_disk_as_it_runs_it_sees_the_same(gemma, reports, llama_cpp, monkeypatch):
    base, reader = gemma.stage.base_gguf, PictureReader(gemma.result.merged)
    monkeypatch.setattr(reference, "WHOLE_BYTES", 0)
    checks = verify_projector(
        gemma.result.path / PROJECTOR, gguf_type="f16", text=base.path, text_type="bf16", tools=llama_cpp, reader=reader
    )
    whole = reports["mmproj"].checks["logits"]
    assert checks["logits"]["relative_error"] == pytest.approx(whole["relative_error"], rel=1e-2)


def test_a_folder_in_float16(gemma, llama_cpp, tmp_path):
    """Its norm is summed in float16 by the converter, and nothing else may be lost by that."""
    import torch

    load(gemma.base).to(torch.float16).save_pretrained(tmp_path / "full")
    reports = gemma.export(
        ("merged", "mmproj"), adapter=None, full=tmp_path / "full", result=ResultFolder(tmp_path / "r"),
        work=tmp_path / "w",
    )  # fmt: skip
    assert [str(report.problem) for report in reports if not report.ok] == []
    assert reports[1].checks["text_type"] == "f16" and reports[1].checks["logits"]["relative_error"] < 0.005


@pytest.mark.parametrize("gguf_type", ["f32", "bf16", "q8_0"])
def test_other_types(gemma, reports, gguf_type):
    report = export_one(gemma.stage, f"mmproj:{gguf_type}")
    assert report.ok, report.problem
    assert report.path == f"gguf/test-model-mmproj-{gguf_type.upper()}.gguf"
    (gemma.result.path / report.path).unlink()


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name, llama_cpp, tmp_path):
    bench = picture_bench(name, tmp_path)
    kinds = with_projector(("gguf:bf16",), base=bench.base)
    precheck(kinds, base=bench.base)
    for kind in kinds:
        report = export_one(bench.stage, kind)
        assert report.ok, report.problem
        print(name, kind, report.checks["logits"])
    assert report.checks["another_picture"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", *OTHERS])
def test_errors_of_every_type(name, llama_cpp, tmp_path, record_property):
    bench = picture_bench(name, tmp_path)
    precheck(("gguf:bf16", "mmproj"), base=bench.base)
    for gguf_type in ("f32", "f16", "bf16", "q8_0"):
        report = export_one(bench.stage, f"mmproj:{gguf_type}")
        assert report.ok, report.problem
        record_property("measured", measured(report, pictures=name))
        assert report.checks["another_picture"] > 10 * report.checks["logits"]["relative_error"]


def test_a_family_that_was_not_tried_is_refused_before_the_training(gemma, llama_cpp, tmp_path):
    base = copy(gemma.base, tmp_path / "base")
    vision = {**read_json(base / "config.json")["vision_config"], "model_type": "clip_vision_model"}
    edit_json(base / "config.json", vision_config=vision)
    with pytest.raises(ExportError) as error:
        precheck(("gguf:f16", "mmproj"), base=base)
    problem = error.value.problems[0]
    assert problem.code == "export-unsupported" and "gemma3 with clip_vision_model" in problem.what
    assert "gemma3 with siglip_vision_model" in problem.why


def test_names_that_the_converter_does_not_know_are_refused_before_the_training(gemma, llama_cpp, tmp_path):
    """As transformers 5 writes a model that was never published: without `vision_model.`."""
    base = copy(gemma.base, tmp_path / "base")
    edit_tensors(base, lambda tensors: {name.replace(".vision_model.", "."): value for name, value in tensors.items()})
    precheck(("merged",), base=base)
    with pytest.raises(ExportError, match="has no place in a projector's GGUF"):
        precheck(("mmproj",), base=base)


def test_processor_files_that_are_missing_are_refused_before_the_training(gemma, llama_cpp, tmp_path):
    base = copy(gemma.base, tmp_path / "base")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (base / name).unlink()
    with pytest.raises(ExportError) as error:
        precheck(("mmproj",), base=base)
    assert error.value.code == "export-picture"


def test_every_family_that_is_exported_is_tried_here():
    made = {name.removesuffix("Config") for name in (FAMILIES[name].config for name in ("gemma3", *OTHERS))}
    assert {kind for kind, _ in picture_families.FAMILIES} == {"gemma3", *OTHERS} and len(made) == len(OTHERS) + 1


def test_llava_keeps_its_merged_folder_and_gets_no_gguf(llama_cpp, tmp_path):
    """llama.cpp's converter knows the class, but not its tower (CLIP)."""
    bench = picture_bench(NOT_CONVERTED, tmp_path)
    report = export_one(bench.stage, "merged")
    assert report.ok and report.checks["tensors_for_pictures_unchanged"] == 59, report.problem
    with pytest.raises(ExportError, match="llava with clip_vision_model"):
        precheck(("gguf:f16", "mmproj"), base=bench.base)


def test_pictures_are_what_they_say():
    import numpy as np
    from PIL import Image

    picture = make_picture(60, seed=3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture)
    assert not np.array_equal(picture, make_picture(60, seed=4))
    assert picture.std() > 20


def test_jobs_add_the_projector(gemma):
    from dropforge.job import asked_exports
    from dropforge.spec_check import check

    spec = check(b"version: 1\nname: x\nmodel: x\ndata: x.jsonl\nexport: [gguf:q8_0]\n", filename="x.yaml").resolved
    source = ModelSource(id="x", path=gemma.base, revision=None, kind="folder")
    assert asked_exports(spec, source) == ("adapter", "gguf:q8_0", "mmproj")
