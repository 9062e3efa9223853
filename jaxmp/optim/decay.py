"""Which parameters decay: matrices do, what is added or multiplied elementwise does not."""

from __future__ import annotations

import re
from typing import Any

import jax

from jaxmp.numerics import tree as trees

_NORM_OR_BIAS = re.compile(r"norm|(^|[/_.])(bias|scale|ln|bn)(_?\w{0,2})?($|[/_.])", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|(^|[/_.])(wte|wpe|cls|pos)($|[/_.])", re.IGNORECASE)


def decay_mask(params: Any, *, embeddings: bool = False) -> Any:
    """A tree of booleans: true for the parameters that weight decay applies to.

    Left out: arrays of fewer than two dimensions, whatever belongs to a norm, biases (also stacked ones,
    as `nn.scan` makes them), and, unless `embeddings` is true, embedding tables, whose rarely used rows
    would fade between their uses. Judged by shape and by the names in each parameter's path. For decay
    on other terms pass optax a mask of your own.
    """

    def decays(path: Any, leaf: Any) -> bool:
        name = trees.path_string(path)
        if leaf.ndim < 2 or _NORM_OR_BIAS.search(name):
            return False
        return embeddings or not _EMBEDDING.search(name)

    return jax.tree_util.tree_map_with_path(decays, params)
