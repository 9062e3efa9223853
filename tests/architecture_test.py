"""The house stands: imports go down only, files are short, importing is cheap and starts nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = {
    "numerics": 0,
    "precision": 1,
    "optim": 2,
    "nn": 2,
    "diagnose": 2,
    "plan": 2,
    "training": 3,
    "run": 4,
}
SOURCES = sorted((ROOT / "jaxmp").rglob("*.py"))


def _imports(path: pathlib.Path) -> set[str]:
    """The dotted modules and names that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which floor it reaches"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_lower_floors_or_its_own_folder(path):
    folder = path.relative_to(ROOT / "jaxmp").parts[0]
    if folder == "__init__.py":
        return
    for name in _imports(path):
        parts = name.split(".")
        assert parts[:2] != ["jax", "_src"], f"{name} is private"
        if parts[0] == "jaxmp":
            assert len(parts) > 1, f"{path}: import the folder's module, not the package"
            other = parts[1]
            assert other == folder or FLOORS[other] < FLOORS[folder], f"{folder} imports {name}"


def test_every_folder_has_a_floor():
    folders = {
        p.parent.relative_to(ROOT / "jaxmp").parts[0] for p in SOURCES if p.parent.name != "jaxmp"
    }
    assert folders <= set(FLOORS), folders - set(FLOORS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_short_says_what_it_is_for_and_holds_short_functions(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(tree), "the first line says what the file is for"
    assert path.stem not in {"utils", "misc", "common", "helpers", "types"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            docstring = ast.get_docstring(node, clean=False) or ""
            assert length - docstring.count("\n") <= 90, f"{node.name} has {length} lines"


def test_tests_mirror_the_package():
    for path in (ROOT / "tests").rglob("*_test.py"):
        folder = path.relative_to(ROOT / "tests").parts[0]
        assert folder.endswith("_test.py") or folder in FLOORS or folder == "scripts", path


def test_importing_starts_no_backend_and_pulls_in_nothing_heavy():
    program = """
import sys, jax
jax.config.update("jax_platforms", "a platform that does not exist")
import jaxmp
heavy = ["matplotlib", "orbax", "grain", "flax.nnx", "sklearn", "tyro", "tensorstore"]
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_costs_little_beyond_jax_flax_optax_and_chex():
    program = """
import time
import jax, flax, optax, chex
start = time.process_time()  # a busy machine does not count
import jaxmp
print(time.process_time() - start)
"""
    runs = [
        float(
            subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
        )
        for _ in range(3)
    ]
    assert min(runs) < 0.3, runs
