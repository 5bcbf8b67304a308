"""Imports run one way, and importing the library brings in nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import memmeta

ROOT = Path(memmeta.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
SERVICE = ROOT.parent / "workers" / "memmeta_workers"

# From the bottom up: a module imports from rows above its own in this table, never from its own row or below.
LAYERS = (
    ("clock", "closures", "errors", "randomness", "memory", "task", "flat", "inductor", "modes"),
    ("attention", "weight_norm", "trees", "report", "fixed_point", "raw", "schedules", "programs", "remat"),
    ("capture", "costs", "microbatch", "padding", "per_step_norm", "places", "pooling", "solvers", "stops"),
    ("double_backward", "dual", "optimizers", "problem"),
    ("steps",),
    ("rollout",),
    ("storage", "whole"),
    ("adjoints",),
    ("stacking",),
    ("adapt", "episode", "metabatch"),
    ("l2l", "learner", "online"),
    ("candidates", "probing"),
    ("search",),
    ("planner",),
    ("algorithms",),
    ("testing",),
)
ALLOWED = {"torch", "numpy", "checkpoint_schedules", *sys.stdlib_module_names}


def part(path: Path) -> str:
    """The module or subpackage of memmeta that a file belongs to."""
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """What a file imports, as absolute names, and whether it does so as soon as it is imported itself."""
    tree = ast.parse((ROOT / path).read_text())
    package = ["memmeta", *path.parts[:-1]]
    at_once = {id(node) for node in _run_on_import(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield (f"{target}.{alias.name}" if node.module is None else target), id(node) in at_once


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        never = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
        if not later and not never:
            yield from _run_on_import(child)


def inside(path: Path) -> set[str]:
    """The modules and subpackages of memmeta that a file imports from."""
    return {name.split(".")[1] for name, _ in imports(path) if name.startswith("memmeta.")}


def test_the_table_has_every_module_once() -> None:
    known = [name for row in LAYERS for name in row]
    assert len(known) == len(set(known))
    assert {*known, "tasks", "__init__"} == {part(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_imports_from_a_higher_layer(path: Path) -> None:
    own = part(path)
    if own == "__init__":
        return
    if own == "tasks":
        assert inside(path) <= {"errors", "task", "tasks"}
        return
    height = next(index for index, row in enumerate(LAYERS) if own in row)
    lower = {name for row in LAYERS[:height] for name in row}
    assert inside(path) <= {*lower, own}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_imports_the_service_or_ray(path: Path) -> None:
    roots = {name.split(".")[0] for name, _ in imports(path)}
    assert not roots & {"memmeta_workers", "ray", "jsonargparse", "rich", "tensorboard", "safetensors"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_what_is_imported_at_once_is_what_the_package_depends_on(path: Path) -> None:
    roots = {name.split(".")[0] for name, at_once in imports(path) if at_once}
    assert roots <= {"memmeta", *ALLOWED}


def test_the_parser_sees_what_it_has_to() -> None:
    """The tests above would pass if it saw nothing."""
    assert {"adapt", "adjoints", "episode", "trees", "task"} <= inside(Path("learner.py"))
    assert {"trees", "rollout", "optimizers"} <= inside(Path("adjoints/walk.py"))
    assert ("torch", True) in list(imports(Path("trees.py")))
    assert ("resource", False) in list(imports(Path("memory.py")))


def test_the_service_uses_the_librarys_public_modules() -> None:
    if not SERVICE.is_dir():
        pytest.skip("the service's sources are not beside the library's")
    for path in sorted(SERVICE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "memmeta":
                assert not any(alias.name.startswith("_") for alias in node.names), path


def test_importing_the_library_leaves_heavy_packages_out() -> None:
    heavy = ("ray", "matplotlib", "learn2learn", "jsonargparse", "rich", "tensorboard", "safetensors", "PIL", "gym")
    code = f"import sys, memmeta; print(sorted(set({heavy!r}) & set(sys.modules)), 'memmeta_workers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split("\n")[0] == "[] False"
    assert done.stderr == ""


def test_public_names_are_there() -> None:
    names = {name for name in vars(memmeta) if not name.startswith("_")}
    assert {
        *("Adam", "AdamW", "Adapted", "AdaptedModel", "Address", "Adjoint", "CaptureError", "FirstOrder"),
        *("InnerOptimizer", "InputError", "MemmetaError", "MetaGradient", "MetaLearner", "NonFiniteError", "Problem"),
        *("RMSprop", "ReplayError", "Report", "SGD", "Solution", "Stepwise", "Supervised", "Task", "TaskScore"),
        *("TaskSource", "UnsupportedError", "Unrolled", "accuracy", "adapt", "maml", "memory", "tasks"),
        *("CG", "ConvergenceError", "Implicit", "Neumann", "Reversible", "Solver", "imaml"),
        *("Forward", "Online", "OnlineReport", "hypergradient_descent"),
        *("Candidate", "Infeasible", "Plan", "plan"),
        *("anil", "cavia", "fomaml", "maml_plus_plus", "meta_sgd", "reptile", "Displacement", "from_forward", "l2l"),
        *("Annealing", "Ensemble", "PerStepBatchNorm", "cosine_by_epoch", "inner_step", "multi_step_weights"),
        "update_statistics",
    } <= names
