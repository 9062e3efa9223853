"""What a narrow format does to gradients in training: counters on the way back, in constant memory.

    def loss_fn(params, probes, batch):
        h = probe(layer_1(params, batch), probes["h"])          # h itself
        return loss_of(layer_2(params, h))

    probes = {"h": new_probe("float16")}
    grads, seen = jax.grad(loss_fn, argnums=(0, 1))(params, probes, batch)
    print(seen["h"].shares)

A probe is the identity. The backward pass counts what passes it, and the counts come out as the gradient
of the probe; where nobody asks for them they are not computed. Thresholds are compared on the bits,
as in `magnitudes`, and a loss scale that is on is in the numbers.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxmp.diagnose import magnitudes
from jaxmp.numerics import formats as number_formats

T = TypeVar("T")


@struct.dataclass
class Probe:
    """Counts of the numbers that passed: zeros before it is used, then a gradient.

    They are float32, as gradients must be, and exact up to 2^24 of a kind; they add up over microbatches,
    places and devices as gradients do.
    """

    format: str = struct.field(pytree_node=False)
    counters: Array
    """[5] or [blocks, 5]: zeros; numbers that flush, go subnormal, overflow in the format; not finite.

    In a cotangent that is in the format already, what flushed is among the zeros and what overflowed is
    not finite.
    """
    total: Array
    """[] or [blocks]: how many numbers passed."""
    histogram: Array | None = None
    """[277] or [blocks, 277]: counts by power of two, over `magnitudes.EXPONENTS`; None without."""

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """By name, the shares of all numbers that passed."""
        names = ("zero", "flush", "subnormal", "overflow", "not finite")
        shares = np.asarray(self.counters) / np.maximum(np.asarray(self.total), 1)[..., None]
        return {name: shares[..., i] for i, name in enumerate(names)}


def new_probe(format: Any = "float16", blocks: int | None = None, histogram: bool = False) -> Probe:
    """What `probe` takes: for one place, or stacked for `blocks` of them, to be scanned over.

    Counters cost a step next to nothing; a histogram a pass of its own over each cotangent.
    """
    shape = [] if blocks is None else [blocks]
    bins = jnp.zeros([*shape, len(magnitudes.EXPONENTS)], jnp.float32) if histogram else None
    name = number_formats.format_of(format).name
    return Probe(name, jnp.zeros([*shape, 5], jnp.float32), jnp.zeros(shape, jnp.float32), bins)


@jax.custom_vjp
def probe(x: T, counts: Probe) -> T:
    """x itself; the gradient with respect to `counts` is what was counted in the gradient at x.

    x is an array or a tree of them, and its gradient passes unchanged. Works under jit, scan, vmap and
    remat; inside `shard_map` pass `jax.lax.pcast(counts, axis, to="varying")` and sum over the axis;
    fails in forward mode.
    """
    del counts
    return x


def _forward(x: T, counts: Probe) -> tuple[T, Probe]:
    return x, counts


def _backward(counts: Probe, cotangent: T) -> tuple[T, Probe]:
    found = jax.tree.map(jnp.zeros_like, counts)
    for leaf in jax.tree.leaves(cotangent):
        if jnp.issubdtype(leaf.dtype, jnp.floating):  # not float0, the cotangent of integers
            found = jax.tree.map(jnp.add, found, _counted(leaf, counts))
    return cotangent, found


def _counted(x: Array, like: Probe) -> Probe:
    codes = magnitudes.magnitude_codes(x)
    flush, normal, over = magnitudes.thresholds(like.format)
    # One number a value, so that there is one pass: what exceeds a threshold exceeds those below.
    count = lambda where: jnp.sum(where, dtype=jnp.float32)
    nonzero, kept = count(codes > 0), count(codes > flush)
    is_normal, is_over, special = (count(codes >= code) for code in (normal, over, 0x7F800000))
    total = jnp.float32(x.size)
    counters = (total - nonzero, nonzero - kept, kept - is_normal, is_over - special, special)
    histogram = None
    if like.histogram is not None:
        histogram = magnitudes.binades_of(x).astype(jnp.float32)
    return Probe(like.format, jnp.stack(counters), total, histogram)


probe.defvjp(_forward, _backward)
