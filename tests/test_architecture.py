"""The house's laws, read off the source: who imports whom, what nobody may call, and the public names."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WINGS = {
    "parallel": set[str](),
    "zero": {"parallel"},
    "infer": {"parallel"},
    "launch": {"parallel", "zero", "infer"},
}
FLOORS = [
    {"errors", "config", "registry"},
    {"mesh", "native", "ledger", "comm", "transport", "shard", "reshard", "rng", "tokenizer", "deferral", "holders"},
    {"kernels"},
    {"tp", "sp", "pp", "ep"},
    {"models"},
    {"hf"},
]
OPEN_FLOORS = (0, 1)  # within which modules may import one another
TORCH_FREE = [
    "parallel.errors",
    "parallel.config",
    "parallel.registry",
    "parallel.ledger",
    "parallel.pp",
    "parallel.pp.draw",
    "infer.request",
    "infer.pages",
    "infer.prefix",
    "infer.scheduler",
]
SURFACE = {
    "parallel": set[str](),
    "parallel.mesh": {"Axis", "Layout", "Mesh", "Place"},
    "parallel.sp": {"gather_tokens", "local_tokens", "split_tokens"},
    "parallel.tp": {
        "ColumnParallelLinear",
        "Dense",
        "LinearMethod",
        "LossSum",
        "MergedColumnParallelLinear",
        "ParallelLMHead",
        "QKVParallelLinear",
        "RowParallelLinear",
        "VocabParallelEmbedding",
        "vocab_parallel_cross_entropy",
        "vocab_parallel_linear_cross_entropy",
    },
    "zero": {
        "DataConfig",
        "Metrics",
        "OptimizerConfig",
        "ScheduleConfig",
        "Trainer",
        "TrainerConfig",
        "ZeroConfig",
        "ZeroOptimizer",
    },
    "infer": {"LLM", "Choice", "Completion", "Engine", "EngineConfig", "Event", "RequestError", "SamplingParams"},
}
PICKLING_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "multiprocessing",
    "torch.multiprocessing",
    "torch.distributed.checkpoint",
    "concurrent.futures.process",
}
PICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "ProcessPoolExecutor",
}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    name: str
    path: Path
    tree: ast.Module

    def imports(self) -> Iterator[tuple[str, int]]:
        """Every module that is imported anywhere in the file, lazily or not, with its line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, node.lineno
            elif isinstance(node, ast.ImportFrom):
                yield "." * node.level + (node.module or ""), node.lineno
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    if inner in modules():
                        yield inner, node.lineno
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                target, colon, _ = node.value.partition(":")
                if colon and target in modules():  # an entry of a registry
                    yield target, node.lineno

    def names(self) -> Iterator[tuple[str, int]]:
        """Every name and dotted name that the file reads, with its line."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                yield node.attr, node.lineno
                yield ast.unparse(node), node.lineno
            elif isinstance(node, ast.Name):
                yield node.id, node.lineno
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield alias.name, node.lineno
                    yield f"{node.module}.{alias.name}", node.lineno

    def exports(self) -> list[str] | None:
        """What the file lists in ``__all__``, or None."""
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
                return ast.literal_eval(node.value)  # type: ignore[union-attr]
        return None


@functools.cache
def modules() -> dict[str, Module]:
    """All modules of the four wings by name."""
    found = {}
    for wing in WINGS:
        for path in sorted((ROOT / wing).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    return found


def floor_of(name: str) -> int | None:
    """The floor inside ``parallel`` that a module stands on; None for the package itself."""
    parts = name.split(".")
    if len(parts) < 2:
        return None
    floors = [index for index, rooms in enumerate(FLOORS) if parts[1] in rooms]
    assert floors, f"{name} stands on no floor"
    return floors[0]


def arrows_up(module: Module) -> Iterator[str]:
    """Imports that the laws forbid, as ``file:line``."""
    wing, floor = module.name.split(".")[0], None
    if wing == "parallel":
        floor = floor_of(module.name)
    for target, line in module.imports():
        there = target.split(".")[0]
        where = f"{module.path.relative_to(ROOT)}:{line} imports {target}"
        if target.startswith("."):
            yield f"{where}: imports are absolute"
        elif there in WINGS and there != wing and there not in WINGS[wing]:
            yield where
        elif there == wing == "parallel" and floor is not None and (other := floor_of(target)) is not None:
            same_room = module.name.split(".")[1] == target.split(".")[1]
            if not same_room and not (other < floor or (other == floor and floor in OPEN_FLOORS)):
                yield where


def test_no_import_runs_up() -> None:
    assert len(modules()) > 30
    assert [arrow for module in modules().values() for arrow in arrows_up(module)] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("parallel.tp.x", "def f():\n    import zero.trainer"),
        ("parallel.tp.x", "from parallel.sp import split_tokens"),
        ("parallel.tp.x", "from parallel import hf"),
        ("parallel.mesh", "from parallel import tp"),
        ("parallel.errors", "from parallel.mesh import Mesh"),
        ("parallel.kernels.x", "from parallel.tp import LossSum"),
        ("parallel.kernels.x", "if 0:\n    from parallel.models.batch import Batch"),
        ("parallel.models.x", "import parallel.hf"),
        ("parallel.registry", "PLACES = {'x': 'parallel.tp.linear:ColumnParallelLinear'}"),
        ("zero.x", "from infer import LLM"),
        ("infer.x", "import launch"),
        ("parallel.tp.x", "from .linear import ColumnParallelLinear"),
    ],
)
def test_the_walk_sees_arrows_that_run_up(name: str, source: str) -> None:
    assert len(list(arrows_up(Module(name, ROOT / "x.py", ast.parse(source))))) == 1


def test_arrows_down_are_allowed() -> None:
    source = "from parallel import comm, shard\nimport torch, parallel.mesh\nfrom parallel.tp.method import Dense"
    assert list(arrows_up(Module("parallel.tp.x", ROOT / "x.py", ast.parse(source)))) == []


def test_only_launch_reads_the_environment() -> None:
    reads = [
        f"{module.name}:{line} {name}"
        for module in modules().values()
        for name, line in module.names()
        if name in ENVIRONMENT and not module.name.startswith("launch")
    ]
    assert reads == []


def test_nothing_is_pickled() -> None:
    found = []
    for module in modules().values():
        found += [f"{module.name}:{line} {name}" for name, line in module.imports() if name in PICKLING_MODULES]
        found += [
            f"{module.name}:{line} {name}" for name, line in module.names() if name in PICKLING_CALLS | PICKLING_MODULES
        ]
        found += [
            f"{module.name}:{node.value.lineno} allow_pickle"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
        ]
    assert found == []


def test_no_global_is_rebound() -> None:
    found = [
        f"{module.name}:{node.lineno}"
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_nothing_stamps_state_onto_torch_or_parameters() -> None:
    found = [
        f"{module.name}:{node.lineno} {ast.unparse(target)}"
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("torch", "dist", "nn", "nn.Module")
    ]
    assert found == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_some_modules_know_nothing_of_torch(name: str) -> None:
    """Neither themselves nor what they import, packages' own ``__init__`` aside."""
    if name not in modules():
        pytest.skip(f"there is no {name}")
    waiting, seen = [name], {name}
    while waiting:
        for target, line in modules()[waiting.pop()].imports():
            banned = (
                "torch",
                "transformers",
                *(() if name == "infer.scheduler" else ("numpy",)),
            )  # it counts in arrays
            assert target.split(".")[0] not in banned, f"{target} from {seen}, line {line}"
            if target in modules() and target not in seen and "." in target:
                seen.add(target)
                waiting.append(target)


def test_every_module_says_what_it_is_and_what_it_gives() -> None:
    for module in modules().values():
        assert ast.get_docstring(module.tree), f"{module.name} has no docstring"
        exports = module.exports()
        if module.path.name == "__main__.py" or (module.path.name == "__init__.py" and len(module.tree.body) == 1):
            continue
        assert exports is not None, f"{module.name} has no __all__"
        assert len(set(exports)) == len(exports)
        defined = {name for node in ast.walk(module.tree) if isinstance(name := getattr(node, "name", None), str)}
        defined |= {node.id for node in ast.walk(module.tree) if isinstance(node, ast.Name)}
        defined |= {
            alias.asname or alias.name
            for n in ast.walk(module.tree)
            for alias in getattr(n, "names", [])
            if isinstance(alias, ast.alias)
        }
        assert set(exports) <= defined, f"{module.name}: __all__ lists {set(exports) - defined}"
        assert not [name for name in exports if name.startswith("_")]


def test_names_that_say_nothing_are_not_used() -> None:
    empty = {"utils", "util", "common", "helpers", "misc"}
    assert [name for name in modules() if name.split(".")[-1] in empty] == []


@pytest.mark.parametrize("name", SURFACE)
def test_public_surface(name: str) -> None:
    module = importlib.import_module(name)
    assert set(module.__all__) == SURFACE[name]
    for public in module.__all__:
        assert getattr(module, public).__doc__, f"{name}.{public} has no docstring"


def test_the_names_on_the_door_can_be_imported() -> None:
    from infer import LLM, SamplingParams
    from parallel.mesh import Layout, Mesh
    from parallel.tp import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )
    from zero import Trainer, ZeroOptimizer

    layers = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, vocab_parallel_cross_entropy)
    assert all((LLM, SamplingParams, Layout, Mesh, Trainer, ZeroOptimizer, *layers))


def test_packages_are_the_four_wings_and_all_are_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    if isinstance(listed, dict):
        patterns = listed["find"]["include"]
        assert {pattern.split(".")[0].rstrip("*") for pattern in patterns} == set(WINGS)
    else:
        packages = {".".join(m.path.parent.relative_to(ROOT).parts) for m in modules().values()}
        assert set(listed) == packages
    for module in modules().values():
        assert (module.path.parent / "__init__.py").exists(), f"{module.name} is in no package"
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(WINGS)
    assert list(ROOT.glob("*.py")) == []


def loaded_by(statement: str) -> set[str]:
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(result.stdout))


def test_starting_ranks_takes_no_torch() -> None:
    """The process that only starts local ranks and waits for them is up at once."""
    assert "torch" not in loaded_by("import launch.env, launch.local")


def test_importing_parallel_costs_little() -> None:
    bare = loaded_by("pass")
    assert len(loaded_by("import parallel") - bare) <= 3
    assert "torch" not in loaded_by("import parallel.errors, parallel.config, parallel.registry, parallel.ledger")
    theirs = loaded_by("import torch, torch.distributed, torch.utils.checkpoint")
    ours = loaded_by("import parallel.comm, parallel.shard, parallel.tp, parallel.models.decoder")
    more = {name for name in ours - theirs if name.split(".")[0] != "parallel"}
    assert len(more) < 10, sorted(more)
