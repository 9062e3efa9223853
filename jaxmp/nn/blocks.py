"""The blocks of a Linen model: what flows into each, and each as a function of that alone.

Blocks are the modules called directly by the model whose first argument is a floating-point array
and whose result is one: embeddings eat integers and are none, and dropout is none either. Instruments
need no change of a model's source to look between its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmp.numerics import tree as trees


class Block(NamedTuple):
    """One block at one point."""

    name: str
    """Its name in the model, `TransformerBlock_0`; called again it is `TransformerBlock_0#1`."""
    kind: str
    """The class of the module, `TransformerBlock`."""
    apply: Callable[[Any], Any]
    """The block as a function of its input, of any batch size; its parameters and other arguments are
    fixed. It traces the model around the block, of which a compiler leaves nothing."""
    input: jax.Array
    """What flowed into it."""


# (name, class of the module, what runs the block on an input, its input) -> its result
_Look = Callable[[str, str, Callable[[Any], Any], Any], Any]


def blocks_of(fn: Callable, *args: Any, **kwargs: Any) -> list[Block]:
    """The blocks that run when `fn`, which applies a Linen model, is called: in that order."""
    kinds: dict[str, str] = {}

    def inputs(args: Any, kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def look(name: str, kind: str, run: Callable[[Any], Any], x: Any) -> Any:
            result = run(x)
            if trees.is_floating(result):
                kinds[name], found[name] = kind, x
            return result

        _intercepted(fn, look)(*args, **kwargs)
        return found

    def flowed_in() -> dict[str, Any]:
        # Arrays come in as arguments: of constants a compiler would compute the whole model itself.
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = {
            i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)
        }

        def run(arrays: dict[int, Any]) -> dict[str, Any]:
            filled = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
            return inputs(*jax.tree.unflatten(tree, filled))

        return jax.jit(run)(arrays)

    def only(wanted: str) -> Callable[[Any], Any]:
        def apply(given: Any) -> Any:
            results: list[Any] = []

            def look(name: str, kind: str, run: Callable[[Any], Any], x: Any) -> Any:
                if name != wanted:
                    return run(x)
                results.append(run(given))
                # What follows is thrown away; it only has to find the shape that it expects.
                return jnp.zeros((x.shape[0], *results[0].shape[1:]), results[0].dtype)

            _intercepted(fn, look)(*args, **kwargs)
            return results[0]

        return apply

    flowed = flowed_in()
    return [Block(name, kind, only(name), flowed[name]) for name, kind in kinds.items()]


def with_inputs(fn: Callable, change: Callable[[str, Any], Any]) -> Callable:
    """`fn`, which applies a Linen model, with `change(name, x)` in place of each block's input x.

    To measure what flows back, `change` adds a tap; to start in the middle, it swaps an input.
    """
    return _intercepted(fn, lambda name, kind, run, x: run(change(name, x)))


def _intercepted(fn: Callable, look: _Look) -> Callable:
    """`fn` with every call of a module one level below the root made by `look`."""

    def intercepted(*args: Any, **kwargs: Any) -> Any:
        calls: dict[str, int] = {}
        running: list[str] = []  # a block within a block, as lifted modules have it, is none

        def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            path = context.module.path
            is_call = len(path) == 1 and context.method_name == "__call__" and not running
            is_block = is_call and not isinstance(context.module, nn.Dropout)
            if not (is_block and args and trees.is_floating(args[0])):
                return next_fun(*args, **kwargs)
            count = calls[path[0]] = calls.get(path[0], -1) + 1
            name = f"{path[0]}#{count}" if count else path[0]
            running.append(name)
            try:
                run = lambda x: next_fun(x, *args[1:], **kwargs)
                return look(name, type(context.module).__name__, run, args[0])
            finally:
                running.pop()

        with nn.intercept_methods(intercept):
            return fn(*args, **kwargs)

    return intercepted
