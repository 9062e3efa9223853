"""From ranges to settings: the loss scale, and what should stay in float32 for a run to be finite.

What an operation would do in 16 bits depends on whether it would run in 16 bits: a norm computes its
statistics in float32 whatever it is given. So the function is traced again as a step would run it, cast
up front or under autocast, and an operation counts only where its result is 16-bit there. Places that
overflow are kept in float32 one by one, the earliest first, until a trace shows none that is exposed.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmp.diagnose import magnitudes
from jaxmp.diagnose.range_table import Range
from jaxmp.numerics import formats as number_formats
from jaxmp.numerics import jaxpr as programs
from jaxmp.numerics import observe
from jaxmp.numerics import tree as trees
from jaxmp.precision import autocast as autocasting
from jaxmp.precision import policy as policies

Pairs = tuple[tuple[str, str], ...]

_MOST = 16
"""Places kept in float32 beyond which a format is given up."""
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
# What may flush, and go subnormal, of the gradients before a larger scale is asked for.
_FLUSHED, _SUBNORMAL = 1e-3, 1e-2
# Gradients grow and shrink in training: this is left to both sides where there is room.
_HEADROOM = 2.0**4
_LARGEST_SCALE = 2.0**32


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """How to train in one 16-bit format. `str` says it in lines to paste."""

    format: str
    loss_scale: float
    """A power of two; 1 for none. For a dynamic scale, where to start."""
    overrides: Pairs
    """Paths of parameters that stay in float32 when parameters are cast up front: for `Policy.overrides`
    and `Config.overrides`."""
    scopes: Pairs
    """Module paths in the traced program that stay in float32 under `jaxmp.autocast(overrides=...)`, and
    for `Policy.overrides` and `Config.overrides` with `autocast=True`."""
    by_cast: bool
    """Whether with `overrides` nothing overflows when cast up front."""
    by_autocast: bool
    """Whether with `scopes` nothing overflows under autocast."""
    holds: bool
    """Whether one of the two does, with at most half of the modules in float32."""
    flushed: tuple[float, float]
    """The share of the 16-bit gradients that flushes without and with the scale."""
    notes: tuple[str, ...] = ()

    @property
    def policy(self) -> str:
        """The policy with `overrides`, as `jaxmp.get_policy` reads it."""
        return self._policy(self.overrides)

    @property
    def autocast_policy(self) -> str:
        """The policy with `scopes`, for steps with `autocast=True`."""
        return self._policy(self.scopes)

    def _policy(self, pairs: Pairs) -> str:
        return str(policies.Policy("float32", self.format, "float32", overrides=pairs))  # pyright: ignore

    def to_json(self) -> dict[str, Any]:
        """The suggestion as plain values."""
        return dataclasses.asdict(self) | {
            "policy": self.policy,
            "autocast_policy": self.autocast_policy,
        }

    def __str__(self) -> str:
        scale = f"2.0**{int(self.loss_scale).bit_length() - 1}"
        lines = [f'{self.format}: policy="mixed_{self.format}"']
        if self.loss_scale > 1:
            before, after = (f"{100 * share:.2g}%" for share in self.flushed)
            lines.append(
                f"  loss_scale=LossScaleConfig(initial={scale}): {before} of the gradients that "
                f"run in 16 bits flush without, {after} with it"
            )
        for works, pairs, how in (
            (self.by_cast, self.overrides, "parameters cast up front (paths of parameters)"),
            (self.by_autocast, self.scopes, "autocast=True (module paths)"),
        ):
            if not works:
                lines.append(f"  {how}: no overrides were found that keep it in range")
            elif pairs:
                lines.append(f"  {how}: overrides={pairs!r}")
            else:
                lines.append(f"  {how}: nothing overflows")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


class Problem(NamedTuple):
    """A function and its arguments."""

    fn: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    is_loss: bool

    def run(self, seed: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(the loss, the gradients of `seed` times it), or without a loss (the seed, the results)."""
        return _run(self.fn, self.is_loss, seed, args, kwargs)

    @property
    def parameters(self) -> list[tuple[str, Any]]:
        """The arrays of the first argument by their paths: inputs of the program from number 1 on."""
        named = trees.named_leaves(self.args[0]) if self.args else []
        return [(path, leaf) for path, leaf in named if programs.is_array(leaf)]

    def modules(self, sites: Sequence[observe.Site]) -> list[str]:
        """The module of each operation among the parameters, see `module_at`.

        Where a scope names none, it is that of the last parameter which the program read before.
        """
        paths, last, found = [path for path, _ in self.parameters], "", []
        for site in sites:
            read = [paths[i - 1] for i in sorted(site.reads) if 0 < i <= len(paths)]
            own = parent(read[0]) or read[0] if read else ""
            last = own if own and site.phase == "forward" else last
            found.append(module_at(site.scope, paths) or own or last)
        return found


def module_at(scope: str, paths: Sequence[str]) -> str:
    """The path among the parameters of the innermost module that a scope of the program lies in.

    `params/Dense_0` for `MLP/Dense_0/activation`, say: the root's name and inner scopes are no
    modules with parameters. "" if there is none.
    """
    segments = [segment.split(".")[0] for segment in scope.split("/")]  # Dense_0.method
    modules = dict.fromkeys(above for path in paths for above in _above(path))
    for end in range(len(segments), 0, -1):
        for start in range(end):
            wanted = "/" + "/".join(segments[start:end])
            if found := [m for m in modules if f"/{m}".endswith(wanted)]:
                return min(found, key=len)
    return ""


def parent(path: str) -> str:
    """The path of what holds it, "" at the top."""
    return path.rpartition("/")[0]


def suggestion(
    problem: Problem, given: Sequence[Range], rows: Sequence[Range], format: str
) -> Suggestion:
    """What to do to train in a 16-bit format, from the ranges of arguments and of operations."""
    notes = []
    # Infinities are common in masks; NaN and infinite gradients are not.
    if any(r.magnitudes.nans or (r.kind == "gradient" and r.magnitudes.not_finite) for r in rows):
        notes.append("Not every number is finite as it is: look with blame_nonfinite first.")
    for row in given:
        if row.kind == "input" and row.magnitudes.shares(format).overflow:
            notes.append(
                f"{row.name} overflows where it is cast: divide it, or give it normalised."
            )
    roads = [_Road(problem, given, rows, format, autocast) for autocast in (False, True)]
    kept = [road.keep() for road in roads]
    for road in roads:
        notes += road.notes
    scaled = [row for row, *exposed in zip(rows, *(road.exposed for road in roads)) if any(exposed)]
    gradients = magnitudes.total_of(
        [row.magnitudes for row in scaled if row.kind == "gradient"], rows[0].magnitudes.formats
    )
    scale = _loss_scale(gradients, format)
    works = [road.works for road in roads]
    modules = {above for path, _ in problem.parameters for above in _above(path)}
    few = [w and 2 * len(k) <= max(len(modules), 2) for w, k in zip(works, kept)]
    pattern = lambda module: _pattern(module, [path for path, _ in problem.parameters])
    return Suggestion(
        format=format,
        loss_scale=scale,
        overrides=tuple((pattern(module), "float32") for module in kept[0]),
        scopes=tuple((scope, "float32") for scope in kept[1]),
        by_cast=works[0],
        by_autocast=works[1],
        holds=any(few),
        flushed=(gradients.shares(format).flush, gradients.shares(format, scale).flush),
        notes=tuple(dict.fromkeys(notes)),
    )


class _Road:
    """One way to 16 bits: cast up front, or autocast."""

    def __init__(
        self,
        problem: Problem,
        given: Sequence[Range],
        rows: Sequence[Range],
        format: str,
        autocast: bool,
    ):
        self.problem, self.rows, self.format, self.autocast = problem, rows, format, autocast
        self.paths = [path for path, _ in problem.parameters]
        loses = lambda row: row.magnitudes.shares(format)
        self.large = {r.name for r in given if r.kind == "parameter" and loses(r).overflow}
        self.hot = [
            i
            for i, row in enumerate(rows)
            if loses(row).overflow or (_is_product(row) and loses(row).flush > 0.5)
        ]
        self.exposed: list[str | None] = [None] * len(rows)
        self.works = True
        self.notes: list[str] = []

    def keep(self) -> list[str]:
        """The places to keep in float32, so that nothing that overflows is exposed."""
        kept: list[str] = []
        while self.works:
            place = next(self._exposed(kept), None)
            if place is None:
                break
            while place and place in kept:
                place = parent(place)
            self.works = bool(place) and len(kept) < _MOST
            if self.works:
                kept = [k for k in kept if not k.startswith(place + "/")] + [place]
        return kept

    def _exposed(self, kept: Sequence[str]) -> Iterator[str]:
        """The places where something would overflow, the earliest first; fills `exposed`."""
        try:
            program = self._trace(tuple((place, "float32") for place in kept))
        except (TypeError, ValueError) as error:
            self.works = False
            how = "under autocast" if self.autocast else "with its arguments cast up front"
            self.notes.append(f"{how} it cannot be traced: {str(error).splitlines()[0]}")
            return
        sites = observe.sites(program)
        self.exposed = _matched([row.site for row in self.rows], sites, self.format)
        inputs = observe.narrowed_inputs(program)
        for i, path in enumerate(self.paths):
            if path in self.large:
                if not self.autocast and not any(trees.match_path(k, path) for k in kept):
                    yield parent(path) or path
                elif self.autocast and inputs[i + 1]:
                    yield inputs[i + 1][0].scope
        for i in self.hot:
            scope = self.exposed[i]
            if scope is not None:
                own = scope == self.rows[i].name
                at = self.rows[i].module if own else module_at(scope, self.paths)
                yield scope if self.autocast else at or self.rows[i].module

    def _trace(self, kept: Pairs) -> programs.Program:
        """The program that a step would run with these places in float32."""
        policy = policies.Policy("float32", self.format, "float32", overrides=kept)  # pyright: ignore
        abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if programs.is_array(x) else x
        fn = self.problem.fn
        args, kwargs = jax.tree.map(abstract, (self.problem.args, self.problem.kwargs))
        if self.autocast:
            fn = autocasting.autocast(fn, policy)
        else:
            first = [policy.cast_to_compute(args[0])] if args else []
            rest, kwargs = trees.cast_floating((args[1:], kwargs), policy.compute_dtype)
            args = (*first, *rest)
        run = self.problem._replace(fn=fn).run
        return programs.trace(run)(jnp.float32(1), *args, **kwargs)[0]


def _run(fn: Callable, is_loss: bool, seed: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    if not is_loss:
        return seed, fn(*args, **kwargs)
    leaves, tree = jax.tree.flatten(args[0])
    places = [i for i, leaf in enumerate(leaves) if trees.is_floating(leaf)]

    def loss_of(floats: list) -> Any:
        filled = list(leaves)
        for place, x in zip(places, floats):
            filled[place] = x
        out = fn(jax.tree.unflatten(tree, filled), *args[1:], **kwargs)
        return out[0] if isinstance(out, tuple) else out

    loss, pullback = jax.vjp(loss_of, [leaves[place] for place in places])
    return loss, pullback(seed.astype(loss.dtype))[0]


def _matched(
    ours: Sequence[observe.Site | None], theirs: Sequence[observe.Site], dtype: str
) -> list[str | None]:
    """For each of our operations, the scope in which its twin's result is 16-bit; None if it is not.

    Twins share primitive, scope, phase and source line, and come in the same order. An operation
    without a twin counts as 16-bit.
    """
    key = lambda site: (site.primitive, site.scope, site.phase, site.source)
    twins, counts = collections.defaultdict(list), collections.Counter(map(key, filter(None, ours)))
    for site in theirs:
        twins[key(site)].append(_narrow_at(site, dtype))
    seen: collections.Counter = collections.Counter()
    found: list[str | None] = []
    for site in ours:
        same = twins.get(key(site)) if site else None
        if site is None or same is None:
            found.append(site.scope if site else None)
        elif len(same) == counts[key(site)]:
            found.append(same[seen[key(site)]])
        else:
            found.append(next((scope for scope in same if scope is not None), None))
        if site:
            seen[key(site)] += 1
    return found


def _narrow_at(site: observe.Site, dtype: str) -> str | None:
    if any(getattr(out, "dtype", None) == dtype for out in site.outputs):
        return site.scope
    return next((n.scope for n in site.narrowed if n.dtype == dtype), None)


def _is_product(row: Range) -> bool:
    site = row.site
    return site is not None and site.primitive in _PRODUCTS and site.phase == "forward"


def _loss_scale(gradients: magnitudes.Magnitudes, format: str) -> float:
    """The scale that brings the gradients into range with room to both sides, where there is room."""
    fits = lambda scale: gradients.shares(format, scale).overflow == 0
    fine = lambda s: s.flush <= _FLUSHED and s.subnormal <= _SUBNORMAL
    if fine(gradients.shares(format)) or number_formats.format_of(format).exponent_bits >= 8:
        return 1.0
    scale = 1.0
    while scale < _LARGEST_SCALE and fits(2 * scale * _HEADROOM):
        if fine(gradients.shares(format, scale / _HEADROOM)):
            break
        scale *= 2
    return scale


def _pattern(module: str, paths: Sequence[str]) -> str:
    """A pattern that matches this module's parameters alone, without what stands above if it can."""
    matched = lambda pattern: [path for path in paths if trees.match_path(pattern, path)]
    segments = module.split("/")
    if segments[0] != "params" or len(segments) == 1:
        return module
    shorter = "**/" + "/".join(segments[1:])
    return shorter if matched(shorter) == matched(module) else module


def _above(path: str) -> list[str]:
    """The modules above a parameter, innermost last; the parameter itself if it stands alone."""
    segments = path.split("/")
    return ["/".join(segments[:end]) for end in range(1, len(segments))] or [path]
