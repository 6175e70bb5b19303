"""Every plot of the study, by subject, each drawn from result files or a model.

    python -m kaf_study.figures seeds models/* --out imgs/seeds.png
    python -m kaf_study.figures scatter models/* --out imgs/scatter.png
    python -m kaf_study.figures perturbations models/* --out imgs/perturbations.png
    python -m kaf_study.figures curves models/* --out imgs/curves.png
    python -m kaf_study.figures shapes models/NAME --out imgs/kaf_shapes.png   # or several
    python -m kaf_study.figures curvature models/* --out imgs/curvature.png

Accuracies are fractions in files and code, percent in figures. One colour per activation, the same
everywhere; where colours alone might not be told apart, marker, line style or a label says it too.
"""

from kaf_study.figures.insights import (
    activation_histograms,
    by_layer,
    curvature_and_robustness,
    movement_and_robustness,
)
from kaf_study.figures.kafs import (
    functions_and_derivatives,
    initial_network,
    kaf_shapes,
    kaf_shapes_side_by_side,
    kaf_starts,
)
from kaf_study.figures.results import (
    accuracy_robustness_scatter,
    adversarial_examples,
    image_rows,
    robustness_curve,
    smallest_perturbations,
    survival_curves,
)
from kaf_study.figures.seeds import accuracies_over_seeds
from kaf_study.figures.style import Line, save, shared_legend
from kaf_study.figures.training import training_curves, training_steps

__all__ = [
    "Line",
    "accuracies_over_seeds",
    "accuracy_robustness_scatter",
    "activation_histograms",
    "adversarial_examples",
    "by_layer",
    "curvature_and_robustness",
    "functions_and_derivatives",
    "image_rows",
    "initial_network",
    "kaf_shapes",
    "kaf_shapes_side_by_side",
    "kaf_starts",
    "movement_and_robustness",
    "robustness_curve",
    "save",
    "shared_legend",
    "smallest_perturbations",
    "survival_curves",
    "training_curves",
    "training_steps",
]
