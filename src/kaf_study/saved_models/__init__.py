"""Open any saved classifier as one thing that can be attacked: a function from images to logits.

A model may come as a model folder of this project, a `.keras` or `.h5` file (of Keras 3 or 2), a
SavedModel folder or a `.zip` of one of these, ours or foreign. Nothing found in it is trusted:
archives are unpacked only inside their own temporary folder (`archives`), pickled code is not run
(`keras_files`), and whatever cannot be attacked honestly is refused with the reason, as an
`InputError` of one line.

Attacks need logits: a saturated softmax has a zero gradient, which looks like robustness. What
squashes them is taken off (`outputs`), in a SavedModel inside its graph (`graphs`); images are
given in the range the model was trained on (`pixel_range`).
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kaf_study import InputError
from kaf_study.files import file_sha256
from kaf_study.model_folder import ModelFolder
from kaf_study.records import read_training
from kaf_study.saved_models.archives import (
    folder_sha256,
    refuse_oversized,
    unpack,
)
from kaf_study.saved_models.graphs import load_saved_model
from kaf_study.saved_models.keras_files import (
    KERAS_SUFFIXES,
    Network,
    import_modules,
    load_keras,
)
from kaf_study.saved_models.original import TWIN, twin
from kaf_study.saved_models.outputs import (
    HOW_ATTACKED,
    LOGITS,
    PROBABILITIES,
    SQUASHED,
    logits_of,
)
from kaf_study.saved_models.pixel_range import PixelRange, Rescaled, refuse_other_range

__all__ = [
    "HOW_ATTACKED",
    "LOGITS",
    "PROBABILITIES",
    "SQUASHED",
    "LoadedModel",
    "Network",
    "Opening",
    "PixelRange",
    "folder_sha256",
    "logits_of",
    "open_model",
    "unpack",
]

KINDS = "a model folder, a .keras or .h5 file, a SavedModel folder, or a .zip of one of these"


@dataclass(frozen=True)
class Opening:
    """What a file does not say of itself.

    Attributes:
        imports: names of modules that define layers of the user's own.
        pixel_range: what the model was trained on; None: [0, 1].
        network: what a file of weights alone belongs to.
    """

    imports: tuple[str, ...] = ()
    pixel_range: PixelRange | None = None
    network: Network | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A saved classifier, opened.

    `model(x, training=False)` maps images (B, H, W, C) in [0, 1] to (B, classes), logits or
    probabilities. `folder` is set for a model folder, `training` where it has a record of ours.
    `remarks` are what was done to open it, for the result ("it computes in float16, ...").
    """

    name: str
    path: Path
    model: Callable
    sha256: str
    folder: Path | None = None
    training: dict | None = None
    remarks: tuple[str, ...] = ()

    @property
    def dataset(self) -> str | None:
        """The data set named by the training record, or None."""
        return self.training["settings"]["dataset"] if self.training else None

    def refuse_other_range(self, x: np.ndarray, y: np.ndarray) -> None:
        """Refuse a model of unknown pixel range that another than [0, 1] fits much better.

        Args:
            x: images (N, H, W, C) in [0, 1]; a few hundred tell. y: true labels (N,).
        """
        if self.training is None and not isinstance(self.model, Rescaled):
            refuse_other_range(self.path, self.model, x, y)


@contextmanager
def open_model(path: Path | str, how: Opening = Opening()) -> Iterator[LoadedModel]:
    """Load the model at `path`; what a `.zip` unpacks to exists only inside the `with` block."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"expected {KINDS}, got {str(path)!r}, which does not exist")
    refuse_oversized(path)
    if path.suffix.lower() != ".zip":
        yield _load(path, path.resolve().name if path.is_dir() else path.stem, how)
        return
    with tempfile.TemporaryDirectory(prefix="robustness_eval_") as folder:
        unpack(path, Path(folder))
        inside = _load(_in_archive(Path(folder), path), path.stem, how)
        # The folder is about to vanish: results go beside the archive.
        yield replace(inside, path=path, sha256=file_sha256(path), folder=None)


def _load(path, name, how):
    file, folder, training = path, None, None
    if path.is_dir():
        file = _only_model_in(path)
        if file is None:
            raise InputError(
                f"{str(path)!r} holds neither model.keras nor saved_model.pb, nor one .keras or "
                f".h5 file alone; expected {KINDS}"
            )
        if file.is_file():
            folder, training = path, _training_record(path)
    if file.is_dir():
        model, remarks = load_saved_model(file)
        if (same := twin(file, model)) is not None:
            model, remarks = same, [*remarks, TWIN]
        sha256 = folder_sha256(file)
    elif file.suffix.lower() in KERAS_SUFFIXES:
        model, remarks = load_keras(file, import_modules(how.imports), how.network)
        sha256 = file_sha256(file)
    else:
        raise InputError(f"expected {KINDS}, got {str(path)!r}")
    if how.pixel_range is not None:
        model = Rescaled(model, how.pixel_range)
        remarks = [*remarks, f"it is given pixels in {how.pixel_range.name}"]
    return LoadedModel(name, path, model, sha256, folder, training, tuple(remarks))


def _only_model_in(folder):
    """A folder that is a SavedModel (itself), its model.keras, or its only Keras file; or None."""
    if (folder / "saved_model.pb").is_file():
        return folder
    if (folder / "model.keras").is_file():
        return folder / "model.keras"
    files = [p for p in folder.iterdir() if p.suffix.lower() in KERAS_SUFFIXES and p.is_file()]
    return files[0] if len(files) == 1 else None


def _in_archive(folder, archive):
    """The one model in an unpacked archive: at its root, or alone one folder down."""
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        if (found := _only_model_in(place)) is not None:
            return place if found.name == "model.keras" else found
    raise InputError(
        f"{str(archive)!r} holds no model, or several; pack one model folder, .keras or .h5 file, "
        "or SavedModel folder"
    )


def _training_record(folder):
    record = ModelFolder(folder).record
    return read_training(record) if record.exists() else None
