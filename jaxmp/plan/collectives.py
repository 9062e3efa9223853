"""What a compiled program sends between devices: kinds, dtypes and bytes."""

from __future__ import annotations

import dataclasses
import math
import re

from jaxmp.plan import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# XLA writes groups in three ways: `{{0,1},{2,3}}` names the devices, `[2,4]<=[8]` is two groups of four,
# `mesh['a'=2,'b'=4] {'b'}` one along the axis b (`'b':(1)2` along a part of it, two long).
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_ALONG = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices, as one device sees it."""

    kind: str
    """XLA's name, "all-gather"."""
    dtype: str
    """Of what is sent, by NumPy's name."""
    bytes: int
    """The larger of what one device gives and what it gets, in one execution."""
    times: float
    """How often it runs in a step."""
    name: str
    """The operation's name in the user's program."""
    source: str
    """"file:line" of the user's code, "" where it is unknown."""
    group: int
    """Devices that exchange among themselves, beside others that do the same; 0 for all there are."""

    def wire_bytes(self, devices: int) -> float:
        """What one device must send in a step of a program on `devices`, the least of any algorithm.

        For n devices that each hold b bytes of a whole or end with them: b (n-1)/n to gather or to scatter a
        sum, twice that for both (all-reduce), b to pass everything on. (Chan et al. 2007,
        doi 10.1002/cpe.1206.)
        """
        n = self.group or devices
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
        return self.times * self.bytes * share.get(self.kind, (n - 1) / n)


def collectives(module: hlo.Module) -> tuple[Collective, ...]:
    """Returns every exchange between devices that runs, in the program's order.

    Several arrays sent as one are several entries. An asynchronous one is counted once, where it starts. A
    TPU's program repeats it in the kernels that run beside it and in the one that ends it, as links of one
    chain on one channel (other compilers give one channel to many exchanges).
    """
    found = []
    seen: set[tuple[str, str]] = set()
    for computation, instruction, times in module.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        chain = instruction.attribute("chain_id")
        link = (chain, instruction.attribute("channel_id"))
        if chain and link in seen:
            continue
        seen.add(link)
        given = [array for shapes in computation.operand_shapes(instruction) for array in shapes]
        # A started exchange has its operands among its results, in front.
        got = instruction.shapes[-len(given) :] if given else instruction.shapes
        for before, after in zip(given, got):
            found.append(
                Collective(
                    kind=kind,
                    dtype=hlo.numpy_name(before.dtype),
                    bytes=max(before.bytes, after.bytes),
                    times=times,
                    name=instruction.attribute("op_name"),
                    source=module.source(instruction),
                    group=_group(instruction),
                )
            )
    return tuple(found)


def by_kind_and_dtype(found: tuple[Collective, ...]) -> dict[tuple[str, str], tuple[float, float]]:
    """Returns executions and bytes in a step for each (kind, dtype), the most bytes first."""
    table: dict[tuple[str, str], tuple[float, float]] = {}
    for one in found:
        times, total = table.get((one.kind, one.dtype), (0.0, 0.0))
        table[one.kind, one.dtype] = (times + one.times, total + one.times * one.bytes)
    return dict(sorted(table.items(), key=lambda item: -item[1][1]))


def _group(instruction: hlo.Instruction) -> int:
    """How many devices take part, 0 where the program names no groups."""
    text = instruction.attributes
    if found := _LISTED.search(text):
        return found.group(1).count(",") + 1
    if found := _COUNTED.search(text):
        return int(found.group(1))
    if found := _ALONG.search(text):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found.group(1)))
        return math.prod(int(part or sizes[axis]) for axis, part in _AXIS.findall(found.group(2)))
    return 0
