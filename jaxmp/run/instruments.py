"""The instruments of `jaxmp.diagnose`, pointed at a run: its model, its state, one of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp import training
from jaxmp.diagnose import flow, layer_gains, spectrum
from jaxmp.nn import blocks, layers, linen
from jaxmp.optim import scaling
from jaxmp.precision import autocast as autocasting
from jaxmp.run import build


@dataclasses.dataclass(frozen=True)
class Attention:
    """How sharp the attention of one layer is on a batch."""

    layer: str
    entropy: float
    """The mean over rows, in nats."""
    least_entropy: float
    """That of the sharpest row that may attend to more than one key; 0 attends to one."""
    max_logit: float


def flow_of(parts: build.Experiment) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A pure function `(state, batch) -> (at block inputs, by module)` of gradient flows.

    It backpropagates the loss in the run's own arithmetic, loss scale included, with a tap at the
    input of every block; the gradients that come back are without scale. It is a program of its own:
    the training step stays as it is, and a run that calls this every k steps pays for it every k steps.
    """
    policy, autocast = parts.policy, parts.config.autocast

    def measure(state: Any, batch: Any) -> tuple[flow.GradientFlow, flow.GradientFlow]:
        scale = scaling.loss_scale_of(state.opt_state)
        rng = jax.random.fold_in(state.rng, state.step)

        def loss(params: Any, taps: dict[str, Any], batch: Any) -> jax.Array:
            change = lambda name, x: flow.tap(x, taps[name]) if name in taps else x
            call = blocks.with_inputs(parts.loss, change)
            return call(params, batch, rng, state.model_state)[0] * scale

        run = autocasting.autocast(loss, policy) if autocast else loss
        params, inputs = state.params, batch
        if not autocast:
            params = policy.cast_to_compute(params)
            inputs = training.cast_inputs(batch, policy)
        taps = {name: flow.new_tap() for name in _block_names(parts, state, batch)}
        grads, at_taps = jax.grad(run, argnums=(0, 1))(params, taps, inputs)
        divide = lambda tree: jax.tree.map(lambda g: g.astype(jnp.float32) / scale, tree)
        at_inputs = flow.flow_at_taps(at_taps)
        return (
            dataclasses.replace(at_inputs, norm=at_inputs.norm / scale),
            flow.gradient_flow(divide(grads), state.params),
        )

    return measure


def scalars(at_inputs: flow.GradientFlow, by_module: flow.GradientFlow) -> dict[str, float]:
    """Gradient flows as named numbers, for records and TensorBoard."""
    found = {f"flow/{n}": v for n, v in zip(at_inputs.names, np.asarray(at_inputs.norm))}
    found |= {f"grad_rms/{n}": v for n, v in zip(by_module.names, np.asarray(by_module.rms))}
    return {name: float(value) for name, value in found.items()}


def gains_of(
    parts: build.Experiment, state: Any, batch: Any, examples: int = 4
) -> tuple[dict[str, layer_gains.Gains], layer_gains.Gains, spectrum.Homogeneity]:
    """(the largest singular value of each block, that of all from the first block on, the degree).

    Local figures, at the inputs that `examples` of the batch give each block, in float32 and as in
    evaluation: nothing is random. The degree is that of the whole at the first example.
    """
    inputs = batch["inputs"][:examples]
    keywords = linen.train_argument(parts.model, False)
    variables = {"params": state.params, **state.model_state}
    found = blocks.blocks_of(parts.model.apply, variables, inputs, **keywords)
    apply = evaluated(parts, state)

    def of(fn: Callable[[Any], Any], x: jax.Array) -> layer_gains.Gains:
        one = lambda example: fn(example[None])[0]
        return jax.jit(lambda x: spectrum.lipschitz(one, x, batched=True))(x)

    first = found[0]

    def rest(x: Any) -> Any:
        swap = lambda name, own: x if name == first.name else own
        return blocks.with_inputs(apply, swap)(inputs)

    per_block = {block.name: of(block.apply, block.input) for block in found}
    degree = jax.jit(spectrum.homogeneity_degree, static_argnums=0)(rest, first.input[:1])
    return per_block, of(rest, first.input), degree


def attention_of(parts: build.Experiment, state: Any, batch: Any) -> list[Attention]:
    """The attention of each layer on a batch, from the first layer to the last; [] without attention."""
    variables = {"params": state.params, **state.model_state}

    @jax.jit
    def seen(variables: Any, inputs: Any) -> Any:
        keywords = linen.train_argument(parts.model, False)
        _, sown = parts.model.apply(variables, inputs, mutable=[layers.ATTENTION], **keywords)
        return sown.get(layers.ATTENTION, {})

    is_layer = lambda node: isinstance(node, dict) and "query" in node
    found = jax.tree_util.tree_leaves_with_path(seen(variables, batch["inputs"]), is_leaf=is_layer)
    return [_attention(str(path[0].key), layer) for path, layer in found]


def _attention(name: str, seen: dict[str, jax.Array]) -> Attention:
    logits = layer_gains.attention_logits(seen["query"], seen["key"])
    rows = jnp.arange(logits.shape[-2])[:, None] + logits.shape[-1] - logits.shape[-2]
    allowed = (jnp.arange(logits.shape[-1]) <= rows) | ~seen["causal"]
    statistics = layer_gains.attention_statistics(logits, allowed)
    several = jnp.sum(allowed, axis=-1) > 1  # one key leaves nothing to choose
    return Attention(
        layer=name,
        entropy=float(jnp.nanmean(statistics.entropy)),
        least_entropy=float(jnp.nanmin(jnp.where(several, statistics.entropy, jnp.nan))),
        max_logit=float(jnp.max(statistics.max_logit)),
    )


def evaluated(parts: build.Experiment, state: Any) -> Callable[[Any], Any]:
    """The model as a function of its inputs, in float32, as in evaluation."""
    variables = {"params": state.params, **state.model_state}
    keywords = linen.train_argument(parts.model, False)
    return lambda inputs: parts.model.apply(variables, inputs, **keywords)


def _block_names(parts: build.Experiment, state: Any, batch: Any) -> list[str]:
    """The blocks of the model, by an abstract run."""
    names: list[str] = []
    note = lambda name, x: (names.append(name), x)[1]
    jax.eval_shape(blocks.with_inputs(evaluated(parts, state), note), batch["inputs"])
    return names
