"""The installed commands: where the packages of the study are missing, one line says so."""

import sys
from importlib import import_module


def train() -> int:
    """`kaf-train`, as `python -m kaf_study.train`."""
    return _main_of("kaf_study.train")


def evaluate() -> int:
    """`kaf-evaluate`, as `python robustness_eval.py`."""
    return _main_of("kaf_study.command")


def _main_of(module: str) -> int:
    """Exit code of a module's `main`, which imports what `pip install .` alone does not bring."""
    try:
        return import_module(module).main()
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"error: {error.name} is not installed; the layers do without it, the study does not: "
            "say pip install '.[study]'\n"
        )
        return 2
