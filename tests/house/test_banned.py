"""STYLE.md rules 3, 4, 7, 10: what must not stand in the source."""

from __future__ import annotations

import ast

import pytest

BANNED_CALLS = {"exec", "eval", "compile", "getsource", "getsourcelines", "reload"}
# Writers of the environment of this process or a child's, and readers that pass it on whole. Configuration is read
# in settings.py alone.
MAY_TOUCH_ENVIRONMENT = {
    "appliance/dropforge/settings.py",
    "appliance/dropforge/daemon/runner.py",  # limits a job to its GPUs before CUDA starts
    "appliance/dropforge/llama_cpp/child.py",  # hands it on to llama.cpp's programs, less LLAMA_*, more offline
    "appliance/dropforge/data/worker.py",  # a data worker tells its tokenizer not to start threads
    "kernels/dropforge_kernels/dispatch.py",  # asks whether Triton's interpreter is on
}


def called_name(node: ast.Call) -> str:
    function = node.func
    return (
        function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    )


def test_no_source_rewriting(sources):
    found = [
        f"{source.name}:{node.lineno} {called_name(node)}"
        for source in sources
        if "/patch/" not in source.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and called_name(node) in BANNED_CALLS
        and ast.unparse(node.func) not in {"re.compile", "torch.compile"}
        and not (called_name(node) == "eval" and isinstance(node.func, ast.Attribute))  # model.eval()
    ]
    assert found == []


def test_no_bare_except(sources):
    found = [
        f"{source.name}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert found == []


def test_no_attribute_probing(sources):
    found = [
        f"{source.name}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and called_name(node) == "hasattr"
    ]
    assert found == []


def test_environment_is_read_in_one_place(sources):
    found = {
        source.name
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
    }
    assert found - MAY_TOUCH_ENVIRONMENT == set()


def test_kernels_do_not_know_the_appliance(sources):
    found = [
        f"{source.name}:{node.lineno}"
        for source in sources
        if source.module.startswith("dropforge_kernels")
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dropforge")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "dropforge" for alias in node.names))
    ]
    assert found == []


def test_source_roots_are_not_packages(sources):
    for source in sources:
        root = source.path.parents[len(source.module.split(".")) - (source.path.name != "__init__.py")]
        assert not (root / "__init__.py").exists() or root.name not in {"kernels", "appliance", "docker"}


@pytest.mark.parametrize("text", ["pythonhosted", "index-url", "npmjs", "/root/", "extra-index"])
def test_no_index_address_or_machine_path_in_locks(text):
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    locks = [*root.glob("docker/*.lock"), *root.glob("docker/*.in"), root / "pyproject.toml"]
    assert len(locks) >= 3
    assert [path.name for path in locks if text in path.read_text(encoding="utf-8")] == []
