"""What several test files need: a classifier whose worst case is known, formulas, short ways."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import tensorflow as tf

from kaf_study.attacks.classifier import CompiledClassifier


def linear(shape, weights, bias=0.0):
    """Classifier of images `shape` with logits x . weights + bias; weights (pixels, classes)."""
    weights = weights.astype("float32")

    def model(x, training=False):
        return tf.reshape(x, (-1, len(weights))) @ weights + bias

    return CompiledClassifier(model, weights.shape[1], shape)


def attack_all(attack, x, y, images=None, restart=1, seed=0, batch_size=8):
    """The run of an attack on all images x, which are numbered from 0 unless told otherwise."""
    images = np.arange(len(x)) if images is None else images
    return attack.run(x, y, images, restart, seed=seed, batch_size=batch_size)


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def formula(x, alpha, d, gamma, kernel="gaussian"):
    difference = np.asarray(x, "float64")[..., None, :] - (d if d.ndim == 2 else d[:, None])
    kappa = {
        "gaussian": lambda: np.exp(-gamma * difference**2),
        "relu": lambda: np.maximum(difference, 0),
        "softplus": lambda: np.logaddexp(0, difference),
    }[kernel]()
    return (alpha * kappa).sum(-2)


def run_python(script, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
