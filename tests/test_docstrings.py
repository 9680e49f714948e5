"""The examples of docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import las_mm

NAMES = sorted(m.name for m in pkgutil.walk_packages(las_mm.__path__, "las_mm."))


def examples(name: str) -> list[doctest.DocTest]:
    """Those of the module's own functions and classes."""
    module = importlib.import_module(name)
    return [found for found in doctest.DocTestFinder().find(module) if found.examples]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.endswith(("__main__", "._C"))])
def test_examples(name):
    torch.manual_seed(0)
    for example in examples(name):
        said: list[str] = []
        failed = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
            example, out=said.append, clear_globs=False
        )
        assert not failed.failed, "".join(said)
