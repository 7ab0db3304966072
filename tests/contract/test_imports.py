"""The laws of the house, read from the source: who imports whom, how large a room grows."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from mm_moe import registry

ROOT = Path(__file__).parents[2]
# Rooms from the ground up. A room imports itself and rooms of lower levels, never its neighbour.
LEVELS = (
    ("mm_moe",),  # errors, registry, batch
    ("mm_moe.moe", "mm_moe.data"),
    ("mm_moe.backbones", "mm_moe.fill", "prompts"),
    ("mm_moe.models",),
    ("mm_moe.cells",),
    ("mm_moe.checkpoint",),
    ("mm_moe.arguments",),
    ("mm_moe.training",),
    ("pretrain", "finetune"),
    ("eval",),
    ("launch",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
DISTRIBUTED_PLACES = ("mm_moe/moe/parallel", "mm_moe/training/", "mm_moe/checkpoint/", "launch/")
TOP_LEVEL = {
    *("mm_moe", "prompts", "pretrain", "finetune", "eval", "launch", "ds_configs", "tests"),
    *("setup.py", "pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md"),
    *(".ci", ".gitignore", ".pre-commit-config.yaml"),
}
GENERATED = {"build", "dist", "runs", "__pycache__", ".git", ".venv"} | {
    f".{tool}_cache" for tool in ("pytest", "ruff", "mypy")
}

FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("mm_moe", "prompts", "pretrain", "finetune", "eval", "launch")
    for path in (ROOT / folder).rglob("*.py")
)
TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


def room_of(module: str) -> str | None:
    """The innermost room that a dotted name lies in; None for a name from outside."""
    parts = module.split(".")
    names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in names if name in LEVEL_OF), None)


def imported_names(source: str, package: str) -> list[str]:
    """Every dotted name that a file imports, at any depth, and `torch.distributed` by attribute."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            prefix = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            names += [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.append("torch.distributed")
    return names


def violations(file: str, source: str) -> list[str]:
    """What a file imports against the law of the levels and of the distributed places."""
    own = room_of(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    found = []
    for name in imported_names(source, file.rpartition("/")[0].replace("/", ".")):
        room = room_of(name)
        if room and room != own and LEVEL_OF[room] >= LEVEL_OF[own]:
            found.append(f"{own} imports {name}")
        outside = name.split(".")[0] == "deepspeed" or name.startswith("torch.distributed")
        if outside and not file.startswith(DISTRIBUTED_PLACES):
            found.append(f"{file} imports {name}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_the_import_law(file):
    assert violations(file, (ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("mm_moe/moe/layer.py", "from mm_moe.errors import ConfigError", 0),
        ("mm_moe/moe/layer.py", "from mm_moe.moe.router import Router", 0),
        ("mm_moe/moe/layer.py", "from mm_moe.data.schema import DataSource", 1),
        ("mm_moe/moe/layer.py", "from mm_moe import models", 1),
        ("mm_moe/moe/layer.py", "from ..models.modeling import X", 1),
        ("mm_moe/moe/layer.py", "from .router import X", 0),
        ("mm_moe/registry.py", "def f():\n    import prompts.replay", 1),
        ("mm_moe/checkpoint/store.py", "import mm_moe.arguments", 1),
        ("finetune/supervised.py", "import pretrain.contrastive", 1),
        ("eval/metrics.py", "import mm_moe.training.predict", 0),
        ("prompts/replay.py", "import torch\ntorch.distributed.barrier()", 1),
        ("mm_moe/moe/layer.py", "from torch import distributed", 1),
        ("mm_moe/moe/parallel.py", "import deepspeed", 0),
        ("mm_moe/moe/parallel_state.py", "import deepspeed", 0),
        ("eval/report.py", "import deepspeed.comm", 1),
    ],
)
def test_the_law_catches_what_it_forbids(file, source, count):
    assert len(violations(file, source)) == count


@pytest.mark.parametrize(
    ("table", "name"),
    [
        (table, name)
        for table in vars(registry).values()
        if isinstance(table, registry.Registry)
        for name in table
    ],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_registry_string_imports(table, name):
    assert callable(table.resolve(name))


def test_no_program_hides_a_dependency():
    # A script's folder comes first on the path: launch/evaluate.py would hide `evaluate`.
    taken = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert {path.stem for path in (ROOT / "launch").glob("*.py")} & taken == set()


def test_top_level_holds_exactly_the_house():
    there = {path.name for path in ROOT.iterdir() if path.suffix not in (".egg-info", ".log")}
    assert there - GENERATED == TOP_LEVEL


@pytest.mark.parametrize("file", [*FILES, *TESTS, "setup.py"])
def test_file_and_functions_stay_small(file):
    source = (ROOT / file).read_text()
    assert len(source.splitlines()) <= 400
    functions = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60]
    assert long == [], f"{file}: functions of more than 60 lines"
