"""Generated text, numbers and tables in LaTeX, as `cards` has them in Markdown."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kaf_study.cards import Columns, points
from kaf_study.files import make_writable, write_atomically

SIGNS = {"&": r"\&", "_": r"\_", "#": r"\#", "±": r"$\pm$", "–": "--", "<": "$<$", "*": "$^*$"}
SHORT = {  # headers that are too wide for a page
    "stand under this / the reference alone": "alone",
    "robust, points": "robust",
    "clean, points": "clean",
    "clean, p (Holm)": "p (Holm)",
    "published clean": "publ. clean",
    "published robust*": "publ. robust*",
    "PGD-50-10, true labels": "PGD-50-10",
    "PGD-50-10, predicted labels*": "predicted*",
}


class Report:
    """numbers: {macro: text, made LaTeX when it is written}; tables: {name of the file: LaTeX}."""

    def __init__(self) -> None:
        self.numbers: dict[str, str] = {}
        self.tables: dict[str, str] = {}

    def write(self, folder: Path) -> None:
        """Writes numbers.tex, which ends with a digest of everything, and a file for each table."""
        make_writable(folder)
        macros = [f"\\newcommand{{\\{name}}}{{{latex(t)}}}" for name, t in self.numbers.items()]
        digest = hashlib.sha256(repr((macros, sorted(self.tables.items()))).encode()).hexdigest()
        macros.append(f"\\newcommand{{\\ResultsDigest}}{{{digest}}}")
        for name, text in ({"numbers": "\n".join(macros)} | self.tables).items():
            text = f"% Written by python -m kaf_study.report (do not edit).\n{text}\n"
            write_atomically(folder / f"{name}.tex", text.encode())


def latex(text: object) -> str:
    """Text in LaTeX: signs that mean something there, thin spaces, true minus signs."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", str(text))
    text = re.sub("[&_#±–<*]", lambda found: SIGNS[found[0]], text)
    return re.sub(" ?%", r"\\,\\%", text).replace("−", "$-$")


def tabular(columns: Columns, places: str = "", heads: Sequence[str] = ()) -> str:
    """A table {header: cells}; the first column to the left unless `places` says otherwise.

    heads: a line above each row, across the table; none where it is empty.
    """
    rows = [[SHORT.get(name, name) for name in columns], *zip(*columns.values(), strict=True)]
    head, *body = (" & ".join(map(latex, row)) + r" \\" for row in rows)
    if heads:
        across = rf"\multicolumn{{{len(columns)}}}{{l}}"
        body = [
            rf"{across}{{\emph{{{latex(above)}}}}} \\" * bool(above) + row
            for above, row in zip(heads, body, strict=True)
        ]
    lines = [
        rf"\begin{{tabular}}{{{places or 'l' + 'r' * (len(columns) - 1)}}}",
        r"\toprule", head, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip
    return "\n".join(lines)


def span(values: Iterable[float], sign: str = "") -> str:
    """ "36.5 to 38.7", of fractions."""
    there = [value for value in values if not pd.isna(value)] or [np.nan]
    return " to ".join(dict.fromkeys(points(end, sign) for end in (min(there), max(there))))


def listed(names: Sequence[str]) -> str:
    """ "A, B and C"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def networks_stand(count: int) -> str:
    return "one network stands" if count == 1 else f"{count} networks stand"
