"""Splits are fixed and disjoint, batches repeat from their seeds, foreign files run no code."""

import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from kaf_study import InputError, datasets


def images(count, side=32, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random((count, side, side, 3), dtype=np.float32) + 0.01


def as_bytes(x):
    return {row.tobytes() for row in x}


# --- digits


def test_digits_have_their_splits_and_range():
    splits = datasets.load("digits")
    assert [len(x) for x, _ in splits] == [1257, 180, 360]
    for x, y in splits:
        assert x.dtype == np.float32 and x.shape[1:] == (32, 32, 3)
        assert y.dtype == np.int64 and y.shape == (len(x),)
        assert set(y) == set(range(10))
        assert x.min() == 0 and 0.9 < x.max() <= 1


def test_digits_splits_hold_every_image_once():
    originals = load_digits().images
    splits = [x for x, _ in datasets.load("digits")]
    assert len(set().union(*map(as_bytes, splits))) == len({d.tobytes() for d in originals})
    assert sum(len(x) for x in splits) == 1797


def test_digits_are_enlarged_bilinearly():
    originals = load_digits().images / 16
    # Pixel centres, the border value repeated outside: one axis after the other by np.interp.
    position = (np.arange(32) + 0.5) / 4 - 0.5
    rows = np.apply_along_axis(lambda v: np.interp(position, np.arange(8), v), 1, originals)
    expected = np.apply_along_axis(lambda v: np.interp(position, np.arange(8), v), 2, rows)
    ours = np.concatenate([x for x, _ in datasets.load("digits")])
    assert as_bytes(ours[..., 0]) == as_bytes(expected.astype(np.float32))
    assert (ours == ours[..., :1]).all()


def test_loading_twice_gives_the_same_images():
    first, second = datasets.load("digits"), datasets.load("digits")
    prints = [datasets.fingerprint(*split) for split in first]
    assert prints == [datasets.fingerprint(*split) for split in second]
    assert len(set(prints)) == 3


def test_fingerprint_sees_values_labels_shapes_and_types():
    x, y = np.arange(8, dtype=np.float32), np.arange(8)
    changed = x.copy()
    changed[3] += 1e-6
    variants = [(x, y), (changed, y), (x, y[::-1]), (x.reshape(2, 4), y), (x.view(np.int32), y)]
    prints = {datasets.fingerprint(*variant) for variant in variants}
    assert len(prints) == len(variants)
    assert all(len(value) == 64 for value in prints)


def test_fingerprint_does_not_depend_on_memory_layout():
    x, y = np.asfortranarray(images(3)), np.arange(3)
    assert datasets.fingerprint(x, y) == datasets.fingerprint(np.ascontiguousarray(x), y)


# --- batches and augmentation


def epoch_of(x, y, **kwargs):
    settings = {"batch_size": 8, "seed": 1, "epoch": 0, "augment": True} | kwargs
    return [(a.numpy(), b.numpy()) for a, b in datasets.batches(x, y, **settings)]


def test_an_epoch_holds_every_image_once_and_a_short_last_batch():
    x, y = images(21, side=4), np.arange(21)
    result = epoch_of(x, y, augment=False)
    assert [len(b) for _, b in result] == [8, 8, 5]
    order = np.concatenate([b for _, b in result])
    assert sorted(order) == list(range(21)) and list(order) != list(range(21))
    np.testing.assert_array_equal(np.concatenate([a for a, _ in result]), x[order])
    assert len(datasets.batches(x, y, batch_size=8, seed=1, epoch=0, augment=True)) == 3


def test_an_epoch_is_a_function_of_seed_and_epoch():
    x, y = images(20, side=8), np.arange(20)
    base = epoch_of(x, y, epoch=3)
    for (a, b), (c, d) in zip(base, epoch_of(x, y, epoch=3), strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)
    for other in (epoch_of(x, y, epoch=4), epoch_of(x, y, epoch=3, seed=2)):
        assert (base[0][1] != other[0][1]).any()
        assert not np.array_equal(base[0][0], other[0][0])


def test_without_shuffling_the_order_is_kept():
    x, y = images(9, side=4), np.arange(9)
    result = epoch_of(x, y, augment=False, shuffle=False)
    np.testing.assert_array_equal(np.concatenate([b for _, b in result]), y)


def test_every_batch_is_augmented_differently():
    x = np.repeat(images(1), 16, axis=0)
    (first, _), (second, _) = epoch_of(x, np.zeros(16, np.int64))
    assert not np.array_equal(first, second)


def test_a_crop_is_one_of_tensorflows_crops_and_flips():
    x = images(200, side=8)
    result = datasets.random_crop_and_flip(tf.constant(x), (5, 6)).numpy()
    padded = tf.image.pad_to_bounding_box(x, 4, 4, 16, 16)
    seen = {}
    for top in range(9):
        for left in range(9):
            window = tf.image.crop_to_bounding_box(padded, top, left, 8, 8)
            for is_flipped in (False, True):
                candidate = tf.image.flip_left_right(window) if is_flipped else window
                for image in np.flatnonzero((candidate == result).numpy().all(axis=(1, 2, 3))):
                    seen[image] = (top, left, is_flipped)
    assert len(seen) == 200
    seen = set(seen.values())
    # 200 draws out of 162 equally likely ones leave 29 % of them unseen on average.
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert len(seen) > 95
    assert 0.3 < np.mean([is_flipped for _, _, is_flipped in seen]) < 0.7


def test_augmentation_stays_inside_a_graph_and_keeps_the_shape():
    dataset = datasets.batches(images(5), np.arange(5), batch_size=4, seed=0, epoch=0, augment=True)
    assert dataset.element_spec[0].shape == (None, 32, 32, 3)
    assert dataset.element_spec[0].dtype == tf.float32


def test_digits_are_not_to_be_mirrored():
    assert datasets.is_augmentable("cifar10") and not datasets.is_augmentable("digits")


def test_batches_refuses_missing_labels_and_empty_batches():
    with pytest.raises(InputError, match="as many labels"):
        epoch_of(images(3), np.arange(2))
    with pytest.raises(InputError, match="batch_size"):
        epoch_of(images(3), np.arange(3), batch_size=0)


# --- CIFAR-10, from small files of the official layout


def python2_pickle(data, labels):
    """A batch as the official files have it: Python 2's pickle, protocol 2, byte strings."""

    def string(value):  # SHORT_BINSTRING or BINSTRING, which Python 3 reads but never writes
        if len(value) < 256:
            return b"U" + struct.pack("<B", len(value)) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
    array += integer(0) + b"\x85" + string(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    shape = integer(data.shape[0]) + integer(data.shape[1]) + b"\x86"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + string(data.tobytes()) + b"tb"
    label_list = b"](" + b"".join(map(integer, labels)) + b"e"
    items = string(b"data") + array + string(b"labels") + label_list
    items += string(b"batch_label") + string(b"training batch 1 of 5")
    return b"\x80\x02}(" + items + b"u."


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Six small files in the official layout, and nothing else to be found; (folder, x, y)."""
    monkeypatch.setattr(datasets, "CIFAR10_BATCH", 20)
    monkeypatch.setattr(datasets, "CIFAR10_VALIDATION", 10)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.delenv("CIFAR10_DIR", raising=False)

    def no_network(**kwargs):
        raise Exception("URL fetch failure\non the site: no network")

    monkeypatch.setattr(datasets.keras.utils, "get_file", no_network)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (120, 3072), dtype=np.uint8)
    y = rng.integers(0, 10, 120)
    for i, name in enumerate(datasets.CIFAR10_FILES):
        part = slice(20 * i, 20 * i + 20)
        write_batch(folder / name, x[part], y[part].tolist(), style=i)
    return folder, x, y


def write_batch(path, data, labels, style):
    contents = (
        python2_pickle(data, labels),
        pickle.dumps({b"data": data, b"labels": labels}, protocol=2),
        pickle.dumps({"data": data, "labels": labels}, protocol=4),
        pickle.dumps({b"data": data, b"labels": labels}, protocol=5),
        pickle.dumps({"data": data, "labels": np.array(labels, np.uint8)}, protocol=3),
        pickle.dumps({b"data": data, b"labels": labels}),
    )
    path.write_bytes(contents[style])


def test_cifar10_is_read_whatever_python_wrote_it(cifar10):
    folder, pixels, labels = cifar10
    train, validation, test = datasets.load("cifar10", folder)
    assert [len(x) for x, _ in (train, validation, test)] == [90, 10, 20]
    # Planes of red, green and blue, each by rows.
    expected = np.moveaxis(pixels.reshape(-1, 3, 32, 32), 1, -1).astype(np.float32) / 255
    np.testing.assert_array_equal(test[0], expected[100:])
    np.testing.assert_array_equal(test[1], labels[100:])
    together = dict(zip([row.tobytes() for row in expected[:100]], labels, strict=False))
    for x, y in (train, validation):
        assert x.dtype == np.float32 and y.dtype == np.int64 and x.flags.c_contiguous
        assert [together[row.tobytes()] for row in x] == list(y)
    assert as_bytes(train[0]) | as_bytes(validation[0]) == as_bytes(expected[:100])


def test_the_folder_or_its_parent_by_argument_or_environment(cifar10, monkeypatch):
    folder, _, _ = cifar10
    expected = datasets.fingerprint(*datasets.load("cifar10", folder)[0])
    assert datasets.fingerprint(*datasets.load("cifar10", str(folder.parent))[0]) == expected
    monkeypatch.setenv("CIFAR10_DIR", str(folder.parent))
    assert datasets.fingerprint(*datasets.load("cifar10")[0]) == expected


@pytest.mark.parametrize("inside", ["cifar-10-batches-py-target", "."])
def test_keras_cache_is_used(cifar10, inside):
    folder, _, _ = cifar10
    cache = Path(os.environ["KERAS_HOME"]) / "datasets" / inside
    cache.mkdir(parents=True)
    folder.rename(cache / folder.name)
    assert len(datasets.load("cifar10")[2][0]) == 20


def test_an_incomplete_cache_is_downloaded_again(cifar10, monkeypatch):
    folder, _, _ = cifar10
    cache = Path(os.environ["KERAS_HOME"]) / "datasets" / datasets.CIFAR10_CACHE
    (cache / folder.name).mkdir(parents=True)
    shutil.copy(folder / "test_batch", cache / folder.name)

    def downloaded(*, fname, **how):
        shutil.copytree(folder, cache / folder.name, dirs_exist_ok=True)
        return str(cache.parent / fname)

    monkeypatch.setattr(datasets.keras.utils, "get_file", downloaded)
    assert [len(x) for x, _ in datasets.load("cifar10")] == [90, 10, 20]


@pytest.mark.parametrize("name", ["cifar10", "digits"])
def test_one_split_is_that_of_all(cifar10, monkeypatch, name):
    monkeypatch.setenv("CIFAR10_DIR", str(cifar10[0]))
    _, *expected = datasets.load(name)
    splits = datasets.load_validation(name), datasets.load_test(name)
    for split, same in zip(splits, expected, strict=True):
        assert datasets.fingerprint(*split) == datasets.fingerprint(*same)


def test_an_evaluation_reads_the_test_images_alone(cifar10):
    folder, _, _ = cifar10
    for name in datasets.CIFAR10_TRAIN_FILES:
        (folder / name).unlink()
    x, y = datasets.load_test("cifar10", folder)
    assert x.shape == (20, 32, 32, 3) and y.shape == (20,)
    with pytest.raises(InputError) as error:
        datasets.load_test("cifar10", folder / "nowhere")
    assert_one_line_with_the_ways(error, "nowhere")


def assert_one_line_with_the_ways(error, *parts):
    message = str(error.value)
    for part in ("--data-dir", "CIFAR10_DIR", "cache", "download", *parts):
        assert part in message
    assert "\n" not in message


def test_no_network_names_the_three_ways(cifar10):
    with pytest.raises(InputError) as error:
        datasets.load("cifar10")
    assert_one_line_with_the_ways(error, "no network")


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_a_named_folder_that_is_wrong_is_not_replaced_by_another(cifar10, monkeypatch, source):
    folder, _, _ = cifar10
    cache = Path(os.environ["KERAS_HOME"]) / "datasets"
    cache.mkdir(parents=True)
    folder.rename(cache / folder.name)  # would be found
    wrong = folder.parent / "nowhere"
    if source == "environment":
        monkeypatch.setenv("CIFAR10_DIR", str(wrong))
    with pytest.raises(InputError) as error:
        datasets.load("cifar10", wrong if source == "argument" else None)
    assert_one_line_with_the_ways(error, str(wrong))


def test_a_missing_file_is_named(cifar10):
    folder, _, _ = cifar10
    (folder / "data_batch_4").unlink()
    with pytest.raises(InputError) as error:
        datasets.load("cifar10", folder)
    assert_one_line_with_the_ways(error, "data_batch_4", "missing")


@pytest.mark.parametrize("keep", [0, 1, 100, 5000, -1])
@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_4"])
def test_a_truncated_file_is_named(cifar10, name, keep):
    folder, _, _ = cifar10
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as error:
        datasets.load("cifar10", folder)
    assert_one_line_with_the_ways(error, name)


class Call:
    def __init__(self, function, *arguments):
        self.reduction = function, arguments

    def __reduce__(self):
        return self.reduction


GOOD = np.zeros((20, 3072), np.uint8)
FOREIGN = {
    "text": b"<html>not found</html>\n",
    "list": pickle.dumps([1, 2, 3]),
    "no_labels": pickle.dumps({"data": GOOD}),
    "fewer_images": pickle.dumps({"data": GOOD[:19], "labels": [0] * 19}),
    "float_images": pickle.dumps({"data": GOOD.astype(np.float32), "labels": [0] * 20}),
    "label_10": pickle.dumps({"data": GOOD, "labels": [0] * 19 + [10]}),
    "ragged_labels": pickle.dumps({"data": GOOD, "labels": [0] * 19 + [[1, 2]]}),
    "bytes_as_images": pickle.dumps({"data": GOOD.tobytes(), "labels": [0] * 20}),
    "eval": pickle.dumps({"data": Call(eval, "1"), "labels": [0] * 20}),
    "getattr": pickle.dumps({"data": Call(getattr, GOOD, "tofile"), "labels": [0] * 20}),
    "zip_codec": b"c_codecs\nencode\n(Vabc\nVzlib\ntR.",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named(cifar10, kind):
    folder, _, _ = cifar10
    (folder / "data_batch_2").write_bytes(FOREIGN[kind])
    with pytest.raises(InputError) as error:
        datasets.load("cifar10", folder)
    assert_one_line_with_the_ways(error, "data_batch_2")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_pickle_runs_no_code(cifar10, tmp_path, protocol):
    folder, _, _ = cifar10
    trace = tmp_path / "trace"
    hostile = pickle.dumps({"data": Call(os.mkdir, str(trace)), "labels": []}, protocol=protocol)
    (folder / "test_batch").write_bytes(hostile)
    with pytest.raises(InputError, match="mkdir"):
        datasets.load("cifar10", folder)
    assert not trace.exists()
    pickle.loads(hostile)  # the test itself is sound: an ordinary reader does run it
    assert trace.exists()


def test_unknown_datasets_list_the_known_ones():
    for function in (
        datasets.load,
        datasets.load_validation,
        datasets.load_test,
        datasets.class_names,
        datasets.is_augmentable,
    ):
        with pytest.raises(InputError, match="cifar10, digits"):
            function("mnist")


def test_class_names_follow_the_labels():
    assert datasets.class_names("cifar10")[3] == "cat"
    assert datasets.class_names("digits")[7] == "7"


# --- the real thing, where it is


@pytest.fixture(scope="module")
def real_cifar10():
    named = os.environ.get("CIFAR10_DIR")
    if not named:
        pytest.skip("CIFAR10_DIR is not set")
    return Path(named).expanduser()


def test_real_cifar10_has_ten_balanced_classes(real_cifar10):
    train, validation, test = datasets.load("cifar10", real_cifar10)
    assert [len(x) for x, _ in (train, validation, test)] == [48_000, 2_000, 10_000]
    assert (np.bincount(test[1]) == 1_000).all()
    assert (np.bincount(np.concatenate([train[1], validation[1]])) == 5_000).all()
    # Known channel means of the training images: 0.4914, 0.4822, 0.4465.
    np.testing.assert_allclose(
        train[0].mean(axis=(0, 1, 2), dtype=np.float64), [0.4914, 0.4822, 0.4465], atol=2e-3
    )


def test_real_cifar10_truncated_ends_with_one_line(real_cifar10, tmp_path):
    folder = real_cifar10
    if not (folder / "test_batch").exists():
        folder = folder / "cifar-10-batches-py"
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "data_batch_1").unlink()
    (tmp_path / "data_batch_1").write_bytes((folder / "data_batch_1").read_bytes()[:10_000_000])
    with pytest.raises(InputError) as error:
        datasets.load("cifar10", tmp_path)
    assert_one_line_with_the_ways(error, "data_batch_1")
