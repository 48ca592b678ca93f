"""The one-way import rule, and what importing the library may cost."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "jaxtransfer"

# A part may import parts of a lower rank, and of its own rank as long as there is no
# cycle. The parts in ONLY have a list of their own instead.
RANK = {
    "typing": 0,
    "ops": 1,
    "tree": 1,
    "prng": 1,
    "losses": 2,
    "scores": 2,
    "model": 3,
    "nets": 4,
    "pretrained": 4,
    "train": 5,
    "methods": 6,
    "compress": 6,
}
ONLY = {
    "parallel": {"typing", "processes"},
    "processes": set(),
    "data": {"typing", "ops", "tree", "prng"},
}
PARTS = set(RANK) | set(ONLY)
ORBAX_HOME = "jaxtransfer.train.checkpoint"
# Imported inside the function that needs them, never by importing the library.
LAZY = {
    "flatbuffers",
    "h5py",
    "matplotlib",
    "qwix",
    "safetensors",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "torch",
    "tyro",
}


def modules() -> dict[str, str]:
    """Source by module name; a package under its own name with ``.__init__``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def imported_names(module: str, source: str, *, lazy: bool = True) -> set[str]:
    """Absolute dotted names that a source imports; ``lazy``: in functions as well."""
    names = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join(parents + ([base] if base else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if lazy or not is_function:
            pending.extend(ast.iter_child_nodes(node))
    return names


def part_of(name: str) -> str:
    """The part of the library a dotted name lies in; ``""`` for the root itself."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] != "__init__" else ""


def violations(module: str, source: str) -> list[str]:
    """What a module imports against the rule, in words."""
    found = []
    part = part_of(module)
    for name in sorted(imported_names(module, source)):
        root = name.split(".")[0]
        if root in ("experiments", "benchmarks", "tests"):
            found.append(f"{module} imports {name}: the library knows no {root}")
        if root == "orbax" and module != ORBAX_HOME:
            found.append(f"{module} imports {name}: only {ORBAX_HOME} may")
        if root != PACKAGE or not part:  # the root module exports everything
            continue
        other = part_of(name)
        if other not in PARTS:
            found.append(f"{module} imports {name}: name the part it comes from")
        elif other == part:
            if part == "methods" and _crosses_methods(module, name):
                found.append(f"{module} imports {name}: no method imports another")
        elif part in ONLY:
            if other not in ONLY[part]:
                found.append(f"{module} imports {name}: {part} knows {ONLY[part]} only")
        elif other in RANK and RANK[other] > RANK.get(part, -1):
            found.append(f"{module} imports {name}: {part} lies below {other}")
    for name in sorted(imported_names(module, source, lazy=False)):
        if name.split(".")[0] in LAZY:
            found.append(f"{module} imports {name} at the top: import it where used")
    return found


def _crosses_methods(module: str, name: str) -> bool:
    """Whether one method imports another; private modules are shared by all."""
    own, other = module.split(".")[2], (name.split(".") + [""])[2]
    return own != "__init__" and other != own and not other.startswith("_")


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """The parts that are left when those without open imports are taken away."""
    left = {part: set(others) for part, others in edges.items()}
    while free := {part for part, others in left.items() if not others & set(left)}:
        left = {part: others for part, others in left.items() if part not in free}
    return sorted(left)


def test_every_part_has_its_place():
    parts = {part_of(module) for module in modules()} - {""}
    assert parts <= PARTS, f"give {sorted(parts - PARTS)} a rank in RANK or ONLY"


def test_imports_run_one_way():
    found = [line for item in modules().items() for line in violations(*item)]
    assert not found, "\n".join(found)


def test_parts_import_without_cycle():
    edges: dict[str, set[str]] = {}
    for module, source in modules().items():
        if part := part_of(module):
            others = {
                part_of(name)
                for name in imported_names(module, source)
                if name.split(".")[0] == PACKAGE
            }
            edges.setdefault(part, set()).update(others - {part, ""})
    assert not cycle(edges), f"these import one another: {cycle(edges)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("typing", "from jaxtransfer import tree"),
        ("tree", "import jaxtransfer.losses"),
        ("losses.features", "from jaxtransfer.model import from_linen"),
        ("losses.features", "from ..train import step"),
        ("ops.kernels", "def f():\n    from jaxtransfer.methods import meta"),
        ("methods.meta.descent", "from jaxtransfer.methods import distill"),
        ("methods.meta.outer", "from jaxtransfer.methods.distill import objective"),
        ("methods.meta.outer", "from ..distill import objective"),
        ("methods.adapt", "from .distill import objective"),
        ("data.sources", "from jaxtransfer import model"),
        ("data.sources", "from jaxtransfer.train.state import TrainState"),
        ("parallel", "from jaxtransfer import tree"),
        ("train.loop", "import orbax.checkpoint as ocp"),
        ("train.loop", "from experiments import quickstart"),
        ("train.loop", "from jaxtransfer import TrainState"),
        ("train.loop", "try:\n    import tensorflow\nexcept ImportError:\n    pass"),
        ("__init__", "import matplotlib.pyplot as plt"),
    ],
)
def test_the_rule_finds(module, source):
    assert violations(f"{PACKAGE}.{module}", source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("methods.meta.outer", "from jaxtransfer.train.step import train_step"),
        ("methods.meta.learner", "from jaxtransfer.methods._common import weighted"),
        ("methods.meta.outer", "from jaxtransfer.methods.meta.learner import Task"),
        ("methods.__init__", "from jaxtransfer.methods.meta import objective"),
        ("losses.features", "from jaxtransfer.losses import reduction"),
        ("losses.features", "from .reduction import mean"),
        ("train.checkpoint", "from orbax.checkpoint import v1"),
        ("data.sources", "def f():\n    import sklearn.datasets"),
        ("__init__", "from jaxtransfer.methods import meta"),
    ],
)
def test_the_rule_allows(module, source):
    assert not violations(f"{PACKAGE}.{module}", source)


def test_a_cycle_is_found():
    assert cycle({"tree": {"prng"}, "prng": {"tree"}, "ops": set()}) == ["prng", "tree"]
    assert not cycle({"tree": {"prng"}, "prng": {"typing"}})


_IMPORT_ALL = """
import importlib, json, sys
names = json.loads(sys.argv[1])
for name in names:
    importlib.import_module(name)
    if name == sys.argv[2]:
        break
import jax
from jax._src import xla_bridge
print(json.dumps({
    "loaded": sorted({name.split(".")[0] for name in sys.modules}),
    "platforms": sorted(xla_bridge._backends),
}))
if sys.argv[3:]:
    jax.devices()
    print(json.dumps(sorted(xla_bridge._backends)))
"""


def _import_in_new_process(last: str, *more: str) -> list:
    names = [name.removesuffix(".__init__") for name in modules()]
    names = [name for name in names if not name.endswith("__main__")]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, json.dumps(names), last, *more],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("last", [PACKAGE, "all"])
def test_importing_starts_no_device_and_loads_nothing_heavy(last):
    (report,) = _import_in_new_process(last)
    assert report["platforms"] == []
    assert PACKAGE in report["loaded"] and "jax" in report["loaded"]
    heavy = {"tensorflow", "matplotlib", "torch", "experiments"}
    assert not heavy & set(report["loaded"])


def test_a_started_device_would_be_seen():
    before, after = _import_in_new_process(PACKAGE, "start a device")
    assert before["platforms"] == [] and "cpu" in after
