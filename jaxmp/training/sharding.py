"""Where each array of a state lies on a mesh: rules by path, and defaults that fit any Flax model.

Parameters are decided first, each by the first of these that speaks about it:

1. the caller's rules, by path;
2. the axis names that a Flax model gave it (`nn.with_partitioning`, `nn.with_logical_partitioning`);
3. defaults. `tensor` cuts the products of the shipped transformers, in columns and then in rows, so
   that a pair of products needs one sum. `fsdp` cuts the largest axis that it divides, though never the
   first one under `layers`, where a loop takes one layer at a time.

What stands elsewhere in the state under a parameter's path and with its shape, such as a moment or an
average, lies as the parameter does; any other array follows rule 1 by its own path, or the defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmp.numerics import tree as trees
from jaxmp.training import mesh as meshes

P = PartitionSpec
Rules = Mapping[str, PartitionSpec] | Iterable[tuple[str, PartitionSpec]]

WHOLE_SHARE = 0.05
"""The smallest arrays stay whole on each device while together they hold less than this part of what
a device would hold if everything were cut evenly: to gather each costs a round trip, and it is little."""

TENSOR_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    ("**/qkv/kernel", P(None, "tensor")),
    ("**/qkv/bias", P("tensor")),
    ("**/SelfAttention_*/out/kernel", P("tensor", None)),
    ("**/TransformerBlock_*/Dense_0/kernel", P(None, "tensor")),
    ("**/TransformerBlock_*/Dense_0/bias", P("tensor")),
    ("**/TransformerBlock_*/Dense_1/kernel", P("tensor", None)),
    *(
        (f"**/layers/{name}/kernel", P(None, None, "tensor"))
        for name in ("query", "key", "value", "gate", "up")
    ),
    *((f"**/layers/{name}/kernel", P(None, "tensor", None)) for name in ("out", "down")),
    ("**/tokens/embedding", P("tensor", None)),
    ("**/head/kernel", P(None, "tensor")),
)
"""How `tensor` cuts the shipped transformers (Shoeybi et al. 2019, arXiv 1909.08053). One that does not
divide the axis leaves it whole."""

SCANNED = "**/layers/**"
"""Parameters of layers that a loop runs, stacked along their first axis."""

LOGICAL_AXES: Mapping[str, str | None] = {
    "batch": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "joined_kv": "tensor",
    "kv": None,
    "length": None,
    "layers": None,
}
"""The mesh's axis for each of Flax's customary logical axis names."""


def state_shardings(
    abstract_state: Any,
    mesh: Mesh,
    rules: Rules | None = None,
    *,
    logical_axes: Mapping[str, str | None] = LOGICAL_AXES,
) -> Any:
    """A NamedSharding for each leaf of a state, in a tree of its structure.

    Make the state there from the start, so that no device ever holds all of it:

        abstract = jax.eval_shape(init)
        shardings = state_shardings(abstract, make_mesh("fsdp=8"))
        state = jax.jit(init, out_shardings=shardings)()

    Args:
      abstract_state: arrays or ShapeDtypeStructs: a `TrainState`, or any tree, all of whose leaves
        then are parameters.
      rules: a mapping, or pairs, from a pattern over the paths of parameters (`match_path`, as in a
        policy's overrides) to a PartitionSpec of the axes data, fsdp and tensor. Where several match,
        the last one decides; an axis that the mesh lacks is left out of it.
      logical_axes: the mesh's axis for each logical name that the model uses.

    Raises:
      ValueError: a rule that matches nothing, names an unknown axis, has more entries than the array
        has axes or does not divide it; or an axis name of the model that `logical_axes` lacks.
    """
    pairs: list[Any] = list(rules.items() if isinstance(rules, Mapping) else rules or ())
    params = getattr(abstract_state, "params", abstract_state)
    leaves = jax.tree.leaves(abstract_state)
    whole_below = _whole_below([math.prod(leaf.shape) for leaf in leaves], _size(mesh, "fsdp"))
    used: set[str] = set()

    def decide(path: str, leaf: Any, names: tuple[Any, ...] | None = None) -> PartitionSpec:
        matching = [(pattern, spec) for pattern, spec in pairs if trees.match_path(pattern, path)]
        used.update(pattern for pattern, _ in matching)
        if matching:
            pattern, spec = matching[-1]
            return _checked(spec, leaf.shape, mesh, f"The rule {pattern!r}", path)
        if names is not None:
            axes = [_mesh_axis(name, mesh, logical_axes, path) for name in names]
            once = [axis if axis not in axes[:i] else None for i, axis in enumerate(axes)]
            return _checked(P(*once), leaf.shape, mesh, "The model's axis names", path)
        return _default(path, leaf.shape, mesh, whole_below)

    names = _axis_names(params)
    decided = {
        path: (tuple(leaf.shape), decide(path, leaf, names.get(path)))
        for path, leaf in trees.named_leaves(params)
    }

    def place(key_path: Any, leaf: Any) -> NamedSharding:
        path = trees.path_string(key_path)
        spec = _of_parameter(path, tuple(leaf.shape), decided)
        return NamedSharding(mesh, decide(path, leaf) if spec is None else spec)

    placed = jax.tree_util.tree_map_with_path(place, abstract_state)
    for pattern, _ in pairs:
        if pattern not in used:
            shown = ", ".join(list(decided)[:4]) + (", …" if len(decided) > 4 else "")
            raise ValueError(
                f"The sharding rule {pattern!r} matched no parameter. Paths look like: "
                f"{shown or '(there are none)'}. Use ** for any number of levels, * within one."
            )
    return placed


def _of_parameter(path: str, shape: tuple[int, ...], decided: Mapping[str, Any]) -> Any:
    """The spec of the parameter that a leaf stands for, by the longest end of its path; None if none."""
    parts = path.split("/")
    for start in range(len(parts)):
        found = decided.get("/".join(parts[start:]))
        if found is not None:
            return found[1] if found[0] == shape else None
    return None


def _default(path: str, shape: tuple[int, ...], mesh: Mesh, whole_below: int) -> PartitionSpec:
    """`tensor` by the rules for the shipped models; `fsdp` over the largest axis it divides."""
    found = [spec for pattern, spec in TENSOR_RULES if trees.match_path(pattern, path)]
    axes: list[Any] = [None] * len(shape)
    for index, axis in enumerate(found[-1] if found and len(found[-1]) == len(shape) else ()):
        if axis in mesh.axis_names and shape[index] % mesh.shape[axis] == 0:
            axes[index] = axis
    fsdp = _size(mesh, "fsdp")
    free = [i for i, n in enumerate(shape) if axes[i] is None and n and n % fsdp == 0]
    if trees.match_path(SCANNED, path):
        free = [i for i in free if i > 0]
    if free and fsdp > 1 and math.prod(shape) >= whole_below:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return _trimmed(axes)


def _whole_below(sizes: list[int], parts: int) -> int:
    """The smallest size of array that is cut in `parts`; see `WHOLE_SHARE`.

    All arrays of one size fare alike, so that the result does not depend on their order.
    """
    budget = WHOLE_SHARE * sum(sizes) / max(parts, 1)
    kept = 0
    for size in sorted(set(sizes)):
        kept += size * sizes.count(size)
        if kept > budget:
            return size
    return max(sizes, default=0) + 1


def _checked(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh, what: str, path: str
) -> PartitionSpec:
    """The spec without axes that the mesh lacks; ValueError where it does not fit the array."""
    if len(spec) > len(shape):
        raise ValueError(
            f"{what} asks for {spec} and {path} has the shape {tuple(shape)}: write at most "
            f"{len(shape)} entries."
        )
    entries = []
    for size, entry in zip(shape, spec):
        names = meshes.names_of(entry)
        for name in names:
            if name not in (*mesh.axis_names, *meshes.AXES):
                raise ValueError(
                    f"{what} cuts {path} over {name!r}, which is no axis of a mesh: write "
                    f"{', '.join(meshes.AXES)} or None."
                )
        kept = tuple(name for name in names if name in mesh.axis_names)
        parts = math.prod(mesh.shape[name] for name in kept)
        if size % parts:
            raise ValueError(
                f"{what} cuts an axis of {size} of {path}, of shape {tuple(shape)}, over "
                f"{' and '.join(kept)} into {parts} parts: choose an axis that {parts} divides."
            )
        entries.append(kept or None)
    return _trimmed(entries)


def _trimmed(entries: list[Any]) -> PartitionSpec:
    """The spec without Nones at its end, as JAX writes it on its own: else a step would compile twice."""
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def _axis_names(params: Any) -> dict[str, tuple[Any, ...]]:
    """The axis names of the boxed parameters, by the path of the array inside."""
    found = {}
    is_box = lambda node: isinstance(node, meta.AxisMetadata)
    for key_path, box in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        if is_box(box):
            [(inner, _)] = jax.tree_util.tree_leaves_with_path(box)
            found[trees.path_string((*key_path, *inner))] = tuple(box.get_partition_spec())
    return found


def _mesh_axis(name: Any, mesh: Mesh, logical_axes: Mapping[str, str | None], path: str) -> Any:
    if name is None or name in mesh.axis_names or name in meshes.AXES:
        return name
    if isinstance(name, tuple):
        inner = (_mesh_axis(part, mesh, logical_axes, path) for part in name)
        return tuple(axis for axis in inner if axis is not None)
    if name not in logical_axes:
        raise ValueError(
            f"The model names an axis of {path} {name!r}, which is neither an axis of the mesh nor "
            f"among the logical axes: pass logical_axes={{{name!r}: 'fsdp'}}, 'tensor' or None, "
            "together with the others it uses."
        )
    return logical_axes[name]


def _size(mesh: Mesh, axis: str) -> int:
    return mesh.shape[axis] if axis in mesh.axis_names else 1
