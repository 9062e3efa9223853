"""Data as a function of the step: pure, each example once an epoch, the same for any number of processes."""

import numpy as np
import pytest

from jaxmp.run import data

DIGITS = data.DigitsConfig()
TEXT = data.TextConfig(sequence_length=32)


@pytest.mark.parametrize(
    "config", [DIGITS, data.DigitsConfig(shift=1), TEXT], ids=["digits", "shifted", "text"]
)
def test_batch_at_is_pure(config):
    one, other = data.load(config, 32, seed=3), data.load(config, 32, seed=3)
    for step in (0, 7, 100, 1, 7):  # any order, any number of times
        other.batch_at(step + 1)
        for key in ("inputs", "targets"):
            np.testing.assert_array_equal(one.batch_at(step)[key], other.batch_at(step)[key])
    assert np.any(one.batch_at(0)["inputs"] != one.batch_at(1)["inputs"])
    different = data.load(config, 32, seed=4)
    assert np.any(one.batch_at(0)["inputs"] != different.batch_at(0)["inputs"])


@pytest.mark.parametrize("config", [DIGITS, TEXT], ids=["digits", "text"])
@pytest.mark.parametrize("processes", [2, 4])
def test_process_slices_make_up_the_global_batch(config, processes):
    whole = data.load(config, 32, seed=0)
    parts = [
        data.load(config, 32, 0, process_index=i, process_count=processes) for i in range(processes)
    ]
    for step in (0, 46, 47):  # 47 * 32 = 1504: the step that spans two epochs of digits
        for key in ("inputs", "targets"):
            joined = np.concatenate([part.batch_at(step)[key] for part in parts])
            np.testing.assert_array_equal(joined, whole.batch_at(step)[key])


def test_every_example_comes_once_an_epoch_also_when_batches_span_epochs():
    examples, size = 10, 4
    order = lambda epoch: data.epoch_order(5, epoch, examples)
    seen = [data.batch_indices(order, step, size, examples) for step in range(5)]  # two epochs
    chosen = np.concatenate([example for _, example in seen])
    epochs = np.concatenate([epoch for epoch, _ in seen])
    assert sorted(chosen[:10]) == sorted(chosen[10:]) == list(range(10))
    assert list(epochs) == [0] * 10 + [1] * 10
    assert list(chosen[:10]) != list(chosen[10:])


def test_the_order_never_changes():
    # Golden: a run must find its data again with another NumPy, so the order is built from raw Philox words.
    assert data.epoch_order(0, 0, 8).tolist() == ORDER_0
    assert data.epoch_order(7, 3, 8).tolist() == ORDER_7


def test_digits_are_cut_by_writers():
    source = data.load(DIGITS, 100, seed=0)
    (held_out,) = source.validation
    assert held_out["inputs"].shape == (297, 8, 8, 1) and held_out["targets"].shape == (297,)
    images, labels = data.digits()
    np.testing.assert_array_equal(held_out["inputs"], images[1500:])
    seen = np.concatenate([source.batch_at(step)["inputs"] for step in range(15)])  # one epoch
    assert sorted(map(bytes, seen)) == sorted(map(bytes, images[:1500]))
    assert images.dtype == np.float32 and labels.dtype == np.int32
    assert images.min() == 0 and images.max() == 1 and set(labels) == set(range(10))


def test_shifts_move_each_image_by_its_own_pixels():
    images = np.zeros((3, 4, 4, 1), np.float32)
    images[:, 1, 2] = 1
    moved = data.shift_images(images, np.array([0, 1, -1]), np.array([0, 1, -3]))
    assert [tuple(np.argwhere(image)[0]) if image.any() else None for image in moved] == [
        (1, 2, 0),
        (2, 3, 0),
        None,  # pushed over the rim; what comes in is black
    ]


def test_shifted_epochs_differ_and_stay_within_the_limit():
    plain, shifted = (data.load(data.DigitsConfig(shift=s), 1500, seed=0) for s in (0, 1))
    before, after = plain.batch_at(0)["inputs"], shifted.batch_at(0)["inputs"]
    nine = [
        data.shift_images(before, np.full(1500, down), np.full(1500, right))
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    ]
    matches = np.stack([(candidate == after).all((1, 2, 3)) for candidate in nine])
    assert matches.any(0).all()
    assert matches.sum(1).min() > 100  # each of nine directions about 167 times


def test_text_targets_are_the_next_bytes():
    source = data.load(TEXT, 4, seed=0)
    batch = source.batch_at(0)
    assert batch["inputs"].shape == batch["targets"].shape == (4, 32)
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_text_windows_of_an_epoch_cover_the_training_part_without_the_held_out():
    text = data.read_text("plays")
    cut = int(len(text) * (1 - TEXT.validation_fraction))
    source = data.load(TEXT, 64, seed=0)
    starts = []
    haystack = bytes(text)
    for step in (0, 100, source.examples // 64 + 1):
        for row in source.batch_at(step)["inputs"]:
            starts.append(haystack.find(bytes(row.astype(np.uint8))))
    assert min(starts) >= 0 and max(starts) + 33 <= cut
    first = haystack.find(bytes(source.validation[0]["inputs"][0].astype(np.uint8)))
    assert first == cut
    assert sum(len(batch["targets"]) for batch in source.validation) == TEXT.validation_windows


def test_the_plays_are_as_vendored():
    text = data.read_text("plays")
    assert len(text) == 1_242_566 and text.max() < 128
    assert bytes(text).startswith(b"AS YOU LIKE IT\n\nby William Shakespeare\n")


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "own.txt").write_bytes(bytes(range(256)) * 40)
    source = data.load(
        data.TextConfig(sequence_length=16, path=str(tmp_path / "own.txt")), 8, seed=0
    )
    assert source.classes == 256 and source.examples == (int(10240 * 0.92) - 1) // 16 - 1
    assert source.batch_at(10_000)["inputs"].shape == (8, 16)


@pytest.mark.parametrize(
    ("config", "batch_size", "words"),
    [
        (DIGITS, 1501, "batch_size=1501 does not fit 1500"),
        (data.DigitsConfig(shift=9), 10, "data.shift=9"),
        (data.TextConfig(path="no/such.txt"), 8, "data.path='no/such.txt'"),
        (data.TextConfig(sequence_length=2_000_000), 8, "data.sequence_length=2000000"),
        (data.TextConfig(validation_fraction=1.5), 8, "data.validation_fraction=1.5"),
        ("digits", 8, "DigitsConfig"),
    ],
)
def test_mistakes_are_told_in_a_sentence(config, batch_size, words):
    with pytest.raises(ValueError, match=words):
        data.load(config, batch_size, seed=0)


def test_a_batch_that_does_not_divide_among_processes():
    with pytest.raises(ValueError, match="batch_size=10 does not divide among 4 processes; use 12"):
        data.load(DIGITS, 10, 0, process_count=4)
    with pytest.raises(ValueError, match="process 4 of 4"):
        data.process_slice(8, 4, 4)


ORDER_0 = [0, 2, 1, 5, 4, 3, 6, 7]
ORDER_7 = [2, 6, 0, 5, 7, 3, 4, 1]


def test_patterns_are_the_same_whenever_asked_and_teach_their_class():
    config = data.PatternsConfig(size=16, classes=3, examples=30, held_out=6)
    source = data.load(config, 10, seed=1)
    first, again = source.batch_at(1), data.load(config, 10, seed=1).batch_at(1)
    np.testing.assert_array_equal(first["inputs"], again["inputs"])
    assert first["inputs"].shape == (10, 16, 16, 3) and first["inputs"].dtype == np.float32
    epoch = [source.batch_at(step) for step in range(3)]
    images = np.concatenate([b["inputs"] for b in epoch])
    labels = np.concatenate([b["targets"] for b in epoch])
    assert len(np.unique(images[:, 0, 0, 0])) == 30  # each example once
    means = np.stack([images[labels == c].mean(0) for c in range(3)])
    (held,) = source.validation
    distance = ((held["inputs"][:, None] - means) ** 2).sum((2, 3, 4))
    np.testing.assert_array_equal(distance.argmin(1), held["targets"])
    part = data.load(config, 10, seed=1, process_index=1, process_count=2).batch_at(1)
    np.testing.assert_array_equal(part["inputs"], first["inputs"][5:])
