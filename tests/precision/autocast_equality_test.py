"""Comparisons for equality find what was equal, though one side has been rounded to 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmp.precision.autocast import autocast, full_precision

X = np.random.default_rng(0).uniform(-1, 1, (4, 8)).astype(np.float32)
W = np.random.default_rng(1).uniform(-0.5, 0.5, (8, 8)).astype(np.float32)


@pytest.mark.parametrize("pick", ["maximum", "clip", "max of rows", "minimum scan"])
@pytest.mark.parametrize("kept", ["given", "returned", "in a region"])
def test_a_maximum_finds_its_operand_again(pick: str, kept: str) -> None:
    """The derivative of a maximum, traced in float32, compares its operand with the result."""
    picks: dict[str, Callable] = {
        "maximum": lambda x: jnp.maximum(x, 0.1),
        "clip": lambda x: jnp.clip(x, -0.5, 0.5),
        "max of rows": lambda x: x.max(0, keepdims=True),
        "minimum scan": lambda x: lax.cummin(x),
    }
    region = full_precision(picks[pick]) if kept == "in a region" else picks[pick]

    def total(x: Any) -> tuple[Any, Any]:
        y = jnp.exp(x) - 1 if kept == "returned" else x
        return jnp.sum(region(y) @ W), y

    differentiated = jax.grad(total, has_aux=True)
    both = lambda x: (differentiated(x)[0], autocast(differentiated)(x)[0])
    # One program, with all of its 16-bit roundings.
    expected, found = jax.jit(both, compiler_options={"xla_allow_excess_precision": False})(X)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
