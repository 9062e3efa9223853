"""Where devices meet in a step: 16-bit parameters gathered, gradients summed in the dtype asked for.

Each device differentiates the loss of its own rows. With N of them and S the loss scale,

    parameters = all-gather(cast(shard))                 # the cast is done on the shard: 16 bits travel
    gradients  = sum over devices of d(loss_i * S / N)   # summed in `reduce_dtype`, back on the shards
    metrics    = mean over devices

so every device sees the same gradients, norm, flag and loss, and decides alike whether to skip. The
cotangents inside the model are those of one device with all the rows, so a loss scale means the same
on any number of devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxmp.numerics import tree as trees
from jaxmp.training import mesh as meshes

# (compute params, batch, rng, model_state, scale) -> (metrics, float32 gradients, model_state)
Gradients = Callable[..., tuple[Any, Any, Any]]
AxisName = str | Sequence[str]


def over_axes(
    gradients: Gradients,
    axis_name: AxisName,
    reduce_dtype: Any = jnp.float32,
    reduce: Callable[[Any], Any] | None = None,
) -> Gradients:
    """`gradients` for code that runs inside `jax.shard_map`, on rows that `axis_name` divides.

    The same with and without `check_vma`. There, JAX sums the gradients of values equal on all devices
    by itself, and a mean on top would multiply them; so the parameters are declared to vary first.
    Each device draws from a key of its own. Floating-point model state is averaged.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    total = (lambda tree: jax.lax.psum(tree, axes)) if reduce is None else reduce

    def mean(leaf: jax.Array) -> jax.Array:
        return jax.lax.pmean(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), axes)

    def on_each(params: Any, batch: Any, rng: Any, model_state: Any, scale: Any) -> Any:
        if rng is not None:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axes))
        parts = jax.lax.psum(1, axes)
        metrics, grads, new_state = gradients(
            _varying(params, axes), batch, rng, _varying(model_state, axes), scale / parts
        )
        # Behind a barrier, or the TPU's compiler widens 16-bit gradients after it has summed them.
        grads = total(jax.lax.optimization_barrier(trees.cast_floating(grads, reduce_dtype)))
        new_state = jax.tree.map(
            lambda leaf: mean(leaf).astype(leaf.dtype) if trees.is_floating(leaf) else leaf,
            new_state,
        )
        return jax.tree.map(mean, metrics), trees.cast_floating(grads, jnp.float32), new_state

    return on_each


def over_mesh(gradients: Gradients, shardings: Any, reduce_dtype: Any = jnp.float32) -> Gradients:
    """`gradients` for code compiled over a mesh, the parameters laid out as `shardings` say.

    The batch is cut over the mesh's axes `data` and `fsdp`; the compiler never sees a reason to gather
    activations over them, since each device's part is a program of its own (`jax.shard_map`). The axis
    `tensor` is left to the compiler, which follows the parameters.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    axes = meshes.batch_axes(mesh)
    if not axes:
        return gradients
    kept = jax.tree.map(lambda s: _scattered(s.spec, axes), shardings)

    def reduce(grads: Any) -> Any:
        return jax.tree.map(lambda g, s: _reduce(g, s, axes, mesh.shape), grads, kept)

    def on_all(params: Any, batch: Any, rng: Any, model_state: Any, scale: Any) -> Any:
        whole = PartitionSpec()
        specs = jax.tree.map(lambda x: PartitionSpec(axes) if jnp.ndim(x) else whole, batch)
        mapped = jax.shard_map(
            over_axes(gradients, axes, reduce_dtype, reduce),
            mesh=mesh,
            axis_names=set(axes),
            in_specs=(whole, specs, whole, whole, whole),
            out_specs=(whole, kept, whole),
            check_vma=False,  # models need not be written for it
        )
        metrics, grads, model_state = mapped(
            gather(params, shardings), batch, rng, model_state, scale
        )
        return metrics, jax.lax.with_sharding_constraint(grads, shardings), model_state

    return on_all


def gather(params: Any, shardings: Any) -> Any:
    """Cast parameters, whole over the batch's axes and cut over `tensor` as before.

    The first constraint keeps the cast where the shard is; without it the compiler may gather first.
    """

    def whole(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, PartitionSpec(*map(_only(("tensor",)), sharding.spec)))

    params = jax.lax.with_sharding_constraint(params, shardings)
    return jax.lax.with_sharding_constraint(params, jax.tree.map(whole, shardings))


def _scattered(spec: PartitionSpec, axes: Sequence[str]) -> PartitionSpec:
    """What a device keeps of a summed gradient: its part, or all of one that `tensor` cuts as well.

    Scattered here, that one would first be gathered over `tensor`, which is the compiler's; it cuts the
    whole sum by itself.
    """
    names = {name for entry in spec for name in meshes.names_of(entry)}
    return PartitionSpec() if names - set(axes) else spec


def _only(axes: Sequence[str]) -> Callable[[Any], Any]:
    """A function that leaves, of what one dimension is cut over, these axes."""

    return lambda entry: tuple(name for name in meshes.names_of(entry) if name in axes) or None


def _reduce(grad: jax.Array, spec: PartitionSpec, axes: Sequence[str], sizes: Any) -> jax.Array:
    """The sum over `axes`, of which each device keeps the part that `spec` gives it."""
    rest = list(axes)
    for dimension, names in enumerate(map(meshes.names_of, spec)):
        if math.prod(sizes[name] for name in names) > 1:
            grad = jax.lax.psum_scatter(grad, names, scatter_dimension=dimension, tiled=True)
            rest = [axis for axis in rest if axis not in names]
    return jax.lax.psum(grad, tuple(rest)) if rest else grad


def _varying(tree: Any, axes: tuple[str, ...]) -> Any:
    """The floating-point leaves declared to differ between the devices of `axes`; no data moves."""

    cast = lambda leaf: jax.lax.pcast(leaf, axes, to="varying") if trees.is_floating(leaf) else leaf
    return jax.tree.map(cast, tree)
