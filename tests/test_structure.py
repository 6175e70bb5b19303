"""The structure of the code is as told: one direction, no cycles, types, functions one can read."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SRC.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
MOST_LINES, MOST_PARAMETERS = 60, 8


def imports(name):
    """The project's own modules that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(TREES[name]):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n in MODULES else node.module for n in inside]
        found |= {n for n in names if n in MODULES}
    return found - {name}


def functions(name):
    """(qualified name, node) of every function and method, nested ones left out."""

    def inside(node, prefix):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}.{child.name}")
            elif isinstance(child, ast.FunctionDef):
                yield f"{prefix}.{child.name}", child

    return list(inside(TREES[name], name))


ALL_FUNCTIONS = [pair for name in MODULES for pair in functions(name)]


CLASSES = {
    node.name: node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}


def methods(name):
    """The methods of a class of the project and of those it is made from; none of foreign ones."""
    if name not in CLASSES:
        return set()
    own = {n.name for n in CLASSES[name].body if isinstance(n, ast.FunctionDef)}
    return own.union(*(methods(getattr(base, "id", "")) for base in CLASSES[name].bases))


def is_override(name):
    """Whether a method has its types where it is first declared, in a class of the project."""
    owner, _, method = name.rpartition(".")
    bases = getattr(CLASSES.get(owner.rpartition(".")[2]), "bases", [])
    return any(method in methods(getattr(base, "id", "")) for base in bases)


def parameters(node):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [a for a in arguments if a.arg not in ("self", "cls")]


def test_no_import_goes_round():
    # A package's __init__ is imported with each of its modules, but may itself import them.
    graph = {name: imports(name) for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_layer_and_the_trainer_never_import_the_study():
    for name in ("kernel_expansion", "activationsf", "fbfadvtrain"):
        assert not any(other.startswith("kaf_study") for other in imports(name)), name


def test_settings_and_records_are_read_without_tensorflow():
    """A command says what is wrong with its arguments before it loads anything heavy."""
    program = (
        "import sys, kaf_study.attacks.registry, kaf_study.records, kaf_study.model_folder;"
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name])


def test_public_functions_have_types():
    untyped = [
        name
        for name, node in ALL_FUNCTIONS
        if not any(part.startswith("_") and part != "__init__" for part in name.split("."))
        and (
            any(a.annotation is None for a in parameters(node))
            or (node.returns is None and node.name != "__init__")
        )
        and not is_override(name)
    ]
    assert not untyped


def test_functions_can_be_read_at_a_glance():
    long = {name: node.end_lineno - node.lineno + 1 for name, node in ALL_FUNCTIONS}
    many = {name: len(parameters(node)) for name, node in ALL_FUNCTIONS}
    assert not {name: lines for name, lines in long.items() if lines > MOST_LINES}
    # Settings one by one, as keras.layers have them; what fit takes, and a range.
    allowed = {"activationsf.Kaf.__init__", "kaf_study.lr_policy.LRFinder.find"}
    assert not {n for n, count in many.items() if count > MOST_PARAMETERS and n not in allowed}
