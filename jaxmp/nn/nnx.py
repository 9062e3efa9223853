"""Flax NNX modules as the plain functions that a training step takes.

Import it by its own name, `import jaxmp.nn.nnx`: NNX costs a second, and only its users pay it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax import Array

from jaxmp.precision.policy import Policy

Loss = Callable[[Any, Any], Array]
LossFn = Callable[[Any, Mapping[str, Any], Any, Any], tuple[Array, dict[str, Any]]]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """Gives `(graphdef, params, model_state)` of a module, the last two nested dicts of arrays.

    `params` holds what is trained (`nnx.Param`), `model_state` all else: running statistics, the
    keys and counts of random streams. `nnx.merge(graphdef, params, model_state)` is the way back.
    """
    graphdef, params, model_state = nnx.split(module, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)


def loss_from(
    graphdef: nnx.GraphDef, loss: Loss, *, metrics: Mapping[str, Loss] | None = None
) -> LossFn:
    """Gives `loss_fn(params, batch, rng, model_state) -> (loss, aux)` that trains a module.

    It stands for

        module = nnx.merge(graphdef, params, model_state)
        module.train()
        outputs = module(batch["inputs"])
        return loss(outputs, batch["targets"]), {"model_state": ..., **metrics}

    where each of `metrics` is a function of the same two arguments. Randomness comes from the
    module's own streams, which are part of `model_state`; `rng` is not used.

    `nnx.BatchNorm` would promote 16-bit activations to the float32 of its running statistics, and
    so all that follows; here it answers in the dtype of its input, computing in float32 inside.
    A policy's override keeps parameters in its dtype; what follows them is the module's choice
    (pass `dtype=` when building it), since NNX has no hook around calls.
    """
    return _loss_fn(graphdef, loss, metrics or {}, train=True)


def eval_loss_from(
    graphdef: nnx.GraphDef, loss: Loss, *, metrics: Mapping[str, Loss] | None = None
) -> LossFn:
    """Gives what `loss_from` gives with `module.eval()`, and the model state unchanged."""
    return _loss_fn(graphdef, loss, metrics or {}, train=False)


def _loss_fn(
    graphdef: nnx.GraphDef, loss: Loss, metrics: Mapping[str, Loss], train: bool
) -> LossFn:
    def loss_fn(
        params: Any, batch: Mapping[str, Any], rng: Any = None, model_state: Any = None
    ) -> tuple[Array, dict[str, Any]]:
        del rng
        module = _merge(graphdef, params, {} if model_state is None else model_state)
        module.train() if train else module.eval()
        outputs = module(batch["inputs"])
        if train:
            nnx.pop(module, nnx.Intermediate)  # sown values are not state: the next step has none
            model_state = split(module)[2]
        targets = batch["targets"]
        aux = {name: metric(outputs, targets) for name, metric in metrics.items()}
        return loss(outputs, targets), {**aux, "model_state": model_state}

    return loss_fn


def _merge(graphdef: nnx.GraphDef, params: Any, model_state: Any) -> nnx.Module:
    """The module, its BatchNorms without a dtype of their own following their input's."""
    module = nnx.merge(graphdef, params, model_state)
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.BatchNorm) and layer.dtype is None:
            layer.promote_dtype = _as_they_are
    return module


def _as_they_are(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    del dtype, inexact
    return arrays


def cast_to_compute(module: nnx.Module, policy: Policy) -> nnx.Module:
    """Gives a copy of the module whose parameters are in the policy's compute dtype.

    For people who keep `nnx.value_and_grad`: called inside the function that is differentiated, it
    makes the gradients those of the float32 parameters. Other variables (running statistics, random
    counts) are copied as they are; hand their new values back by `update_state`.
    """
    graphdef, params, model_state = split(module)
    return _merge(graphdef, policy.cast_to_compute(params), model_state)


def update_state(module: nnx.Module, copy: nnx.Module) -> None:
    """Writes the variables of `copy` that are not parameters into `module`."""
    nnx.update(module, nnx.state(copy, nnx.Not(nnx.Param)))
