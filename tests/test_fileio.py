"""Where measurements are kept, whoever the user is."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from las_mm import fileio

HOMELESS = """
import os
os.environ["XDG_CACHE_HOME"] = os.environ["TMPDIR"]  # mmengine's yapf needs one to be imported
from las_mm.fileio import cache_folder
del os.environ["XDG_CACHE_HOME"]
print(cache_folder())
print(cache_folder())
"""


def homeless(tmp_path, code=HOMELESS):
    """What ``code`` prints where there is neither $HOME nor an entry for the user's id."""
    unset = ("HOME", "XDG_CACHE_HOME", "LAS_MM_CACHE")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    no_entry = "import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n"
    command = [sys.executable, "-c", no_entry + code]
    env["TMPDIR"] = str(tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if "could not determine the home directory" in done.stderr:
        pytest.skip("its yapf, which mmengine imports, needs a home")
    assert done.returncode == 0, done.stderr
    return done


def test_user_without_a_home(tmp_path):
    done = homeless(tmp_path)
    folder = tmp_path / f"las_mm-{os.getuid()}"
    assert [line for line in done.stdout.splitlines() if line.startswith("/")] == [str(folder)] * 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (done.stdout + done.stderr).count("this user has no home folder") == 1
    assert "LAS_MM_CACHE" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_a_folder_that_others_may_have_made_is_not_used(tmp_path, kind):
    planted, elsewhere = tmp_path / f"las_mm-{os.getuid()}", tmp_path / "elsewhere"
    if kind == "link":
        elsewhere.mkdir(mode=0o700)
        planted.symlink_to(elsewhere)
    elif kind == "file":
        planted.write_text("")
    else:
        planted.mkdir()
        planted.chmod(0o777)
    folders = [line for line in homeless(tmp_path).stdout.splitlines() if line.startswith("/")]
    assert folders[0] == folders[1] and Path(folders[0]).parent == tmp_path
    assert folders[0] not in (str(planted), str(elsewhere))


def test_named_folders_come_first(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv("LAS_MM_CACHE", raising=False)
    assert fileio.cache_folder() == tmp_path / "caches" / "las_mm"
    monkeypatch.setenv("LAS_MM_CACHE", str(tmp_path / "mine"))
    assert fileio.cache_folder() == tmp_path / "mine"
