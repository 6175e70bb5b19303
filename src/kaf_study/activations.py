"""The activations of the study, one table: what tables and figures say of each, and its origins.

The layers themselves are `activationsf.activation(name)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Kinds, as figures and claims tell them apart
FIXED = "fixed activation"
RANDOM_KAF = "KAF, random start"
RIDGE_KAF = "KAF, ridge start"
KAF_ON_BASE = "KAF on a fixed activation"
FROZEN_KAF = "KAF, frozen shapes"
KWTA = "k-WTA"


@dataclass(frozen=True)
class StudiedActivation:
    """One row of the table.

    color: of Okabe & Ito 2008, or of Tol 2021 (muted): told apart by colour-blind readers.
    base: of a KAF, the activation it starts as (ridge fit) or corrects.
    thesis_vgg_bounds: (lr_min, lr_max) that the thesis found for the VGG-like network by range
        tests.
    published: {architecture: (clean accuracy, accuracy under attack)} of the thesis (Sapienza,
        2020): CIFAR-10, 60 (VGG) and 80 epochs; PGD-50-10 of ART 1.3.3 called without labels, so
        of the predicted-label kind.
    """

    label: str
    color: str
    kind: str
    base: str | None = None
    thesis_vgg_bounds: tuple[float, float] | None = None
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict)


# In the order of tables and legends
STUDIED: Mapping[str, StudiedActivation] = MappingProxyType(
    {
        "relu": StudiedActivation(
            "ReLU", "#000000", FIXED, thesis_vgg_bounds=(0.0001, 0.08),
            published={"vgg": (0.7810, 0.4541), "resnet20": (0.7752, 0.5017)},
        ),
        "elu": StudiedActivation(
            "ELU", "#E69F00", FIXED, thesis_vgg_bounds=(0.0001, 0.1),
            published={"vgg": (0.7399, 0.4549), "resnet20": (0.7542, 0.5169)},
        ),
        "swish": StudiedActivation(
            "Swish", "#0072B2", FIXED, thesis_vgg_bounds=(0.0001, 0.3),
            published={"vgg": (0.7699, 0.4773), "resnet20": (0.7868, 0.5388)},
        ),
        "kaf": StudiedActivation(
            "KAF", "#D55E00", RANDOM_KAF, thesis_vgg_bounds=(0.01, 1.0),
            published={"vgg": (0.7793, 0.4680), "resnet20": (0.7808, 0.5223)},
        ),
        "kaf_relu": StudiedActivation(
            "KAF_ReLU", "#CC79A7", RIDGE_KAF, base="relu",
            published={"resnet20": (0.7965, 0.5144)},
        ),
        "kaf_elu": StudiedActivation(
            "KAF_ELU", "#009E73", RIDGE_KAF, base="elu", thesis_vgg_bounds=(0.0001, 0.1),
            published={"vgg": (0.7493, 0.4540), "resnet20": (0.7869, 0.5276)},
        ),
        "kaf_swish": StudiedActivation(
            "KAF_Swish", "#56B4E9", RIDGE_KAF, base="swish", thesis_vgg_bounds=(0.0001, 0.8),
            published={"vgg": (0.7885, 0.4633), "resnet20": (0.7921, 0.5210)},
        ),
        "kaf_free": StudiedActivation(
            "KAF_Free", "#882255", RANDOM_KAF, thesis_vgg_bounds=(0.01, 2.0),
            published={"vgg": (0.7754, 0.4620), "resnet20": (0.7888, 0.5207)},
        ),
        "kaf_on_relu": StudiedActivation("KAF_on_ReLU", "#AA4499", KAF_ON_BASE, base="relu"),
        "kaf_on_elu": StudiedActivation("KAF_on_ELU", "#999933", KAF_ON_BASE, base="elu"),
        "kaf_on_swish": StudiedActivation("KAF_on_Swish", "#332288", KAF_ON_BASE, base="swish"),
        # of a network trained before (kaf_study.transplant), not a layer of its own
        "kaf_frozen": StudiedActivation("KAF_Frozen", "#117733", FROZEN_KAF),
        "kwta": StudiedActivation("k-WTA", "#999999", KWTA),
    }
)  # fmt: skip

WITHOUT_CURVATURE = ("relu", "kwta")  # no second derivative, no function of one variable
ACTIVATION_LABELS = {name: row.label for name, row in STUDIED.items()}
ACTIVATION_COLORS = {name: row.color for name, row in STUDIED.items()}
OTHER_COLOR = "#666666"  # of an activation that is not in the table


def kind_of(activation: str | None) -> str:
    """Its kind, "other" for one that is not in the table."""
    row = STUDIED.get(activation or "")
    return row.kind if row else "other"


def is_kaf(activation: str | None) -> bool:
    return is_trained_kaf(activation) or kind_of(activation) == FROZEN_KAF


def is_trained_kaf(activation: str | None) -> bool:
    return kind_of(activation) in (RANDOM_KAF, RIDGE_KAF, KAF_ON_BASE)


def activation_of(label: str) -> str | None:
    """The activation that a label names before its first comma ("KAF_ELU, seed 1"), or None."""
    name = label.split(",")[0].strip().lower().replace("-", "")
    return name if name in STUDIED else None
