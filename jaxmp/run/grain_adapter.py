"""Grain datasets under the data contract: a `batch_at(step)` that is pure.

A Grain iterator has a state that is tied to the number of processes. A `MapDataset` needs none: its
element i is a function of i, also after shuffle and repeat, so a batch is a row of such elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxmp.run import data

if TYPE_CHECKING:
    import grain


def batch_at_from(
    dataset: grain.MapDataset[Any],
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Any]:
    """`batch_at(step)` over a finite `grain.MapDataset` of examples, each a pytree of arrays.

    Every epoch is another permutation, drawn by Grain from `seed`; a batch may span two epochs.
    Each process gets its rows of the global batch, stacked. For `run.train` put it into a
    `data.Source`.
    """
    rows = data.process_slice(batch_size, process_index, process_count)
    endless = dataset.seed(seed).shuffle().repeat()

    def batch_at(step: int) -> Any:
        first = step * batch_size
        examples = [endless[first + row] for row in range(rows.start, rows.stop)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *examples)

    return batch_at
