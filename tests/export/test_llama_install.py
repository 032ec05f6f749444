"""What a finished build of llama.cpp leaves behind: the tools, the libraries they load, the converter."""

from __future__ import annotations

from pathlib import Path

from dropforge.llama_cpp.build import _install, complete
from dropforge.llama_cpp.release import CONVERTER_PARTS, TARGETS


def test_libraries_lie_beside_the_tools_and_versions_stay_links(tmp_path: Path) -> None:
    """The GPU images' build has CUDA in a library that the tools look for in their own folder."""
    source, built, target = tmp_path / "source", tmp_path / "built", tmp_path / "target"
    for name in CONVERTER_PARTS:
        (source / name).mkdir(parents=True)
    built.mkdir()
    for name in (*TARGETS, "llama-bench", "libggml-cuda.so.0.1"):
        (built / name).write_bytes(b"x" * 1000)
        (built / name).chmod(0o755)
    (built / "libggml-cuda.so").symlink_to("libggml-cuda.so.0.1")
    _install(source, built, target, scratch=tmp_path / "scratch")
    assert complete(target)
    assert {path.name for path in (target / "bin").iterdir()} == {*TARGETS, "libggml-cuda.so", "libggml-cuda.so.0.1"}
    assert (target / "bin" / "libggml-cuda.so").is_symlink()
