"""Flax Linen modules as the plain functions that a training step takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import Array

from jaxmp.numerics import tree as trees
from jaxmp.precision.policy import Policy

Loss = Callable[[Any, Any], Array]
LossFn = Callable[[Any, Mapping[str, Any], Any, Any], tuple[Array, dict[str, Any]]]


def init(
    model: nn.Module, rng: Array, inputs: Any, *, rngs: Sequence[str] = ("dropout",), **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Gives `(params, model_state)`: the collection "params", and the others ({} for none).

    `inputs` is one batch, of which only shapes and dtypes matter. Keyword arguments go to the
    model, which is called with `train=False` if it knows the word. Compiled, so nothing of the
    forward pass is computed.
    """
    kwargs = {**train_argument(model, False), **kwargs}
    keys = _keys(rng, ("params", *rngs))
    variables = dict(jax.jit(lambda keys, inputs: model.init(keys, inputs, **kwargs))(keys, inputs))
    return variables.pop("params", {}), variables


def loss_from(
    model: nn.Module,
    loss: Loss,
    *,
    metrics: Mapping[str, Loss] | None = None,
    rngs: Sequence[str] = ("dropout",),
    policy: Policy | None = None,
) -> LossFn:
    """Gives `loss_fn(params, batch, rng, model_state) -> (loss, aux)` that trains `model`.

    It stands for

        outputs, model_state = model.apply(
            {"params": params, **model_state}, batch["inputs"], train=True,
            rngs={name: ... for name in rngs}, mutable=list(model_state))
        return loss(outputs, batch["targets"]), {"model_state": model_state, **metrics}

    where each of `metrics` is a function of the same two arguments. A model that calls its argument
    `deterministic` gets that, negated; one that has neither gets none.

    With a `policy` that has overrides, a module whose path matches one runs in that dtype: its
    inputs are cast to it and its results back to the dtype around it. (Its parameters already are,
    by the policy's own cast.) Without this Flax would promote all that follows a float32 LayerNorm
    to float32. A module that owns just a parameter which matches has its results cast back, too.
    What the model returns is not cast back: a float32 head yields float32 logits.

    Raises:
      ValueError: an override matched neither a parameter nor a module; raised while tracing.
    """
    return _loss_fn(model, loss, metrics or {}, rngs, policy, train=True)


def eval_loss_from(
    model: nn.Module,
    loss: Loss,
    *,
    metrics: Mapping[str, Loss] | None = None,
    policy: Policy | None = None,
) -> LossFn:
    """Gives what `loss_from` gives, with `train=False`: nothing is random, no state changes."""
    return _loss_fn(model, loss, metrics or {}, (), policy, train=False)


def _loss_fn(
    model: nn.Module,
    loss: Loss,
    metrics: Mapping[str, Loss],
    rngs: Sequence[str],
    policy: Policy | None,
    train: bool,
) -> LossFn:
    kwargs = train_argument(model, train)

    def loss_fn(
        params: Any, batch: Mapping[str, Any], rng: Any = None, model_state: Any = None
    ) -> tuple[Array, dict[str, Any]]:
        model_state = {} if model_state is None else model_state
        variables = {"params": params, **model_state}
        keys = None if rng is None or not train else _keys(rng, rngs)
        mutable = list(model_state) if train else False
        apply = lambda: model.apply(
            variables, batch["inputs"], rngs=keys, mutable=mutable, **kwargs
        )
        out = _with_overrides(apply, params, policy) if policy and policy.overrides else apply()
        outputs, model_state = out if train else (out, model_state)
        targets = batch["targets"]
        aux = {name: metric(outputs, targets) for name, metric in metrics.items()}
        return loss(outputs, targets), {**aux, "model_state": model_state}

    return loss_fn


def _keys(rng: Array, names: Sequence[str]) -> dict[str, Array]:
    return dict(zip(names, jax.random.split(rng, len(names)))) if names else {}


def train_argument(model: nn.Module, train: bool) -> dict[str, Any]:
    """The keyword argument by which this model is told whether it trains, if it has one."""
    parameters = inspect.signature(type(model).__call__).parameters
    if "train" in parameters:
        return {"train": train}
    return {"deterministic": not train} if "deterministic" in parameters else {}


def _with_overrides(call: Callable[[], Any], params: Any, policy: Policy) -> Any:
    """Gives `call()` with every module that an override names run in the override's dtype."""
    paths = [path for path, _ in trees.named_leaves(params)]
    surroundings = [policy.compute_dtype]  # the dtype of the module that is running, innermost last
    uncast: dict[int, tuple[Any, Any]] = {}  # id of a result cast back -> it and the original

    def cast_back(result: Any, dtype: Any) -> Any:
        back = trees.cast_leaf(result, dtype)
        uncast[id(back)] = (back, result)
        return back

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "setup":
            return next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        paths.append(path)
        around, dtype = surroundings[-1], policy.dtype_at(path)
        if dtype != around:
            args, kwargs = trees.cast_floating((args, kwargs), dtype)
        surroundings.append(dtype)
        try:
            results = next_fun(*args, **kwargs)
        finally:
            surroundings.pop()
        if path and (dtype != around or _owns_overridden(context.module, path, policy)):
            results = jax.tree.map(lambda result: cast_back(result, around), results)
        return results

    with nn.intercept_methods(intercept):
        out = call()
    for pattern, _ in policy.overrides:
        if not any(trees.match_path(pattern, path) for path in paths):
            raise ValueError(
                f"The policy's override {pattern!r} matched no parameter and no module. Modules "
                f"that ran: {', '.join(path for path in paths if path)}."
            )
    return jax.tree.map(lambda leaf: uncast.get(id(leaf), (leaf, leaf))[1], out)


def _owns_overridden(module: nn.Module, path: str, policy: Policy) -> bool:
    own = [k for k, v in module.variables.get("params", {}).items() if not isinstance(v, Mapping)]
    return any(policy.dtype_at(f"{path}/{name}") != policy.dtype_at(path) for name in own)
