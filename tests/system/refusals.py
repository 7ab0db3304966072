"""What a program says when it refuses, and that it leaves nothing behind."""

from pathlib import Path

import pytest

from launch import train
from mm_moe.errors import MMMoEError


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(kind: type[MMMoEError], *argv: str, program=train, output: str | None = "run") -> str:
    """What a program says when it refuses; checks the class, one line, and the untouched disk."""
    words = [*argv, *(("--output_dir", output) if output and program is train else ())]
    before = tree(Path.cwd())
    with pytest.raises(MMMoEError) as caught:
        program.main(words)
    assert caught.type is kind, caught.value
    assert tree(Path.cwd()) == before
    said = str(caught.value)
    assert "\n" not in said
    return said


def file(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name
