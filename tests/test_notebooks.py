"""Every notebook runs from top to bottom in a fresh kernel, at its quick setting."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

# A training looks at its validation images again and again; here what it sees is of no interest.
FEW_VALIDATION_IMAGES = """
from kaf_study import datasets

whole = datasets.load

def few(*arguments):
    training, (x, y), test = whole(*arguments)
    return training, (x[:32], y[:32]), test

datasets.load = few
"""

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_at_its_quick_setting(path, monkeypatch):
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.delenv("CIFAR10_DIR", raising=False)  # the quick setting needs no download
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW_VALIDATION_IMAGES))
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    before = set((NOTEBOOKS.parent / "models").rglob("*"))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert set((NOTEBOOKS.parent / "models").rglob("*")) == before
    assert all(cell.execution_count for cell in code_cells(notebook))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_as_a_reader_expects_it(path):
    notebook = nbformat.read(path, as_version=4)
    tagged = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", ())]
    assert len(tagged) == 1 and 'os.environ.get("QUICK")' in tagged[0].source
    assert notebook.cells[0].cell_type == "markdown"
    assert max(len(cell.source.splitlines()) for cell in code_cells(notebook)) <= 30
    assert path.stat().st_size < 1_500_000
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    text = nbformat.writes(notebook)
    assert os.path.expanduser("~") + "/" not in text


def set_up(address=""):
    """The first cell, one and the same in all notebooks, with that address filled in."""
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS.glob("*.ipynb")]
    (source,) = {code_cells(notebook)[0].source for notebook in notebooks}
    before, after = source.split('REPOSITORY = ""')
    return f'{before}REPOSITORY = "{address}"{after}'


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What a notebook's first cell runs, in an empty folder without the project; clones appear."""
    run = []

    def runs(command, check):
        assert check  # what fails ends the cell
        run.append(command)
        if command[0] == "git":
            (tmp_path / command[-1] / "notebooks").mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", runs)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return run


def test_set_up_of_a_notebook_alone_fetches_and_installs(commands, tmp_path):
    exec(set_up("somewhere"), {})
    cloned, installed = commands
    assert cloned[:2] == ["git", "clone"] and "somewhere" in cloned
    assert installed[0] == sys.executable and installed[-1] == "..[study]"
    assert Path.cwd() == tmp_path / cloned[-1] / "notebooks"
    assert sys.path[0] == str(tmp_path / cloned[-1] / "src")


def test_set_up_after_a_restart_takes_the_clone_that_is_there(commands, tmp_path, monkeypatch):
    exec(set_up("somewhere"), {})
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    exec(set_up(), {})
    assert len(commands) == 2 and Path.cwd() == here


def test_set_up_in_a_clone_installs_that_and_does_nothing_after(commands, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    exec(set_up(), {})
    assert [command[-1] for command in commands] == ["..[study]"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    exec(set_up(), {})
    assert len(commands) == 1 and Path.cwd() == tmp_path / "notebooks"


def test_set_up_without_an_address_says_what_to_do(commands):
    with pytest.raises(SystemExit, match="REPOSITORY"):
        exec(set_up(), {})
    assert not commands


def test_all_notebooks_are_listed():
    listed = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert f"`{path.name}`" in listed


def imported_modules(cell):
    """Top-level names that a cell imports, in their order."""
    source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names = [node.module] if isinstance(node, ast.ImportFrom) else names
        yield from (name.split(".")[0] for name in names)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_tensorflow_reads_is_set_before_it_is_imported(path):
    """Otherwise processors without AVX-512 go without oneDNN: attacks take twice the time."""
    cells = code_cells(nbformat.read(path, as_version=4))
    imported = [name for cell in cells for name in imported_modules(cell)]
    setting = imported.index("kaf_study")
    importing = {"keras", "tensorflow", "activationsf", "fbfadvtrain", "kernel_expansion"}
    assert not importing & set(imported[:setting])
