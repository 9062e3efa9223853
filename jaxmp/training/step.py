"""One pure training step: cast, scale, differentiate, update, or skip as a whole."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmp.numerics import tree as trees
from jaxmp.optim import outliers, scaling
from jaxmp.precision import autocast as autocasting
from jaxmp.precision import policy as policies
from jaxmp.training import accumulate as accumulation
from jaxmp.training import exchange
from jaxmp.training import mesh as meshes
from jaxmp.training.state import TrainState

Metrics = dict[str, jax.Array]
LossFn = Callable[..., Any]

# What a batch usually calls the part that the model eats.
INPUT_NAMES = ("inputs", "input", "x", "image", "images", "features", "pixel_values")
DEFAULT_POLICY = "params=float32,compute=bfloat16,output=float32"


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    policy: policies.Policy | str = DEFAULT_POLICY,
    accumulate: int = 1,
    *,
    inputs: Sequence[str] | None = None,
    autocast: bool = False,
    shardings: Any = None,
    axis_name: exchange.AxisName | None = None,
    reduce_dtype: Any = jnp.float32,
    in_parts: str = "",
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """A pure function `step(state, batch) -> (state, metrics)`; compile it with `jit_step`.

    The step casts the float32 master parameters and the batch's inputs to the policy's compute dtype,
    multiplies the loss by the loss scale found in the optimizer state, differentiates, and hands the
    gradients to `tx`. If the loss or a gradient is not finite, the step is skipped for everything:
    parameters, optimizer (moments, schedule, averages), model state and step count keep their bits;
    only the loss scale and its counters move. A step that `optim.skip_outliers` leaves out is skipped
    for everything as well; only its running norm's counters move then.

    Args:
      loss_fn: `loss_fn(params, batch)`, optionally with a third parameter for a PRNG key and one named
        `model_state`. Returns a scalar loss, or `(loss, aux)` with a dict of scalar metrics; with
        `model_state`, its successor stands in `aux["model_state"]`.
      tx: any optax transformation. Wrap it in `optim.with_loss_scale` for float16; `optim.adamw`,
        `optim.sgd` and `optim.recipe` are wrapped.
      policy: a policy or its string.
      accumulate: how many microbatches the batch is cut into, their gradients averaged in float32.
      inputs: the entries of the batch to cast; by default those in `INPUT_NAMES`, or the first of a
        tuple. Labels, masks, indices and keys are never cast.
      autocast: decide operation by operation (see `jaxmp.autocast`) instead of casting parameters and
        inputs up front: for models written in float32 whose softmax, norms and losses should stay so.
        The policy's overrides are then patterns over places in the program.
      shardings: for several devices, where the parameters lie: `state_shardings(...).params`. Each device
        differentiates the loss of its own rows of the batch (`exchange.over_mesh`), as a microbatch
        is: what a model computes across rows, such as the statistics of BatchNorm, is the device's own.
      axis_name: for a step that is called inside `jax.shard_map` instead, the mesh axes that divide the
        batch, the state being whole on each device (`exchange.over_axes`).
      reduce_dtype: what gradients are in while devices sum them: "bfloat16" halves what is sent.
      in_parts: with `shardings`, a pattern of paths of parameters that each device hands to the model in
        its own parts, such as "layers/**"; the model gathers them (`exchange.layer_gatherer`).

    The metrics are scalars: `loss` (without scale), `grad_norm` (without scale, before clipping),
    `loss_scale` (the one used in this step), `finite`, `skipped` (not finite, or an outlier left out),
    and those of `loss_fn`.
    """
    cast, call = _cast_and_call(loss_fn, policies.as_policy(policy), inputs, autocast)
    across = _across(shardings, axis_name, reduce_dtype, in_parts)
    gradients_of = _gradients_of(cast, call, accumulate, across)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        scale_state = scaling.loss_scale_state_of(state.opt_state)
        scale = scaling.loss_scale_of(state.opt_state)
        rng = jax.random.fold_in(state.rng, state.step)
        metrics, grads, model_state = gradients_of(
            state.params, batch, rng, state.model_state, scale
        )
        loss = metrics["loss"]
        # The transformation does the same to the same gradients; compiled, it is done once.
        unscaled = grads if scale_state is None else scale_state.loss_scale.unscale(grads)
        norm, finite = trees.norm_and_finite(unscaled)
        applied = finite & jnp.isfinite(loss)
        updates, opt_state = optax.with_extra_args_support(tx).update(
            grads, state.opt_state, state.params, value=loss
        )
        # What a guard in the chain left out, such as `skip_outliers`, is left out of the rest too.
        left_out = outliers.skipped_outliers_of(opt_state) - outliers.skipped_outliers_of(
            state.opt_state
        )
        kept = applied & (left_out == 0)
        new_state = dataclasses.replace(
            state,
            step=state.step + jnp.int32(kept),
            params=trees.select_tree(
                kept, optax.apply_updates(state.params, updates), state.params
            ),
            opt_state=scaling.hold_unless(applied, opt_state, state.opt_state),
            model_state=trees.select_tree(kept, model_state, state.model_state),
        )
        metrics |= {
            "grad_norm": norm,
            "loss_scale": scale,
            "finite": applied,
            "skipped": ~kept,
        }
        return new_state, metrics

    return train_step


def jit_step(step: Callable[..., Any], shardings: Any = None) -> Callable[..., Any]:
    """The step compiled once, its state donated: the new state takes the old one's memory.

    With the `shardings` of a state (`state_shardings`) it comes and goes laid out so, a batch is cut over
    the mesh's axes `data` and `fsdp`, and the metrics are on every device.
    """
    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    mesh = meshes.mesh_of(shardings)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, meshes.batch_sharding(mesh)),
        out_shardings=(shardings, meshes.replicated(mesh)),
    )


def make_eval_step(
    loss_fn: LossFn,
    policy: policies.Policy | str = DEFAULT_POLICY,
    *,
    inputs: Sequence[str] | None = None,
    autocast: bool = False,
    shardings: Any = None,
    in_parts: str = "",
) -> Callable[[TrainState, Any], Metrics]:
    """A pure function `evaluate(state, batch) -> metrics`, in the arithmetic of training.

    `loss_fn` is of the form that `make_train_step` takes; what it does to the model state is dropped.
    """
    cast, call = _cast_and_call(loss_fn, policies.as_policy(policy), inputs, autocast)

    def eval_step(state: TrainState, batch: Any) -> Metrics:
        params, batch = cast(state.params, batch)
        if shardings is not None:
            params = exchange.gather(params, shardings, in_parts)
        loss, aux, _ = call(params, batch, state.rng, state.model_state)
        return {"loss": loss, **aux}

    return eval_step


def value_and_grad(
    loss_fn: LossFn,
    policy: policies.Policy | str = DEFAULT_POLICY,
    *,
    has_aux: bool = False,
    accumulate: int = 1,
    inputs: Sequence[str] | None = None,
    autocast: bool = False,
    shardings: Any = None,
    axis_name: exchange.AxisName | None = None,
    reduce_dtype: Any = jnp.float32,
) -> Callable[..., tuple[Any, Any]]:
    """`jax.value_and_grad` under a policy, for those who write their own step.

    The result is called `f(params, batch, rng=None, model_state=None, *, scale=1.0)` with float32
    parameters. It returns the loss without scale (with `has_aux`, a pair of it and the aux dict) and
    float32 gradients of the loss times `scale`: pass `scale=loss_scale_of(opt_state)`, and the
    gradients on to a transformation wrapped in `with_loss_scale`, which divides them.
    Arguments are those of `make_train_step`.
    """
    cast, call = _cast_and_call(loss_fn, policies.as_policy(policy), inputs, autocast)
    across = _across(shardings, axis_name, reduce_dtype)
    gradients_of = _gradients_of(cast, call, accumulate, across)

    def value_and_grad_fn(
        params: Any, batch: Any, rng: Any = None, model_state: Any = None, *, scale: Any = 1.0
    ) -> tuple[Any, Any]:
        metrics, grads, new_model_state = gradients_of(params, batch, rng, model_state, scale)
        loss = metrics.pop("loss")
        if model_state is not None:
            metrics["model_state"] = new_model_state
        return ((loss, metrics) if has_aux else loss), grads

    return value_and_grad_fn


def cast_inputs(batch: Any, policy: policies.Policy, inputs: Sequence[str] | None = None) -> Any:
    """The batch with what the model eats in the compute dtype, and the rest as it is.

    Raises:
      ValueError: a mapping with floating-point entries, none of them known as an input.
    """
    cast = lambda tree: trees.cast_floating(tree, policy.compute_dtype)
    if isinstance(batch, Mapping):
        names = [n for n in (INPUT_NAMES if inputs is None else inputs) if n in batch]
        floating = [n for n, v in batch.items() if any(map(trees.is_floating, jax.tree.leaves(v)))]
        if floating and not names:
            raise ValueError(
                f"The batch has the floating-point entries {', '.join(map(repr, floating))}, and none "
                f"is known to be the model's input ({', '.join(inputs or INPUT_NAMES)}): name those "
                f"to cast, as in inputs=({floating[0]!r},), or inputs=() with names of none."
                if inputs is None
                else f"The batch has no entry named {', '.join(map(repr, inputs))}: it has "
                f"{', '.join(map(repr, batch))}."
            )
        return {name: cast(value) if name in names else value for name, value in batch.items()}
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return (cast(batch[0]), *batch[1:])
    return cast(batch)


def _cast_and_call(
    loss_fn: LossFn, policy: policies.Policy, inputs: Sequence[str] | None, autocast: bool
) -> tuple[Callable[[Any, Any], tuple[Any, Any]], Callable[..., Any]]:
    """What casts `(params, batch)` up front, and the loss to call on them: the two roads to 16 bits."""
    call = _normalised(loss_fn)
    if autocast and policy.compute_dtype.itemsize == 2:
        return lambda params, batch: (params, batch), autocasting.autocast(call, policy)
    return (
        lambda params, batch: (
            policy.cast_to_compute(params),
            cast_inputs(batch, policy, inputs),
        ),
        call,
    )


def _across(
    shardings: Any, axis_name: exchange.AxisName | None, reduce_dtype: Any, in_parts: str = ""
) -> Callable[[exchange.Gradients], exchange.Gradients]:
    """What makes one device's gradients those of all: nothing, a mesh's exchange, or `shard_map`'s."""
    if shardings is not None and axis_name is not None:
        raise ValueError(
            "Both shardings and axis_name were given: pass shardings for a step compiled over a mesh, "
            "or axis_name for one that is called inside jax.shard_map."
        )
    if shardings is not None:
        return lambda gradients: exchange.over_mesh(gradients, shardings, reduce_dtype, in_parts)
    if axis_name is not None:
        return lambda gradients: exchange.over_axes(gradients, axis_name, reduce_dtype)
    return lambda gradients: gradients


def _gradients_of(
    cast: Callable[[Any, Any], tuple[Any, Any]],
    call: Callable[..., Any],
    parts: int,
    across: Callable[[exchange.Gradients], exchange.Gradients],
) -> exchange.Gradients:
    """A function of `(params, batch, rng, model_state, scale)` giving metrics, gradients, model state.

    Gradients are taken at the cast parameters and widened afterwards, which is what
    differentiating through the cast does; so the cast is done once, not in every microbatch, and
    what devices send each other is 16-bit.
    """

    def gradients_of(
        compute_params: Any, batch: Any, rng: Any, model_state: Any, scale: Any
    ) -> tuple[Metrics, Any, Any]:
        def micro_step(micro: Any, index: Any, model_state: Any) -> tuple[Metrics, Any, Any]:
            key = rng if rng is None or parts == 1 else jax.random.fold_in(rng, index)

            def scaled_loss(compute_params: Any) -> tuple[jax.Array, Any]:
                loss, aux, new_state = call(compute_params, micro, key, model_state)
                return loss * scale, ({"loss": loss, **aux}, new_state)

            grads, (metrics, new_state) = jax.grad(scaled_loss, has_aux=True)(compute_params)
            return metrics, grads, new_state

        return accumulation.accumulate(micro_step, compute_params, batch, model_state, parts)

    exchanged = across(gradients_of)
    return lambda params, batch, *rest: exchanged(*cast(params, batch), *rest)


def _normalised(loss_fn: LossFn) -> Callable[..., tuple[jax.Array, dict[str, Any], Any]]:
    """`loss_fn` with all four arguments, returning `(float32 loss, metrics, model_state)`."""
    parameters = list(inspect.signature(loss_fn).parameters.values())
    takes_state = any(p.name == "model_state" for p in parameters)
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "model_state"
    ]
    takes_rng = len(positional) > 2 or any(p.kind == p.VAR_POSITIONAL for p in parameters)

    def call(params: Any, batch: Any, rng: Any, model_state: Any) -> Any:
        arguments = (params, batch, rng) if takes_rng else (params, batch)
        out = loss_fn(*arguments, **({"model_state": model_state} if takes_state else {}))
        loss, aux = out if isinstance(out, tuple) else (out, {})
        if jnp.shape(loss) != ():
            raise ValueError(
                f"loss_fn returned a loss of shape {jnp.shape(loss)}, expected a scalar: take its "
                "mean, or return (loss, aux)."
            )
        aux = dict(aux)
        if takes_state and "model_state" not in aux:
            raise ValueError(
                "loss_fn takes model_state but did not return its successor: return "
                '(loss, {"model_state": new_model_state, ...}).'
            )
        return jnp.asarray(loss, jnp.float32), aux, aux.pop("model_state", model_state)

    return call
