"""Where devices meet in a step: 16-bit parameters gathered, gradients summed in the dtype asked for.

Each device differentiates the loss of its own rows. With N of them and S the loss scale,

    parameters = all-gather(cast(shard))                 # the cast is done on the shard: 16 bits travel
    gradients  = sum over devices of d(loss_i * S / N)   # summed in `reduce_dtype`, back on the shards
    metrics    = mean over devices

so every device sees the same gradients, norm, flag and loss, and decides alike whether to skip. Parameters
of scanned layers may stay in parts until the loop reaches their layer (`layer_gatherer`): then a device
holds one layer at a time, and each is gathered again for its backward pass if that computes it again. The
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


def over_mesh(
    gradients: Gradients, shardings: Any, reduce_dtype: Any = jnp.float32, in_parts: str = ""
) -> Gradients:
    """`gradients` for code compiled over a mesh, the parameters laid out as `shardings` say.

    The batch is cut over the mesh's axes `data` and `fsdp`; the compiler never sees a reason to gather
    activations over them, since each device's part is a program of its own (`jax.shard_map`). The axis
    `tensor` is left to the compiler, which follows the parameters. Those whose path matches `in_parts`
    reach the model as the device's own parts; it makes them whole with a `layer_gatherer`.
    """
    mesh = meshes.mesh_of(shardings)
    axes = meshes.batch_axes(mesh)
    if not axes:
        return gradients
    whole = PartitionSpec()
    cut = jax.tree.map(lambda s: PartitionSpec(*map(_only(axes), s.spec)), shardings)
    parted = _parted(shardings, in_parts)
    given = jax.tree.map(lambda p, spec: spec if p else whole, parted, cut)
    kept = jax.tree.map(
        lambda p, spec, s: spec if p else _scattered(s.spec, axes), parted, cut, shardings
    )

    def reduce(grads: Any) -> Any:
        summed = lambda g, spec, p: g if p else _reduce(g, spec, axes, mesh.shape)
        return jax.tree.map(summed, grads, kept, parted)

    def on_all(params: Any, batch: Any, rng: Any, model_state: Any, scale: Any) -> Any:
        specs = jax.tree.map(lambda x: PartitionSpec(axes) if jnp.ndim(x) else whole, batch)
        mapped = jax.shard_map(
            over_axes(gradients, axes, reduce_dtype, reduce),
            mesh=mesh,
            axis_names=set(axes),
            in_specs=(given, specs, whole, whole, whole),
            out_specs=(whole, kept, whole),
            check_vma=False,  # models need not be written for it
        )
        metrics, grads, model_state = mapped(
            gather(params, shardings, in_parts), batch, rng, model_state, scale
        )
        return metrics, jax.lax.with_sharding_constraint(grads, shardings), model_state

    return on_all


def gather(params: Any, shardings: Any, in_parts: str = "") -> Any:
    """Cast parameters, whole over the batch's axes but for those `in_parts`, cut over `tensor` as before.

    The first constraint keeps the cast where the shard is; without it the compiler may gather first.
    """
    params = jax.lax.with_sharding_constraint(params, shardings)
    parted = _parted(shardings, in_parts)
    wanted = jax.tree.map(lambda p, s: s if p else _gathered(s), parted, shardings)
    return jax.lax.with_sharding_constraint(params, wanted)


def layer_gatherer(
    shardings: Any, reduce_dtype: Any = jnp.float32, *, mapped: bool = True
) -> Callable[[Any], Any]:
    """A function that makes one layer's parameters whole: what a scanned model takes as its `whole`.

    `shardings` are those of the stacked parameters, whose first axis is the layers'. With `mapped` it is
    for a step over a mesh, inside whose `shard_map` each device has its own parts; the gradient is summed
    over the devices in `reduce_dtype` and lands in the parts. Else for code that the compiler partitions,
    such as an evaluation.
    """
    mesh = meshes.mesh_of(shardings)
    axes = meshes.batch_axes(mesh)

    def of_leaf(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
        spec = PartitionSpec(*sharding.spec[1:])
        if not _is_cut(sharding, axes):
            return lambda leaf: leaf
        if not mapped:
            layer = _gathered(NamedSharding(mesh, spec))
            return lambda leaf: jax.lax.with_sharding_constraint(leaf, layer)
        return _gather_parts(PartitionSpec(*map(_only(axes), spec)), axes, mesh.shape, reduce_dtype)

    makers = jax.tree.map(of_leaf, shardings)
    return lambda layer: jax.tree.map(lambda make, leaf: make(leaf), makers, layer)


def _gather_parts(
    spec: PartitionSpec, axes: Sequence[str], sizes: Any, reduce_dtype: Any
) -> Callable[[jax.Array], jax.Array]:
    """all-gather of what `spec` cuts, in the dtype of the part; backwards the sum, as in `over_axes`."""

    @jax.custom_vjp
    def whole(part: jax.Array) -> jax.Array:
        for dimension, names in enumerate(map(meshes.names_of, spec)):
            if names:
                part = jax.lax.all_gather(part, names, axis=dimension, tiled=True)
        return part

    def backward(like: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
        wide = jax.lax.optimization_barrier(cotangent.astype(reduce_dtype))
        return (_reduce(wide, spec, axes, sizes).astype(like.dtype),)

    # A residual must be an array; an empty one carries the dtype.
    whole.defvjp(lambda part: (whole(part), jnp.zeros(0, part.dtype)), backward)
    return whole


def _parted(shardings: Any, pattern: str) -> Any:
    """A tree of booleans: which parameters the model gets in parts."""
    mesh = meshes.mesh_of(shardings)
    axes = meshes.batch_axes(mesh)

    def is_parted(path: Any, sharding: NamedSharding) -> bool:
        named = bool(pattern) and trees.match_path(pattern, trees.path_string(path))
        return named and _is_cut(sharding, axes)

    return jax.tree_util.tree_map_with_path(is_parted, shardings)


def _is_cut(sharding: NamedSharding, axes: Sequence[str]) -> bool:
    return any(name in axes for entry in sharding.spec for name in meshes.names_of(entry))


def _gathered(sharding: NamedSharding) -> NamedSharding:
    """The sharding without the batch's axes."""
    return NamedSharding(sharding.mesh, PartitionSpec(*map(_only(("tensor",)), sharding.spec)))


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
