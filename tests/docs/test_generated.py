"""The generated pages equal what the code says, and what must be documented is."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from dropforge.schema import SCHEMA_FILE, spec_schema_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_generate"] = module
    spec.loader.exec_module(module)
    return module


def test_every_generated_page_is_current(generate):
    stale = [name for name, page in generate.PAGES.items() if (ROOT / name).read_text(encoding="utf-8") != page()]
    assert stale == [], "run `make docs`"


def test_the_checked_in_schema_is_current():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == spec_schema_text(), "run `make docs`"


def test_every_field_of_the_spec_says_what_it_means():
    schema = json.loads(spec_schema_text())
    sections = {"Spec": schema, **schema["$defs"]}
    silent = [
        f"{name}.{field}" for name, section in sections.items()
        for field, value in section.get("properties", {}).items() if not value.get("description")
    ]  # fmt: skip
    assert silent == []


def test_every_setting_is_documented():
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    source = (ROOT / "appliance" / "dropforge" / "settings.py").read_text(encoding="utf-8")
    for name in set(re.findall(r'"(DROPFORGE_[A-Z_]+)"', source)):
        assert f"`{name}`" in page, name


def test_every_link_leads_somewhere():
    broken = []
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert broken == []


def test_every_example_spec_and_every_spec_in_the_docs_is_valid():
    from dropforge.spec_check import check

    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ROOT.glob("examples/**/*.y*ml")}
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for number, block in enumerate(
            re.findall(r"```yaml\n(version: 1.*?)```", page.read_text(encoding="utf-8"), re.S)
        ):
            texts[f"{page.name} block {number}"] = block
    assert len(texts) >= 3
    for name, text in texts.items():
        assert check(text.encode(), filename="job.yaml").spec.export, name


def test_the_schema_accepts_what_the_model_accepts_and_refuses_typos():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(spec_schema_text())
    good = {"version": 1, "name": "x", "model": "a/b", "data": "t.jsonl", "export": ["merged"]}
    jsonschema.validate(good, schema)
    jsonschema.validate({**good, "model": {"id": "a/b"}, "data": {"train": ["a.jsonl", {"path": "b"}]}}, schema)
    for bad in (
        {**good, "modle": "x"},
        {**good, "train": {"learning_rte": 1}},
        {k: v for k, v in good.items() if k != "export"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
