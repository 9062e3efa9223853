"""Meshes from a short text: which devices share the batch, the parameters, the products."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
"""What a mesh's axes divide: the batch; the batch and the state; the products inside a layer."""
BATCH_AXES = ("data", "fsdp")
"""The axes whose devices each read rows of their own."""


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a text describes: `data=8`, `data=2,fsdp=4`, `fsdp=16,tensor=2`, `data=-1`.

    - `data`: each device holds the whole state and reads rows of its own.
    - `fsdp`: as `data`, and parameters and optimizer state are cut among the devices.
    - `tensor`: each device does a part of every product, on the same rows.

    One axis may be -1: whatever number uses all devices. The first devices are taken where the sizes
    need fewer than there are, of `jax.devices()` if none are given; several processes must use all.
    The axes are of JAX's type Auto: the compiler places what is not said.

    Raises:
      ValueError: a text of another form, an unknown axis, or sizes that do not fit the devices.
    """
    sizes = parse_mesh(spec)
    found = list(jax.devices() if devices is None else devices)
    known = math.prod(size for size in sizes.values() if size > 0)
    if -1 in sizes.values():
        if len(found) % known:
            raise ValueError(
                f"mesh {spec!r} cannot use {_devices(len(found))}: {known} does not divide their "
                f"number; write sizes whose product is {len(found)}."
            )
        sizes = {axis: len(found) // known if size < 0 else size for axis, size in sizes.items()}
    needed = math.prod(sizes.values())
    if needed > len(found):
        raise ValueError(
            f"mesh {spec!r} needs {_devices(needed)} and there {_are(len(found))}; write a smaller "
            f"one, such as data={len(found)}, or on a CPU set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}."
        )
    if needed < len(found) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {spec!r} uses {needed} of {_devices(len(found))}, and a run on several processes "
            f"must use all: write sizes whose product is {len(found)}."
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=found[:needed],
    )


def parse_mesh(spec: str) -> dict[str, int]:
    """The axes' sizes in the text's order, -1 where they depend on the devices; ValueError as above."""
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if match is None:
            raise ValueError(
                f"mesh {spec!r} cannot be read at {part!r}; write axes and sizes such as data=8, "
                "data=2,fsdp=4, fsdp=4,tensor=2 or data=-1."
            )
        axis, size = match.groups()
        if axis not in AXES:
            raise ValueError(
                f"mesh {spec!r} has an axis {axis!r}, which is unknown; write {', '.join(AXES)}."
            )
        if axis in sizes:
            raise ValueError(f"mesh {spec!r} has the axis {axis} twice; write it once.")
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh {spec!r} leaves several sizes open; write at most one -1.")
    return sizes


def mesh_of(shardings: Any) -> Mesh:
    """The mesh over which a tree of shardings lays out a state."""
    return jax.tree.leaves(shardings)[0].mesh


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Those of the mesh's axes whose devices, several of them, read rows of their own."""
    return tuple(axis for axis in mesh.axis_names if axis in BATCH_AXES and mesh.shape[axis] > 1)


def batch_parts(mesh: Mesh) -> int:
    """In how many parts the mesh cuts a batch."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch's leading axis cut over `data` and `fsdp`, all else whole: for `jax.device_put(batch, …)`."""
    return NamedSharding(mesh, PartitionSpec(batch_axes(mesh) or None))


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """The rows of a batch of `size`, int64 and rising, that the devices of this process read."""
    read = batch_sharding(mesh).addressable_devices_indices_map((size,))
    return np.unique(np.concatenate([np.arange(size)[index] for index in read.values()]))


def names_of(entry: Any) -> tuple[str, ...]:
    """The axes of one entry of a PartitionSpec, which is None, a name or several."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def in_turn(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, finished when it returns if its results lie on several CPU devices.

    XLA's virtual CPU devices share few threads: devices of two programs that run at once can take them
    all while each waits for its neighbours, for ever. Elsewhere nothing is waited for.
    """

    def call(*args: Any) -> Any:
        results = fn(*args)
        for leaf in jax.tree.leaves(results)[:1]:
            devices = leaf.sharding.device_set
            if len(devices) > 1 and next(iter(devices)).platform == "cpu":
                jax.block_until_ready(results)
        return results

    return call


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"
