"""Gradients by depth: where they vanish or explode on their way back, and which layers stand still.

Two views of one thing. `gradient_flow` reads the parameters' gradients that a step computes anyway.
`tap` measures the gradient at a block's input, which no parameter has: it is the identity, and the
backward pass leaves the size of what flows through it as the gradient of a dummy argument:

    def loss_fn(params, taps, batch):
        def block(x, layer):
            layer_params, layer_tap = layer
            return apply_block(layer_params, flow.tap(x, layer_tap)), None
        x, _ = jax.lax.scan(block, embed(params, batch), (params["blocks"], taps))
        return loss_of(params, x)

    grads, tap_grads = jax.grad(loss_fn, argnums=(0, 1))(params, flow.new_tap(12), batch)
    print(flow.flow_at_taps(tap_grads))
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from jaxmp.numerics import formats
from jaxmp.numerics import tree as trees

T = TypeVar("T")

# From the typical module's root mean square. Sizes differ a hundredfold in healthy networks.
_FAR_FROM_TYPICAL = 1e3
# From the first block to the last: a healthy transformer stays within a factor of ten.
_FAR_ALONG_DEPTH = 1e2
# Updates are usually a thousandth of the weights; a tenth overwrites what was learned.
_RUSHED = 0.1

_ADVICE = {
    "vanishing with depth": "Add residual connections or normalise before each branch, and scale the "
    "initial weights to keep variances (2 / inputs before a ReLU).",
    "exploding with depth": "Weight residual branches by 1 / depth or normalise before each branch; "
    "warm up longer or lower the rate, and clip by global norm meanwhile.",
    "not finite": "Find the first operation that is not finite with blame_nonfinite; skip such steps, "
    "and in float16 let the loss scale come down.",
    "dead": "Look for stop_gradient, parameters nobody uses, units that never fire, a layer behind it "
    "that starts at zero (normal at the first step), or float16 gradients flushed to zero (raise the "
    "loss scale).",
    "vanishing": "Look for saturated activations and large norms before it; a rate of its own, or Adam, "
    "rescales it. In float16 check the loss scale.",
    "exploding": "Look for unnormalised inputs, attention logits that grow and small variances under a "
    "norm; clip by global or unit norm.",
    "rushed": "Lower the rate, warm up longer, or clip updates.",
    "stalled": "Updates under half a unit in the last place round away: keep float32 master weights, "
    "or raise the rate.",
}


class Finding(NamedTuple):
    """Something wrong with the flow of gradients, and what to try."""

    verdict: str
    """In a word or two: dead, exploding, vanishing with depth, …"""
    names: tuple[str, ...]
    """The modules; for a verdict on depth the series of blocks, as in `params/block_#`."""
    detail: str
    """What was measured, in a sentence."""
    remedy: str

    def __str__(self) -> str:
        more = f" and {len(self.names) - 4} more" if len(self.names) > 4 else ""
        return f"{self.verdict}: {', '.join(self.names[:4])}{more}. {self.detail} {self.remedy}"


@struct.dataclass
class GradientFlow:
    """Gradients by module, or by block input, in the order of depth. A pytree: it may leave a jit."""

    names: tuple[str, ...] = struct.field(pytree_node=False)
    norm: Array
    """[M] float32, the Euclidean norm of each module's gradient, or of that at each block's input."""
    sizes: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    """The number of entries of each module's gradient; None at taps."""
    dtypes: tuple[str, ...] | None = struct.field(pytree_node=False, default=None)
    """The coarsest dtype among each module's parameters; None where these were not given."""
    weight_norm: Array | None = None
    """[M] that of its parameters."""
    update_ratio: Array | None = None
    """[M] norm of the update / norm of the parameters; inf where only these are zero."""

    @property
    def rms(self) -> Array:
        """[M] the root mean square of each module's gradient, comparable between sizes; norm at taps."""
        if self.sizes is None:
            return self.norm
        return self.norm / jnp.sqrt(jnp.array(self.sizes, jnp.float32))

    def findings(self) -> list[Finding]:
        """What is wrong: along the depth first, then module by module; empty if nothing is."""
        return [*_judge_depth(self), *_judge_modules(self)]

    def __str__(self) -> str:
        title = "gradient norm" if self.sizes is None else "gradient rms"
        columns = {
            title: self.rms,
            "weight norm": self.weight_norm,
            "update/weight": self.update_ratio,
        }
        shown = {
            title: np.asarray(column) for title, column in columns.items() if column is not None
        }
        width = max(map(len, ("module", *self.names)))
        lines = [f"{'module':{width}}" + "".join(f"{title:>15}" for title in shown)]
        for i, name in enumerate(self.names):
            lines.append(f"{name:{width}}" + "".join(f"{c[i]:15.3e}" for c in shown.values()))
        findings = self.findings() or ["Gradients reach every layer at a similar size."]
        return "\n".join([*lines, "", *map(str, findings)])


def gradient_flow(
    grads: Any,
    params: Any = None,
    updates: Any = None,
    *,
    levels: int | None = None,
    stacked: Sequence[str] = (),
) -> GradientFlow:
    """Gives the size of the gradient, and of the update next to the weights, module by module.

    A module is what holds a leaf: `block_2/dense` for `block_2/dense/kernel`. Modules stand in natural
    order, `block_2` before `block_10`. Pure and jittable, one reduction over each tree, in float32 and
    right at any magnitude: it can stay inside a step and be read every so many steps. `str()` of the
    result is a table with verdicts and remedies.

    Args:
      grads: unscaled gradients: any tree of dicts, lists or modules.
      params: the parameters, of the same structure, for their norms.
      updates: what the optimiser adds to them, for the ratio of update to weight.
      levels: group by so many leading segments of the path instead, e.g. 2 for `params/block_2`.
      stacked: patterns, as `trees.match_path` reads them, of modules whose leaves lead with an axis of
        blocks, as `nn.scan` makes them: `("**/blocks",)` splits `blocks/dense` into `blocks/0/dense`
        and so on.
    """
    if updates is not None and params is None:
        raise ValueError(
            "gradient_flow: updates came without params, and their ratio needs both; pass "
            "gradient_flow(grads, params, updates)."
        )
    for what, tree in (("params", params), ("updates", updates)):
        if tree is not None and jax.tree.structure(tree) != jax.tree.structure(grads):
            raise ValueError(
                f"gradient_flow: {what} and grads differ in structure; expected the trees of one and "
                "the same step, with the same containers and keys."
            )
    parts = _by_module(grads, levels, stacked)
    if not parts:
        raise ValueError("gradient_flow: grads holds no floating-point array to measure.")
    flow = GradientFlow(
        names=tuple(parts),
        norm=_norms(parts),
        sizes=tuple(sum(part.size for part in module) for module in parts.values()),
    )
    if params is None:
        return flow
    weights = _by_module(params, levels, stacked)
    weight_norm = _norms(weights)
    epsilon = lambda part: formats.format_of(part.dtype).epsilon
    flow = dataclasses.replace(
        flow,
        dtypes=tuple(str(max(module, key=epsilon).dtype) for module in weights.values()),
        weight_norm=weight_norm,
    )
    if updates is None:
        return flow
    update_norm = _norms(_by_module(updates, levels, stacked))
    ratio = jnp.where(update_norm == 0, 0, update_norm / weight_norm)
    return dataclasses.replace(flow, update_ratio=ratio)


@jax.custom_vjp
def tap(x: T, tap: trees.SumOfSquares) -> T:
    """Gives x itself; the gradient with respect to `tap` is the size of the gradient at x.

    x is an array or a tree of them, and its gradient passes through unchanged. `tap` is one block's
    part of `new_tap`; differentiate the loss with respect to it and hand the result to `flow_at_taps`.
    Sizes add up as sums of squares do, so a tap under `vmap`, in several microbatches or used in
    several places measures the norm over all of them together. Works under jit, scan and remat; inside
    `shard_map` pass `jax.lax.pcast(tap, axis, to="varying")`; fails in forward mode. With a scaled
    loss the norms are scaled too.
    """
    del tap
    return x


def _tap_forward(x: T, tap: trees.SumOfSquares) -> tuple[T, None]:
    del tap
    return x, None


def _tap_backward(_: None, cotangent: T) -> tuple[T, trees.SumOfSquares]:
    return cotangent, trees.sum_of_squares(cotangent)


tap.defvjp(_tap_forward, _tap_backward)


def new_tap(blocks: int | None = None) -> trees.SumOfSquares:
    """Gives what `tap` takes: for one place, or stacked for `blocks` of them, to be scanned over."""
    zeros = jnp.zeros([] if blocks is None else [blocks], jnp.float32)
    return trees.SumOfSquares(zeros, zeros, zeros)


def flow_at_taps(tap_grads: Any) -> GradientFlow:
    """Gives the norm of the gradient at every block's input, from the gradients of the taps.

    tap_grads: one stacked tap, or a tree of single and stacked ones; a tap is named by its path, and
    by its number where stacked. Natural order, as in `gradient_flow`.
    """
    is_tap = lambda node: isinstance(node, trees.SumOfSquares)
    norms = {}
    for path, squares in jax.tree_util.tree_leaves_with_path(tap_grads, is_leaf=is_tap):
        if not is_tap(squares):
            raise ValueError(
                f"flow_at_taps: expected gradients of taps made by new_tap; came {type(squares).__name__} "
                f"at {trees.path_string(path)!r}."
            )
        name, norm = trees.path_string(path), trees.root_of(squares)
        places = [name] if norm.ndim == 0 else [f"{name or 'block'}_{i}" for i in range(norm.size)]
        norms.update(zip(places, jnp.ravel(norm)))
    names = sorted(norms, key=_natural)
    return GradientFlow(names=tuple(names), norm=jnp.stack([norms[name] for name in names]))


class _Part(NamedTuple):
    """What one leaf, or one block's slice of it, contributes to a module."""

    squares: trees.SumOfSquares
    size: int
    dtype: Any


def _by_module(tree: Any, levels: int | None, stacked: Sequence[str]) -> dict[str, list[_Part]]:
    """The parts of each module, in natural order of their names."""
    modules: dict[str, list[_Part]] = {}
    for path, leaf in trees.named_leaves(tree):
        if not trees.is_floating(leaf):
            continue
        for place, part in _parts(path.split("/"), leaf, stacked):
            name = "/".join(place[: levels or max(len(place) - 1, 1)])
            modules.setdefault(name, []).append(part)
    return {name: modules[name] for name in sorted(modules, key=_natural)}


def _parts(
    path: list[str], leaf: Array, stacked: Sequence[str]
) -> Iterator[tuple[list[str], _Part]]:
    for end in range(1, len(path) + 1):
        if any(trees.match_path(pattern, "/".join(path[:end])) for pattern in stacked):
            break
    else:
        yield path, _Part(trees.sum_of_squares(leaf), leaf.size, leaf.dtype)
        return
    if leaf.ndim == 0:
        raise ValueError(f"gradient_flow: {'/'.join(path)!r} is a scalar, so it cannot be stacked.")
    # One reduction for all blocks, rather than one for each slice.
    squares = jax.vmap(trees.sum_of_squares)(leaf)
    for i in range(leaf.shape[0]):
        own = jax.tree.map(lambda field, i=i: field[i], squares)
        yield [*path[:end], str(i), *path[end:]], _Part(own, leaf[0].size, leaf.dtype)


def _norms(modules: dict[str, list[_Part]]) -> Array:
    add = lambda *fields: sum(fields[1:], start=fields[0])
    sums = [jax.tree.map(add, *(part.squares for part in parts)) for parts in modules.values()]
    return trees.root_of(jax.tree.map(lambda *fields: jnp.stack(fields), *sums))


def _natural(name: str) -> list[str | int]:
    """A key that sorts block_2 before block_10: text and numbers in turn."""
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"([0-9]+)", name))]


def _judge_depth(flow: GradientFlow) -> Iterator[Finding]:
    for series, blocks in _series_of_blocks(flow.names).items():
        norms = np.asarray(flow.norm, np.float64)
        sizes = np.ones(len(norms)) if flow.sizes is None else np.array(flow.sizes)
        rms = [np.linalg.norm(norms[at]) / np.sqrt(sizes[at].sum()) for at in blocks.values()]
        first, last = rms[0], rms[-1]
        if len(rms) < 3 or not (0 < first < np.inf and 0 < last < np.inf):
            continue
        ratio = first / last
        if 1 / _FAR_ALONG_DEPTH <= ratio <= _FAR_ALONG_DEPTH:
            continue
        verdict = "vanishing with depth" if ratio < 1 else "exploding with depth"
        detail = (
            f"The gradient at block {min(blocks)} is 10^{np.log10(ratio):.1f} times that at block "
            f"{max(blocks)}."
        )
        yield Finding(verdict, (series,), detail, _ADVICE[verdict])


def _series_of_blocks(names: Sequence[str]) -> dict[str, dict[int, list[int]]]:
    """Where the modules of each numbered block stand, by block and by series: `decoder/block_#`.

    The first segment that ends in a number tells the block, whatever lies below it.
    """
    series: dict[str, dict[int, list[int]]] = {}
    for i, name in enumerate(names):
        if found := re.match(r"(.*?)([0-9]+)(?=/|$)", name):
            blocks = series.setdefault(found[1] + "#", {})
            blocks.setdefault(int(found[2]), []).append(i)
    return series


def _judge_modules(flow: GradientFlow) -> Iterator[Finding]:
    rms = np.asarray(flow.rms, np.float64)
    alive = np.isfinite(rms) & (rms > 0)
    typical = np.median(rms[alive]) if alive.any() else 1.0
    # At taps a long way is the series' matter; naming half of all blocks would add nothing.
    far = np.inf if flow.sizes is None else _FAR_FROM_TYPICAL
    checks = {
        "not finite": (~np.isfinite(rms), "The gradient holds inf or NaN."),
        "dead": (rms == 0, "The gradient is exactly zero."),
        "vanishing": (alive & (rms < typical / far), f"Below 1/{far:.0f} of the typical module's."),
        "exploding": (
            alive & (rms > typical * far),
            f"Above {far:.0f} times the typical module's.",
        ),
    }
    if flow.update_ratio is not None and flow.dtypes is not None:
        ratio = np.asarray(flow.update_ratio, np.float64)
        ulp = np.array([formats.format_of(dtype).epsilon for dtype in flow.dtypes])
        checks |= {
            "rushed": (
                (ratio > _RUSHED) & (ratio < np.inf),
                f"The update exceeds {_RUSHED} of the weights.",
            ),
            "stalled": (
                (ratio > 0) & (ratio < ulp / 2),
                "The update is below the weights' resolution.",
            ),
        }
    for verdict, (where, detail) in checks.items():
        if where.any():
            names = tuple(np.array(flow.names)[where].tolist())
            yield Finding(verdict, names, detail, _ADVICE[verdict])
