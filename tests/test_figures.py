"""Figures and tables, drawn from result files made up here."""

import json

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from fabricated import result, training_record, write_training
from matplotlib.colors import to_hex

from activationsf import ACTIVATIONS, Kaf, kaf_layers
from kaf_study import InputError, figures
from kaf_study.activations import ACTIVATION_COLORS, ACTIVATION_LABELS, STUDIED, activation_of
from kaf_study.attacks.registry import AttackSettings
from kaf_study.figures import __main__ as command
from kaf_study.figures.kafs import activation_values
from kaf_study.model_folder import COPIES, common_training, model_labels, trained_models
from kaf_study.records import Evaluation, read_results

CLEAN = {"relu": 0.77, "swish": 0.79, "kaf": 0.78}
ROBUST = {"relu": 0.36, "swish": 0.41, "kaf": 0.39}


def make_model(root, activation, *, clean=None, robust=None, n=1000, seed=0, sha="ab"):
    """A model with results of PGD-50-10; of predicted labels 0.1 above the robust accuracy."""
    settings = {"dataset": "cifar10", "activation": activation, "seed": seed}
    folder = root / f"cifar10_resnet20_{activation}_seed{seed}"
    write_training(folder, training_record(**settings))
    clean = CLEAN.get(activation, 0.7) if clean is None else clean
    robust = ROBUST.get(activation, 0.3) if robust is None else robust
    numbers = np.arange(n)
    stands = (numbers < round(robust * n)) | (numbers >= round((clean + 0.1) * n))
    for labels in ("true", "predicted"):
        result(
            numbers < round(clean * n),
            stands,
            AttackSettings(labels=labels),
            model=folder.name,
            model_sha256=sha,
        ).write(folder / "robustness")
    return folder


@pytest.fixture
def models(tmp_path):
    for activation in ("swish", "kaf", "relu"):
        make_model(tmp_path / "models", activation)
    yield tmp_path / "models"
    plt.close("all")


def points(ax):
    """The markers drawn, {(x, y): (colour, marker)}."""
    return {
        (line.get_xdata()[0], line.get_ydata()[0]): (to_hex(line.get_color()), line.get_marker())
        for line in ax.lines
        if len(line.get_xdata()) == 1 and line.get_marker() not in ("|", "_", "None")
    }


def test_every_activation_has_its_own_color_and_label():
    assert set(ACTIVATIONS) <= set(STUDIED)
    assert len(set(ACTIVATION_COLORS.values())) == len(set(ACTIVATION_LABELS.values()))
    assert len(set(ACTIVATION_COLORS.values())) == len(STUDIED)
    for name, label in ACTIVATION_LABELS.items():
        assert activation_of(label) == activation_of(f"{label}, seed 1") == name


def test_scatter_places_each_model_at_clean_and_robust_percent(models):
    ax = figures.accuracy_robustness_scatter(read_results(models))
    drawn = points(ax)
    expected = {(100 * CLEAN[a], 100 * ROBUST[a]): ACTIVATION_COLORS[a].lower() for a in CLEAN}
    assert {place: color for place, (color, _) in drawn.items()} == pytest.approx(expected)
    assert drawn[77.0, 36.0][1] == "d" and drawn[78.0, 39.0][1] == "P"
    texts = [text.get_text() for text in ax.texts]
    assert {"ReLU", "Swish", "KAF"} <= set(texts)
    assert any("first 1000" in text and "true labels" in text for text in texts)
    assert "%" in ax.get_xlabel() and "%" in ax.get_ylabel()


def test_error_bars_are_one_standard_error_in_each_direction(models):
    ax = figures.accuracy_robustness_scatter(read_results(models / "cifar10_resnet20_kaf_seed0"))
    (bars,) = ax.containers
    across, along = (c.get_segments()[0] for c in bars.lines[2])
    clean, robust = (100 * np.sqrt(p * (1 - p) / 1000) for p in (0.78, 0.39))
    np.testing.assert_allclose(across[:, 0], [78 - clean, 78 + clean])
    np.testing.assert_allclose(along[:, 1], [39 - robust, 39 + robust])


def test_labels_do_not_cover_each_other(tmp_path):
    activations = [name for name, row in STUDIED.items() if row.published or name == "kwta"]
    for i, activation in enumerate(activations):
        make_model(tmp_path, activation, clean=0.78 + 0.001 * i, robust=0.4 + 0.002 * (i % 3))
    ax = figures.accuracy_robustness_scatter(read_results(tmp_path))
    names = [ACTIVATION_LABELS[name] for name in activations]
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text() in names]
    assert len(boxes) == len(names) == 9
    overlapping = [a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(overlapping)
    plt.close("all")


def test_robust_above_clean_is_flagged_with_true_labels_only(tmp_path):
    make_model(tmp_path, "kaf", clean=0.3, robust=0.3)
    results = read_results(tmp_path).assign(clean_accuracy=0.29)  # as no rows can give it
    with pytest.warns(UserWarning, match="impossible"):
        ax = figures.accuracy_robustness_scatter(results)
    assert any("impossible" in text.get_text() for text in ax.texts)
    ax = figures.accuracy_robustness_scatter(results, labels="predicted")
    assert not any("impossible" in text.get_text() for text in ax.texts)
    assert "not a robust accuracy" in ax.get_ylabel()
    plt.close("all")


def test_lines_reach_their_labels_at_another_resolution(tmp_path):
    for i, activation in enumerate(("relu", "elu", "swish", "kaf", "kaf_elu")):
        make_model(tmp_path, activation, clean=0.78 + 0.0002 * i, robust=0.4 + 0.0001 * i)
    ax = figures.accuracy_robustness_scatter(read_results(tmp_path))
    ax.figure.set_dpi(250)
    ax.figure.canvas.draw()
    lines = [text.arrow_patch for text in ax.texts if getattr(text, "arrow_patch", None)]
    boxes = [
        text.get_window_extent()
        for text in ax.texts
        if text.get_text() in ACTIVATION_LABELS.values()
    ]
    assert lines and len(boxes) == 5
    for line in lines:
        ends = line.get_transform().transform(line.get_path().vertices)[[0, -1]]
        gaps = [np.hypot(*(end - np.clip(end, box.min, box.max))) for box in boxes for end in ends]
        assert min(gaps) < 6  # pixels; Matplotlib leaves some at the end of an arrow


def test_scatter_refuses_to_mix_protocols(models):
    make_model(models, "kaf", n=200)
    with pytest.raises(InputError, match=r"several protocols.*pgd-50-10-true-n200"):
        figures.accuracy_robustness_scatter(read_results(models))
    ax = figures.accuracy_robustness_scatter(read_results(models), protocol="pgd-50-10-true-n200")
    assert len(points(ax)) == 1


def test_results_of_other_weights_are_refused(tmp_path):
    make_model(tmp_path, "kaf", sha="other")
    with pytest.raises(InputError, match="other weights"):
        figures.accuracy_robustness_scatter(read_results(tmp_path))


def test_models_that_differ_in_seed_say_so(tmp_path):
    make_model(tmp_path, "kaf", seed=0)
    make_model(tmp_path, "kaf", seed=1)
    labels = model_labels(trained_models(tmp_path))
    assert sorted(labels.values()) == ["KAF, seed 0", "KAF, seed 1"]


def test_training_curves_show_every_model_in_its_color(models):
    histories = {model.activation: model.history for model in trained_models(models)}
    figure = figures.training_curves(histories)
    loss, clean, *_ = figure.axes
    assert [line.get_color() for line in loss.lines] == [
        ACTIVATION_COLORS[name] for name in ("relu", "swish", "kaf")
    ]
    np.testing.assert_allclose(clean.lines[0].get_ydata(), [10, 20, 30])
    np.testing.assert_array_equal(clean.lines[0].get_xdata(), [1, 2, 3])


def test_lines_labelled_by_folder_have_the_color_of_their_activation(models):
    (kaf,) = trained_models(models / "cifar10_resnet20_kaf_seed0")
    name = kaf.folder.name
    curve = pd.Series([1.0, 2.0], [1, 2])
    accuracy = {"eps": [0, 8], "accuracy": [0.8, 0.4], "n": 100}
    points = pd.DataFrame({"x": 0.5, "low": 0.4, "high": 0.6, "y": 0.4, "error": 0.1}, [name])
    steps = pd.DataFrame({"step": range(3), "loss": 2.0, "gradient_norm": 1.0})
    drawn = [
        figures.training_curves({name: figures.Line(kaf.history, "kaf")}).axes[0],
        figures.by_layer({name: figures.Line(curve, "kaf")}, ylabel="y"),
        figures.robustness_curve({name: figures.Line(accuracy, "kaf")}),
        figures.training_steps({name: figures.Line(steps, "kaf")}).axes[1],
        figures.movement_and_robustness(points.assign(activation="kaf"), xlabel="x"),
    ]
    assert {to_hex(ax.lines[0].get_color()) for ax in drawn} == {ACTIVATION_COLORS["kaf"].lower()}
    for ax in drawn:
        assert ax.get_legend_handles_labels()[1] == [name]
    several = pd.concat([points] * 3).assign(activation=["kaf", "relu", "kaf"])
    several.index = ["first", "second", "third"]
    ax = figures.movement_and_robustness(several, xlabel="x")
    assert ax.get_legend_handles_labels()[1] == ["KAF (2)", "second"]
    plain = figures.by_layer({name: curve}, ylabel="y")  # whose activation nobody said
    assert to_hex(plain.lines[0].get_color()) not in map(str.lower, ACTIVATION_COLORS.values())


def test_a_logarithmic_axis_within_a_decade_has_plain_numbers():
    ax = figures.by_layer({"relu": pd.Series([7.98, 8.09])}, ylabel="norm", log=True)
    ax.figure.canvas.draw()
    texts = [label.get_text() for label in ax.yaxis.get_minorticklabels()]
    assert "8.02" in texts and not any("times" in text for text in texts)


def test_curves_name_the_loss_of_their_kind_of_training(models, tmp_path):
    """An ordinary training's loss is of unperturbed batches and has the l2 in it."""

    def drawn(**epsilons):
        for activation, epsilon in epsilons.items():
            path = models / f"cifar10_resnet20_{activation}_seed0" / "training.json"
            record = json.loads(path.read_text())
            record["settings"]["epsilon"] = epsilon
            path.write_text(json.dumps(record))
        folders = [models / f"cifar10_resnet20_{activation}_seed0" for activation in epsilons]
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "save", lambda figure, path: seen.append(figure))
            assert command.main(["curves", *map(str, folders), "--out", "unused.png"]) == 0
        (figure,) = seen
        return figure.axes[0].get_ylabel(), figure.get_suptitle()

    loss, title = drawn(relu=8 / 255, kaf=8 / 255)
    assert loss == "training loss (perturbed batches)" and "fast adversarial training" in title
    loss, title = drawn(relu=0, kaf=0)
    assert loss == "training loss (with l2)" and "ordinary training" in title
    loss, title = drawn(relu=0, kaf=8 / 255)
    assert loss == "training loss (each its own)" and "(3 epochs of training)" in title


def test_a_loss_that_is_not_finite_is_not_smoothed_away():
    history = pd.DataFrame({"step": range(3), "loss": [2.3, 2.2, np.nan], "gradient_norm": 1.0})
    left, _ = figures.training_steps({"kaf": history}).axes[:2]
    drawn = left.lines[0].get_ydata()
    np.testing.assert_allclose(drawn[:2], [2.3, 2.25])
    assert np.isnan(drawn[2])


@pytest.mark.parametrize("log", [True, False])
def test_what_is_not_finite_stands_above_all_lines_and_says_whose_it_is(log):
    layers = np.arange(1, 11)
    one, other = pd.Series(10.0**-layers, layers), pd.Series(3 * 10.0**-layers, layers)
    one[:4], other[:2] = np.inf, np.nan
    ax = figures.by_layer({"kaf, a": one, "kaf, b": other}, ylabel="norm", log=log)
    ax.figure.canvas.draw()
    lines, crosses = ax.lines[:2], ax.lines[2:]
    highest = max(ax.transData.transform((1, np.nanmax(line.get_ydata())))[1] for line in lines)
    lowest = min(ax.transAxes.transform((0, cross.get_ydata()[0]))[1] for cross in crosses)
    assert lowest > highest + 3
    assert [list(cross.get_xdata()) for cross in crosses] == [[1, 2, 3, 4], [1, 2]]
    assert [text.get_text() for text in ax.texts] == ["a: not finite", "b: not finite"]


def test_a_figure_that_cannot_be_written_is_said_in_one_line(models, tmp_path, capsys):
    (tmp_path / "d.png").mkdir()
    assert command.main(["curves", str(models), "--out", str(tmp_path / "d.png")]) == 2
    error = capsys.readouterr().err
    assert "cannot write" in error and error.count("\n") == 1


def kaf_model(**kwargs):
    inputs = keras.Input((4, 4, 2))
    x = Kaf(D=5, **kwargs)(inputs)
    x = keras.layers.Flatten()(x)
    x = Kaf(D=5, **kwargs)(keras.layers.Dense(3)(x))
    return keras.Model(inputs, keras.layers.Dense(2)(x), name="net")


def test_kaf_shapes_draws_the_function_of_every_layer_over_its_start():
    model = kaf_model(ridge="elu")
    layer = kaf_layers(model)[0]
    start = activation_values(layer, np.linspace(-4, 4, 201))
    layer.alpha.assign(2 * layer.alpha)
    figure = figures.kaf_shapes(model)
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["1: 4×4, 2 ch.", "2: 3 ch."]
    _, *trained, begun = panels[0].lines
    for channel, line in enumerate(trained):
        np.testing.assert_allclose(line.get_ydata(), 2 * start[:, channel], rtol=1e-5, atol=1e-6)
        assert line.get_color() == ACTIVATION_COLORS["kaf_elu"]
    np.testing.assert_allclose(begun.get_ydata(), start[:, 0], rtol=1e-5, atol=1e-6)
    plt.close(figure)


def test_kaf_shapes_draws_a_random_start_only_where_it_is_known():
    model, initial = kaf_model(), kaf_model()
    without = figures.kaf_shapes(model).axes[0].lines
    both = figures.kaf_shapes(model, initial=initial).axes[0].lines
    assert len(both) == len(without) + 2
    plt.close("all")


def test_shapes_of_several_models_stand_in_rows_over_their_own_starts():
    models = {"kaf_elu": (kaf_model(ridge="elu"), None), "kaf": (kaf_model(), kaf_model())}
    figure = figures.kaf_shapes_side_by_side(models, panels=1, channels=2)
    ridge, random = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes] == ["kaf_elu", "kaf"]
    assert (len(ridge.lines), len(random.lines)) == (1 + 2 + 1, 1 + 2 + 2)  # with y = 0
    trained = activation_values(kaf_layers(models["kaf"][0])[0], random.lines[1].get_xdata())
    np.testing.assert_allclose(random.lines[1].get_ydata(), trained[:, 0], rtol=1e-5, atol=1e-6)
    shallower = keras.Sequential([keras.Input((2,)), Kaf()])
    with pytest.raises(InputError, match="same number of Kaf layers"):
        figures.kaf_shapes_side_by_side(models | {"kaf, one layer": (shallower, None)})
    plt.close("all")


def test_kaf_shapes_says_that_there_is_no_kaf():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(InputError, match="no Kaf layers"):
        figures.kaf_shapes(model)


def test_models_that_differ_in_nothing_named_are_named_by_their_folders(tmp_path):
    for number in (1, 2):
        make_model(tmp_path / str(number), "swish").rename(tmp_path / f"pilot{number}")
    labels = model_labels(trained_models(tmp_path))
    assert sorted(labels.values()) == ["Swish, pilot1", "Swish, pilot2"]


def test_titles_say_what_the_models_were_trained_on(models):
    one, *_ = trained_models(models)
    assert common_training([one]) == "ResNet20 on CIFAR-10 (3 epochs of fast adversarial training)"
    copy, *_ = COPIES
    one.record["dataset"] = {"validation_fingerprint": copy}
    one.settings["epsilon"] = 0.0
    ordinary = "ResNet20 on a JPEG copy of CIFAR-10 (3 epochs of ordinary training)"
    assert common_training([one]) == ordinary
    assert common_training(trained_models(models)).startswith("ResNet20 on CIFAR-10")


def test_survival_curves_recount_the_rows():
    images = pd.DataFrame(
        {
            "label": [0] * 5,
            "clean_prediction": [0, 0, 0, 0, 1],
            "adversarial_prediction": [1, 1, 1, 0, 1],
            "restart": pd.array([1, 1, 2, None, None], dtype="Int64"),
            "iteration": pd.array([0, 3, 2, None, None], dtype="Int64"),
        }
    )
    result = Evaluation(images, {"attack": {"steps": 4, "restarts": 2}})
    first, second = figures.survival_curves(result).axes
    np.testing.assert_allclose(first.lines[0].get_ydata(), [60, 60, 60, 40, 40])
    np.testing.assert_allclose(second.lines[0].get_ydata(), [80, 40, 20])


def test_smallest_perturbations_are_those_of_the_rows(models, tmp_path):
    """Of 8 images 2 are wrong when clean, 2 were never felled, 4 fell at 1, 2, 3 and 8 of 255."""
    is_clean, stands = np.arange(8) < 6, np.isin(np.arange(8), (0, 5))
    settings = AttackSettings("deepfool-linf", epsilon=1.0)
    for name in ("relu", "kaf"):
        made = result(is_clean, stands, settings, model=f"cifar10_resnet20_{name}_seed0")
        norms = {"relu": [0, 3, 1, 8, 2, 0, 0, 0], "kaf": [0, 90, 90, 90, 2, 0, 0, 0]}[name]
        made.images["linf"] = np.array(norms) / 255
        made.write(models / f"cifar10_resnet20_{name}_seed0" / "robustness")
    ax = figures.smallest_perturbations(read_results(models))
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["ReLU: 5.5", "KAF: 90.0"]  # of six: 1, 2, 3, 8 and two without an end
    relu = lines["ReLU: 5.5"]
    assert to_hex(relu.get_color()) == ACTIVATION_COLORS["relu"]
    ends = np.array([place for place in zip(*relu.get_data(), strict=True) if place[0] < np.inf])
    expected = [(0, 100), (0, 87.5), (0, 75), (1, 62.5), (2, 50), (3, 37.5), (8, 25)]
    np.testing.assert_allclose(ends, expected, rtol=1e-8)
    out = tmp_path / "perturbations.png"
    assert command.main(["perturbations", str(models), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_ridge_starts_are_drawn_over_their_targets():
    figure = figures.kaf_starts(targets=("elu",))
    by_label = {line.get_label(): line for line in figure.axes[1].lines}
    x = by_label["elu"].get_xdata()
    inside = np.abs(x) <= 3
    np.testing.assert_allclose(
        by_label["KAF_elu"].get_ydata()[inside], by_label["elu"].get_ydata()[inside], atol=0.02
    )
    assert len(figure.axes[0].lines) == 6


def test_derivatives_stand_beside_their_functions():
    keras.utils.set_random_seed(0)
    kaf = Kaf(alpha_initializer=keras.initializers.RandomNormal(stddev=0.5))
    kaf.build((None, 2))
    layers = {name: keras.layers.Activation(name) for name in ("relu", "swish")}
    figure = figures.functions_and_derivatives(layers | {"kaf": kaf}, channel=1)
    left, right = ({line.get_label(): line for line in ax.lines} for ax in figure.axes)
    assert set(left) == set(right) == {"ReLU", "Swish", "KAF"}
    x, slope = right["ReLU"].get_data()
    np.testing.assert_array_equal(slope[x < -0.02], 0)
    np.testing.assert_array_equal(slope[x > 0.02], 1)
    assert np.isnan(slope).sum() == 1  # the jump is not drawn as a line
    sigmoid = 1 / (1 + np.exp(-x))
    np.testing.assert_allclose(
        right["Swish"].get_ydata(), sigmoid * (1 + x * (1 - sigmoid)), atol=1e-5
    )
    second = activation_values(kaf, x)[:, 1]
    np.testing.assert_allclose(left["KAF"].get_ydata(), second, atol=1e-6)
    np.testing.assert_allclose(right["KAF"].get_ydata(), np.gradient(second, x), atol=0.02)
    assert to_hex(left["KAF"].get_color()) == ACTIVATION_COLORS["kaf"].lower()


def test_image_rows_have_one_image_in_each_place():
    images = np.random.default_rng(0).random((3, 4, 4, 3))
    figure = figures.image_rows({"one": images, "two": images[:2]}, ["a", "b", "c"])
    shown = [len(ax.images) for ax in figure.axes]
    assert shown == [1, 1, 1, 1, 1, 0]
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["one", "two"]


def test_examples_show_what_the_model_said_and_how_sure_it_was():
    x = np.full((2, 4, 4, 3), 0.5, "float32")
    x_adv = x + np.float32(8 / 255)
    logits = np.log(np.array([[0.9, 0.1], [0.2, 0.8]], "float32"))
    figure = figures.adversarial_examples(
        x, x_adv, [0, 1], logits, logits[::-1], ("cat", "dog"), [3, 7]
    )
    axes = np.array(figure.axes).reshape(2, 3)
    assert [ax.get_xlabel() for ax in axes[0]] == ["cat, 90%", "", "dog, 80%"]
    assert axes[1, 0].get_ylabel() == "test image 7\ndog"
    np.testing.assert_allclose(axes[0, 1].images[0].get_array(), 1)  # the largest shift: white
    assert "8/255" in axes[0, 1].get_title()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scatter", "{root}/nowhere", "--out", "{root}/a.png"], "not a folder"),
        (["scatter", "{root}/empty", "--out", "{root}/a.png"], "no results"),
        (["perturbations", "{root}/models", "--out", "{root}/a.png"], "no results of deepfool"),
        (["curves", "{root}/empty", "--out", "{root}/a.png"], "no finished model"),
        (["shapes", "{root}/empty", "--out", "{root}/a.png"], "no finished model with KAFs"),
        (["curves", "{root}/models", "--out", "{root}/a.xyz"], "end in .png"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(models, capsys, arguments, message):
    root = models.parent
    (root / "empty").mkdir()
    assert command.main([a.format(root=root) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_command_writes_png_files(models, tmp_path):
    for name in ("scatter", "curves"):
        out = tmp_path / "new" / f"{name}.png"
        assert command.main([name, str(models), "--out", str(out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")
