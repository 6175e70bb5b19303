"""The state of an unfinished training in one file, replaced at once after each epoch."""

import json
import math
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from kaf_study import InputError
from kaf_study.files import check_file, replacing
from kaf_study.records import HISTORY_COLUMNS, CheckpointState, checked, hardware, versions

MAX_BYTES = 2 * 1024**3  # a ResNet20's checkpoint has 3 MB
NEEDED_COLUMNS = {*HISTORY_COLUMNS, "seconds"}


class Checkpoint(keras.callbacks.Callback):
    """Keeps all variables of a run, and its history.

    keras.callbacks.BackupAndRestore keeps neither the history nor the state of the random
    generators, and a kill while it writes leaves a torn backup.

    On creation the model takes over what the file holds, if there is one.

    Args:
        dataset: dict that names the training images; a checkpoint of other images is refused.
        shapes_sha256: of the network whose learned shapes this one has; one of others is refused.
        writes: whether this process keeps the file; of several workers one does.

    Attributes:
        history: list of rows (dict), one for each finished epoch.
        stopped: the epoch (from 0) in which the probe stopped the training, or None.
        processes: `records.ProcessRecord` of each process that trained.
    """

    def __init__(
        self,
        path: Path,
        model: keras.Model,
        dataset: dict[str, Any],
        *,
        shapes_sha256: str | None = None,
        writes: bool = True,
    ):
        super().__init__()
        self.path = path
        self.dataset = dataset
        self.shapes_sha256 = shapes_sha256
        self.writes = writes
        self.history: list[dict[str, float]] = []
        self.stopped: int | None = None
        self.processes: list[dict[str, Any]] = []
        if path.exists():
            state, values = read_checkpoint(path)
            if state.get("dataset", dataset) != dataset:  # not kept by earlier versions
                raise InputError(
                    f"{path} is of a run on other images of {dataset['name']}. Give the "
                    "--data-dir it was begun with, name another --out, or --force to start anew."
                )
            if state.get("shapes_sha256", shapes_sha256) != shapes_sha256:
                raise InputError(
                    f"{path} is of a run with the shapes of another network than shapes_of now "
                    "holds. Restore that network, name another --out, or --force to start anew."
                )
            variables = self._variables(model)
            if [v.shape for v in values] != [tuple(v.shape) for v in variables]:
                raise InputError(
                    f"{path} is not a checkpoint of this network (its variables have other "
                    "shapes); --force to start anew."
                )
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
            self.history, self.stopped = state["history"], state["stopped"]
            self.processes = state.get("processes", [])

    @staticmethod
    def _variables(model: keras.Model) -> list[Any]:
        # model.variables: weights, batch-norm statistics and states of the random generators
        return [*model.variables, *model.optimizer.variables]

    def on_train_begin(self, logs: dict | None = None) -> None:
        here: dict[str, Any] = {"versions": versions(), "hardware": hardware()}
        if (replicas := tf.distribute.get_strategy().num_replicas_in_sync) > 1:
            here["replicas"] = replicas
        self.processes.append({"first_epoch": len(self.history)} | here)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        row = {"epoch": epoch, **{k: float(v) for k, v in (logs or {}).items()}}
        values = [keras.ops.convert_to_numpy(v) for v in self._variables(self.model)]
        # The last batch of an epoch can spoil the weights without a trace in the loss.
        if not (math.isfinite(row["loss"]) and are_finite(values)):
            raise InputError(
                f"The training diverged in epoch {epoch + 1} (loss {row['loss']:.4g}): the loss or "
                "the weights are no longer finite. Start anew with a lower --lr-max and --force; "
                "until then the checkpoint of the epoch before is kept."
            )
        row["learning_rate"] = float(self.model.optimizer.learning_rate)
        row["seconds"] = round(time.perf_counter() - self.started, 2)
        self.history.append(row)
        self.stopped = epoch if self.model.stop_training else None
        if not self.writes:
            return
        state = {name: getattr(self, name) for name in CheckpointState.__struct_fields__}
        with replacing(self.path) as temporary:
            np.savez(
                temporary,
                state=json.dumps(state),
                **{f"variable_{i}": value for i, value in enumerate(values)},
            )

    def last_good_row(self) -> dict[str, float]:
        """The row of the epoch whose weights (of which it may be the mean) the model has."""
        return self.history[-1 if self.stopped is None else -2]


def are_finite(values: list[np.ndarray]) -> bool:
    return all(np.isfinite(value).all() for value in values)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The state (`CheckpointState`) and the values of all variables, in their order.

    Raises:
        InputError: for what is no checkpoint, damaged, or has weights that are not finite.
    """
    check_file(path, MAX_BYTES)
    try:
        with np.load(path, allow_pickle=False) as stored:
            if sum(entry.file_size for entry in stored.zip.infolist()) > MAX_BYTES:
                raise ValueError("it unpacks to more than a checkpoint has")
            text = str(stored["state"])
            values = [stored[f"variable_{i}"] for i in range(len(stored.files) - 1)]
            finite = are_finite(values)
    except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file
        raise InputError(
            f"{path} is not a checkpoint that can be read ({type(error).__name__}); "
            "--force to start anew."
        ) from None
    state = checked(text.encode(), CheckpointState, path)
    rows = state["history"]
    is_counted = [row.get("epoch") for row in rows] == list(range(len(rows)))
    is_complete = len(rows) > 0 and all(row.keys() >= NEEDED_COLUMNS for row in rows)
    can_stop = state["stopped"] in (None, *range(1, len(rows))[-1:])
    if not (finite and is_counted and is_complete and can_stop):
        reason = "its history is damaged" if finite else "its weights are not all finite"
        raise InputError(f"{path} cannot be resumed: {reason}; --force to start anew.")
    return state, values
