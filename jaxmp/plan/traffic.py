"""Counts the bytes that an optimized XLA program reads from and writes to device memory.

XLA runs one kernel per instruction outside of fusions, so

    bytes = sum over instructions that run of (bytes of operands + bytes of results)

over the entry computation, the bodies of its loops (times their trip count), the functions it calls
and the most expensive branch of its conditionals. Instructions inside a fusion live in registers and
count nothing. Corrections, all to what a kernel really touches:

- parameters, tuples, bitcasts and constants are no kernels;
- a slice, a dynamic slice or a gather reads what it returns, also inside a fusion or one within it,
  and so does arithmetic whose result is only sliced: a kernel computes the elements that are asked for;
- a dynamic update or a scatter works in place: it touches the part that changes;
- an asynchronous copy reads where it starts and writes where it is done;
- scratch space of a library call counts nothing, nor do buffers in on-chip memory (TPU).

What it leaves out: caches (a second read of a buffer counts again), padding of tiles, spills.
"""

from __future__ import annotations

from jaxmp.plan import hlo

_FREE_CALLS = frozenset(["AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"])
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id "
    "add-dependency domain token".split()
)
_SLICING = frozenset(["slice", "dynamic-slice", "gather"])
_IN_PLACE = frozenset(["dynamic-update-slice", "scatter"])
_TRANSPARENT = frozenset(["bitcast", "reshape"])
# Each element of the result needs one element of each operand.
_ELEMENTWISE = frozenset(
    "abs add and atan2 broadcast clamp compare convert copy cosine divide exponential "
    "exponential-minus-one is-finite log log-plus-one logistic maximum minimum multiply negate not or "
    "power remainder round-nearest-even rsqrt select sign sine sqrt subtract tanh transpose xor".split()
)
_ON_CHIP = frozenset([1, 2, 3, 4])


def _size(arrays: tuple[hlo.Array, ...], on_chip: bool) -> int:
    """Returns bytes in main memory; with `on_chip`, buffers of other memory spaces count nothing."""
    return sum(a.bytes for a in arrays if not (on_chip and a.space in _ON_CHIP))


def bytes_accessed(module: hlo.Module, *, on_chip: bool = False) -> float:
    """Returns the bytes that one run of the program moves; see the formula above.

    `on_chip=True` (TPU) leaves out buffers that the compiler placed in on-chip memory.
    """
    return _computation_bytes(module, module.entry, on_chip, {})


def _computation_bytes(module, computation, on_chip, known) -> float:
    if computation.name not in known:
        known[computation.name] = sum(
            _instruction_bytes(module, computation, instruction, on_chip, known)
            for instruction in computation.instructions
        )
    return known[computation.name]


def _instruction_bytes(module, computation, instruction, on_chip, known) -> float:
    opcode, calls = instruction.opcode, instruction.calls

    def called(key):
        return [
            _computation_bytes(module, module.computations[name], on_chip, known)
            for name in calls.get(key, ())
        ]

    if opcode in _FREE:
        return 0
    if opcode == "while":
        return module.trip_count(computation, instruction) * (
            sum(called("body")) + sum(called("condition"))
        )
    if opcode == "conditional":
        return max(called("branch_computations"), default=0)
    if opcode in ("call", "async-start"):
        return sum(called("to_apply")) + sum(called("calls")) + sum(called("called_computations"))
    if opcode in ("async-update", "async-done"):
        return 0
    if opcode == "custom-call" and instruction.attribute("custom_call_target") in _FREE_CALLS:
        return 0
    operands = computation.operand_shapes(instruction)
    if opcode == "fusion":
        return _fusion_bytes(module, instruction, operands, on_chip)
    return _plain_bytes(instruction, operands, on_chip)


def _plain_bytes(instruction, operands, on_chip) -> int:
    opcode, result = instruction.opcode, _size(instruction.shapes, on_chip)
    if opcode.endswith("-start"):  # the write is counted at "-done"
        source = (
            instruction.shapes[1:2]
            if opcode == "slice-start"
            else tuple(array for shapes in operands for array in shapes)
        )
        if opcode == "slice-start":
            source = (hlo.Array(source[0].dtype, source[0].dims, operands[0][0].space),)
        return _size(source, on_chip)
    if opcode.endswith("-done") or opcode in ("iota", "rng-bit-generator"):
        return result
    if opcode in _SLICING:
        # `result` bytes are read from where the operand lives, and written.
        read = sum(a.bytes for a in instruction.shapes) if _size(operands[0], on_chip) else 0
        return read + result + sum(_size(index, on_chip) for index in operands[1:])
    if opcode == "dynamic-update-slice":
        return 2 * _size(operands[1], on_chip)
    if opcode == "scatter":
        return 2 * sum(_size(o, on_chip) for o in operands[1:])
    if opcode == "custom-call" and "cu" in instruction.attribute("custom_call_target")[:5]:
        result = _size(tuple(a for a in instruction.shapes if a.dtype not in ("s8", "u8")), on_chip)
    return result + sum(_size(operand, on_chip) for operand in operands)


def _through(body: hlo.Computation, name: str) -> list[tuple[hlo.Instruction, str]]:
    """Returns who really reads a value: its users, and the users of its bitcasts."""
    found = []
    for user in body.users.get(name, []):
        found += _through(body, user.name) if user.opcode in _TRANSPARENT else [(user, name)]
    return found


def _read_bytes(module: hlo.Module, body: hlo.Computation, value: hlo.Instruction) -> int:
    """Returns the bytes of a value inside a fusion that are needed for what follows."""
    whole, count = sum(a.bytes for a in value.shapes), sum(a.elements for a in value.shapes)
    readers = _through(body, value.name)
    total = 0 if readers else whole
    for reader, name in readers:
        position = reader.operands.index(name)
        if reader.opcode in _SLICING and position == 0:
            total += _read_bytes(module, body, reader)
        elif reader.opcode in _ELEMENTWISE:
            # As many elements as are needed of the result, each of this value's size.
            needed, of = _read_bytes(module, body, reader), sum(a.bytes for a in reader.shapes)
            elements = sum(a.elements for a in reader.shapes) * needed // of if of else 0
            total += whole * min(elements, count) // count if count else 0
        elif reader.opcode == "fusion":
            inner = _fused(module, reader)
            parameter = inner.parameters[position]
            total += _read_bytes(module, inner, parameter) if parameter.name in inner.users else 0
        elif not (reader.opcode in _IN_PLACE and position == 0):
            return whole
        if total >= whole:
            return whole
    return total


def _written_bytes(module: hlo.Module, body: hlo.Computation, root: hlo.Instruction) -> int:
    """Returns the bytes that a fusion's root writes (and reads, where it adds to what is there)."""
    while root.opcode in _TRANSPARENT and root.operands[0] in body.by_name:
        root = body.by_name[root.operands[0]]
    operands = body.operand_shapes(root)
    if root.opcode == "fusion" and len(root.shapes) == 1:
        inner = _fused(module, root)
        return _written_bytes(module, inner, inner.root)
    if root.opcode == "dynamic-update-slice":
        return sum(a.bytes for a in operands[1])
    if root.opcode == "scatter":
        return 2 * sum(a.bytes for a in operands[-1])
    return sum(a.bytes for a in root.shapes)


def _fused(module: hlo.Module, fusion: hlo.Instruction) -> hlo.Computation:
    """Returns what a fusion computes; on a TPU fusions lie within fusions."""
    return module.computations[fusion.calls["calls"][0]]


def _fusion_bytes(module, fusion, operands, on_chip) -> int:
    body, total = _fused(module, fusion), 0
    for parameter, shapes in zip(body.parameters, operands):
        used = parameter.name in body.users
        total += _read_bytes(module, body, parameter) if used and _size(shapes, on_chip) else 0
    root = body.root
    roots = [body.by_name[o] for o in root.operands] if root.opcode == "tuple" else [root]
    for part, shape in zip(roots, fusion.shapes):
        total += _written_bytes(module, body, part) if _size((shape,), on_chip) else 0
    return total
