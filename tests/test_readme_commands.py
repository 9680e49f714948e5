"""README's other commands and its Python: the cheap ones run, of the rest every option exists."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from las_mm import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
OURS = [line for line in COMMANDS if line.startswith(("las_mm ", "python tools/"))]
CHEAP = [line for line in OURS if line.split()[1] in ("predict", "search")]


def help_of(line: str, capsys, monkeypatch) -> str:
    words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [words[1], "--help"])
    with pytest.raises(SystemExit) as end:
        if words[0] == "las_mm":
            cli.main(sys.argv)
        else:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("line", OURS)
def test_every_option_exists(line, capsys, monkeypatch):
    text = help_of(line, capsys, monkeypatch)
    options = [word for word in shlex.split(line) if word.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", text)] == []
    for word in shlex.split(line):
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize("line", CHEAP)
def test_the_cheap_ones_run(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LAS_MM_PRETRAINED", "none")
    cli.main(shlex.split(line)[1:])
    assert "ms" in capsys.readouterr().out


def test_lines_of_python(tmp_path):
    (code,) = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "position" in done.stdout and "layer4.2" in done.stdout.replace("stage4.2", "layer4.2")


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in COMMANDS if re.match(r"make \w", line)]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
