"""Compiles a training step for a machine that may be absent, and says what it would cost there."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from jaxmp.plan import collectives as collectives_lib
from jaxmp.plan import hlo, targets, traffic
from jaxmp.plan import products as products_lib
from jaxmp.plan.products import Product

Shardings = Callable[[Sequence[jax.Device]], tuple[Any, Any]]
"""Maps a target's devices to shardings of the state and of the batch (trees or prefixes of them)."""

_SHOWN = 8  # places of wide products that a report spells out; a float32 model has hundreds


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step for one target. Bytes and FLOPs are of one device and step."""

    target: str
    device_count: int
    compile_seconds: float
    bytes_accessed: float
    """Main memory read and written, counted from the program (`jaxmp.plan.traffic`)."""
    compiler_bytes: float | None
    """The same by the compiler's own cost analysis, which counts a loop's body once; None on GPU."""
    product_flops: float
    """FLOPs of matrix products and convolutions, counted from the program."""
    compiler_flops: float | None
    """All FLOPs by the compiler's own cost analysis; None on GPU."""
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Outputs that live in the buffers of donated arguments."""
    temporary_bytes: int
    products: tuple[Product, ...]
    collectives: tuple[collectives_lib.Collective, ...]
    """Exchanges between devices."""
    dtype_bytes: dict[str, int]
    """Bytes of the state by dtype."""
    not_aliased: tuple[str, ...]
    """Leaves of the donated state whose buffers hold no output: each costs its size twice."""

    @property
    def peak_bytes(self) -> int:
        """Device memory held at once: arguments, outputs in buffers of their own, temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory of one device of the target."""
        return targets.parse_target(self.target).chip.memory_bytes

    @property
    def products_by_dtypes(self) -> dict[str, tuple[int, float]]:
        """Executions and FLOPs of products for each signature such as "bfloat16 x bfloat16 -> float32"."""
        return products_lib.by_dtypes(self.products)

    @property
    def wide_products(self) -> tuple[Product, ...]:
        """Products with an operand of more than 16 bits: slow, and rarely meant."""
        return tuple(product for product in self.products if product.wide)

    @property
    def traffic_by_kind(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Executions and bytes of exchanges between devices for each (kind, dtype)."""
        return collectives_lib.by_kind_and_dtype(self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON, products and exchanges summed up by dtypes."""
        row = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("products", "collectives")
        }
        row["peak_bytes"] = self.peak_bytes
        row["products"] = {
            dtypes: {"count": count, "flops": flops}
            for dtypes, (count, flops) in self.products_by_dtypes.items()
        }
        row["collectives"] = [
            {"kind": kind, "dtype": dtype, "times": times, "bytes": size}
            for (kind, dtype), (times, size) in self.traffic_by_kind.items()
        ]
        row["wide_products"] = [dataclasses.asdict(product) for product in self.wide_products]
        return row

    def __str__(self) -> str:
        lines = [
            f"{self.target}: {self.bytes_accessed / 1e9:.3f} GB moved, "
            f"{self.product_flops / 1e12:.3f} TFLOP in products, "
            f"{self.peak_bytes / 2**30:.2f} GiB at peak "
            f"({self.temporary_bytes / 2**30:.2f} GiB temporary), "
            f"compiled in {self.compile_seconds:.1f} s",
        ]
        for dtypes, (count, flops) in self.products_by_dtypes.items():
            lines.append(f"  {count} products {dtypes}: {flops / 1e12:.3f} TFLOP")
        places = products_lib.by_place(self.wide_products)
        for place, (count, _) in list(places.items())[:_SHOWN]:
            lines.append(f"  wide: {count} of {place}")
        if len(places) > _SHOWN:
            lines.append(f"  and {len(places) - _SHOWN} more places of wide products")
        if self.not_aliased:
            lines.append(f"  donated but not reused: {', '.join(self.not_aliased)}")
        return "\n".join(lines)


def lower_for(
    step: Callable,
    state: Any,
    batch: Any,
    target: str = "gpu-h100",
    *,
    shardings: Shardings | None = None,
) -> jax.stages.Lowered:
    """Returns `step(state, batch)` lowered for a target with the state donated, ready to compile.

    `state` and `batch` are trees of arrays or `jax.ShapeDtypeStruct`s: only shapes and dtypes are
    read. Without `shardings` all of it lives on the target's first device; with them the new state is laid
    out as the old one.
    Raises ValueError for a target that is unknown or whose compiler is not installed.
    """
    devices = targets.devices(target)
    if shardings is None:
        everywhere = SingleDeviceSharding(devices[0])
        state_shardings, batch_shardings = everywhere, everywhere
        results: dict[str, Any] = {}
    else:
        state_shardings, batch_shardings = shardings(devices)
        results = {"out_shardings": (state_shardings, None)}

    def place(sharding, tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    def train_step(state, batch):
        return step(state, batch)

    with warnings.catch_warnings():
        # The report names them.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return jax.jit(train_step, donate_argnums=0, **results).lower(
            jax.tree.map(place, state_shardings, state), jax.tree.map(place, batch_shardings, batch)
        )


def compile_for(
    step: Callable,
    state: Any,
    batch: Any,
    target: str = "gpu-h100",
    *,
    shardings: Shardings | None = None,
    compiler_options: Mapping[str, bool | int | str] | None = None,
) -> Compiled:
    """Returns what `step(state, batch) -> (state, metrics)` costs on a target, without running it.

    The target's own compiler does the work, so its wheel must be installed, but no such device.
    Arguments and errors are those of `lower_for`; "cpu" is the machine at hand. `compiler_options`
    are XLA's own. A real GPU lets the compiler try several kernels for each product, an absent one
    does not: it then writes its own (Triton) kernels, and {"xla_gpu_enable_triton_gemm": False} shows
    the program with cuBLAS's instead.
    """
    lowered = lower_for(step, state, batch, target, shardings=shardings)
    started = time.perf_counter()
    options: Any = dict(compiler_options or {})
    compiled = lowered.compile(options)
    seconds = time.perf_counter() - started
    return describe(compiled, target, state=state, compile_seconds=seconds)


def describe(
    compiled: jax.stages.Compiled, target: str, *, state: Any = (), compile_seconds: float = 0.0
) -> Compiled:
    """Returns the report of a program compiled for a target; `state` is its donated argument."""
    module = hlo.parse(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    costs = compiled.cost_analysis() or {}
    found = products_lib.products(module)
    platform = targets.parse_target(target).chip.platform
    return Compiled(
        target=target,
        device_count=targets.parse_target(target).device_count,
        compile_seconds=compile_seconds,
        bytes_accessed=traffic.bytes_accessed(module, on_chip=platform == "tpu"),
        compiler_bytes=costs.get("bytes accessed"),
        product_flops=sum(product.flops for product in found),
        compiler_flops=costs.get("flops"),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        products=found,
        collectives=collectives_lib.collectives(module),
        dtype_bytes=_dtype_bytes(state),
        not_aliased=_not_aliased(module),
    )


def _dtype_bytes(tree: Any) -> dict[str, int]:
    """Returns bytes by dtype; a key counts as what it is made of."""
    table: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for side in leaf.shape:
            size *= side
        table[str(leaf.dtype)] = table.get(str(leaf.dtype), 0) + size
    return table


def _not_aliased(module: hlo.Module) -> tuple[str, ...]:
    """Names the entry's parameters of the state that no output reuses."""
    return tuple(
        parameter.attribute("op_name")
        for number, parameter in enumerate(module.entry.parameters)
        if number not in module.aliases and parameter.attribute("op_name").startswith("state")
    )
