"""dev/docs_figures.py: figures that are older than what they speak of."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest

DEV = Path(__file__).resolve().parents[1] / "dev"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The script on a repository with one source and one page."""
    monkeypatch.syspath_prepend(str(DEV))
    script = importlib.import_module("docs_figures")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "kernel.cpp").write_text("a")
    (tmp_path / "README.md").write_text("# x\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path, "first")
    return script


def git(folder, *arguments) -> str:
    options = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(
        ["git", *options, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(folder, message) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
    return git(folder, "rev-parse", "--short", "HEAD")


def test_newer_sources_are_named(tool, tmp_path, capsys):
    first = git(tmp_path, "rev-parse", "--short", "HEAD")
    page = tmp_path / "docs/performance.md"
    page.write_text(f"# p\n\n<!-- figures: {first} kernel.cpp -->\n| a |\n|---|\n")
    commit(tmp_path, "figures")
    assert tool.main() == 0
    out = capsys.readouterr().out
    assert "docs/performance.md:3" in out and "none" in out
    (tmp_path / "kernel.cpp").write_text("b")
    commit(tmp_path, "a faster kernel")
    assert tool.main() == 0
    assert "a faster kernel" in capsys.readouterr().out


def test_what_does_not_exist_is_an_error(tool, tmp_path, capsys):
    (tmp_path / "README.md").write_text("<!-- figures: abcdef0 kernel.cpp -->\n")
    assert tool.main() == 1
    assert "README.md:1: there is no commit abcdef0" in capsys.readouterr().err
    first = git(tmp_path, "rev-parse", "--short", "HEAD")
    (tmp_path / "README.md").write_text(f"<!-- figures: {first} gone.cpp -->\n")
    assert tool.main() == 1
    assert "there is no gone.cpp" in capsys.readouterr().err
