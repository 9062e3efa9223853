"""From a config to the parts of a run: model, loss, optimizer, data, and the two compiled functions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxmp import nn, optim, training
from jaxmp.nn import functional as F
from jaxmp.nn import layers
from jaxmp.nn.models.gpt import GPT, GPTConfig
from jaxmp.nn.models.llama import Llama, LlamaConfig
from jaxmp.nn.models.mlp import MLP, MLPConfig
from jaxmp.nn.models.resnet import ResNet, ResNetConfig
from jaxmp.nn.models.vit import VisionTransformer, ViTConfig
from jaxmp.precision.policy import Policy
from jaxmp.run import config as configs
from jaxmp.run import data
from jaxmp.run.config import Config, ConfigError
from jaxmp.training import mesh as meshes

MODULES = {
    MLPConfig: MLP,
    ViTConfig: VisionTransformer,
    ResNetConfig: ResNet,
    GPTConfig: GPT,
    LlamaConfig: Llama,
}
"""The module that each model config describes."""

CLIPS = {
    "norm": optim.clip_by_global_norm,
    "unit": optim.clip_by_unit_norm,
    "value": optim.clip_by_value,
    "zscore": optim.clip_by_zscore,
    "quantile": optim.clip_by_quantile,
}
"""What `optimizer.clip_by` names, made of the number in `optimizer.clip`."""

Step = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run, built but not started."""

    config: Config
    policy: Policy
    source: data.Source
    model: Any
    """The Linen module."""
    loss: Callable[..., Any]
    """`loss(params, batch, rng, model_state) -> (loss, aux)` of training, in the dtypes that it is given."""
    init: Callable[[], training.TrainState]
    """Gives the state before the first step."""
    step: Step
    """The pure training step, not compiled."""
    evaluate: Callable[[Any, Any], dict[str, jax.Array]]
    """The pure evaluation of one batch, not compiled: metrics averaged over its rows."""
    shardings: Any = None
    """Where each leaf of the state lies on the config's mesh; None on one device."""


def build(
    config: Config, source: data.Source | None = None, *, devices: Sequence[Any] | None = None
) -> Experiment:
    """The parts of the run that `config` describes, fed by `source` if one is given. Raises ConfigError.

    `devices` are those that it will run on, `jax.devices()` if none are given; they may be absent ones.
    """
    policy = configs.policy_of(config)
    devices = jax.devices() if devices is None else devices
    mesh = _mesh(config, devices)
    if source is None:
        source = _load(config, mesh)
    model = model_of(config, devices[0].platform)
    schedule = schedule_of(config)
    tx = transformation(config, schedule)
    example = jax.tree.map(lambda x: x[:1], source.validation[0]["inputs"])

    def init() -> training.TrainState:
        params_key, run_key = jax.random.split(jax.random.key(config.seed))
        params, model_state = nn.linen.init(model, params_key, example)
        return training.TrainState.create(params, tx, model_state=model_state, rng=run_key)

    shardings = _shardings(config, init, mesh)
    trained, evaluated, in_parts = _by_layer(model, shardings, config.reduce_dtype)
    scored = {"accuracy": F.accuracy}
    loss = replicated_loss(config.replicas)
    # Of a vocabulary's logits it takes one more pass over all, 5% of what a GPT-2 step moves.
    watched = {} if isinstance(config.data, data.TextConfig) else scored
    train_loss = nn.linen.loss_from(trained, loss, metrics=watched, policy=policy)
    eval_loss = nn.linen.eval_loss_from(
        evaluated, F.softmax_cross_entropy, metrics=scored, policy=policy
    )
    shared = {
        "autocast": config.autocast,
        "shardings": None if shardings is None else shardings.params,
        "in_parts": in_parts,
    }
    train_step = training.make_train_step(
        train_loss, tx, policy, config.accumulate, reduce_dtype=config.reduce_dtype, **shared
    )
    return Experiment(
        config=config,
        policy=policy,
        source=source,
        model=model,
        loss=nn.linen.loss_from(model, loss, metrics=watched, policy=policy),
        init=init,
        step=logged_step(train_step, schedule, config.replicas),
        evaluate=_evaluation(training.make_eval_step(eval_loss, policy, **shared)),
        shardings=shardings,
    )


def model_of(config: Config, platform: str) -> Any:
    """The Linen module of the config, its attention fused where `platform` (of the devices) has that."""
    settings: Any = config.model
    if hasattr(settings, "attention"):
        # Under autocast the model is traced in float32, which the fused kernel does not take.
        dtype = "float32" if config.autocast else configs.policy_of(config).compute_dtype
        size = settings.width // settings.heads
        kind = layers.resolve_attention(settings.attention, platform, dtype, size)
        settings = dataclasses.replace(settings, attention=kind)
    return MODULES[type(settings)](settings)


def _by_layer(model: Any, shardings: Any, reduce_dtype: str) -> tuple[Any, Any, str]:
    """(model to train, model to evaluate, the pattern of what they gather themselves, layer by layer)."""
    if shardings is None or not hasattr(model, "whole"):
        return model, model, ""
    stacked = shardings.params["layers"]
    return (
        model.clone(whole=training.layer_gatherer(stacked, reduce_dtype)),
        model.clone(whole=training.layer_gatherer(stacked, mapped=False)),
        "layers/**",
    )


def _mesh(config: Config, devices: Sequence[Any]) -> Any:
    """The config's mesh, None on one device. Raises ConfigError where it does not fit."""
    if not config.mesh:
        if jax.process_count() > 1:
            raise ConfigError(
                f"mesh is empty, which means one device, and {jax.process_count()} processes train "
                "together; write --mesh data=-1, which uses all their devices, or fsdp=-1."
            )
        return None
    try:
        mesh = training.make_mesh(config.mesh, devices)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    parts = meshes.batch_parts(mesh)
    if config.batch_size % (parts * config.accumulate):
        raise ConfigError(
            f"mesh {config.mesh!r} cuts a batch in {parts} parts, and batch_size={config.batch_size} does "
            f"not divide into {parts} times accumulate={config.accumulate}; write a batch_size that is "
            f"a multiple of {parts * config.accumulate}, or smaller data and fsdp axes."
        )
    return mesh


def _shardings(config: Config, init: Callable[[], Any], mesh: Any) -> Any:
    """The shardings of the state on the mesh, None without one. Raises ConfigError."""
    if mesh is None:
        return None
    with model_mistakes():
        shardings = training.state_shardings(jax.eval_shape(init), mesh)
    cut = {name for s in jax.tree.leaves(shardings) for e in s.spec for name in meshes.names_of(e)}
    for axis in ("fsdp", "tensor"):
        if axis in mesh.axis_names and mesh.shape[axis] > 1 and axis not in cut:
            raise ConfigError(
                f"mesh {config.mesh!r} has {axis}={mesh.shape[axis]}, which cuts no parameter of "
                f"{type(config.model).__name__}; write a size that divides the model's width, or data."
            )
    return shardings


def _load(config: Config, mesh: Any) -> data.Source:
    apart = jax.process_count() > 1
    rows = meshes.local_rows(mesh, config.batch_size) if apart else None
    try:
        return data.load(config.data, config.batch_size, config.seed, rows=rows)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def schedule_of(config: Config) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the updates applied so far."""
    rate, steps, warmup = config.optimizer, config.steps, configs.warmup_steps(config)
    if rate.schedule == "cosine":
        return optim.warmup_cosine(rate.learning_rate, steps, warmup)
    if rate.schedule == "rsqrt":
        return optim.warmup_rsqrt(rate.learning_rate, warmup)
    if rate.schedule == "constant":
        return optim.warmup_constant(rate.learning_rate, warmup)
    decay_steps = rate.decay_steps or max(1, min(steps // 5, steps - warmup))
    return optim.warmup_stable_decay(rate.learning_rate, steps, warmup, decay_steps)


def transformation(
    config: Config, schedule: Callable[[Any], jax.Array]
) -> optax.GradientTransformationExtraArgs:
    """The optax chain of the config: replicas' sum, unscaling and guards, clipping, optimizer, decay."""
    settings = config.optimizer
    skip = functools.partial(optim.skip_outliers, factor=settings.skip_outliers)
    shared: dict[str, Any] = {
        "weight_decay": settings.weight_decay,
        "clip": CLIPS[settings.clip_by](settings.clip) if settings.clip else None,
        "guard": skip if settings.skip_outliers else None,
        "ema": settings.ema or None,
        "loss_scale": configs.loss_scale_of(config),
    }
    if settings.name == "sgd":
        chain = optim.sgd(schedule, momentum=settings.momentum, **shared)
    else:
        chain = optim.adamw(schedule, b1=settings.b1, b2=settings.b2, eps=settings.eps, **shared)
    if config.replicas == 1:
        return chain
    # What an all-reduce over the replicas would do to the float32 gradients, still scaled: add equals up.
    return optax.chain(optax.scale(float(config.replicas)), chain)


def replicated_loss(replicas: int) -> Callable[[Any, Any], jax.Array]:
    """Cross-entropy whose gradient is that of one of `replicas` identical workers averaging their losses.

    Forward nothing changes. Backward, the cotangent of the logits is at most 1 / (batch *
    replicas): with 2^25 examples or more every float16 cotangent rounds to zero unless the loss is
    scaled.
    """
    if replicas == 1:
        return F.softmax_cross_entropy
    return lambda logits, targets: F.softmax_cross_entropy(
        F.scale_gradient(logits, 1 / replicas), targets
    )


def logged_step(step: Step, schedule: Callable[[Any], jax.Array], replicas: int) -> Step:
    """The step with `learning_rate` among its metrics, and `grad_norm` of the sum over replicas."""

    def logged(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        new_state, metrics = step(state, batch)
        del metrics["finite"]  # told by `loss` and `grad_norm`
        metrics["learning_rate"] = schedule(state.step)
        metrics["grad_norm"] = metrics["grad_norm"] * replicas
        return new_state, metrics

    return logged


def _evaluation(
    evaluate: Callable[[Any, Any], dict[str, jax.Array]],
) -> Callable[..., dict[str, jax.Array]]:
    """`evaluate`, and the same with `ema_` in front for the averaged parameters where they are kept."""

    def both(state: Any, batch: Any) -> dict[str, jax.Array]:
        metrics = evaluate(state, batch)
        average = optim.ema_of(state.opt_state)
        if average is not None:
            smooth = evaluate(state.replace(params=average), batch)
            metrics |= {f"ema_{key}": smooth[key] for key in metrics}
        return metrics

    return both


def compile_step(experiment: Experiment) -> tuple[Any, Step]:
    """(abstract state, the step compiled once with its state donated). Raises ConfigError."""
    with model_mistakes():
        state, batch = abstract_arguments(experiment)
        step = training.jit_step(experiment.step, experiment.shardings)
        return state, meshes.in_turn(step.lower(state, batch).compile())


def abstract_arguments(experiment: Experiment) -> tuple[Any, Any]:
    """The shapes and dtypes of the state and of a global batch, and on a mesh where they lie."""
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(_global_shape(experiment, x), x.dtype),
        experiment.source.batch_at(0),
    )
    state = jax.eval_shape(experiment.init)
    if experiment.shardings is not None:
        rows = training.batch_sharding(meshes.mesh_of(experiment.shardings))
        state = jax.tree.map(lambda x, s: x.update(sharding=s), state, experiment.shardings)
        batch = jax.tree.map(lambda x: x.update(sharding=rows), batch)
    return state, batch


def whole_jit(experiment: Experiment, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` compiled, its results whole on every device of the mesh."""
    if experiment.shardings is None:
        return jax.jit(fn)
    mesh = meshes.mesh_of(experiment.shardings)
    return jax.jit(fn, out_shardings=meshes.replicated(mesh))


def first_state(experiment: Experiment) -> Any:
    """The state before the first step, made where it lies, never on one device first."""
    return meshes.in_turn(jax.jit(experiment.init, out_shardings=experiment.shardings))()


def place(experiment: Experiment, batch: data.Batch) -> Any:
    """A batch of training on the devices of the mesh, its rows cut among them; as it is on one device.

    Of several processes each gives its own rows.
    """
    if experiment.shardings is None:
        return batch
    if jax.process_count() == 1:
        return place_whole(experiment, batch)
    sharding = training.batch_sharding(meshes.mesh_of(experiment.shardings))
    shapes = {key: _global_shape(experiment, x) for key, x in batch.items()}
    return jax.make_array_from_process_local_data(sharding, batch, shapes)


def place_whole(experiment: Experiment, batch: data.Batch) -> Any:
    """As `place`, for a batch that every process has whole, such as one of an evaluation.

    One that does not divide, such as the last, is whole on every device.
    """
    if experiment.shardings is None:
        return batch
    mesh = meshes.mesh_of(experiment.shardings)
    divides = all(len(x) % meshes.batch_parts(mesh) == 0 for x in batch.values())
    sharding = training.batch_sharding(mesh) if divides else meshes.replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    spread = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(spread, batch)


def _global_shape(experiment: Experiment, rows: np.ndarray) -> tuple[int, ...]:
    """The shape of an array of the global batch, of which this process has `rows`."""
    if jax.process_count() == 1:
        return rows.shape
    return (experiment.config.batch_size, *rows.shape[1:])


@contextlib.contextmanager
def model_mistakes() -> Iterator[None]:
    """Turns what a model refuses at its tracing into a ConfigError.

    Such as a patch that does not divide the image, or an override that matches nothing.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        key = "overrides" if "override" in str(error) else "model"
        raise ConfigError(f"{key}: {error}") from error


def evaluate_all(
    evaluate: Callable[..., dict[str, jax.Array]], state: Any, batches: tuple
) -> dict[str, float]:
    """Metrics averaged over all rows of the batches, as floats."""
    results = [evaluate(state, batch) for batch in batches]
    weights = np.array([len(batch["targets"]) for batch in batches], np.float64)
    return {
        key: float(np.average([float(r[key]) for r in results], weights=weights))
        for key in results[0]
    }
