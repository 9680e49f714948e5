"""In place of yapf, with which mmengine formats a config several times a run, 3 s each."""

__version__ = "0.40.2"
