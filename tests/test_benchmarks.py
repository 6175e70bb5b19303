"""The benchmarks run and write what they promise; their figures are not judged here."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import keras
import pytest

from kaf_study.architectures import resnet

PATH = Path(__file__).parents[1] / "benchmarks" / "run.py"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("benchmarks_run", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_layer_benchmark_writes_its_section_and_keeps_the_others(run, tmp_path, capsys):
    out = tmp_path / "results.json"
    out.write_text('{"attack": {"kept": true}}')
    assert run.main(["layer", "--quick", "--rounds", "2", "--out", str(out)]) == 0
    assert "kaf plain compiled" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["attack"] == {"kept": True}
    section = results["layer"]
    assert section["quick"] and section["machine"] and section["date"] and section["versions"]
    sides = {"relu", "swish", "kaf", "kaf moving", "kaf plain", "kaf plain compiled"}
    (shape,) = section["shapes"].values()
    assert list(shape) == list(run.PASSES)
    for measured in (*shape.values(), *section["growth"].values()):
        assert set(measured["sides"]) == set(measured["to swish"]) == sides
        for side in measured["sides"].values():
            low, high = side["quartiles_ms"]
            assert 0 < low <= side["median_ms"] <= high and side["rounds"] >= 2
        assert measured["to swish"]["swish"]["median"] == 1

    kept = {name: row["kept"] for name, row in section["memory"]["sides"].items()}
    assert kept["kaf"] == pytest.approx(1, abs=0.05) and kept["swish"] == pytest.approx(1, abs=0.05)
    assert kept["kaf plain"] > 2


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_are_measured_where_they_are_installed(run, backend, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert run.main(["backends", "--quick", "--out", str(out)]) == 0
    section = json.loads(out.read_text())["backends"]
    if importlib.util.find_spec(backend) is None:
        assert backend not in section and f"{backend} is not installed" in capsys.readouterr().out
        return
    found = section[backend]
    assert found["to kaf"]["kaf"]["median"] == 1 and {"kaf", "kaf plain"} <= set(found["sides"])
    assert 1 <= found["kept"]["kaf"] < 2 < found["kept"]["kaf plain"]


def test_gradients_are_taken_in_the_batches_of_attacks(run, tmp_path):
    out = tmp_path / "results.json"
    assert run.main(["gradient", "--quick", "--out", str(out)]) == 0
    assert {"relu", "kaf"} <= set(json.loads(out.read_text())["gradient"]["3"]["sides"])
    sizes = {name: len(run.keras_gradient(name, 17)()[1]) for name in ("relu", "kaf")}
    assert sizes == {"relu": 18, "kaf": 24}  # in 64ths, and where XLA compiles in fewer steps


def test_sides_are_called_in_turn(run):
    calls = []
    times = run.alternate({name: lambda n=name: calls.append(n) for name in "AB"}, 3, warm_up=0)
    assert calls == list("AB" * 4)  # the first calls are timed apart
    assert len(times["A"]["seconds"]) == 3


def test_ratio_is_the_median_of_ratios_within_rounds(run):
    times = {"a": {"seconds": [2, 40, 6]}, "b": {"seconds": [1, 10, 2]}}
    assert run.ratio(times, "a", "b")["median"] == 3


def test_end_points_are_judged_in_the_right_direction(run):
    results = {
        "step": {"resnet20": {"to swish": {"kaf": {"median": 1.5}, "kaf_free": {"median": 1.8}}}},
        "attack": {"by_n": {str(run.ATTACKED[-1]): {"speed-up": {"median": 5.0}}}},
    }
    verdicts = [
        line.split(" | ")[-1].strip(" |") for line in run.end_point_table(results).splitlines()
    ]
    assert verdicts[2:] == ["not measured"] * 9 + ["not met", "met"] + ["not measured"] * 8 + [
        "met"
    ]


def test_what_a_step_takes_beyond_swish_is_added_up_over_its_layers(run):
    """Beyond Swish: 2 ms a layer forward, 3 for the gradient in x, 5 for the parameters'."""

    def sides(kaf, moving):
        medians = {"swish": 1.0, "kaf": 1.0 + kaf, "kaf moving": 1.0 + moving}
        return {"sides": {name: {"median_ms": ms} for name, ms in medians.items()}}

    passes = dict(zip(run.PASSES, (sides(2, 20), sides(5, 50), sides(10, 100)), strict=True))
    whole = {"swish": 400.0, "kaf": 400.0 + 320, "kaf_free": 400.0 + 3000}
    results = {
        "layer": {"shapes": dict.fromkeys(run.RESNET20_LAYERS, passes)},
        "step": {"resnet20": {"sides": {name: {"median_ms": ms} for name, ms in whole.items()}}},
    }
    found = dict(run.step_profile(results))
    layers = sum(run.RESNET20_LAYERS.values())
    assert found["forward, twice"] == {"kaf": 4 * layers, "kaf_free": 40 * layers}
    assert found["gradient in x, twice"] == {"kaf": 6 * layers, "kaf_free": 60 * layers}
    assert found["gradient in the parameters"] == {"kaf": 5 * layers, "kaf_free": 50 * layers}
    assert found["the layers, together"] == {"kaf": 15 * layers, "kaf_free": 150 * layers}
    assert found["the whole step"] == {"kaf": 320, "kaf_free": 3000}
    assert "| the whole step | 320 (80%) | 3000 (750%) |" in run.profile_table(results)
    del passes["forward and gradient in x"]
    assert run.step_profile(results) == []


def test_the_layers_of_a_step_are_those_of_a_resnet20(run):
    network = resnet("swish")
    activations = [layer for layer in network.layers if isinstance(layer, keras.layers.Activation)]
    shapes = ["x".join(map(str, (128, *layer.output.shape[1:]))) for layer in activations]
    assert Counter(shapes) == run.RESNET20_LAYERS


def test_errors_are_one_line(run, tmp_path, capsys):
    out = tmp_path / "results.json"
    out.write_text("[]")
    assert run.main(["layer", "--quick", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
