"""The activations of the study, one table."""

# In the order of the tables
ACTIVATION_LABELS = {
    "relu": "ReLU",
    "elu": "ELU",
    "swish": "Swish",
    "kaf": "KAF",
    "kaf_relu": "KAF_ReLU",
    "kaf_elu": "KAF_ELU",
    "kaf_swish": "KAF_Swish",
    "kaf_free": "KAF_Free",
    "kwta": "k-WTA",
}

# Okabe & Ito 2008, and wine and grey of Tol 2021: told apart by colour-blind readers.
ACTIVATION_COLORS = {
    "relu": "#000000",
    "elu": "#E69F00",
    "swish": "#0072B2",
    "kaf": "#D55E00",
    "kaf_relu": "#CC79A7",
    "kaf_elu": "#009E73",
    "kaf_swish": "#56B4E9",
    "kaf_free": "#882255",
    "kwta": "#999999",
}
