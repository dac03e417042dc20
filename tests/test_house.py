"""The layout and the import rules of the house: imports go down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fusedllm"

# Room -> rooms it may import. Files directly in the package are rooms of their own.
GROUND = {"config", "errors", "qarray"}
MAY_IMPORT = {
    "config": {"errors"},
    "errors": set(),
    "qarray": set(),
    "text": GROUND,
    "kernels": GROUND,
    "quant": GROUND | {"kernels"},
    "model": GROUND | {"kernels", "quant"},
    "sharding": GROUND | {"kernels", "quant", "model"},
    "weights": GROUND | {"kernels", "quant", "text", "model", "sharding"},
    "partition": GROUND | {"kernels", "quant", "text", "model", "sharding", "weights"},
    "calibrate": GROUND | {"kernels", "quant", "text", "model", "weights"},
    "engine": GROUND | {"kernels", "quant", "text", "model", "sharding", "weights", "partition", "calibrate"},
}
BELOW_THE_FACADE = {*MAY_IMPORT, "backend", "compilation_cache", "prompts"}
MAY_IMPORT["prompts"] = {"errors"}
MAY_IMPORT["backend"] = GROUND | {"kernels"}
MAY_IMPORT["compilation_cache"] = {"weights"}
MAY_IMPORT["stream"] = BELOW_THE_FACADE
MAY_IMPORT["llm"] = BELOW_THE_FACADE | {"stream"}
MAY_IMPORT["quantizing"] = BELOW_THE_FACADE
MAY_IMPORT["sizing"] = BELOW_THE_FACADE
# What a server says of itself, and what a client makes of it. A client needs no model, and must not load one.
MAY_IMPORT["attesting"] = {"__init__", "errors", "partition", "weights"}
MAY_IMPORT["verifying"] = {"errors", "partition"}
MAY_IMPORT["__init__"] = BELOW_THE_FACADE | {"llm", "quantizing"}
FACES = GROUND | {"__init__", "compilation_cache", "llm", "stream", "quantizing", "engine", "weights"}
MAY_IMPORT["cli"] = FACES | {"calibrate", "sharding", "sizing", "serve", "attesting", "verifying"}
MAY_IMPORT["serve"] = FACES | {"text", "attesting"}
MAY_IMPORT["__main__"] = {"cli"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Every module of the package that the file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            found.add(node.module)
            if node.module == "fusedllm":
                found |= {f"fusedllm.{alias.name}" for alias in node.names}
    return {name for name in found if name == "fusedllm" or name.startswith("fusedllm.")}


def room_of_module(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 1 or not any((PACKAGE / f"{parts[1]}{suffix}").exists() for suffix in ("", ".py")):
        return "__init__"
    return parts[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"the room {room} has no place in the house yet: add it to the table"
    for name in imported_modules(path):
        target = room_of_module(name)
        assert target == room or target in MAY_IMPORT[room], f"{path.name} in {room} imports {name}"


def test_the_rule_would_catch_a_kernel_that_knows_the_model(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def late():\n    from fusedllm.model.params import Params\n")
    (name,) = imported_modules(wrong)
    assert room_of_module(name) not in MAY_IMPORT["kernels"]


def test_only_the_runner_launches_programs():
    compiling = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if room_of(path) == "engine" and "jax.jit" in path.read_text()
    }
    assert compiling == {"engine/runner.py"}


def test_no_file_grows_into_a_warehouse():
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert max(lengths.values()) <= 400, max(lengths, key=lambda name: lengths[name])


def test_every_file_says_its_purpose_first():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@pytest.mark.parametrize(
    "statement",
    [
        "import fusedllm",
        "import fusedllm.cli.main",
        "import fusedllm.config",
        "import fusedllm.serve",
        "import fusedllm.attesting",
        "import fusedllm.verifying",
    ],
)
def test_importing_loads_no_jax(statement):
    code = f"{statement}\nimport sys\nassert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names_exist():
    import fusedllm

    for name in fusedllm.__all__:
        assert getattr(fusedllm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fusedllm.nonsense
