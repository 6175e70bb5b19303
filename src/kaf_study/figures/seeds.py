"""The figure of the answer: what each activation reaches, over several trainings."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from kaf_study.activations import ACTIVATION_LABELS
from kaf_study.claims import MEASURES, Study, means
from kaf_study.figures.style import color_of, marker_of
from kaf_study.model_folder import common_training


def accuracies_over_seeds(study: Study, attack: str) -> Figure:
    """Clean and robust accuracy, percent, a line for each activation.

    Small points are single trainings; the large one is their mean, with its 95 % interval over
    images and seeds (`kaf_study.seeds`) where any activation has several seeds.

    Args:
        attack: its name, as it is shown.
    """
    table = means(study)
    rows = np.arange(len(table))[::-1]  # the first on top
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 1.6 + 0.36 * len(table)), sharey=True, layout="constrained"
    )
    for ax, measure in zip(axes, MEASURES, strict=True):
        for row, mean in zip(rows, table.itertuples(), strict=True):
            color = color_of(mean.activation)
            marker, size = marker_of(mean.activation)
            value, low, high = (100 * getattr(mean, measure + end) for end in ("", "_low", "_high"))
            trainings = 100 * study.results[measure][mean.activation].mean(axis=1)
            if np.isfinite(low):
                ax.plot([low, high], [row, row], color=color, lw=1.5, solid_capstyle="butt")
            ax.plot(value, row, marker, color=color, ms=size, mec="white", mew=0.6, zorder=3)
            if len(trainings) > 1:
                ax.plot(trainings, np.full(len(trainings), row - 0.28), ".", color=color, ms=5)
        ax.set_xlabel(f"{measure} accuracy (%)")
        ax.grid(axis="x", alpha=0.25)
        ax.set_axisbelow(True)
    axes[0].set_yticks(
        rows,
        [
            f"{ACTIVATION_LABELS.get(name, name)}, {count} seed{'s' * (count > 1)}"
            for name, count in zip(table["activation"], table["seeds"], strict=True)
        ],
    )
    axes[0].set_ylim(-0.7, len(table) - 0.4)
    figure.suptitle(common_training(study.models), fontsize=12)
    axes[0].set_title(f"{study.n:,} images", fontsize=9)
    axes[1].set_title(f"under {attack}", fontsize=9)
    figure.supxlabel(
        "large: mean, with its 95 % interval over images and seeds; points below: trainings",
        fontsize=9,
    )
    return figure
