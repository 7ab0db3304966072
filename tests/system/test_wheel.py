"""The wheel: built from a copy of the source tree, complete, and importable on its own."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("mm_moe", "prompts", "pretrain", "finetune", "eval", "launch")
# Imports every module of the wheel and reads one embedded row, then says where each module lies.
PROBE = """
import importlib, json, sys
names = sys.argv[1:]
files = {name: importlib.import_module(name).__file__ for name in names}
from mm_moe.registry import DATASETS
source = DATASETS.resolve("emoji")()
sample = source.to_sample(next(iter(source.stream(source.splits()[0]))))
print(json.dumps({"files": files, "payload": sorted(sample.payload)}))
"""


def pip(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: a build leaves `build/` behind, and a stale one would slip into the next wheel.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*ROOMS, "ds_configs", "tests"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(out), ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def content(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_it_holds_every_file_of_the_rooms_and_nothing_else(content):
    expected = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    inside = {name for name in content if name.split("/")[0] in ROOMS}
    assert inside == expected
    rest = {name.split("/")[0] for name in content - inside}
    assert all(name.startswith("mm_moe-") for name in rest), rest


@pytest.mark.parametrize(
    "what",
    [
        "mm_moe/data/embedded/*.parquet",
        "mm_moe/data/embedded/*NOTICE*",
        "mm_moe/*tokenizer*.json",
        "finetune/recipes/emoji_replay.yaml",
        "eval/templates/report.html.jinja",
        "mm_moe-*.data/data/share/mm-moe/ds_configs/zero2.json",
        "mm_moe-*.dist-info/licenses/LICENSE",
    ],
)
def test_it_holds_what_a_run_reads(content, what):
    assert [name for name in content if fnmatch.fnmatchcase(name, what)]


def test_it_stays_small_enough_to_send(wheel):
    assert wheel.stat().st_size < 25e6


def test_every_module_imports_from_the_wheel_alone(wheel, content, tmp_path):
    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in content
        if name.endswith(".py") and name.split("/")[0] in ROOMS
    )
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *modules],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, file in found["files"].items() if not file.startswith(str(site))] == []
    assert found["payload"] == ["image", "text"]
