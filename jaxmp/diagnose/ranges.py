"""Range audits: what every tensor of a program would lose in narrower formats, forward and backward.

    print(jaxmp.audit_ranges(loss_fn, params, batch))

The program runs as it is given, usually in float32, operation by operation under one jit; of each
operation's result only counts by power of two are kept. A tensor counts as a gradient if it doubles when
the loss is doubled, which is what a loss scale does to it; the others of the backward pass, such as
activations computed again, are activations. Operations that only move values have no row.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp.diagnose import magnitudes, range_table, suggest
from jaxmp.numerics import formats as number_formats
from jaxmp.numerics import jaxpr as programs
from jaxmp.numerics import observe
from jaxmp.numerics import tree as trees

FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True)
class RangeAudit:
    """What an audit found, as plain data; `str` is a table by module, and what to do."""

    formats: tuple[str, ...]
    rows: tuple[range_table.Range, ...]
    """Parameters, inputs, operations in the order in which they ran, gradients of parameters."""
    differentiated: str = ""
    """What was differentiated: "the first argument", or "" for a forward pass alone."""
    suggestions: dict[str, suggest.Suggestion] = dataclasses.field(default_factory=dict)
    """What to do to train in each of the 16-bit formats that were asked for."""

    @property
    def suggestion(self) -> suggest.Suggestion | None:
        """The finest 16-bit format that holds the numbers with few places kept in float32."""
        found = list(self.suggestions.values())
        found.sort(key=lambda s: number_formats.format_of(s.format).epsilon)
        return next((s for s in found if s.holds), found[-1] if found else None)

    @property
    def exponents(self) -> np.ndarray:
        """[277] the powers of two of `histograms`."""
        return magnitudes.EXPONENTS

    @property
    def histograms(self) -> dict[str, np.ndarray]:
        """For "parameters", "activations" and "gradients", [277] counts over `exponents`."""
        kinds = ("parameter", "activation", "gradient")
        return {kind + "s": self.total(kind).binades for kind in kinds if self.of(kind)}

    def of(self, kind: str) -> list[range_table.Range]:
        """The rows of one kind."""
        return [row for row in self.rows if row.kind == kind]

    def total(self, kind: str) -> magnitudes.Magnitudes:
        """The magnitudes of all tensors of one kind together."""
        return magnitudes.total_of([row.magnitudes for row in self.of(kind)], self.formats)

    def by_module(self) -> dict[tuple[str, str], magnitudes.Magnitudes]:
        """For each (kind, name), in the order of the rows, the magnitudes of its rows together."""
        groups = collections.defaultdict(list)
        for row in self.rows:
            groups[row.kind, row.name].append(row.magnitudes)
        return {key: magnitudes.total_of(found, self.formats) for key, found in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """The audit as plain values, which `json.dump` takes."""
        return {
            "formats": list(self.formats),
            "differentiated": self.differentiated,
            "rows": [row.to_json() for row in self.rows],
            "suggestions": {name: s.to_json() for name, s in self.suggestions.items()},
        }

    def __str__(self) -> str:
        text = range_table.table(self.by_module(), self.formats)
        return "\n\n".join([text, *map(str, self.suggestions.values())])


def audit_ranges(
    fn: Callable[..., Any], *args: Any, formats: Sequence[str] = FORMATS, **kwargs: Any
) -> RangeAudit:
    """What each tensor of `fn(*args, **kwargs)` would lose in each format, and what to do about it.

    A `fn` that returns a loss, a floating-point scalar or a pair of one and anything, is
    differentiated with respect to the floating-point arrays of its first argument, the parameters;
    of any other function the forward pass alone is audited. Give it the model in float32: what a
    narrower dtype has already lost cannot be seen. Arguments may hold PRNG keys, integers, model state.

    Args:
      fn: pure and jittable, such as `loss_fn(params, batch)`.
      formats: names, as `jaxmp.format_of` reads them. For the 16-bit ones there is a suggestion.
    """
    names = tuple(number_formats.format_of(name).name for name in formats)
    problem = suggest.Problem(fn, args, kwargs, _is_loss(fn, args, kwargs))
    program, _ = programs.trace(problem.run)(jnp.float32(1), *args, **kwargs)
    places, values = observe.sites(program), programs.array_leaves(args, kwargs)

    @jax.jit
    def measured(seed: Any, *values: Any) -> tuple[list, list]:
        outputs, records = observe.observe(program, [seed, *values], _probe(names))
        gradients = outputs[1:] if problem.is_loss else []
        return records, [_of_floats([x], names) for x in (*values, *gradients)]

    once, tensors = jax.device_get(measured(jnp.float32(1), *values))
    twice = jax.device_get(measured(jnp.float32(2), *values)[0]) if problem.is_loss else once
    rows = [
        range_table.Range(
            kind="gradient" if problem.is_loss and _doubled(one, two) else "activation",
            name=site.scope,
            magnitudes=one,
            module=module,
            site=site,
        )
        for site, module, one, two in zip(places, problem.modules(places), once, twice)
        if one is not None and one.total
    ]
    given = [
        range_table.Range(kind, name, found, suggest.parent(name) or name)
        for (kind, name), found in zip(_names(args, kwargs), tensors)
        if found is not None
    ]
    of_parameters = [row for row in given if row.kind == "parameter"]
    gradients = [
        dataclasses.replace(row, kind="gradient", magnitudes=found)
        for row, found in zip(of_parameters, tensors[len(values) :])
    ]
    sixteen = [name for name in names if number_formats.format_of(name).bits == 16]
    return RangeAudit(
        formats=names,
        rows=(*given, *rows, *gradients),
        differentiated="the first argument" if problem.is_loss else "",
        suggestions={name: suggest.suggestion(problem, given, rows, name) for name in sixteen},
    )


def tensor_ranges(tree: Any, formats: Sequence[str] = FORMATS, kind: str = "parameter") -> Any:
    """The audit of the arrays at hand: parameters, gradients or an optimizer's state; no suggestion.

    `kind` is what they are, "parameter" or "gradient". Arrays without floating-point numbers are left out.
    """
    names = tuple(number_formats.format_of(name).name for name in formats)
    floats = [(name, leaf) for name, leaf in trees.named_leaves(tree) if trees.is_floating(leaf)]
    measured = jax.jit(lambda leaves: [magnitudes.measure(leaf, names) for leaf in leaves])
    found = jax.device_get(measured([leaf for _, leaf in floats]))
    rows: list[Any] = [
        range_table.Range(kind, name, one, suggest.parent(name) or name)  # pyright: ignore
        for (name, _), one in zip(floats, found)
    ]
    return RangeAudit(names, tuple(rows))


def _is_loss(fn: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether there is something to differentiate, and something to differentiate it by."""
    out: Any = []
    program, unflatten = programs.trace(fn)(*args, **kwargs)
    out = unflatten([v.aval for v in program.jaxpr.outvars])
    out = out[0] if isinstance(out, tuple) and out else out
    scalar = getattr(out, "shape", None) == () and programs.is_inexact(out)
    return bool(scalar and any(map(trees.is_floating, jax.tree.leaves(args[:1]))))


def _probe(names: tuple[str, ...]) -> observe.Probe:
    """Measures the floating-point results of operations that compute something."""
    computes = lambda site: (
        site.primitive not in observe.MOVES and any(map(_is_measurable, site.outputs))
    )
    return observe.Probe(
        start=lambda site: magnitudes.empty(names) if computes(site) else None,
        look=lambda site, operands, results: _of_floats(results, names) if computes(site) else None,
        merge=lambda site, old, new, *place: magnitudes.merge(old, new) if computes(site) else None,
    )


def _of_floats(arrays: Sequence[Any], names: tuple[str, ...]) -> magnitudes.Magnitudes | None:
    found = None
    for x in arrays:
        if _is_measurable(x):
            new = magnitudes.measure(x, names)
            found = new if found is None else magnitudes.merge(found, new)
    return found


def _is_measurable(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _doubled(one: magnitudes.Magnitudes | None, two: magnitudes.Magnitudes | None) -> bool:
    """Whether every number moved up by one binade."""
    if one is None or two is None or not one.numbers:
        return False
    return bool(np.array_equal(one.binades[:-1], two.binades[1:]) and not two.binades[0])


def _names(args: tuple, kwargs: dict) -> list[tuple[Any, str]]:
    """(kind, path) of each array in the arguments: parameters are what the first argument holds."""
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path((args, kwargs)):
        if programs.is_array(leaf):
            is_first = trees.path_string(path[:2]) == "0/0"
            name = trees.path_string(path[2:] if is_first else path[1:])
            names.append(("parameter", name) if is_first else ("input", f"argument {name}"))
    return names
