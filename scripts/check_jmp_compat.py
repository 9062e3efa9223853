"""Runs jmp's own tests and dm-haiku's mixed-precision tests with jaxmp in jmp's place.

    pip install jmp==0.0.4 dm-haiku
    python scripts/check_jmp_compat.py [jmp] [dm-haiku]

The tests are read from the installed wheels. Each suite runs in a process of its own in which
`import jmp` gives jaxmp. Prints counts; exits with 1 if a test fails and 2 if a wheel is missing.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys
import types
import unittest

# The test files of each wheel.
SUITES = {
    "jmp": ("jmp/_src/loss_scale_test.py", "jmp/_src/policy_test.py"),
    "dm-haiku": ("haiku/_src/mixed_precision_test.py",),
}


def main(names: list[str]) -> int:
    """Runs the named suites, all by default, and returns the worst exit code."""
    unknown = set(names) - set(SUITES)
    if unknown:
        print(f"There is no suite {' '.join(sorted(unknown))}; there are {' and '.join(SUITES)}.")
        return 2
    missing = [wheel for wheel in SUITES if not _installed(wheel)]
    if missing:
        print(f"This needs {' and '.join(missing)}; try: pip install jmp==0.0.4 dm-haiku")
        return 2
    root = str(pathlib.Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, "--run"]
    environment = {**os.environ, "PYTHONPATH": path}
    codes = [subprocess.call([*command, n], env=environment) for n in names or SUITES]
    return max(map(abs, codes))


def _installed(wheel: str) -> bool:
    try:
        return bool(importlib.metadata.version(wheel))
    except importlib.metadata.PackageNotFoundError:
        return False


def run(wheel: str) -> int:
    """Runs one suite in this process, which has not imported jmp, and returns its exit code."""
    stand_in_for_jmp()
    suite = unittest.TestSuite()
    for i, path in enumerate(SUITES[wheel]):
        module = _load(f"{wheel}_tests_{i}".replace("-", "_"), wheel, path)
        suite.addTests(unittest.defaultTestLoader.loadTestsFromModule(module))
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=0).run(suite)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    counts = f"{result.testsRun} tests, {failed} failed, {len(result.skipped)} skipped"
    print(f"{wheel} {importlib.metadata.version(wheel)}: {counts}", flush=True)
    return int(failed > 0 or result.testsRun == 0)


def stand_in_for_jmp() -> None:
    """Makes `jmp` mean jaxmp, and `jmp._src` the two private modules that its tests import."""
    # A private table of names that policy_test compares `str(policy)` with: jmp's own.
    names = _load("names_of_jmp", "jmp", "jmp/_src/policy.py").dtype_to_names

    import jaxmp

    public = {name: value for name, value in vars(jaxmp).items() if not name.startswith("_")}
    loss_scale = types.ModuleType("jmp._src.loss_scale")
    policy = types.ModuleType("jmp._src.policy")
    package = types.ModuleType("jmp._src")
    vars(loss_scale).update(public)
    vars(policy).update(public, dtype_to_names=names)
    vars(package).update(loss_scale=loss_scale, policy=policy)
    sys.modules["jmp"] = jaxmp
    sys.modules |= {module.__name__: module for module in (package, loss_scale, policy)}


def _load(name: str, wheel: str, path: str) -> types.ModuleType:
    """A file of an installed wheel as a module of another name; its package is not imported."""
    file = importlib.metadata.distribution(wheel).locate_file(path)
    spec = importlib.util.spec_from_file_location(name, str(file))
    if spec is None or spec.loader is None or not pathlib.Path(str(file)).exists():
        sys.exit(f"The installed {wheel} has no {path}; try jmp==0.0.4 dm-haiku==0.0.17.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(run(arguments[1]) if arguments[:1] == ["--run"] else main(arguments))
