"""The state of a training run: everything that a step changes, as one pytree."""

from __future__ import annotations

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxmp.numerics import tree as trees


@flax.struct.dataclass
class TrainState:
    """Parameters, optimizer and model state, and the root of the run's randomness.

    Subclass it (with `flax.struct.dataclass`) to carry more; a step leaves unknown fields alone.
    """

    step: jax.Array
    """Updates applied so far, an int32 scalar. Skipped steps do not count."""
    params: Any
    """The float32 master copy of the parameters; the policy casts it at the start of each step."""
    opt_state: Any
    """The optimizer's state, with the loss scale inside (`optim.loss_scale_of`)."""
    model_state: Any
    """What the model carries along that is not trained, such as running statistics; {} for none."""
    rng: jax.Array
    """A PRNG key, constant over the run: step t uses `fold_in(rng, t)`."""

    @classmethod
    def create(
        cls,
        params: Any,
        tx: optax.GradientTransformation,
        *,
        model_state: Any = None,
        rng: jax.Array | None = None,
        **fields: Any,
    ) -> Self:
        """The state before the first step.

        Floating-point parameters narrower than float32 are widened to it. All arrays are copied, so
        that donating the state to a step cannot delete arrays the caller still holds.
        """
        params = jax.tree.map(_at_least_float32, _own(params))
        return cls(
            step=jnp.zeros([], jnp.int32),
            params=params,
            opt_state=tx.init(params),
            model_state={} if model_state is None else _own(model_state),
            rng=jax.random.key(0) if rng is None else jnp.array(rng, copy=True),
            **fields,
        )


def _own(tree: Any) -> Any:
    """A copy; naming the dtype drops weak types, which would change after the first step."""
    return jax.tree.map(lambda x: jnp.array(x, dtype=jnp.asarray(x).dtype, copy=True), tree)


def _at_least_float32(leaf: jax.Array) -> jax.Array:
    return trees.cast_leaf(leaf, jnp.promote_types(leaf.dtype, jnp.float32))
