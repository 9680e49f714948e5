"""The ``las_mm`` command: what it lists, what it refuses, and that tools/ say the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from conftest import load_tool
from las_mm import cli, version
from las_mm.configs import usual_size
from las_mm.dependencies import MissingDependencyError
from las_mm.errors import UserError, as_user_errors, told

ROOT = Path(__file__).resolve().parents[2]
TOOLS = dict(
    benchmark="benchmark",
    calibrate="calibrate",
    convert="convert_checkpoint",
    masks="visualize_masks",
    plot="plot_log",
    predict="predict_latency",
    roofline="roofline",
    search="search_granularity",
    validate="validate_latency",
)


def in_a_process(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """``python -m las_mm`` where there is no checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "las_mm", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_help_lists_every_subcommand_in_a_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, what in cli.COMMANDS.items():
        assert lines.count(f"  {name:10} {what}") == 1
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"las_mm {version.__version__}\n"


def test_help_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    done = in_a_process("--help", folder=tmp_path)
    assert done.returncode == 0 and "explain" in done.stdout, done.stderr
    done = in_a_process("--version", folder=tmp_path)
    assert done.stdout.strip() == f"las_mm {version.__version__}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: las_mm {name} ")
    assert f"\nlas_mm {name} " in printed  # an example
    assert import_module(f"las_mm.cli.{name}").__doc__.splitlines()[0] in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "las_mm: error: the following arguments are required: COMMAND"),
        (["nothing"], "las_mm: error: argument COMMAND: invalid choice: 'nothing'"),
        (["predict", "gone.py", "--device", "v100"], "las_mm predict: error: config file gone.py"),
        (["predict"], "las_mm predict: error: the following arguments are required"),
        (["plot", "gone"], "las_mm plot: error: no training log in gone"),
        (["explain", "gone.py"], "las_mm explain: error: config file gone.py does not exist"),
        (["explain", "x.py", "--shape", "0", "9"], "--shape must be two positive integers H W"),
    ],
)
def test_refusals(arguments, words, refused):
    assert words in refused(cli.main, arguments)


def test_a_users_error_in_a_process(tmp_path):
    done = in_a_process("predict", "gone.py", "--device", "v100", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last == "las_mm predict: error: config file gone.py does not exist"
    assert "Traceback" not in done.stderr


def test_predicts_without_tools(tmp_path):
    (tmp_path / "config.py").write_text("model = dict(type='las_mm.LASResNet', depth=50)\n")
    arguments = ["config.py", "--device", "v100", "--shape", "64", "64", "--json", "out.json"]
    done = in_a_process("predict", *arguments, folder=tmp_path)
    assert done.returncode == 0 and "backbone" in done.stdout, done.stderr
    assert (tmp_path / "out.json").is_file()


@pytest.mark.parametrize(("command", "tool"), TOOLS.items())
def test_tools_run_the_subcommands(command, tool, monkeypatch):
    called = []
    monkeypatch.setattr(
        import_module(f"las_mm.cli.{command}"),
        "add_arguments",
        lambda parser: called.append(parser),
    )
    monkeypatch.setattr(import_module(f"las_mm.cli.{command}"), "run", called.append)
    load_tool(tool).main([])
    parser, args = called
    assert parser.prog == f"{tool}.py" and args.argv == []


def test_every_subcommand_but_explain_has_a_tool():
    assert {*TOOLS, "explain"} == set(cli.COMMANDS)


def test_the_entry_point_is_installed_with_the_package():
    (target,) = re.findall(r'"las_mm = ([\w.]+:\w+)"', (ROOT / "setup.py").read_text())
    module, _, function = target.partition(":")
    assert getattr(import_module(module), function) is cli.main


def test_ctrl_c(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    for command, more in (("plot", ""), ("calibrate", "; the same command goes on from here")):
        monkeypatch.setattr(import_module(f"las_mm.cli.{command}"), "run", interrupted)
        with pytest.raises(SystemExit) as end:
            cli.run(command, [str(tmp_path)] if command == "plot" else [])
        assert end.value.code == f"las_mm {command}: interrupted{more}"


@pytest.mark.parametrize(
    "error", [UserError("a\nb"), MissingDependencyError("a\nb"), OSError("a\nb")], ids=repr
)
def test_one_way_to_say_errors(error, refused):
    def program():
        with told("program"):
            raise error

    assert refused(program) == "program: error: a b"


def test_other_errors_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), told("program"), as_user_errors(ValueError):
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match="wrong") as error, as_user_errors(ValueError):
        raise ValueError("wrong")
    assert isinstance(error.value.__cause__, ValueError)


def test_usual_size():
    assert usual_size(dict(default_scope="mmpretrain")) == (224, 224)
    assert usual_size({}) == (800, 1344)
