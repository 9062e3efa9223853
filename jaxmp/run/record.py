"""The metadata of a checkpoint: what is in it, who wrote it, and whether a state has room for it.

A record is JSON: `format`, `step`, `meta` (the caller's own), `versions` of the libraries, and for
each leaf by its path `shape`, `dtype` and `fingerprint`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

from jaxmp.numerics import tree as trees
from jaxmp.run import fingerprint, leaves

_FORMAT = 1
_PACKAGES = ("jaxmp", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def named(state: Any) -> dict[str, Any]:
    """The leaves by path, in the tree's order; ValueError if two have the same path."""
    pairs = trees.named_leaves(state)
    by_name = dict(pairs)
    if len(by_name) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two leaves of the state have the same path {twice}; rename one of them.")
    return by_name


def describe(
    step: int, state: dict[str, Any], arrays: dict[str, Any], meta: dict[str, Any]
) -> dict[str, Any]:
    """The record of named leaves and the arrays that stand for them."""
    prints = fingerprint.fingerprints(arrays.values())
    described = {}
    for (name, leaf), digits in zip(state.items(), prints, strict=True):
        kind = _kind(name, leaf)
        described[name] = {"shape": [*kind.shape], "dtype": kind.dtype, "fingerprint": digits}
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    return {
        "format": _FORMAT,
        "step": step,
        "meta": meta,
        "versions": versions,
        "leaves": described,
    }


def text(record: dict[str, Any]) -> str:
    """The record as JSON, the same for equal records."""
    return json.dumps(record, sort_keys=True, indent=1)


def mismatch(record: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """How the stored leaves differ in path, shape or dtype from those wanted, in words, or None."""
    stored = {name: _stored_kind(leaf) for name, leaf in record["leaves"].items()}
    kinds = {name: _kind(name, leaf) for name, leaf in wanted.items()}
    different = [name for name in stored | kinds if stored.get(name) != kinds.get(name)]
    if not different:
        return None
    name, more = different[0], len(different) - 1
    there, here = stored.get(name, "absent"), kinds.get(name, "absent")
    others = {0: "", 1: ", and one more leaf differs"}.get(more, f", and {more} more leaves differ")
    return f"leaf {name} is {there} there and {here} here{others}"


def changed_leaf(record: dict[str, Any], arrays: dict[str, Any]) -> str | None:
    """The first of the named arrays that differs from its fingerprint in the record, or None."""
    prints = fingerprint.fingerprints(arrays.values())
    for name, found in zip(arrays, prints, strict=True):
        if found != record["leaves"][name]["fingerprint"]:
            return name
    return None


def _stored_kind(leaf: dict[str, Any]) -> leaves.Kind:
    return leaves.Kind(tuple(leaf["shape"]), leaf["dtype"])


def _kind(name: str, leaf: Any) -> leaves.Kind:
    try:
        return leaves.kind_of(leaf)
    except ValueError as error:
        raise ValueError(f"Leaf {name} is {error}.") from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
