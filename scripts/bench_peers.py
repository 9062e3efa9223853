"""The other libraries' training steps in `bench.py`: jmp, MPX and flax's DynamicScale in float16.

Each is written as its own documentation shows, around the same Linen model, optimizer and clipping as
jaxmp's row. A builder takes (model loss, optimizer after unscaling) and returns (init, step); it raises
ImportError where its package is not installed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

CLIP = 1.0


def _guarded(tx):
    return optax.chain(optax.clip_by_global_norm(CLIP), tx)


def _cast_inputs(batch, dtype):
    inputs = batch["inputs"]
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        return batch
    return batch | {"inputs": inputs.astype(dtype)}


def jmp_float16(loss_fn, tx):
    """jmp 0.0.4: Policy, DynamicLossScale, all_finite and select_tree."""
    import jmp

    tx = _guarded(tx)
    policy = jmp.get_policy("params=float32,compute=float16,output=float32")

    # The state holds numbers: jmp's object checks its leaves, and so refuses to be lowered.
    def init(params):
        return params, tx.init(params), (jnp.float32(2**15), jnp.int32(0))

    def step(state, batch):
        params, opt_state, (loss_scale, counter) = state
        scale = jmp.DynamicLossScale(loss_scale, counter, min_loss_scale=jnp.float32(1))

        def scaled_loss(params):
            cast = policy.cast_to_compute(params)
            return scale.scale(loss_fn(cast, _cast_inputs(batch, jnp.float16)))

        loss, grads = jax.value_and_grad(scaled_loss)(params)
        grads = scale.unscale(grads)
        finite = jmp.all_finite(grads)
        updates, new_opt = tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        kept = jmp.select_tree(finite, (new_params, new_opt), (params, opt_state))
        adjusted = scale.adjust(finite)
        return (*kept, (adjusted.loss_scale, adjusted.counter)), scale.unscale(loss)

    return init, step


def mpx_float16(loss_fn, tx):
    """MPX (mixed-precision-for-JAX): filter_value_and_grad and optimizer_update."""
    import mpx

    tx = _guarded(tx)

    def init(params):
        scaling = mpx.DynamicLossScaling(jnp.float32(2**15), jnp.float32(1))
        return params, tx.init(params), (scaling.loss_scaling, scaling.counter)

    def step(state, batch):
        params, opt_state, (scale, counter) = state
        scaling = mpx.DynamicLossScaling(scale, jnp.float32(1), counter=counter)
        grad_fn = mpx.filter_value_and_grad(loss_fn, scaling)
        loss, scaling, finite, grads = grad_fn(params, batch)
        params, opt_state = mpx.optimizer_update(params, tx, opt_state, grads, finite)
        return (params, opt_state, (scaling.loss_scaling, scaling.counter)), loss

    return init, step


def flax_float16(loss_fn, tx):
    """flax.training.dynamic_scale, as in flax's ImageNet example."""
    from flax.training import dynamic_scale

    tx = _guarded(tx)

    def init(params):
        scale = dynamic_scale.DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(2**15))
        return params, tx.init(params), scale

    def step(state, batch):
        params, opt_state, scale = state

        def loss_of(params):
            cast = jax.tree.map(lambda p: p.astype(jnp.float16), params)
            return loss_fn(cast, _cast_inputs(batch, jnp.float16))

        scale, finite, loss, grads = scale.value_and_grad(loss_of)(params)
        updates, new_opt = tx.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return (keep(new_params, params), keep(new_opt, opt_state), scale), loss

    return init, step


PEERS = {
    "jmp float16": jmp_float16,
    "MPX float16": mpx_float16,
    "flax DynamicScale float16": flax_float16,
}
