"""What speed and memory are: ratios in one run, the sides alternating.

    python benchmarks/run.py [layer|backends|step|gradient|attack|all] [--quick] [--out FILE]

Every comparison calls its sides in turn (A B C A B C ...), so that whatever else the machine does
falls on all of them; medians over rounds, the spread is the interquartile range, ratios are medians
of the ratios within rounds. First calls (tracing, compilation) and warm-ups are not counted; how
long the first calls took is reported. Each section is merged into the results file with the machine
and the date. --quick makes everything tiny: it shows that it runs, its figures mean nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from kaf_study import CommandParser, InputError, run_command
from kaf_study.cards import put_table_into
from kaf_study.files import make_writable
from kaf_study.records import hardware, versions, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
QUICK_RESULTS = HERE.parent / "runs" / "benchmarks_quick.json"  # never mixed with real ones
SECTIONS = ("layer", "backends", "step", "gradient", "attack")


# --------------------------------------------------------------------------- measuring


LEAST_SECONDS = 0.002  # whatever is shorter is called several times in a row, and divided


def alternate(sides, rounds, *, warm_up=2):
    """Calls the sides in turn and takes the time.

    Args:
        sides: {name: function without arguments that returns when its work is done}.
        rounds: how often each is measured.

    Returns:
        {name: {"first": seconds of the first call, "seconds": [one for each round]}}.
    """
    times = {name: {"first": _seconds(side), "seconds": []} for name, side in sides.items()}
    calls = {}
    for name, side in sides.items():
        for _ in range(warm_up):
            seconds = _seconds(side)
        calls[name] = max(1, int(LEAST_SECONDS / seconds)) if warm_up else 1
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                side()
            times[name]["seconds"].append((time.perf_counter() - began) / calls[name])
    return times


def _seconds(side):
    began = time.perf_counter()
    side()
    return time.perf_counter() - began


def statistics(times):
    """Of `alternate`'s times: median and quartiles in ms, and the first call's seconds."""
    summary = {}
    for name, measured in times.items():
        low, median, high = 1e3 * np.percentile(measured["seconds"], [25, 50, 75])
        summary[name] = {
            "median_ms": _round(median),
            "quartiles_ms": [_round(low), _round(high)],
            "rounds": len(measured["seconds"]),
            "first_call_s": _round(measured["first"]),
        }
    return summary


def ratio(times, side, to):
    """Median over rounds of side / to, and its quartiles."""
    within = np.divide(times[side]["seconds"], times[to]["seconds"])
    low, median, high = np.percentile(within, [25, 50, 75])
    return {"median": _round(median), "quartiles": [_round(low), _round(high)]}


def _round(value):
    return float(f"{value:.4g}")


def print_table(title, times, *, to):
    """One line for each side: ms, spread, and the ratio to the side `to`."""
    print(f"\n{title}")
    print(f"  {'':28}{'median ms':>11}{'quartiles':>20}{f'/ {to}':>14}{'first call s':>14}")
    for name, row in statistics(times).items():
        low, high = row["quartiles_ms"]
        relative = ratio(times, name, to)["median"]
        print(
            f"  {name:28}{row['median_ms']:11.4g}{f'{low:.4g} - {high:.4g}':>20}{relative:14.3g}"
            f"{row['first_call_s']:14.3g}",
            flush=True,
        )


# --------------------------------------------------------------------------- layer


LAYER_SHAPES = [(128, 32, 32, 16), (128, 16, 16, 32), (128, 8, 8, 64), (128, 128)]
GROWTH = [5, 10, 20, 40, 80]
GROWTH_SHAPE = (32, 32, 32, 16)  # at D = 80 the plain formula keeps gigabytes for 128 images
FAST, MOVING, PLAIN, COMPILED = "kaf", "kaf moving", "kaf plain", "kaf plain compiled"


def layer_functions(shape, D=20):
    """x, and {side: (forward, its parameters as tf.Variables, whether XLA compiles it)}."""
    import keras
    import tensorflow as tf

    from activationsf import Kaf
    from kernel_expansion import equally_spaced_dictionary, plain_expansion

    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=shape), tf.float32)
    layers = {
        "relu": keras.layers.Activation("relu"),
        "swish": keras.layers.Activation("swish"),
        FAST: Kaf(D=D),
        MOVING: Kaf(D=D, moving=True),
    }
    for layer in layers.values():
        layer.build(shape)
    kaf = layers[FAST]
    alpha = kaf.alpha.value
    dictionary = tf.constant(equally_spaced_dictionary(D, 3.0), tf.float32)

    def plain(x):
        return plain_expansion(x, tf.convert_to_tensor(alpha), dictionary, kaf.gamma)

    forwards = {
        name: (layer, [weight.value for weight in layer.trainable_weights], False)
        for name, layer in layers.items()
    }
    forwards[PLAIN] = plain, [alpha], False
    forwards[COMPILED] = plain, [alpha], True
    return x, forwards


PASSES = ("forward", "forward and gradient in x", "forward and gradients")


def layer_sides(shape, D=20):
    """{pass of PASSES: {side: function without arguments}}"""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # says of every new tf.function that it is one
    x, forwards = layer_functions(shape, D)
    upstream = tf.constant(np.random.default_rng(1).normal(size=shape), tf.float32)

    def with_gradients(forward, parameters=()):
        def value_and_gradients(x, upstream):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = forward(x)
            return y, tape.gradient(y, [x, *parameters], output_gradients=upstream)

        return value_and_gradients

    # On a CPU a tf.function returns when its outputs are there: no synchronisation is needed.
    sides = {what: {} for what in PASSES}
    for name, (forward, parameters, compiled) in forwards.items():
        compile_ = partial(tf.function, jit_compile=compiled or None, autograph=False)
        sides["forward"][name] = partial(compile_(lambda x, f=forward: f(x)), x)
        in_x, in_all = map(compile_, (with_gradients(forward), with_gradients(forward, parameters)))
        sides["forward and gradient in x"][name] = partial(in_x, x, upstream)
        sides["forward and gradients"][name] = partial(in_all, x, upstream)
    return sides


def layer(quick, arguments):
    if quick:  # few points: XLA needs seconds to compile 20
        shapes, D, growth, growth_shape = [(8, 16)], 3, [2], (8, 16)
    else:
        shapes, D, growth, growth_shape = LAYER_SHAPES, 20, GROWTH, GROWTH_SHAPE
    rounds = arguments.rounds or (3 if quick else 21)
    section = {"shapes": {}, "growth": {}, "D": D}
    for shape in shapes:
        found = section["shapes"]["x".join(map(str, shape))] = {}
        for what, sides in layer_sides(shape, D).items():
            times = alternate(sides, rounds)
            print_table(f"{what}, {shape}, D = {D}", times, to="swish")
            found[what] = {
                "sides": statistics(times),
                "to swish": {name: ratio(times, name, "swish") for name in times},
                "to kaf": {name: ratio(times, name, FAST) for name in times},
            }
    for points in growth:
        sides = layer_sides(growth_shape, points)["forward and gradients"]
        times = alternate(sides, 3 if quick else max(5, rounds // 3))
        print_table(f"forward and gradients, {growth_shape}, D = {points}", times, to="swish")
        section["growth"][str(points)] = {
            "sides": statistics(times),
            "to swish": {name: ratio(times, name, "swish") for name in times},
        }
    section["growth_shape"] = list(growth_shape)
    section["memory"] = memory(shapes[0], D, peaks=not quick)
    return section


# --------------------------------------------------------------------------- memory


def memory(shape, D, *, peaks):
    """Bytes kept for the backward pass, and at the peak, in multiples of the input's bytes.

    kept: all tensors of the forward graph that the backward pass, traced as a function of its own,
    asks for; they stay alive between the two. Parameters are not counted, x is.
    peak: forward and gradients, resident size of fresh processes at this batch size and at twice
    as many images: the difference, so that what does not grow with the batch cancels.
    """
    size = 4 * int(np.prod(shape))
    found = {"shape": list(shape), "D": D, "input_mb": _round(size / 1e6), "sides": {}}
    print(f"\nmemory at {shape}, D = {D}, in multiples of the input ({found['input_mb']} MB)")
    print(f"  {'':28}{'kept for backward':>20}{'peak':>10}")
    x, forwards = layer_functions(shape, D)
    for name, (forward, parameters, compiled) in forwards.items():
        kept = _round(bytes_kept(forward, parameters, compiled, x) / size)
        peak = None
        if peaks:
            doubled = (2 * shape[0], *shape[1:])
            grown = peak_of_fresh_process(name, doubled, D) - peak_of_fresh_process(name, shape, D)
            peak = _round(grown / size)
        found["sides"][name] = {"kept": kept, "peak": peak}
        print(f"  {name:28}{kept:20.3f}{'-' if peak is None else f'{peak:.1f}':>10}", flush=True)
    return found


def bytes_kept(forward, parameters, compiled, x):
    import tensorflow as tf

    kept = {}
    inner = tf.function(forward, jit_compile=True, autograph=False) if compiled else forward

    @tf.function(autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = inner(x)

        def backward(upstream):
            return tape.gradient(y, [x, *parameters], output_gradients=upstream)

        traced = tf.function(backward, autograph=False).get_concrete_function(
            tf.TensorSpec(y.shape, y.dtype)
        )
        # resources are the variables; a tensor may be asked for more than once
        kept.update((id(t), t) for t in traced.captured_inputs if t.dtype != tf.resource)
        return y

    step.get_concrete_function(tf.TensorSpec(x.shape, x.dtype))
    weights = [tuple(parameter.shape) for parameter in parameters]
    return sum(
        t.dtype.size * int(np.prod(t.shape)) for t in kept.values() if tuple(t.shape) not in weights
    )


def peak_of_fresh_process(side, shape, D):
    """Bytes resident at most during a few calls of forward and gradients."""
    return int(answer_of_worker("peak-worker", shape, D, "--side", side))


def answer_of_worker(worker, shape, D, *options, **environment):
    """The last line that one of WORKERS prints, in a fresh process."""
    command = [sys.executable, __file__, worker, *options, "--shape", *map(str, (*shape, D))]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if run.returncode:
        raise RuntimeError(f"the measurement by {worker} failed: {run.stderr[-500:]}")
    return run.stdout.splitlines()[-1]


def peak_worker(side, shape, D):
    both = layer_sides(shape, D)["forward and gradients"][side]
    for _ in range(3):
        both()
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(1024 * int(status["VmHWM"].split()[0]))


# --------------------------------------------------------------------------- other backends


def backends(quick, arguments):
    """The expansion under Keras' JAX and torch, each in a process of its own, where installed."""
    from importlib.util import find_spec

    *shape, D = (8, 16, 3) if quick else (*LAYER_SHAPES[0], 20)
    rounds = arguments.rounds or (2 if quick else 11)
    section = {"shape": shape, "D": D}
    for backend in ("jax", "torch"):
        if not find_spec(backend):
            print(f"{backend} is not installed: its side is left out")
            continue
        options = "--rounds", str(rounds)
        answer = answer_of_worker("backend-worker", shape, D, *options, KERAS_BACKEND=backend)
        section[backend] = json.loads(answer)
        print(f"{backend}: {json.dumps(section[backend], indent=1)}")
    return section


def backend_worker(shape, D, rounds):
    """Prints, as JSON: forward with gradients in x and alpha of KAF and of its formula."""
    import keras

    from kernel_expansion import (
        equally_spaced_dictionary,
        gaussian_expansion,
        plain_expansion,
        rule_of_thumb_bandwidth,
    )

    gamma = rule_of_thumb_bandwidth(D, 3.0)
    dictionary = equally_spaced_dictionary(D, 3.0).astype("float32")
    expansions = {
        FAST: lambda x, alpha: gaussian_expansion(x, alpha, boundary=3.0, gamma=gamma),
        PLAIN: lambda x, alpha: plain_expansion(
            x, alpha, keras.ops.convert_to_tensor(dictionary), gamma
        ),
    }
    generator = np.random.default_rng(0)
    sizes = (shape, (D, shape[-1]), shape)
    x, alpha, upstream = (generator.normal(size=size).astype("float32") for size in sizes)
    of_backend = {"jax": jax_sides, "torch": torch_expansion_sides}[keras.backend.backend()]
    sides, kept = of_backend(expansions, x, alpha, upstream)
    times = alternate(sides, rounds)
    found = {
        "sides": statistics(times),
        "to kaf": {name: ratio(times, name, FAST) for name in times},
        "kept": {name: _round(elements / x.size) for name, elements in kept.items()},
    }
    print(json.dumps(found | {"version": sys.modules[keras.backend.backend()].__version__}))


def jax_sides(expansions, x, alpha, upstream):
    """{side: function without arguments}, under jit, and {side: elements kept}."""
    import jax

    def side(expansion):
        @jax.jit
        def value_and_gradients(x, alpha, upstream):
            y, backward = jax.vjp(expansion, x, alpha)
            return y, backward(upstream)

        return lambda: jax.block_until_ready(value_and_gradients(x, alpha, upstream))

    kept = {}
    for name, expansion in expansions.items():
        _, backward = jax.vjp(jax.jit(expansion), x, alpha)
        kept[name] = sum(leaf.size for leaf in jax.tree.leaves(backward))
    x, alpha, upstream = map(jax.numpy.asarray, (x, alpha, upstream))
    return {name: side(expansion) for name, expansion in expansions.items()}, kept


def torch_expansion_sides(expansions, x, alpha, upstream):
    """{side: function without arguments}, eager and compiled, and {side: elements kept}."""
    import torch

    x, alpha = (torch.tensor(a, requires_grad=True) for a in (x, alpha))
    upstream = torch.tensor(upstream)

    def side(expansion):
        return lambda: torch.autograd.grad(expansion(x, alpha), [x, alpha], upstream)

    kept = {}
    for name, expansion in expansions.items():
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.data_ptr()] = max(tensor.untyped_storage().nbytes() // 4, 1)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            expansion(x, alpha)
        kept[name] = sum(storages.values())
    sides = {name: side(expansion) for name, expansion in expansions.items()}
    for name, expansion in expansions.items():
        sides[f"{name} compiled"] = side(torch.compile(expansion))
    return sides, kept


# --------------------------------------------------------------------------- step


STEP_ACTIVATIONS = ["relu", "swish", "kaf", "kaf_free"]
HALF_STEPS = ["swish, mixed_bfloat16", "kaf, mixed_bfloat16", "swish, mixed_float16"]


def keras_step(architecture, activation, batch_size, precision="float32"):
    """One step of fast adversarial training as kaf_study.train makes it, on one random batch."""
    import keras
    import tensorflow as tf

    from kaf_study.train import TrainConfig, build_network, build_trainer

    keras.utils.set_random_seed(0)
    config = TrainConfig(
        architecture=architecture,
        activation=activation,
        batch_size=batch_size,
        precision=precision,
        seed=0,
    )
    model = build_trainer(build_network(config), config, steps=10_000)
    x, y = map(tf.constant, random_batch(batch_size))
    return lambda: model.train_on_batch(x, y)


def random_batch(batch_size):
    generator = np.random.default_rng(0)
    x = generator.random((batch_size, 32, 32, 3), "float32")
    return x, generator.integers(0, 10, batch_size)


class TorchSide:
    """The ResNet20 of benchmarks/torch_resnet20.py in a process of its own, kept alive.

    TensorFlow and PyTorch in one process share neither threads nor their libraries peacefully. The
    worker sleeps on a pipe while TensorFlow is measured, and the other way round.
    """

    def __init__(self, what, activation, batch_size):
        command = [sys.executable, HERE / "torch_resnet20.py", what, activation, str(batch_size)]
        self.worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self._answer()

    def __call__(self):
        print("again", file=self.worker.stdin, flush=True)
        self._answer()

    def _answer(self):
        answer = self.worker.stdout.readline().strip()
        if not answer:
            raise RuntimeError("the PyTorch side stopped; its message is above")
        return answer

    def close(self):
        self.worker.stdin.close()
        self.worker.wait()


def torch_sides(what, activations, batch_size):
    """{"swish, PyTorch": side}; {} where torch is not installed."""
    from importlib.util import find_spec

    if not find_spec("torch"):
        print("torch is not installed: the comparison with PyTorch is left out")
        return {}
    return {f"{name}, PyTorch": TorchSide(what, name, batch_size) for name in activations}


def measure_beside_torch(sides, theirs, rounds, warm_up):
    """`alternate` of ours and theirs; (times, what of the section compares them)."""
    try:
        times = alternate(sides | theirs, rounds, warm_up=warm_up)
    finally:
        for side in theirs.values():
            side.close()
    if not theirs:
        return times, {}
    names = [name.split(",")[0] for name in theirs]
    to_theirs = {name: ratio(times, name, f"{name}, PyTorch") for name in names}
    return times, {"to PyTorch": to_theirs, "torch": next(iter(theirs.values())).version}


def step(quick, arguments):
    batch_size = 4 if quick else 128
    rounds = arguments.rounds or (2 if quick else 11)
    section = {"batch_size": batch_size}
    for architecture in ("resnet20",) if quick else ("resnet20", "vgg"):
        activations = ["swish", "kaf"] if quick else STEP_ACTIVATIONS
        sides = {name: keras_step(architecture, name, batch_size) for name in activations}
        theirs = {}
        if architecture == "resnet20":
            for name in HALF_STEPS[:1] if quick else HALF_STEPS:
                activation, precision = name.split(", ")
                sides[name] = keras_step(architecture, activation, batch_size, precision)
            theirs = torch_sides("step", ("swish",) if quick else ("relu", "swish"), batch_size)
        times, compared = measure_beside_torch(sides, theirs, rounds, 1 if quick else 3)
        title = f"step of fast adversarial training, {architecture}, batch {batch_size}"
        print_table(title, times, to="swish")
        section[architecture] = {
            "sides": statistics(times),
            "to swish": {name: ratio(times, name, "swish") for name in times},
        } | compared
    return section


# --------------------------------------------------------------------------- gradient


GRADIENT_SIZES = (17, 64, 128)
GRADIENT_ACTIVATIONS = ("relu", "swish", "kaf")


def keras_gradient(activation, count):
    """The gradient of the loss in `count` images as attacks take it: folded, in padded batches."""
    import keras

    from kaf_study.architectures import resnet
    from kaf_study.attacks.classifier import CompiledClassifier, cross_entropy
    from kaf_study.attacks.loop import padded_size
    from kaf_study.fused_layers import inference_twin

    keras.utils.set_random_seed(0)
    classifier = CompiledClassifier(
        inference_twin(resnet(activation), random_batch(2)[0]), 10, (32, 32, 3)
    )
    is_compiled = classifier.is_compiled_by_shape
    x, y = random_batch(padded_size(count, max(GRADIENT_SIZES), is_compiled=is_compiled))
    differentiate = classifier.differentiable(cross_entropy)
    return lambda: differentiate(x, y)


def gradient(quick, arguments):
    rounds = arguments.rounds or (2 if quick else 21)
    activations = ("relu", "kaf") if quick else GRADIENT_ACTIVATIONS
    section = {}
    for count in (3,) if quick else GRADIENT_SIZES:
        sides = {name: keras_gradient(name, count) for name in activations}
        theirs = torch_sides("gradient", ("relu",) if quick else ("relu", "swish"), count)
        times, compared = measure_beside_torch(sides, theirs, rounds, 1 if quick else 3)
        print_table(f"gradient of the loss in {count} images, ResNet20", times, to="relu")
        section[str(count)] = {"sides": statistics(times)} | compared
    return section


# --------------------------------------------------------------------------- attack


ATTACKED = (20, 60)  # first test images


def default_model():
    models = HERE.parent / "models"
    preferred = models / "cifar10_resnet20_swish_seed0"
    found = [preferred] if (preferred / "training.json").exists() else []
    found += sorted(path.parent for path in models.glob("*/training.json"))
    if not found:
        raise InputError("models/ holds no trained model to attack; name one with --model FOLDER")
    return found[0]


def attack(quick, arguments):
    """PGD of robustness_eval against ART called plainly, true labels, and who is left standing."""
    from kaf_study import datasets
    from kaf_study.saved_models import open_model

    steps, restarts = (5, 2) if quick else (50, 10)
    counts = [8, 16] if quick else ATTACKED  # ART called plainly takes minutes
    rounds = arguments.rounds or 1
    folder = arguments.model or default_model()
    with open_model(str(folder)) as opened:
        dataset = opened.dataset or "cifar10"
        x, y = datasets.load_test(dataset, data_dir=arguments.data_dir)
        model = opened.model
        section = {
            "model": opened.name,
            "model_sha256": opened.sha256,
            "dataset": dataset,
            "attack": f"PGD-{steps}-{restarts}",
            "by_n": {},
        }
        for n in counts:
            verdicts = {}
            ours = partial(_ours, model, x[:n], y[:n], steps, restarts, verdicts)
            plain = partial(_plain_art, model, x[:n], y[:n], steps, restarts, verdicts)
            warm_up = {  # shapes, kernels, traces
                "ours": partial(_ours, model, x[:n], y[:n], 1, 1, {}),
                "ART": partial(_plain_art, model, x[:n], y[:n], 1, 1, {}),
            }
            first = {name: _seconds(side) for name, side in warm_up.items()}
            times = {name: {"first": first[name], "seconds": []} for name in first}
            setup = []
            for _ in range(rounds):
                wall = _seconds(ours)  # all of it: tracing, clean pass, attack, checks
                setup.append(wall - verdicts["seconds"])
                times["ours"]["seconds"].append(wall)
                times["ART"]["seconds"].append(_seconds(plain))
            print_table(f"{section['attack']}, {opened.name}, first {n} images", times, to="ours")
            section["by_n"][str(n)] = _attack_entry(times, verdicts, setup)
    return section


def _ours(model, x, y, steps, restarts, verdicts):
    from kaf_study.evaluation import AttackSettings, evaluate

    result = evaluate(model, x, y, AttackSettings(steps=steps, restarts=restarts))
    verdicts["ours"] = np.asarray(result.is_robust)
    verdicts["clean"] = np.asarray(result.is_clean)
    verdicts["rows"] = result.images
    verdicts["seconds"] = result.summary["seconds"]  # the restarts alone


def _plain_art(model, x, y, steps, restarts, verdicts):
    """ART as its documentation shows it."""
    import keras
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import TensorFlowV2Classifier

    classifier = TensorFlowV2Classifier(
        model=model,
        nb_classes=10,
        input_shape=x.shape[1:],
        loss_object=keras.losses.CategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )
    pgd = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=8 / 255,
        eps_step=2 / 255,
        max_iter=steps,
        num_random_init=restarts,
        batch_size=128,
        verbose=False,
    )
    np.random.seed(0)  # noqa: NPY002 - ART draws its starts from NumPy's global generator
    x_adv = pgd.generate(x, np.eye(10, dtype="float32")[y])
    clean = classifier.predict(x).argmax(axis=-1)
    verdicts["ART"] = (clean == y) & (classifier.predict(x_adv).argmax(axis=-1) == y)


def _attack_entry(times, verdicts, setup):
    ours, art, rows = verdicts["ours"], verdicts["ART"], verdicts["rows"]
    only_art = [
        {
            "image": int(i),
            "fell_in_restart": int(rows["restart"][i]),
            "at_iteration": int(rows["iteration"][i]),
        }
        for i in np.flatnonzero(art & ~ours)
    ]
    entry = {
        "sides": statistics(times),
        "speed-up": ratio(times, "ART", "ours"),
        "ours_setup_s": _round(float(np.median(setup))),
        "clean": int(verdicts["clean"].sum()),
        "standing": {"ours": int(ours.sum()), "ART": int(art.sum())},
        "standing_only_under_ART": only_art,
        "standing_only_under_ours": np.flatnonzero(ours & ~art).tolist(),
        "why_they_differ": (
            "other random starts; ours judges every iterate, ART the last one of each restart"
        ),
    }
    print(
        f"  standing of {len(ours)}: ours {ours.sum()}, ART {art.sum()}; only under ART "
        f"{[e['image'] for e in only_art]}, only under ours {entry['standing_only_under_ours']}; "
        f"{entry['ours_setup_s']:.1f} s of ours are tracing, clean pass and checks"
    )
    return entry


# --------------------------------------------------------------------------- end points


def end_points(results):
    """The figures that were asked for: (what, measured or None, limit, "at least" or "at most")."""

    def find(*keys):
        value = results
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                return None
            value = value[key]
        return value

    first = "x".join(map(str, LAYER_SHAPES[0]))
    both = ("layer", "shapes", first, "forward and gradients", "to kaf")
    step_ratio = ("step", "resnet20", "to swish")
    torch = ("step", "resnet20", "to PyTorch")
    least, most = "at least", "at most"
    return [
        ("plain formula / kaf, forward and gradients", find(*both, PLAIN, "median"), 12, least),
        ("the same, plain formula compiled", find(*both, COMPILED, "median"), 4, least),
        *(
            (
                f"kaf / swish, {what}",
                find("layer", "shapes", first, what, "to swish", FAST, "median"),
                2.5,
                most,
            )
            for what in ("forward", "forward and gradients")
        ),
        (
            "kept for the backward pass / input",
            find("layer", "memory", "sides", FAST, "kept"),
            2,
            most,
        ),
        *(
            (
                f"plain formula / kaf, forward and gradients, under {label}",
                find("backends", backend, "to kaf", PLAIN, "median"),
                limit,
                least,
            )
            for label, backend, limit in (("JAX's jit", "jax", 2), ("PyTorch, eager", "torch", 5))
        ),
        *(
            (
                f"kept for the backward pass / input, under {label}",
                find("backends", backend, "kept", FAST),
                2,
                most,
            )
            for label, backend in (("JAX", "jax"), ("PyTorch", "torch"))
        ),
        ("kaf / swish, ResNet20 step", find(*step_ratio, "kaf", "median"), 1.2, most),
        ("kaf_free / swish, ResNet20 step", find(*step_ratio, "kaf_free", "median"), 1.9, most),
        ("relu, ResNet20 step / PyTorch's", find(*torch, "relu", "median"), 1.1, most),
        ("swish, ResNet20 step / PyTorch's", find(*torch, "swish", "median"), 1.1, most),
        *(
            (
                f"{name}, gradient of {count} images / PyTorch's",
                find("gradient", str(count), "to PyTorch", name, "median"),
                1.0,
                most,
            )
            for name in ("relu", "swish")
            for count in GRADIENT_SIZES
        ),
        (
            f"plain ART / ours, PGD-50-10, {ATTACKED[-1]} images",
            find("attack", "by_n", str(ATTACKED[-1]), "speed-up", "median"),
            4,
            least,
        ),
    ]


def end_point_table(results):
    """Markdown, for benchmarks/README.md too."""
    lines = ["| ratio | aim | measured | |", "| --- | ---: | ---: | --- |"]
    for what, measured, limit, sense in end_points(results):
        if measured is None:
            shown, verdict = "–", "not measured"
        else:
            is_met = measured >= limit if sense == "at least" else measured <= limit
            shown, verdict = f"{measured:.3g}", "met" if is_met else "not met"
        lines.append(f"| {what} | {sense} {limit:g} | {shown} | {verdict} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- where a step goes


RESNET20_LAYERS = {"128x32x32x16": 7, "128x16x16x32": 6, "128x8x8x64": 6}  # activations of a shape
LAYER_OF = {"kaf": FAST, "kaf_free": MOVING}  # activation of a step: side of a layer


def step_profile(results):
    """Where the time goes that a ResNet20's training step with KAFs takes beyond one with Swish.

    The layers are timed alone, and added up. A step of fast adversarial training asks for the
    gradient in x twice, in the attack and in the training; for that in the parameters once.

    Returns:
        Rows (what, {activation: ms beyond Swish}); [] where the step, or the layers' gradient in x
        by itself, have not been measured.
    """
    try:
        shapes, whole = results["layer"]["shapes"], results["step"]["resnet20"]["sides"]
        found = {name: _beyond_swish(shapes, whole, name) for name in LAYER_OF}
    except KeyError:
        return []
    return [(what, {name: found[name][what] for name in found}) for what in found["kaf"]]


def _beyond_swish(shapes, whole, activation):
    def layers(what):
        sides = {shape: shapes[shape][what]["sides"] for shape in RESNET20_LAYERS}
        return sum(
            count * (sides[shape][side]["median_ms"] - sides[shape]["swish"]["median_ms"])
            for shape, count in RESNET20_LAYERS.items()
        )

    side = LAYER_OF[activation]
    forward, in_x, in_all = map(layers, PASSES)
    return {
        "forward, twice": 2 * forward,
        "gradient in x, twice": 2 * (in_x - forward),
        "gradient in the parameters": in_all - in_x,
        "the layers, together": in_x + in_all,
        "the whole step": whole[activation]["median_ms"] - whole["swish"]["median_ms"],
    }


def profile_table(results):
    """Markdown, for benchmarks/README.md too: ms, and percent of Swish's step."""
    profile = step_profile(results)
    if not profile:
        return "Not measured."
    swish = results["step"]["resnet20"]["sides"]["swish"]["median_ms"]
    lines = [
        f"| ms of a step beyond Swish's {swish:.0f} | kaf | kaf_free |",
        "| --- | ---: | ---: |",
    ]
    for what, found in profile:
        shown = [f"{ms:.0f} ({ms / swish:.0%})" for ms in found.values()]
        lines.append(f"| {what} | {' | '.join(shown)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- the command


WORKERS = ("peak-worker", "backend-worker")  # started by the sections


def parse(argv=None):
    parser = CommandParser(
        prog="benchmarks/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "section", nargs="?", default="all", choices=(*SECTIONS, "all", "table", *WORKERS),
        metavar="layer|backends|step|gradient|attack|all|table",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny: shows that it runs")
    parser.add_argument("--out", type=Path, help=f"default {RESULTS.relative_to(HERE.parent)}")
    parser.add_argument("--rounds", type=int, help="measurements of each side")
    parser.add_argument("--model", help="attack: model folder (the swish ResNet20 in models/)")
    parser.add_argument("--data-dir", help="attack: folder of cifar-10-batches-py")
    parser.add_argument(
        "--into",
        metavar="README.md",
        help="table: written there, between <!-- benchmarks --> and between <!-- profile -->",
    )
    for name in ("--shape", "--side"):  # peak-worker's
        kind = {"type": int, "nargs": "+"} if name == "--shape" else {}
        parser.add_argument(name, help=argparse.SUPPRESS, **kind)
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    if arguments.section in WORKERS:
        *shape, D = arguments.shape
        if arguments.section == "peak-worker":
            peak_worker(arguments.side, tuple(shape), D)
        else:
            backend_worker(tuple(shape), D, arguments.rounds)
        return 0
    return run_command("benchmarks/run.py", lambda: run(arguments))


def run(arguments):
    if arguments.rounds is not None and arguments.rounds < 1:
        raise InputError(f"--rounds must be at least 1, got {arguments.rounds}")
    out = arguments.out or (QUICK_RESULTS if arguments.quick else RESULTS)
    make_writable(out.parent)
    results = _read(out)
    if arguments.section == "table":  # of what was measured before
        tables = {"benchmarks": end_point_table(results), "profile": profile_table(results)}
        print(*tables.values(), sep="\n\n")
        if arguments.into:
            for name, table in tables.items():
                put_table_into(arguments.into, table, name)
        return
    measure = dict(zip(SECTIONS, (layer, backends, step, gradient, attack), strict=True))
    sections = SECTIONS if arguments.section == "all" else (arguments.section,)
    for name in sections:
        began = time.monotonic()
        measured = measure[name](arguments.quick, arguments)
        results[name] = measured | {
            "quick": arguments.quick,
            "machine": hardware(),
            "system": platform.platform(),
            "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began),
        }
        write_json(out, results)
    if arguments.section == "all":
        print(f"\n{end_point_table(results)}")
    print(f"\n{out}")


def _read(out):
    if not out.exists():
        return {}
    try:
        results = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = None
    if not isinstance(results, dict):
        raise InputError(f"{str(out)!r} is no results file of this program; name another --out")
    return results


if __name__ == "__main__":
    sys.exit(main())
