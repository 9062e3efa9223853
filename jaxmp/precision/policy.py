"""Policies: which dtype parameters are kept in, computed in, and handed out in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.numerics import tree as trees

T = TypeVar("T")

# The first name of each dtype is the one that `str(policy)` writes.
_NAMES = {
    "bfloat16": ("bf16", "bfloat16"),
    "float16": ("f16", "float16"),
    "float32": ("full", "f32", "float32"),
    "float64": ("f64", "float64"),
}
_DTYPES = {name: jnp.dtype(dtype) for dtype, names in _NAMES.items() for name in names}
_MIXED = {"mixed_bfloat16": "p=f32,c=bf16,o=f32", "mixed_float16": "p=f32,c=f16,o=f32"}
_KEYS = {"p": 0, "params": 0, "c": 1, "compute": 1, "o": 2, "output": 2}

Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Policy:
    """The dtypes of a mixed-precision model: kept, computed with, handed out.

    A policy is plain data: hashable, comparable, and written as a string by `str`, which
    `get_policy` reads back. Its casts touch floating-point arrays alone.
    """

    param_dtype: np.dtype
    """What parameters are stored in; float32 keeps the small updates that 16 bits would lose."""
    compute_dtype: np.dtype
    """What parameters and inputs are cast to for the forward and backward pass."""
    output_dtype: np.dtype
    """What results are cast to."""
    overrides: tuple[tuple[str, np.dtype], ...] = dataclasses.field(default=(), kw_only=True)
    """Parameter or module paths that compute in another dtype: a mapping, or pairs, from a pattern
    (see `numerics.tree.match_path`) to a dtype. Where several match, the last one decides."""

    def __post_init__(self) -> None:
        for field in ("param_dtype", "compute_dtype", "output_dtype"):
            object.__setattr__(self, field, parse_dtype(getattr(self, field)))
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        parsed = tuple((str(pattern), parse_dtype(dtype)) for pattern, dtype in pairs)
        object.__setattr__(self, "overrides", parsed)

    def cast_to_param(self, tree: T) -> T:
        """The tree with floating-point arrays in the parameters' dtype."""
        return trees.cast_floating(tree, self.param_dtype)

    def cast_to_compute(self, tree: T) -> T:
        """The tree with floating-point arrays in the compute dtype, or in that of their override.

        Raises:
          ValueError: an override matched no path of the tree. A lone array has no path: it is cast
            to the compute dtype, so that inputs can be cast by the same policy.
        """
        if not self.overrides or jax.tree_util.all_leaves([tree]):
            return trees.cast_floating(tree, self.compute_dtype)
        self._check_overrides([path for path, _ in trees.named_leaves(tree)])
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: trees.cast_leaf(leaf, self.dtype_at(trees.path_string(path))), tree
        )

    def cast_to_output(self, tree: T) -> T:
        """The tree with floating-point arrays in the output dtype."""
        return trees.cast_floating(tree, self.output_dtype)

    def dtype_at(self, path: str) -> np.dtype:
        """The compute dtype of the parameter or module at a path such as `decoder/LayerNorm_0`."""
        matches = [dtype for pattern, dtype in self.overrides if trees.match_path(pattern, path)]
        return matches[-1] if matches else self.compute_dtype

    def with_output_dtype(self, output_dtype: Any) -> Policy:
        """This policy with another output dtype."""
        return dataclasses.replace(self, output_dtype=output_dtype)

    def _check_overrides(self, paths: list[str]) -> None:
        for pattern, _ in self.overrides:
            if not any(trees.match_path(pattern, path) for path in paths):
                shown = ", ".join(paths[:4]) + (", …" if len(paths) > 4 else "")
                raise ValueError(
                    f"The policy's override {pattern!r} matched no parameter. Paths look like: "
                    f"{shown or '(the tree is empty)'}. Use ** for any number of levels, * within one."
                )

    def __str__(self) -> str:
        dtypes = (self.param_dtype, self.compute_dtype, self.output_dtype)
        parts = [f"{key}={_short(dtype)}" for key, dtype in zip("pco", dtypes)]
        return ",".join(parts + [f"@{path}={_short(dtype)}" for path, dtype in self.overrides])


def get_policy(policy_name: str) -> Policy:
    """The policy that a string describes.

    - `"params=float32,compute=bfloat16,output=float32"`, or short, `"p=f32,c=bf16,o=f32"`. Without
      `params`, float32; without `compute`, as params; without `output`, as compute.
    - `"@PATTERN=DTYPE"` among them adds an override: `"c=f16,o=f32,@**/LayerNorm_*=f32"`.
    - `"bfloat16"`: one dtype for all three.
    - `"mixed_bfloat16"`, `"mixed_float16"`: float32 parameters and outputs, 16-bit compute.

    The first and third forms are those of jmp 0.0.4; spaces are allowed.
    """
    text = _MIXED.get(policy_name.strip(), policy_name)
    if "=" not in text:
        dtype = parse_dtype(text)
        return Policy(dtype, dtype, dtype)
    dtypes: list[Any] = [np.dtype("float32"), None, None]
    overrides = []
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.rpartition("="))
        if key.startswith("@"):
            overrides.append((key[1:], parse_dtype(value)))
        elif key in _KEYS:
            dtypes[_KEYS[key]] = parse_dtype(value)
        else:
            raise ValueError(
                f"Unknown key {key!r} in the policy {policy_name!r}: it should be 'params', 'compute' "
                "or 'output', as in 'params=float32,compute=bfloat16,output=float32'."
            )
    param, compute, output = dtypes
    compute = compute or param
    return Policy(param, compute, output or compute, overrides=tuple(overrides))


def as_policy(policy: Policy | str) -> Policy:
    """The policy itself, or the one that the string describes."""
    return get_policy(policy) if isinstance(policy, str) else policy


def parse_dtype(value: Any) -> np.dtype:
    """The dtype that a name or dtype-like object stands for."""
    if isinstance(value, str):
        name = value.strip()
        if name == "half":
            return jnp.dtype(half_dtype())
        if name not in _DTYPES:
            raise ValueError(
                f"Unknown dtype {name!r}: expected one of {', '.join(sorted(_DTYPES))}, half. A policy "
                "is a dtype, mixed_bfloat16, mixed_float16, or params=…,compute=…,output=…"
            )
        return _DTYPES[name]
    return jnp.dtype(value)


def _short(dtype: np.dtype) -> str:
    return _NAMES.get(dtype.name, (dtype.name,))[0]


def cast_to_full(tree: T) -> T:
    """The tree with floating-point arrays in float32."""
    return trees.cast_floating(tree, jnp.float32)


def cast_to_half(tree: T) -> T:
    """The tree with floating-point arrays in this machine's 16-bit dtype, see `half_dtype`."""
    return trees.cast_floating(tree, half_dtype())


def half_dtype(platform: str | None = None) -> Any:
    """bfloat16 on a TPU, float16 elsewhere: jmp's choice, kept for code written for it.

    New code should name its dtype, since a program may be compiled for a machine that is not here.
    Without `platform` the platform is the first that JAX is configured for, or else the one that it
    finds, which starts its backend.
    """
    if platform is None:
        configured = getattr(jax.config, "jax_platforms", None)
        platform = configured.split(",")[0] if configured else jax.default_backend()
    return jnp.bfloat16 if platform == "tpu" else jnp.float16
