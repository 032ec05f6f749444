"""What of the training data reaches the exports, and the licence they carry."""

from __future__ import annotations

import pytest
from dropforge.export.base_license import license_of, origin
from dropforge.export.modelfile import Modelfile, read_modelfile, write_modelfile
from dropforge.export.samples import ROWS, TOKENS, TrainingRow, read_samples, write_samples
from dropforge.export.stage import SAMPLE_TOKENS, SAMPLES, Stage


def test_rows_come_back_with_their_prompts(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
        {"input_ids": [3], "labels": [-100]},
    ]
    write_samples(rows, tmp_path)
    assert read_samples(tmp_path) == (
        TrainingRow(ids=(5, 6, 7), prompt=2), TrainingRow(ids=(8, 9), prompt=0), TrainingRow(ids=(3,), prompt=1),
    )  # fmt: skip


def test_large_sets_are_cut(tmp_path):
    write_samples(({"input_ids": [1], "labels": [1]} for _ in range(ROWS + 9)), tmp_path)
    assert len(read_samples(tmp_path)) == ROWS
    long = {"input_ids": [1] * (TOKENS // 3), "labels": [1] * (TOKENS // 3)}
    write_samples([long] * 9, tmp_path)
    assert len(read_samples(tmp_path)) == 3
    write_samples([{"input_ids": [1] * (TOKENS + 1), "labels": [1] * (TOKENS + 1)}], tmp_path)
    assert len(read_samples(tmp_path)) == 1, "one long document is better than nothing"


def test_weights_of_an_earlier_release_have_none(tmp_path):
    assert read_samples(tmp_path) == ()


def test_prompts_of_the_data_are_asked(llama, tmp_path):
    rows = (
        TrainingRow(ids=(5, 6, 7, 8), prompt=0), TrainingRow(ids=(9, 8, 7), prompt=2),
        TrainingRow(ids=(9, 8, 6), prompt=2), TrainingRow(ids=(4,) * 999, prompt=900),
    )  # fmt: skip
    plain = Stage(llama.request((), work=tmp_path / "a"), log=print).prompts()
    asked = Stage(llama.request((), work=tmp_path / "b", samples=rows), log=print).prompts()
    assert asked[: len(plain)] == plain
    assert asked[len(plain) :] == [[9, 8], [4] * SAMPLE_TOKENS]
    assert len(asked) == len(plain) + SAMPLES


README = "---\ntags: [x]\nlicense: {license}\n---\nlicense: not this\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ""),
        ({"README.md": "no header"}, ""),
        ({"README.md": README.format(license="apache-2.0")}, "apache-2.0"),
        ({"README.md": README.format(license='"other"\nlicense_name: llama3')}, "llama3"),
        ({"README.md": README.format(license="mit"), "LICENSE.txt": "The\tterms\r\n\f\nnext"}, "The terms\n\nnext"),
    ],
)
def test_the_licence_of_the_base(files, expected, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text, newline="")
    assert license_of(tmp_path) == expected
    text, said = write_modelfile(Modelfile(gguf="./x.gguf", license=license_of(tmp_path)))
    assert said.left_out == () and read_modelfile(text).license == expected


def test_a_builtin_model_has_one(llama):
    assert license_of(llama.base) == "apache-2.0"


def test_the_origin_that_a_gguf_names(tmp_path):
    """The licence's name, not its text; an address only for a model of the hub."""
    (tmp_path / "LICENSE").write_text("A long text.")
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\n---\n")
    assert origin("org/Model-8B", base=tmp_path) == {
        "general.base_model.count": 1, "general.base_model.0.name": "Model-8B", "general.license": "llama3.1",
        "general.base_model.0.organization": "org", "general.base_model.0.repo_url": "https://huggingface.co/org/Model-8B",
    }  # fmt: skip
    (tmp_path / "README.md").unlink()
    assert origin("my-model", base=tmp_path) == {"general.base_model.count": 1, "general.base_model.0.name": "my-model"}
