"""Reads the text of an optimized XLA program: what it moves, what it multiplies, what it reuses.

Only what a plan needs is understood: computations, instructions, shapes, memory spaces, calls, trip
counts and source lines. Anything else of the text is kept as it is and ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "u4": 4, "s4": 4, "u2": 2, "s2": 2, "c64": 64}
_NUMPY_NAMES = {"bf16": "bfloat16", "f": "float", "s": "int", "u": "uint", "c": "complex"}

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = (.*)$")
_NAME = re.compile(r"%([^\s,(){}]+)")
_CALL_KEYS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "called_computations",
)
_CALLS = re.compile(rf"\b({'|'.join(_CALL_KEYS)})=(\{{[^}}]*\}}|%[^\s,]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of one buffer as the program writes it."""

    dtype: str
    """XLA's short name: "bf16", "f32", "s32", "pred"."""
    dims: tuple[int, ...]
    space: int = 0
    """Memory space: 0 is the device's main memory, 1 a TPU's on-chip vector memory."""

    @property
    def elements(self) -> int:
        """Number of elements, 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes, without the padding of tiles."""
        return -(-self.elements * bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Array, ...]
    """Its result; the leaves of a tuple in order."""
    operands: tuple[str, ...]
    argument: str
    """The text between the parentheses: a parameter's number, a constant's value."""
    attributes: str
    """The text after the parentheses."""
    calls: dict[str, tuple[str, ...]]
    """Computations called, by attribute: "calls", "body", "to_apply", ..."""
    root: bool

    @functools.cached_property
    def backend_config(self) -> dict:
        """The compiler's own notes as a dictionary, {} where there are none."""
        start = self.attributes.find("backend_config=")
        if start < 0:
            return {}
        try:
            found, _ = json.JSONDecoder().raw_decode(
                self.attributes, start + len("backend_config=")
            )
        except json.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    def attribute(self, name: str) -> str:
        """Returns an attribute's text without its braces or quotes, "" if it is absent."""
        value = r"""\{([^}]*)\}|"((?:[^"\\]|\\.)*)"|([^\s,}]+)"""
        found = re.search(rf"\b{name}=(?:{value})", self.attributes)
        text = next((group for group in found.groups() if group is not None), "") if found else ""
        return re.sub(r"\\(.)", r"\1", text)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions, in the order of the schedule."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read a name."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in set(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Parameters in the order of the caller's operands."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda parameter: int(parameter.argument))

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Array, ...]]:
        """Returns the shapes of an instruction's operands."""
        return [self.by_name[o].shapes if o in self.by_name else () for o in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: Computation
    aliases: frozenset[int]
    """Numbers of the entry's parameters whose buffers hold results."""
    sources: dict[int, str]
    """Stack frame number to "file:line", the innermost line outside installed packages."""

    def source(self, instruction: Instruction) -> str:
        """Returns "file:line" of the user's code behind an instruction, "" where it is unknown."""
        frame = instruction.attribute("stack_frame_id")
        if frame:
            return self.sources.get(int(frame), "")
        file, line = instruction.attribute("source_file"), instruction.attribute("source_line")
        return f"{file}:{line}" if file else ""

    def trip_count(self, computation: Computation, loop: Instruction) -> int:
        """Returns how often a `while` of a computation runs its body, 1 where nobody knows.

        Told by the compiler's note, or read off a condition `counter < constant` whose counter starts at a
        constant and goes up in ones, as the loops of `jax.lax.scan` do.
        """
        known = loop.backend_config.get("known_trip_count", {})
        if isinstance(known, dict) and "n" in known:
            return int(known["n"])
        condition = self.computations[loop.calls["condition"][0]]
        test = (
            condition.by_name.get(condition.root.operands[0]) if condition.root.operands else None
        )
        bound = _constant(condition, condition.root.operands[-1]) if test else None
        if bound is None or condition.root.attribute("direction") != "LT" or test is None:
            return 1
        start = 0
        carried = computation.by_name.get(loop.operands[0])
        if carried is not None and carried.opcode == "tuple" and test.attribute("index"):
            start = _constant(computation, carried.operands[int(test.attribute("index"))]) or 0
        return max(bound - start, 1)

    @functools.cached_property
    def executions(self) -> dict[str, float]:
        """How often each computation runs in one run of the program.

        A loop's body runs as often as is known (`trip_count`), each branch of a
        conditional counts as run.
        """
        counts = dict.fromkeys(self.computations, 0.0)
        for name in reversed(self._callees_first()):
            counts[name] += 1.0 if name == self.entry.name else 0.0
            for instruction in self.computations[name].instructions:
                for key, callees in instruction.calls.items():
                    looped = key == "body"
                    times = self.trip_count(self.computations[name], instruction) if looped else 1
                    for callee in callees:
                        counts[callee] += counts[name] * times
        return counts

    def _callees_first(self) -> list[str]:
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            for instruction in self.computations[name].instructions:
                for callees in instruction.calls.values():
                    for callee in callees:
                        visit(callee)
            order.append(name)

        visit(self.entry.name)
        return order

    def instructions(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """Yields every instruction that runs, fused ones too, and how often it does."""
        for name, times in self.executions.items():
            if times:
                for instruction in self.computations[name].instructions:
                    yield self.computations[name], instruction, times


def bits(dtype: str) -> int:
    """Returns the width of an XLA dtype name: 16 for "bf16", 8 for "f8e4m3fn"."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 0


def numpy_name(dtype: str) -> str:
    """Returns NumPy's name of an XLA dtype: "bfloat16" for "bf16", "float8_e4m3fn" for "f8e4m3fn"."""
    if dtype in ("bf16", "pred"):
        return {"bf16": "bfloat16", "pred": "bool"}[dtype]
    found = re.fullmatch(r"([fsuc])(\d+)(\w*)", dtype)
    if not found:
        return dtype
    kind, width, rest = found.groups()
    return f"{_NUMPY_NAMES[kind]}{width}" + (f"_{rest}" if rest else "")


def _constant(computation: Computation, name: str) -> int | None:
    """The value of a scalar integer constant, behind copies too; None of anything else."""
    found = computation.by_name.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = computation.by_name.get(found.operands[0])
    if found is None or found.opcode != "constant" or not found.argument.lstrip("-").isdigit():
        return None
    return int(found.argument)


def parse_shapes(text: str) -> tuple[Array, ...]:
    """Returns the arrays of a shape's text, the leaves of a tuple in order."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d)
        arrays.append(Array(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(arrays)


def _balanced(text: str, start: int) -> int:
    """Returns the place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text)


def _parse_instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    shape_end = _balanced(rest, 0) if rest.startswith("(") else rest.find(" ")
    opening = rest.find("(", shape_end)
    if shape_end < 0 or opening < 0:
        return None
    closing = _balanced(rest, opening)
    argument, attributes = rest[opening + 1 : closing - 1], rest[closing:]
    calls = {key: tuple(_NAME.findall(value)) for key, value in _CALLS.findall(attributes)}
    opcode = rest[shape_end:opening].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(argument))
    shapes = parse_shapes(rest[:shape_end])
    return Instruction(name, opcode, shapes, operands, argument, attributes, calls, bool(root))


def _parse_sources(text: str) -> dict[int, str]:
    """Reads the tables of file names, locations and frames that stand before the computations."""
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] | None = None
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            rows = tables.setdefault(line, {})
        elif rows is not None and (found := re.match(r"(\d+) (.*)", line)):
            rows[int(found.group(1))] = found.group(2)
        elif line.endswith("{") and tables:
            break

    def number(row: str, key: str) -> int:
        found = re.search(rf"\b{key}=(\d+)", row)
        return int(found.group(1)) if found else 0

    def place(frame: int) -> str:
        row = tables["FileLocations"].get(
            number(tables["StackFrames"][frame], "file_location_id"), ""
        )
        file = tables["FileNames"].get(number(row, "file_name_id"), "").strip('"')
        return f"{file}:{number(row, 'line')}" if file else ""

    sources = {}
    for innermost in tables.get("StackFrames", {}):
        frame, chosen = innermost, place(innermost)
        while "site-packages" in chosen:
            parent = number(tables["StackFrames"][frame], "parent_frame_id")
            if parent in (0, frame) or parent not in tables["StackFrames"]:
                chosen = place(innermost)
                break
            frame, chosen = parent, place(parent)
        sources[innermost] = chosen
    return sources


def parse(text: str) -> Module:
    """Returns the program of `compiled.as_text()`. Raises ValueError if it has no entry."""
    computations: dict[str, Computation] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if not name and (found := _COMPUTATION.match(line)):
            name, lines = found.group(2), []
            entry = name if found.group(1) else entry
        elif name and line.startswith("}"):
            parsed = tuple(filter(None, map(_parse_instruction, lines)))
            computations[name] = Computation(name, parsed)
            name = ""
        elif name:
            lines.append(line)
    if entry not in computations:
        raise ValueError("The text is not an XLA program: it has no ENTRY computation.")
    header = text[: text.find("\n")]
    start = header.find("input_output_alias=")
    aliases: frozenset[int] = frozenset()
    if start >= 0:
        end = header.find("alias) }", start)
        found = re.findall(r": \((\d+), \{[\d, ]*\}, \w+-alias", header[start : end + 8])
        aliases = frozenset(map(int, found))
    return Module(computations, computations[entry], aliases, _parse_sources(text))
