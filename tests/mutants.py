"""How many planted faults the tests see: a random sample of mutants of a module, by cosmic-ray.

    python tests/mutants.py                       # the modules in TESTS, 25 mutants each (hours)
    python tests/mutants.py apgd square --count 20 --seed 1

Each mutant changes one place of one module and is run against the own tests of that module, in a
copy of the checkout; it is killed if a test fails. Survivors are shown as diffs: a missing fact, or
a change that does not change behaviour. Places in type annotations and in text do not count.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_and_test

ROOT = Path(__file__).parents[1]
TESTS = {  # module -> its own tests
    "src/kernel_expansion.py": ["test_kernel_expansion.py", "test_backends.py"],
    "src/activationsf.py": ["test_activationsf.py"],
    "src/fbfadvtrain.py": ["test_fbfadvtrain.py"],
    "src/kaf_study/attacks/registry.py": ["test_registry.py"],
    "src/kaf_study/attacks/loop.py": ["test_attacks.py"],
    "src/kaf_study/attacks/pgd.py": ["test_attacks.py"],
    "src/kaf_study/attacks/fab.py": ["test_fab.py"],
    "src/kaf_study/attacks/rapid.py": ["test_rapid.py"],
    "src/kaf_study/attacks/apgd.py": ["test_apgd.py"],
    "src/kaf_study/attacks/square.py": ["test_square.py"],
    "src/kaf_study/evaluation.py": ["test_evaluation.py"],
    "src/kaf_study/result_files.py": ["test_evaluation.py"],
    "src/kaf_study/records.py": ["test_records.py"],
    "src/kaf_study/paired.py": ["test_paired.py"],
    "src/kaf_study/seeds.py": ["test_seeds.py"],
    "src/kaf_study/claims.py": ["test_claims.py"],
    "src/kaf_study/tables.py": ["test_compare.py", "test_claims.py"],
    "src/kaf_study/compare.py": ["test_compare.py"],
    "src/kaf_study/cards.py": ["test_compare.py", "test_claims.py"],
    "src/kaf_study/train.py": ["test_train.py"],
    "src/kaf_study/checkpoint.py": ["test_train.py"],
    "src/kaf_study/files.py": ["test_records.py"],
    "src/kaf_study/model_folder.py": ["test_records.py", "test_train.py"],
    "src/kaf_study/datasets.py": ["test_datasets.py"],
    "src/kaf_study/fused_layers.py": ["test_fused_layers.py"],
}
SLOWER = 4  # a mutant whose tests take this many times as long hangs: it is killed


def in_annotation(source):
    """Function: (line, column) -> whether it lies in a type annotation."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                start = annotation.lineno, annotation.col_offset
                spans.append((start, (annotation.end_lineno, annotation.end_col_offset)))
    return lambda place: any(start <= place < end for start, end in spans)


def sample(module, count, seed):
    """`count` mutants of a module, each at a place of its own."""
    skip = in_annotation(module.read_text(encoding="utf-8"))
    places = {}
    for item in _all_work_items([module], {}):
        place = item.mutations[0].start_pos
        if not skip(tuple(place)):
            places.setdefault(tuple(place), []).append(item)
    generator = random.Random(f"{module.name} {seed}")
    chosen = generator.sample(sorted(places), min(count, len(places)))
    return [generator.choice(places[place]) for place in chosen]


def run(copy, module, tests, count, seed):
    """Test the sample; prints each verdict, and how many were killed."""
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {' '.join(tests)}"
    began = time.monotonic()
    subprocess.run(command.split(), cwd=copy, check=True, stdout=subprocess.DEVNULL)
    timeout = SLOWER * (time.monotonic() - began)
    mutants, killed = sample(Path(module), count, seed), 0
    for item in mutants:
        result = mutate_and_test(item.mutations, command, timeout)
        killed += result.is_killed
        mutation = item.mutations[0]
        word = "killed" if result.is_killed else "SURVIVED"
        operator = mutation.operator_name.split("/")[-1]
        print(f"{word:8} {module}:{mutation.start_pos[0]} {operator}", flush=True)
        if not result.is_killed:
            print("\n".join(line for line in result.diff.splitlines() if line[:1] in "+-"))
    print(f"{module}: {killed} of {len(mutants)} killed", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="parts of their paths (all of TESTS)")
    parser.add_argument("--count", type=int, default=25, help="mutants of each module (25)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    arguments = parser.parse_args()
    wanted = [m for m in TESTS if not arguments.modules or any(p in m for p in arguments.modules)]
    needed = {Path(module) for module in wanted}
    needed |= {Path("tests", name) for module in wanted for name in TESTS[module]}
    if missing := [str(path) for path in sorted(needed) if not (ROOT / path).is_file()]:
        parser.error(f"TESTS names what is not there: {', '.join(missing)}; mend it")
    with tempfile.TemporaryDirectory() as copy:
        tracked = ["git", "ls-files", "src", "tests", "models", "pyproject.toml", "*.py", "*.md"]
        for name in subprocess.check_output(tracked, cwd=ROOT, text=True).splitlines():
            if (ROOT / name).is_file():
                target = Path(copy, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        os.chdir(copy)  # mutants are written into this copy, whose src/ comes before the installed
        os.environ["PYTHONPATH"] = str(Path(copy, "src"))
        for module in wanted:
            tests = [f"tests/{name}" for name in TESTS[module]]
            run(copy, module, tests, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
