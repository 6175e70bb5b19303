"""Several devices, or several processes, train as one does."""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from kaf_study import InputError, distributed, train

# Batches of 32 and 8 images: a network with batch norm, whose statistics are of all of them.
TRAINING = """
import sys
import kaf_study  # before TensorFlow is imported
import keras, tensorflow as tf
from kaf_study import distributed, train

how, out = sys.argv[1:]
cpu = tf.config.list_physical_devices("CPU")[0]
if how == "mirrored":
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
else:
    strategy = distributed.strategy_named("multiworker" if how == "multiworker" else None)

def tiny(name, activation, **kwargs):
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(4, 3)(keras.layers.AveragePooling2D(4)(inputs))
    x = keras.layers.Activation(activation)(keras.layers.BatchNormalization()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)), name=name)

class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt

train.build = tiny
if how == "interrupted":
    train.CurvatureProbe = lambda *_: Interrupt()
settings = {"dataset": "digits", "activation": "swish", "train_n": 40, "batch_size": 32}
config = train.TrainConfig(**settings, epochs=2)
train.train(config, out, verbose=0, strategy=strategy)
"""


def start(how, out, **environment):
    command = [sys.executable, "-c", TRAINING, how, str(out)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes):
    for process in processes:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-2000:]


def assert_same_training(out, expected):
    """The record of `out`, whose weights are those of another folder."""
    records = [json.loads((folder / "training.json").read_text()) for folder in (out, expected)]
    assert records[0]["settings"] == records[1]["settings"]
    models = [keras.saving.load_model(folder / "model.keras") for folder in (out, expected)]
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    return records[0]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "model"
    finish(start("one", out))
    return out


def test_two_devices_train_as_one(one_device, tmp_path):
    finish(start("mirrored", tmp_path / "two"))
    record = assert_same_training(tmp_path / "two", one_device)
    assert [process.get("replicas") for process in record["processes"]] == [2]


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.mark.slow
def test_two_workers_go_on_where_one_process_was_interrupted(one_device, tmp_path):
    out = tmp_path / "model"
    interrupted = start("interrupted", out)
    assert "KeyboardInterrupt" in interrupted.communicate(timeout=300)[1]
    assert not (out / "model.keras").exists()

    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    finish(
        *(
            start(
                "multiworker",
                out,
                TF_CONFIG=json.dumps({"cluster": {"worker": workers}, "task": task}),
            )
            for task in tasks
        )
    )
    record = assert_same_training(out, one_device)
    assert [process["first_epoch"] for process in record["processes"]] == [0, 1]
    assert [process.get("replicas") for process in record["processes"]] == [None, 2]


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("mirrored", None, "several GPUs; TensorFlow sees 0"),
        ("multiworker", None, "needs TF_CONFIG"),
        ("multiworker", "[]", "needs TF_CONFIG"),
        ("multiworker", '{"cluster": {"worker": 5}, "task": {}}', "needs TF_CONFIG"),
        ("tpu", None, "mirrored, multiworker"),
    ],
)
def test_a_strategy_that_is_not_there_is_refused(name, config, message, monkeypatch, tmp_path):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(InputError, match=message):
        distributed.strategy_named(name)
    command = ["--dataset", "digits", "--strategy", name, "--out", str(tmp_path / "model")]
    assert train.main(command) == 2
    assert not (tmp_path / "model").exists()
