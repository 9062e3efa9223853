"""Will it fit, and which side binds: memory by what fills it, and the roofline of a compiled step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxmp.plan import compile as compiling
from jaxmp.plan import products as products_lib
from jaxmp.plan import targets

_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one step of a program takes of one device of a target."""

    program: compiling.Compiled
    parameters: int
    """Numbers in the parameters, over all devices."""
    memory: dict[str, int]
    """Bytes of one device by what fills them."""
    product_seconds: float
    """Time of the matrix products at the chip's peak rate for their operands; NaN if it is unknown."""
    memory_seconds: float
    """Time of the bytes moved at the chip's memory bandwidth; NaN if it is unknown."""
    exchange_seconds: float
    """Time of what a device sends to others at the bandwidth of all its links; NaN if it is unknown."""
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    """Bytes that the step as it is written holds on one device until its backward pass, by what they are:
    part of "temporaries", where a compiler keeps them."""

    @property
    def peak_bytes(self) -> int:
        """Device memory held at once."""
        return self.program.peak_bytes

    @property
    def state_bytes(self) -> int:
        """What is there before the step: all but temporaries."""
        return sum(size for name, size in self.memory.items() if name != "temporaries")

    @property
    def free_bytes(self) -> int:
        """What is left of the device's memory; negative if the step does not fit."""
        return self.program.memory_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the step fits into the device's memory; true where its size is not known."""
        return self.program.memory_bytes == 0 or self.free_bytes >= 0

    @property
    def seconds(self) -> float:
        """The least time of a step: the slowest of the sides, as if they overlapped fully."""
        return max(self._sides.values())

    @property
    def bound(self) -> str:
        """The side that binds: "memory", "products" or "exchanges"."""
        return max(self._sides, key=self._sides.__getitem__)

    @property
    def _sides(self) -> dict[str, float]:
        return {
            "memory": self.memory_seconds,
            "products": self.product_seconds,
            "exchanges": self.exchange_seconds,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON; a time that is not known is None."""
        known = lambda value: None if math.isnan(value) else value
        return {
            **self.program.to_dict(),
            "parameters": self.parameters,
            "memory": self.memory,
            "kept": self.kept,
            "device_memory_bytes": self.program.memory_bytes,
            "fits": self.fits,
            "free_bytes": self.free_bytes,
            "product_seconds": known(self.product_seconds),
            "memory_seconds": known(self.memory_seconds),
            "exchange_seconds": known(self.exchange_seconds),
            "bound": None if math.isnan(self.seconds) else self.bound,
            "suggestions": list(suggestions(self)),
        }

    def __str__(self) -> str:
        program = self.program
        rows = [
            ("target", f"{program.target}, {program.device_count} device(s)"),
            ("parameters", f"{self.parameters:,}"),
            *((f"memory: {name}", _size(value)) for name, value in self.memory.items()),
            *((f"as written: {name}", _size(value)) for name, value in self.kept.items()),
            ("memory at peak", f"{_size(self.peak_bytes)}{self._verdict()}"),
            ("bytes moved", f"{_decimal(program.bytes_accessed, 'B')} a step"),
            ("FLOPs in products", f"{_decimal(program.product_flops, 'FLOP')} a step"),
        ]
        if not math.isnan(self.seconds):
            rows.append(
                (
                    "roofline",
                    f"at least {1e3 * self.seconds:.2f} ms a step, bound by {self.bound} ("
                    + ", ".join(f"{side} {1e3 * time:.2f} ms" for side, time in self._sides.items())
                    + ")",
                )
            )
        for (kind, dtype), (times, size) in program.traffic_by_kind.items():
            rows.append((kind, f"{times:g} times, {_decimal(size, 'B')} of {dtype} a step"))
        for dtypes, (count, flops) in program.products_by_dtypes.items():
            rows.append(("products", f"{count:g} of {dtypes}, {_decimal(flops, 'FLOP')}"))
        places = products_lib.by_place(program.wide_products)
        for place, (count, flops) in list(places.items())[:_SHOWN]:
            rows.append(("wide products", f"{count:g} of {place}, {_decimal(flops, 'FLOP')}"))
        if len(places) > _SHOWN:
            rows.append(("wide products", f"and {len(places) - _SHOWN} more places"))
        rows.append(("compiled in", f"{program.compile_seconds:.1f} s"))
        rows += [("try", sentence) for sentence in suggestions(self)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _verdict(self) -> str:
        device = self.program.memory_bytes
        if not device:
            return ""
        word = "fits" if self.fits else "does NOT fit"
        left = "free" if self.fits else "missing"
        return f" of {_size(device)}: {word}, {_size(abs(self.free_bytes))} {left}"


def estimate(
    program: compiling.Compiled, state: Any, batch: Any, kept: Mapping[str, int] | None = None
) -> Estimate:
    """Returns the memory by what fills it and the roofline of a program that `compile_for` made.

    `state` and `batch` are what it was compiled for; leaves that carry a sharding count as the part
    of one device. What the program keeps beside them (activations, gradients, the 16-bit copy of the
    parameters) is "temporaries"; `kept` goes into the report beside it.

    The roofline is a bound from below: it takes products, memory and exchanges to run side by side, each
    at its best rate, and leaves out launches and the rest. What devices send is the least that any
    algorithm sends (`Collective.wire_bytes`), over all links of one device. (Williams, Waterman and
    Patterson 2009, doi 10.1145/1498765.1498785.)
    """
    chip = targets.parse_target(program.target).chip
    parts = {
        "parameters": getattr(state, "params", ()),
        "optimizer": getattr(state, "opt_state", ()),
        "model state": getattr(state, "model_state", ()),
        "batch": batch,
    }
    memory = {name: device_bytes(tree) for name, tree in parts.items()}
    memory["other arguments"] = max(program.argument_bytes - sum(memory.values()), 0)
    memory["results"] = program.output_bytes - program.alias_bytes
    memory["temporaries"] = program.temporary_bytes
    return Estimate(
        program=program,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(parts["parameters"])),
        memory={name: size for name, size in memory.items() if size > 0},
        product_seconds=sum(_seconds(product, chip) for product in program.products),
        memory_seconds=_quotient(program.bytes_accessed, chip.memory_bandwidth),
        exchange_seconds=_quotient(
            sum(one.wire_bytes(program.device_count) for one in program.collectives),
            chip.link_bandwidth,
        ),
        kept=dict(kept or {}),
    )


def suggestions(found: Estimate) -> tuple[str, ...]:
    """Returns what to change, in sentences: where memory is short, and products wider than 16 bits."""
    said = []
    if not found.fits:
        if found.state_bytes > found.program.memory_bytes:
            said.append(
                "the state alone exceeds the device: shard it over more devices (fsdp), or take one "
                "with more memory."
            )
        else:
            said.append(
                "temporaries are what does not fit: accumulate over more microbatches, take a smaller "
                "batch, or recompute activations in the backward pass."
            )
    # A CPU's compiler widens 16-bit products itself: nothing that a user could change.
    rates = targets.parse_target(found.program.target).chip.peak_flops
    if found.program.wide_products and rates:
        share = sum(p.flops for p in found.program.wide_products) / found.program.product_flops
        said.append(
            f"{len(found.program.wide_products)} products ({share:.0%} of the FLOPs) have operands wider "
            "than 16 bits: compute in bfloat16, or see their lines above if that was meant."
        )
    if found.program.not_aliased:
        said.append(
            f"{len(found.program.not_aliased)} donated arrays are not reused, so they are held twice: "
            f"{', '.join(found.program.not_aliased[:3])}."
        )
    return tuple(said)


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays, present or abstract."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _seconds(product: products_lib.Product, chip: targets.Chip) -> float:
    """The time of a product at the peak rate of its widest operand.

    A TPU multiplies float32 in passes of bfloat16, one by default: where a chip names no rate for a
    dtype, that of bfloat16 holds.
    """
    if not chip.peak_flops:
        return math.nan
    known = [d for d in product.operands if d in chip.peak_flops]
    slowest = min((chip.peak_flops[d] for d in known), default=chip.peak_flops["bfloat16"])
    return product.flops / slowest


def _quotient(amount: float, rate: float) -> float:
    return amount / rate if rate else math.nan


def _size(count: float) -> str:
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _decimal(count: float, unit: str) -> str:
    return _scaled(count, 1000, tuple(prefix + unit for prefix in ("", "k", "M", "G", "T", "P")))


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    """A quantity in the largest unit that leaves at least one of it, with three digits or more."""
    place = 0
    while count >= base and place < len(units) - 1:
        count, place = count / base, place + 1
    return f"{count:.{max(0, 2 - len(str(int(count))) + 1)}f} {units[place]}"
