"""Finding, pinning, building and running llama.cpp's tools."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from dropforge.errors import EnvironmentFault, ExportError
from dropforge.llama_cpp import release
from dropforge.llama_cpp.build import build, complete, usable_jobs
from dropforge.llama_cpp.child import run_tool, tail
from dropforge.llama_cpp.convert import convert
from dropforge.llama_cpp.locate import LlamaCpp, find_llama_cpp
from dropforge.llama_cpp.pre_tokenizer import recognise
from dropforge.llama_cpp.server import LlamaServer
from dropforge.llama_cpp.source import check_hash, unpacked_source
from dropforge.settings import settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fresh_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("DROPFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DROPFORGE_LLAMA_CPP", raising=False)
    settings.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    settings.cache_clear()


def test_the_lock_names_the_same_archive():
    lock = (ROOT / "docker" / "llama.lock").read_text().split()
    assert lock == [f"{release.SDIST}=={release.SDIST_VERSION}", f"--hash=sha256:{release.SDIST_SHA256}"]


def test_the_build_lock_holds_hashes_only():
    lines = (ROOT / "docker" / "build.lock").read_text().splitlines()
    assert [line.split("==")[0] for line in lines] == ["cmake", "ninja"]
    assert all(line.count("--hash=sha256:") == 2 and "http" not in line for line in lines)


def test_missing_tools_say_what_to_do(fresh_settings):
    with pytest.raises(EnvironmentFault) as error:
        find_llama_cpp()
    assert error.value.code == "tool-missing"
    assert "make llama" in error.value.problems[0].fix
    assert release.COMMIT[:12] in error.value.problems[0].where


def test_a_folder_without_the_tool_says_which(tmp_path):
    (tmp_path / "bin").mkdir()
    for ask in (lambda: LlamaCpp(tmp_path).tool("llama-server"), lambda: LlamaCpp(tmp_path).converter):
        with pytest.raises(EnvironmentFault) as error:
            ask()
        assert error.value.code == "tool-missing"


def test_the_setting_is_the_only_place_when_given(fresh_settings, tmp_path):
    (tmp_path / "mine" / "bin").mkdir(parents=True)
    fresh_settings.setenv("DROPFORGE_LLAMA_CPP", str(tmp_path / "mine"))
    settings.cache_clear()
    assert find_llama_cpp().root == tmp_path / "mine"


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_another_archive_is_refused_before_unpacking(tmp_path):
    sdist = archive(tmp_path / "x.tar.gz", {f"{release.SOURCE_IN_SDIST}CMakeLists.txt": "project(x)"})
    with pytest.raises(EnvironmentFault) as error:
        unpacked_source(tmp_path, sdist=sdist, log=print)
    assert error.value.code == "llama-hash"
    assert not (tmp_path / "source").exists()


def test_only_llama_cpp_is_unpacked(tmp_path, monkeypatch):
    sdist = archive(
        tmp_path / "x.tar.gz",
        {f"{release.SOURCE_IN_SDIST}CMakeLists.txt": "project(x)", "llama_cpp_python-0.3.36/setup.py": "evil()"},
    )
    from dropforge.files import sha256_file
    from dropforge.llama_cpp import source

    monkeypatch.setattr(source, "SDIST_SHA256", sha256_file(sdist))
    check_hash(sdist)
    folder = unpacked_source(tmp_path, sdist=sdist, log=print)
    assert [path.name for path in folder.iterdir()] == ["CMakeLists.txt"]


def test_a_failing_build_says_why_and_leaves_nothing_final(tmp_path):
    """CMake runs for real, on a source that is none."""
    target = tmp_path / "llama"
    source = tmp_path / ".llama.building" / "source"
    source.mkdir(parents=True)
    (source / "CMakeLists.txt").write_text('message(FATAL_ERROR "no compiler here")')
    with pytest.raises(EnvironmentFault) as error:
        build(target, jobs=1, log=lambda line: None)
    assert error.value.code == "llama-build"
    assert "no compiler here" in error.value.problems[0].why
    assert not target.exists()


def test_a_finished_build_is_not_built_again(llama_cpp):
    """The tests' own tools are a whole build, and `build` leaves such a folder alone."""
    assert complete(llama_cpp.root)
    lines: list[str] = []
    assert build(llama_cpp.root, jobs=1, log=lines.append).root == llama_cpp.root
    assert lines == [f"llama.cpp {release.COMMIT[:9]} is built: {llama_cpp.root}"]


@pytest.mark.parametrize(("cores", "gib", "jobs"), [(64, 256, 64), (64, 24, 24), (2, 24, 2), (8, 0.5, 1)])
def test_no_more_compilers_than_the_memory_holds(tmp_path, monkeypatch, cores, gib, jobs):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal:  999999999 kB\nMemAvailable:   {int(gib * 2**20)} kB\nBuffers: 1 kB\n")
    monkeypatch.setattr("dropforge.llama_cpp.build.MEMINFO", meminfo)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert usable_jobs() == jobs


def test_tool_output_is_in_the_error():
    with pytest.raises(ExportError) as error:
        run_tool(["sh", "-c", "echo first; echo the reason >&2; exit 3"], what="it broke", code="x-y")
    assert "exit status 3" in error.value.problems[0].why
    assert "the reason" in error.value.problems[0].why


def test_tail_is_short():
    assert tail("\n".join(str(i) for i in range(100))).splitlines() == [str(i) for i in range(88, 100)]


def test_pre_tokenizers_by_definition(llama, qwen):
    definition = json.loads((qwen.base / "tokenizer.json").read_text())
    assert recognise(definition) == "qwen2"
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    assert recognise(definition) is None
    assert recognise(json.loads((llama.base / "tokenizer.json").read_text())) is None
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert recognise({"model": {"type": "BPE"}, "pre_tokenizer": byte_level}) == "gpt-2"


def test_an_unknown_pre_tokenizer_stops_the_conversion(qwen, llama_cpp, tmp_path):
    """Better no file than one that cuts text in another way."""
    from export_harness import copy

    folder = copy(qwen.base, tmp_path / "model")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ExportError) as error:
        convert(folder, tmp_path / "x.gguf", gguf_type="f16", name="x", tools=llama_cpp)
    assert error.value.code == "export-convert"
    assert "BPE pre-tokenizer was not recognized" in error.value.problems[0].why


@pytest.mark.slow
def test_an_unknown_architecture_stops_the_conversion(qwen, llama_cpp, tmp_path):
    from export_harness import copy, edit_json

    folder = copy(qwen.base, tmp_path / "model")
    edit_json(folder / "config.json", architectures=["NobodyForCausalLM"])
    with pytest.raises(ExportError) as error:
        convert(folder, tmp_path / "x.gguf", gguf_type="f16", name="x", tools=llama_cpp)
    assert "NobodyForCausalLM" in error.value.problems[0].why


def test_a_file_that_is_no_gguf_does_not_load(llama_cpp, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(ExportError) as error, LlamaServer(tmp_path / "x.gguf", tools=llama_cpp):
        pytest.fail("it loaded")
    assert error.value.code == "gguf-load"


def test_the_server_is_gone_after_the_block(llama, llama_cpp):
    import psutil

    path = llama.stage.base_gguf.path
    with LlamaServer(path, tools=llama_cpp, context=256) as server:
        assert server.tokenize("a", add_special=False)
        children = [p for p in psutil.Process().children() if p.name().startswith("llama-server")]
        assert len(children) == 1
        sockets = Path(server.socket)
        assert sockets.exists()
    assert not sockets.parent.exists()
    assert not children[0].is_running()
