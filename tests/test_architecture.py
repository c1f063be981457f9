"""The rules of the house that a reader cannot see in one file: who imports whom, what is documented, what is not here."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL_FILES = {
    f"bm_jax.{name}"
    for name in ("shapes", "initialization", "layers", "mamba", "attention", "routing", "moe", "cache", "model", "sharding",
                 "sequence_parallel", "experts", "expert_exchange", "expert_parallel", "decode_step", "quantize")
}  # fmt: skip


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path
    for folder in ("bm_jax", "pallas_kernels", "configs", "convert")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
SCRIPTS = {
    module_name(path): path
    for path in [ROOT / "train.py", *sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "experiments").rglob("*.py"))]
}


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def imports(path, *, at_import_time=False):
    """Names of the modules a file imports, `from a import b` counting as both a and a.b."""
    nodes = tree(path).body if at_import_time else ast.walk(tree(path))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name, *packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "pallas_kernels")])
def test_kernels_depend_on_jax_alone(name):
    for imported in imports(SOURCES[name]):
        top = imported.split(".")[0]
        assert top in {"jax", "jaxlib", "numpy", "pallas_kernels", "jax_triton", "triton"} | set(sys.stdlib_module_names), (
            imported
        )


@pytest.mark.parametrize("name", sorted(MODEL_FILES))
def test_model_files_see_only_what_lies_below(name):
    for imported in imports(SOURCES[name]):
        if within(imported, "bm_jax", "configs", "convert", "train", "tests", "benchmarks"):
            assert within(imported, "bm_jax.config", *MODEL_FILES), imported
        assert not within(imported, "optax", "orbax", "grain", "tyro"), imported


def test_configuration_needs_no_jax():
    for imported in imports(SOURCES["bm_jax.config"]):
        assert imported.split(".")[0] in sys.stdlib_module_names, imported


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "configs")])
def test_presets_see_only_the_configuration(name):
    for imported in imports(SOURCES[name]):
        allowed = within(imported, "bm_jax.config", "configs") or imported.split(".")[0] in sys.stdlib_module_names
        assert allowed, imported


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "convert")])
def test_converters_see_only_what_a_model_directory_is(name):
    files = ("leaves", "parameter_folder", "sealed_folder", "tensor_file")
    allowed = ("config", *files, "checkpoint", "model", "model_directory", "sharding", "data.tokenizer", "data.errors")
    for imported in imports(SOURCES[name]):
        if within(imported, "bm_jax"):
            assert within(imported, *(f"bm_jax.{module}" for module in allowed)), imported
    at_import_time = {imported.split(".")[0] for imported in imports(SOURCES[name], at_import_time=True)}
    assert not at_import_time & {"torch", "transformers"}


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_imports_the_script_or_the_tests(name):
    for imported in imports(SOURCES[name]):
        assert not within(imported, "train", "tests", "benchmarks", "experiments"), imported
        assert not within(imported, "convert") or within(name, "convert"), imported


@pytest.mark.parametrize("name", [*SOURCES, *SCRIPTS])
def test_no_nnx(name):
    path = (SOURCES | SCRIPTS)[name]
    assert not any(within(imported, "flax.nnx", "flax.experimental") for imported in imports(path))
    assert not re.search(r"\bnnx\b", path.read_text())


@pytest.mark.parametrize("name", SOURCES)
def test_public_names_are_documented(name):
    module = tree(SOURCES[name])
    missing = [] if ast.get_docstring(module) or not module.body else ["the module"]
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            public = not node.name.startswith("_") and node.name != "main"  # the module says what its main does
            if public and not ast.get_docstring(node):
                missing.append(node.name)
    assert not missing


@functools.cache
def tracked_text():
    """Every text file under version control, by path."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in path.read_bytes()[:4096]:
            files[name] = path.read_text(errors="replace")
    return files


# In pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile(
    "(?<![\\w.~-])/(?:" + "|".join(["home/", "root/", "Users/", "work/", "opt/", "mnt/", "tm" + "p/"]) + ")\\w"
)


def test_no_machine_paths():
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_text().items()
        if name != "tests/test_architecture.py"
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found


def test_the_search_for_machine_paths_finds_them():
    for text in ("see /home/someone/x", "'/root/x'", '"/tm' + 'p/run"', "(/mnt/disk)"):
        assert MACHINE_PATHS.search(text), text
    for text in ("https://host/home/x", "runs/default", "a/root/b", "and/or", "/temporary"):
        assert not MACHINE_PATHS.search(text), text


def test_nothing_is_left_to_do():
    words = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]) + r")\b")
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in tracked_text().items()
        if name.endswith((".py", ".md", ".toml"))
        for number, line in enumerate(text.splitlines(), 1)
        if words.search(line)
    ]
    assert not found
