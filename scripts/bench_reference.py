"""The yardstick of `bench.py`: a GPT and a ViT, and their 16-bit training steps, written by hand.

Plain JAX and optax, no Flax and nothing of jaxmp: what an expert would write for one model and one
precision, keeping as little as possible between the forward and the backward pass. Parameters have
the names and shapes of `jaxmp.nn.models`, so that both can start from the same weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


def f32(x):
    """Widens for sums and curved functions; stored values stay in 16 bits."""
    return x.astype(jnp.float32)


# --- elementwise code that keeps 16-bit inputs and recomputes the rest ---------------------------


@jax.custom_vjp
def gelu(x):
    x32 = f32(x)
    return (0.5 * x32 * (1 + jnp.tanh(0.7978845608 * (x32 + 0.044715 * x32**3)))).astype(x.dtype)


def _gelu_backward(x, g):
    # The barrier makes XLA read the stored 16-bit value, not keep a float32 one beside it.
    x32 = f32(lax.optimization_barrier(x))
    t = jnp.tanh(0.7978845608 * (x32 + 0.044715 * x32**3))
    slope = 0.5 * (1 + t) + 0.5 * x32 * (1 - t * t) * 0.7978845608 * (1 + 3 * 0.044715 * x32**2)
    return ((f32(g) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def layer_norm(x, scale, bias):
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x, scale, bias):
    x32 = f32(x)
    mean = x32.mean(-1, keepdims=True)
    rstd = lax.rsqrt(jnp.square(x32 - mean).mean(-1, keepdims=True) + 1e-5)
    y = (x32 - mean) * rstd * f32(scale) + f32(bias)
    return y.astype(x.dtype), (x, mean, rstd, scale)


def _layer_norm_backward(saved, g):
    x, mean, rstd, scale = saved
    normal = (f32(lax.optimization_barrier(x)) - mean) * rstd
    g32 = f32(g)
    rows = tuple(range(g.ndim - 1))
    gs = g32 * f32(scale)
    dx = gs - gs.mean(-1, keepdims=True) - normal * (gs * normal).mean(-1, keepdims=True)
    d_scale, d_bias = (g32 * normal).sum(rows), g32.sum(rows)
    return (rstd * dx).astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(scale.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def linear(x, kernel, bias):
    return x @ kernel + bias


def _linear_backward(saved, g):
    x, kernel = saved
    g = lax.optimization_barrier(g)  # else its sum keeps a float32 copy of what made it
    rows = tuple(range(g.ndim - 1))
    d_kernel = jnp.tensordot(x, g, (rows, rows))
    return g @ kernel.T, d_kernel, f32(g).sum(rows).astype(g.dtype)


linear.defvjp(lambda x, w, b: (linear(x, w, b), (x, w)), _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(q, k, v, causal):
    """q, k, v [B, T, N, H] -> [B, T, N, H]; keeps the weights in 16 bits."""
    return _attention_forward(q, k, v, causal)[0]


def _attention_forward(q, k, v, causal):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if causal:
        length = q.shape[1]
        seen = lax.broadcasted_iota(jnp.int32, (length, length), 0)
        seen = seen >= lax.broadcasted_iota(jnp.int32, (length, length), 1)
        scores = jnp.where(seen, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v)
    return out, (q, k, v, weights, out)


def _attention_backward(causal, saved, g):
    q, k, v, weights, out = saved
    weights = lax.optimization_barrier(weights)
    d_v = jnp.einsum("bnts,btnh->bsnh", weights, g)
    d_weights = jnp.einsum("btnh,bsnh->bnts", g, v)
    # sum_s weights * d_weights = sum_h out * g, H numbers a row instead of T.
    inner = jnp.sum(f32(g) * f32(out), -1).transpose(0, 2, 1)[..., None]
    d_scores = f32(weights) * (f32(d_weights) - inner) * q.shape[-1] ** -0.5
    d_scores = d_scores.astype(q.dtype)
    d_q = jnp.einsum("bnts,bsnh->btnh", d_scores, k)
    d_k = jnp.einsum("bnts,btnh->bsnh", d_scores, q)
    return d_q, d_k, d_v


attention.defvjp(_attention_forward, _attention_backward)


@jax.custom_vjp
def head_loss(x, table, targets):
    """Mean cross entropy of `x @ table.T`, float32 logits, 16-bit products forward and backward."""
    return _head_loss_forward(x, table, targets)[0]


def _head_loss_forward(x, table, targets):
    logits = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
    top = logits.max(-1, keepdims=True)
    log_sum = top[..., 0] + jnp.log(jnp.exp(logits - top).sum(-1))
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (log_sum - picked).mean(), (x, table, targets, logits, log_sum)


def _head_loss_backward(saved, g):
    x, table, targets, logits, log_sum = saved
    slope = jnp.exp(logits - log_sum[..., None]) - _one_hot(logits, targets)
    slope = (slope * (g / targets.size)).astype(x.dtype)
    rows = tuple(range(targets.ndim))
    d_x = jnp.einsum("...v,vd->...d", slope, table)
    return d_x, jnp.tensordot(slope, x, (rows, rows)), np.zeros(targets.shape, jax.dtypes.float0)


def _one_hot(logits, targets):
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


head_loss.defvjp(_head_loss_forward, _head_loss_backward)


@jax.custom_vjp
def embed(table, positions, tokens):
    return table[tokens] + positions


def _embed_backward(saved, g):
    table, tokens = saved
    # Thousands of cotangents meet in one row: summed in float32.
    rows = jnp.zeros(table.shape, jnp.float32).at[tokens].add(f32(g))
    d_positions = f32(g).sum(0).astype(table.dtype)
    return rows.astype(table.dtype), d_positions, np.zeros(tokens.shape, jax.dtypes.float0)


embed.defvjp(lambda t, p, tokens: (embed(t, p, tokens), (t, tokens)), _embed_backward)


# --- the models ----------------------------------------------------------------------------------


def block(p, x, heads, causal, fused):
    """Pre-LN transformer block on x [B, T, D]; `fused` is cuDNN's attention."""
    norm = lambda name, x: layer_norm(x, p[name]["scale"], p[name]["bias"])
    dense = lambda layer, x: linear(x, layer["kernel"], layer["bias"])
    qkv = dense(p["SelfAttention_0"]["qkv"], norm("LayerNorm_0", x))
    q, k, v = (part.reshape(*x.shape[:2], heads, -1) for part in jnp.split(qkv, 3, -1))
    if fused:
        y = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    else:
        y = attention(q, k, v, causal)
    x = x + dense(p["SelfAttention_0"]["out"], y.reshape(x.shape))
    return x + dense(p["Dense_1"], gelu(dense(p["Dense_0"], norm("LayerNorm_1", x))))


def gpt_loss(params, batch, *, heads, fused):
    """Mean next-token loss; batch["inputs"] and batch["targets"] are integers [B, T]."""
    tokens, table = batch["inputs"], params["tokens"]["embedding"]
    x = embed(table, params["positions"][: tokens.shape[1]], tokens)
    for i in range(sum(name.startswith("TransformerBlock") for name in params)):
        x = block(params[f"TransformerBlock_{i}"], x, heads, True, fused)
    x = layer_norm(x, params["final_norm"]["scale"], params["final_norm"]["bias"])
    return head_loss(x, table, batch["targets"])


def vit_loss(params, batch, *, heads, patch, fused):
    """Mean classification loss; batch["inputs"] [B, H, W, C] of floats, batch["targets"] [B]."""
    images = batch["inputs"]
    b, h, w, c = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)
    x = linear(x, params["patch"]["kernel"], params["patch"]["bias"]) + params["positions"]
    for i in range(sum(name.startswith("TransformerBlock") for name in params)):
        x = block(params[f"TransformerBlock_{i}"], x, heads, False, fused)
    x = layer_norm(x, params["final_norm"]["scale"], params["final_norm"]["bias"])
    x = f32(x).mean(1).astype(x.dtype)
    logits = jnp.einsum("bd,dc->bc", x, params["head"]["kernel"])
    logits = f32(logits) + f32(params["head"]["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


# --- the step ------------------------------------------------------------------------------------


class State(NamedTuple):
    """What the step changes. Everything is float32 but the counters."""

    params: Any
    opt_state: Any
    scale: jax.Array
    good_steps: jax.Array


def init_state(params, tx):
    """The state before the first step; scale and counter are there even where nothing scales."""
    return State(params, tx.init(params), jnp.float32(2**15), jnp.int32(0))


def train_step(loss_fn, tx, dtype, *, clip=1.0, scaling=False):
    """One step in `dtype` with a float32 master copy; `tx` is the optimizer after clipping.

    With `clip`, gradients are scaled to that global norm and a step whose norm is not finite is
    skipped by select; with `scaling`, the loss scale is dynamic. Without `clip`: bare.
    """

    def step(state, batch):
        params, opt_state, scale, good_steps = state
        cast = jax.tree.map(lambda p: p.astype(dtype), params)
        inputs = batch["inputs"]
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            batch = batch | {"inputs": inputs.astype(dtype)}
        factor = scale if scaling else jnp.float32(1)
        loss, grads = jax.value_and_grad(lambda p: loss_fn(p, batch) * factor)(cast)
        grads = jax.tree.map(lambda g: f32(g) / factor, grads)
        if clip is None:
            updates, opt_state = tx.update(grads, opt_state, params)
            return State(optax.apply_updates(params, updates), opt_state, scale, good_steps), loss
        # One pass over the gradients gives the norm, and with it whether all are finite.
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        finite = jnp.isfinite(norm)
        shrink = jnp.minimum(1.0, clip / norm)
        updates, new_opt = tx.update(jax.tree.map(lambda g: g * shrink, grads), opt_state, params)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        params = keep(optax.apply_updates(params, updates), params)
        opt_state = keep(new_opt, opt_state)
        if scaling:
            grow = finite & (good_steps == 1999)
            good_steps = jnp.where(finite & ~grow, good_steps + 1, 0)
            up, down = jnp.minimum(scale * 2, 2.0**24), jnp.maximum(scale / 2, 1.0)
            scale = jnp.where(grow, up, jnp.where(finite, scale, down))
        metrics = {"loss": loss / factor, "grad_norm": norm, "finite": finite}
        return State(params, opt_state, scale, good_steps), metrics

    return step
