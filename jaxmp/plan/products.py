"""Finds the matrix products of an optimized XLA program: their dtypes, FLOPs and source lines."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from jaxmp.plan import hlo

_LIBRARY_GEMM = re.compile(r"^__cublas\$|^__onednn\$matmul|^__hipblas")
_LIBRARY_CONVOLUTION = re.compile(r"^__cudnn\$conv|^__onednn\$conv")
_LIBRARY_ATTENTION = re.compile(r"^__cudnn\$fmha")


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product, convolution or fused attention of a compiled program."""

    kind: str
    """"dot", "convolution" or "attention"."""
    operands: tuple[str, ...]
    """Dtypes of what is multiplied, by NumPy's names."""
    result: str
    """Dtype of the result as it is written or handed on, which is not the accumulator's."""
    flops: float
    """Floating-point operations of all its executions in one run."""
    times: float
    """How often it runs."""
    name: str
    """The operation's name in the user's program, with the transformations around it."""
    source: str
    """"file:line" of the user's code, "" where it is unknown."""

    @property
    def dtypes(self) -> str:
        """A short signature: "bfloat16 x bfloat16 -> float32"."""
        return f"{' x '.join(self.operands)} -> {self.result}"

    @property
    def wide(self) -> bool:
        """Whether an operand is a float of more than 16 bits."""
        return any(dtype in ("float32", "float64") for dtype in self.operands)


def products(module: hlo.Module) -> tuple[Product, ...]:
    """Returns every product that runs, fused or not, in the program's order.

    FLOPs are 2 for each multiplication that has a partner: padding and holes of a convolution do
    not count. Fused attention counts two products forward and five backward, masked parts included.
    """
    found = []
    for computation, instruction, times in module.instructions():
        kind = _kind(instruction)
        if not kind:
            continue
        operands = [shape[0] for shape in computation.operand_shapes(instruction) if shape]
        if kind == "attention":
            flops = _attention_flops(instruction, operands)
        elif kind == "convolution":
            flops = _convolution_flops(instruction, operands)
        else:
            flops = _dot_flops(instruction, operands)
        count = 3 if kind == "attention" else 2
        found.append(
            Product(
                kind,
                tuple(hlo.numpy_name(array.dtype) for array in operands[:count]),
                hlo.numpy_name(instruction.shapes[0].dtype),
                flops * times,
                times,
                instruction.attribute("op_name"),
                module.source(instruction),
            )
        )
    return tuple(found)


def by_dtypes(found: Iterable[Product]) -> dict[str, tuple[int, float]]:
    """Returns number of executions and FLOPs for each signature of dtypes, most FLOPs first."""
    table: dict[str, tuple[int, float]] = {}
    for product in found:
        count, flops = table.get(product.dtypes, (0, 0.0))
        table[product.dtypes] = (count + int(product.times), flops + product.flops)
    return dict(sorted(table.items(), key=lambda row: -row[1][1]))


def by_place(found: Iterable[Product]) -> dict[str, tuple[int, float]]:
    """Returns number of executions and FLOPs for each "dtypes at file:line", most FLOPs first."""
    table: dict[str, tuple[int, float]] = {}
    for product in found:
        place = f"{product.dtypes} at {product.source or product.name or '?'}"
        count, flops = table.get(place, (0, 0.0))
        table[place] = (count + int(product.times), flops + product.flops)
    return dict(sorted(table.items(), key=lambda row: -row[1][1]))


def _kind(instruction: hlo.Instruction) -> str:
    if instruction.opcode in ("dot", "ragged-dot", "scaled-dot"):
        return "dot"
    if instruction.opcode == "convolution":
        return "convolution"
    if instruction.opcode == "custom-call":
        target = instruction.attribute("custom_call_target")
        if _LIBRARY_GEMM.match(target):
            return "dot"
        if _LIBRARY_CONVOLUTION.match(target):
            return "convolution"
        if _LIBRARY_ATTENTION.match(target):
            return "attention"
    return ""


def _dot_flops(instruction: hlo.Instruction, operands: list[hlo.Array]) -> float:
    if instruction.opcode == "custom-call":
        config = instruction.backend_config
        config = config.get("gemm_backend_config", config)
        numbers = config.get("dot_dimension_numbers", {})
        contracted = [int(d) for d in numbers.get("lhs_contracting_dimensions", ["-1"])]
    else:
        contracted = [int(d) for d in instruction.attribute("lhs_contracting_dims").split(",") if d]
    inner = math.prod(operands[0].dims[d] for d in contracted)
    return 2.0 * instruction.shapes[0].elements * inner


def _window(instruction: hlo.Instruction, key: str, rank: int, default: str) -> list[str]:
    found = re.search(rf"\b{key}=([\d_x\-]+)", instruction.attribute("window"))
    return found.group(1).split("x") if found else [default] * rank


def _convolution_flops(instruction: hlo.Instruction, operands: list[hlo.Array]) -> float:
    """Counts multiplications in each spatial dimension by walking over its windows.

    A TPU writes batched products as convolutions with dilated operands: nearly all places of such a
    window are holes, so window sizes alone overestimate by the batch.
    """
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels"))
    if not labels or len(operands) < 2:
        return 0.0
    left, right, out = labels.groups()
    lhs, rhs, result = operands[0], operands[1], instruction.shapes[0]
    if len(result.dims) != len(out):  # a library call for a gradient, labelled as its forward one
        return 2.0 * lhs.elements * rhs.elements / max(rhs.dims[right.index("o")], 1)
    rank = len(left) - 2
    strides = _window(instruction, "stride", rank, "1")
    pads = _window(instruction, "pad", rank, "0_0")
    holes_left = _window(instruction, "lhs_dilate", rank, "1")
    holes_right = _window(instruction, "rhs_dilate", rank, "1")
    flops = 2.0 * result.dims[out.index("b")] * result.dims[out.index("f")]
    flops *= rhs.dims[right.index("i")]
    for axis in range(rank):
        size = lhs.dims[left.index(str(axis))]
        dilation, pad = int(holes_left[axis]), int(pads[axis].split("_")[0])
        flops *= sum(
            0 <= place <= (size - 1) * dilation and place % dilation == 0
            for start in range(result.dims[out.index(str(axis))])
            for tap in range(rhs.dims[right.index(str(axis))])
            for place in [start * int(strides[axis]) + tap * int(holes_right[axis]) - pad]
        )
    return flops


def _attention_flops(instruction: hlo.Instruction, operands: list[hlo.Array]) -> float:
    config = instruction.backend_config.get("cudnn_fmha_backend_config", {})
    scores = config.get("intermediate_tensor_shape", {}).get("dimensions", [])
    backward = "Backward" in instruction.attribute("custom_call_target")
    width = operands[0].dims[-1]
    return 2.0 * math.prod(int(d) for d in scores) * width * (5 if backward else 2)
