"""What the README shows is so: its Python runs, its table is drawn from the result files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kaf_study import compare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_tables_are_those_of_the_result_files(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README, encoding="utf-8")
    cards = tmp_path / "cards.md"
    arguments = [
        str(ROOT / "models"),
        str(ROOT / "pilots/relu_seed1"),
        "--into",
        str(copy),
        "--cards",
        str(cards),
    ]
    assert compare.main(arguments) == 0
    assert cards.read_text() == (ROOT / "models" / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, ROOT / "benchmarks" / "run.py", "table", "--into", copy]
    subprocess.run(command, check=True)
    assert copy.read_text(encoding="utf-8") == README


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:imgs|src|tests|benchmarks)/[\w/.]+", README)))
)
def test_files_named_in_the_readme_exist(path):
    assert (ROOT / path).exists() or path == "imgs/demo_scatter.png"
