"""Data as a pure function of the step: `batch_at(step)` gives the same arrays whenever it is asked.

There is no iterator and so no iterator state: a run that resumes at step k asks for batch k.
Examples are laid out on one endless line, epoch after epoch, each epoch a fresh permutation seeded
by (seed, epoch); step s takes positions s*B ... s*B + B - 1, so every example comes exactly once an
epoch and a batch may span two epochs. A process takes its slice of the global batch, so the order
does not depend on how many processes there are.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.resources
import importlib.util
import lzma
import math
import pathlib
from collections.abc import Callable

import numpy as np

Batch = dict[str, np.ndarray]
Rows = slice | np.ndarray

DIGITS_TRAIN_ROWS = 1500
"""Rows before this one train. The 297 behind it were written by people of whom no row is in training."""

BYTE_VALUES = 256


@dataclasses.dataclass(frozen=True)
class DigitsConfig:
    """Handwritten digits, 8x8 grey: 1500 to train, 297 by other writers to test (UCI)."""

    shift: int = 0
    """Largest random shift of a training image in pixels, in each direction (0: none)."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text as bytes: windows of `sequence_length` and the byte that follows each position."""

    sequence_length: int = 128
    """Tokens (bytes) in one example."""
    path: str = "plays"
    """`plays`: ten plays of Shakespeare that come with the package. Else the path of any file."""
    validation_fraction: float = 0.08
    """The last part of the text, by position, is held out. 0.08 is the last play, The Tempest, and a bit."""
    validation_windows: int = 192
    """How many held-out windows, spread evenly, an evaluation reads (0: all)."""


@dataclasses.dataclass(frozen=True)
class PatternsConfig:
    """Made-up images at the size of real ones, for models whose data does not come with the package.

    Every class has a coarse pattern of its own, and each image is it under noise: a model that trains
    learns it, and nothing else follows from that.
    """

    size: int = 224
    """Height and width in pixels; three channels."""
    classes: int = 1000
    examples: int = 1_281_167
    """Training images in one epoch: as many as ImageNet-1k has."""
    held_out: int = 64


DataConfig = DigitsConfig | PatternsConfig | TextConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set, ready to feed a run."""

    batch_at: Callable[[int], Batch]
    """step (from 0) -> {"inputs", "targets"}: this process's rows of the global batch. Pure."""
    validation: tuple[Batch, ...]
    """The held-out data in order, each row once; the last batch may be shorter."""
    examples: int
    """Training examples in one epoch."""
    classes: int
    """Number of different targets: 10 digits, or 256 bytes."""
    unit: str
    """What throughput counts: "examples" or "tokens"."""
    units_per_example: int
    about: str
    """One line for people: what and how much."""


def load(
    config: DataConfig,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    rows: np.ndarray | None = None,
) -> Source:
    """The data set that `config` describes, cut into global batches of `batch_size` in the order of `seed`.

    Each of `process_count` processes gets `batch_size / process_count` rows a step, or those whose
    places in the batch are in `rows`. Raises ValueError with a sentence when the data is missing, too
    small for the batch, or does not divide.
    """
    share = process_slice(batch_size, process_index, process_count) if rows is None else rows
    if isinstance(config, DigitsConfig):
        return _digits_source(config, batch_size, seed, share)
    if isinstance(config, TextConfig):
        return _text_source(config, batch_size, seed, share)
    if isinstance(config, PatternsConfig):
        return _patterns_source(config, batch_size, seed, share)
    raise ValueError(
        f"data is a {type(config).__name__}; write DigitsConfig(...), PatternsConfig(...) or "
        "TextConfig(...)."
    )


def process_slice(batch_size: int, index: int, count: int) -> slice:
    """The rows of a global batch that process `index` of `count` reads."""
    if count < 1 or not 0 <= index < count:
        raise ValueError(
            f"process {index} of {count} does not exist; index must lie in 0..{count - 1}."
        )
    if batch_size % count:
        raise ValueError(
            f"batch_size={batch_size} does not divide among {count} processes; "
            f"use {math.ceil(batch_size / count) * count}."
        )
    share = batch_size // count
    return slice(index * share, (index + 1) * share)


def random_words(seed: int, epoch: int, count: int, *, stream: int = 0) -> np.ndarray:
    """`count` random uint64 words for one epoch, from Philox's raw counter stream.

    Raw words, not `Generator` methods: NumPy promises the former never to change, the latter may.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    key = np.array([seed % 2**64, (epoch << 8 | stream) % 2**64], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """The order, int64 [examples], in which an epoch visits the examples: each exactly once."""
    return np.argsort(random_words(seed, epoch, examples), kind="stable")


def batch_indices(
    order: Callable[[int], np.ndarray], step: int, batch_size: int, examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """(epoch, example) of each row of a step's global batch, both int64 [batch_size]."""
    if step < 0:
        raise ValueError(f"step={step} is negative; the first batch is step 0.")
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), examples)
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = order(int(epoch))[places[here]]
    return epochs, chosen


def _orderer(seed: int, examples: int) -> Callable[[int], np.ndarray]:
    """`epoch_order` that remembers the last two epochs: a cache, not a state."""
    return functools.lru_cache(maxsize=2)(lambda epoch: epoch_order(seed, epoch, examples))


def _check_batch(batch_size: int, examples: int, what: str) -> None:
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size={batch_size} does not fit {examples} training {what}; "
            f"write a batch_size between 1 and {examples}."
        )


def digits() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 digits: images float32 [1797, 8, 8, 1] in [0, 1] and labels int32 [1797].

    Reads the file inside the installed scikit-learn without importing `sklearn.datasets`, which
    takes seconds.
    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn."
        )
    # A path below the package's folder, found without running sklearn/__init__.py.
    spec = importlib.util.find_spec("sklearn")
    folder = pathlib.Path(spec.submodule_search_locations[0])  # type: ignore[union-attr,index]
    with gzip.open(folder / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = (table[:, :-1] / np.float32(16)).reshape(-1, 8, 8, 1)
    return images, table[:, -1].astype(np.int32)


def shift_images(images: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Each image [N, H, W, C] moved by its own whole number of pixels, the uncovered rim black."""
    height, width = images.shape[1:3]
    rows = np.arange(height)[None, :] - down[:, None]
    columns = np.arange(width)[None, :] - right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    moved = images[
        np.arange(len(images))[:, None, None],
        rows.clip(0, height - 1)[:, :, None],
        columns.clip(0, width - 1)[:, None],
    ]
    return np.where(inside[..., None], moved, np.float32(0))


def _digits_source(config: DigitsConfig, batch_size: int, seed: int, rows: Rows) -> Source:
    if not 0 <= config.shift <= 3:
        raise ValueError(
            f"data.shift={config.shift} must lie in 0..3: the images are 8 pixels wide."
        )
    images, labels = digits()
    train = DIGITS_TRAIN_ROWS
    _check_batch(batch_size, train, "images")
    order = _orderer(seed, train)
    span = 2 * config.shift + 1

    @functools.lru_cache(maxsize=2)
    def shifts(epoch: int) -> np.ndarray:
        words = random_words(seed, epoch, 2 * train, stream=1).reshape(2, train)
        return (words % span).astype(np.int64) - config.shift

    def batch_at(step: int) -> Batch:
        epochs, chosen = (a[rows] for a in batch_indices(order, step, batch_size, train))
        inputs = images[chosen]
        if config.shift:
            down, right = np.array([shifts(int(e))[:, i] for e, i in zip(epochs, chosen)]).T
            inputs = shift_images(inputs, down, right)
        return {"inputs": inputs, "targets": labels[chosen]}

    held_out = {"inputs": images[train:], "targets": labels[train:]}
    about = f"digits: {train} to train, {len(images) - train} by other writers to test"
    return Source(batch_at, (held_out,), train, 10, "examples", 1, about)


PATTERN_CELLS = 8
"""A class's pattern has so many squares in each direction."""


def _patterns_source(config: PatternsConfig, batch_size: int, seed: int, rows: Rows) -> Source:
    if config.size % PATTERN_CELLS or min(config.classes, config.examples, config.held_out) < 1:
        raise ValueError(
            f"data.size={config.size} must be a multiple of {PATTERN_CELLS}, and data.classes, examples "
            "and held_out at least 1."
        )
    _check_batch(batch_size, config.examples, "images")
    order = _orderer(seed, config.examples)
    side = config.size // PATTERN_CELLS

    def noise(number: int, stream: int, *shape: int) -> np.ndarray:
        """float32 in [-1, 1), the same whenever it is asked for."""
        words = random_words(0, number, math.prod(shape), stream=stream)
        return ((words >> 40).astype(np.float32) / np.float32(2**23) - 1).reshape(shape)

    def picture(example: int) -> np.ndarray:
        cells = noise(example % config.classes, 2, PATTERN_CELLS, PATTERN_CELLS, 3)
        return np.kron(cells, np.ones((side, side, 1), np.float32)) + noise(
            example, 3, config.size, config.size, 3
        )

    def batch_of(examples: np.ndarray) -> Batch:
        labels = (examples % config.classes).astype(np.int32)
        return {"inputs": np.stack([picture(int(e)) for e in examples]), "targets": labels}

    def batch_at(step: int) -> Batch:
        return batch_of(batch_indices(order, step, batch_size, config.examples)[1][rows])

    unseen = config.examples + np.arange(config.held_out)
    held_out = tuple(
        batch_of(unseen[i : i + batch_size]) for i in range(0, len(unseen), batch_size)
    )
    about = f"made-up images of {config.classes} patterns, {config.size} pixels wide"
    return Source(batch_at, held_out, config.examples, config.classes, "examples", 1, about)


def read_text(path: str) -> np.ndarray:
    """The text as bytes, uint8 [length]: the plays of the package, or any file."""
    if path == "plays":
        asset = importlib.resources.files("jaxmp.run") / "assets" / "plays.txt.xz"
        return np.frombuffer(lzma.decompress(asset.read_bytes()), np.uint8)
    try:
        return np.frombuffer(pathlib.Path(path).expanduser().read_bytes(), np.uint8)
    except OSError as error:
        raise ValueError(
            f"data.path={path!r} cannot be read ({error.strerror}); write 'plays' or the path of a text file."
        ) from error


def _check_text(config: TextConfig) -> None:
    if config.sequence_length < 1:
        raise ValueError(f"data.sequence_length={config.sequence_length} must be at least 1.")
    if not 0 < config.validation_fraction < 1:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1; 0.08 is usual."
        )


def _text_source(config: TextConfig, batch_size: int, seed: int, rows: Rows) -> Source:
    _check_text(config)
    text, length = read_text(config.path), config.sequence_length
    cut = int(len(text) * (1 - config.validation_fraction))
    # Each epoch cuts the text at another offset below `length`, so windows - 1 always fit.
    windows, held_windows = (cut - 1) // length - 1, (len(text) - cut - 1) // length
    if windows < 1 or held_windows < 1:
        raise ValueError(
            f"data.sequence_length={length} is too long for a text of {len(text)} bytes of which "
            f"{len(text) - cut} are held out; write a smaller one."
        )
    _check_batch(batch_size, windows, f"windows of {length} bytes")
    order = _orderer(seed, windows)
    offsets = np.arange(length + 1)

    def cut_out(starts: np.ndarray) -> Batch:
        tokens = text[starts[:, None] + offsets].astype(np.int32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def batch_at(step: int) -> Batch:
        epochs, chosen = (a[rows] for a in batch_indices(order, step, batch_size, windows))
        shift = {
            e: int(random_words(seed, int(e), 1, stream=1)[0] % length) for e in np.unique(epochs)
        }
        return cut_out(chosen * length + np.array([shift[e] for e in epochs]))

    wanted = min(config.validation_windows or held_windows, held_windows)
    starts = cut + length * (np.arange(wanted) * held_windows // wanted)
    validation = tuple(cut_out(starts[i : i + batch_size]) for i in range(0, wanted, batch_size))
    about = (
        f"{config.path}: {cut:,} bytes to train, {len(text) - cut:,} held out, windows of {length}"
    )
    return Source(batch_at, validation, windows, BYTE_VALUES, "tokens", length, about)
