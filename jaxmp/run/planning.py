"""The command line of a plan: `plan.py configs/NAME.py --target TARGET [--dotted.overrides ...]`.

Compiles the very step of a config for a machine that is absent and says whether it fits there and
what it costs. No step runs.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from jaxmp import plan, training
from jaxmp.plan import compile as compiling
from jaxmp.plan import cost, residuals, targets
from jaxmp.precision.autocast import autocast
from jaxmp.run import build, cli
from jaxmp.run.config import Config, ConfigError
from jaxmp.training import mesh as meshes

USAGE = """usage: plan.py configs/NAME.py [--target TARGET] [--json FILE] [--setting VALUE ...]

Compiles the training step of a config for hardware that is not here, and prints its memory, bytes,
FLOPs, roofline and products. Exit code 0: it fits; 1: it does not.
  --target TARGET   gpu-h100 (default), gpu-h200, gpu-a100, tpu-v5e, tpu-v5p, tpu-v6e, cpu; several
                    devices as gpu-h100:8 or tpu-v5e:4x4, which the config's mesh divides
  --json FILE       also write the plan as JSON
  plan.py configs/NAME.py --target tpu-v5e --batch_size 64 --accumulate 4
  plan.py configs/llama_7b_bfloat16.py --target tpu-v5e:4x4 --mesh fsdp=16"""

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Plans what the command line asks for; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    def run() -> int:
        target, rest = cli.take_one(arguments, "--target", "gpu-h100")
        file, rest = cli.take_one(rest, "--json", "")
        config, name = cli.parse(rest, USAGE)
        print(f"{name}, policy {config.policy}, batch {config.batch_size}", flush=True)
        try:
            found = estimate(config, target)
            said, row, fits = str(found), found.to_dict(), found.fits
            alone = found.state_bytes > found.program.memory_bytes
        except DoesNotFit as refusal:
            said, row, fits = str(refusal), {"target": target, "refused": str(refusal)}, False
            alone = refusal.state_alone
        advice = () if fits else ways_out(config, alone)
        print("\n".join((said, *(f"try {way}" for way in advice))))
        if file:
            text = json.dumps({**row, "fits": fits, "ways_out": advice}, indent=1) + "\n"
            pathlib.Path(file).write_text(text, encoding="utf-8")
        return 0 if fits else 1

    return cli.exit_code_of(run)


class DoesNotFit(Exception):
    """A compiler refused a step because it needs more memory than the device has; told in a sentence."""

    def __init__(self, said: str, state_alone: bool):
        super().__init__(said)
        self.state_alone = state_alone
        """Whether the state without any activations is larger than the device's memory."""


def ways_out(config: Config, state_alone: bool = False) -> tuple[str, ...]:
    """What makes a device hold less at once, as settings of the command line that this config leaves open.

    Where the state alone is too large, fewer activations do not help.
    """
    mesh = meshes.parse_mesh(config.mesh) if config.mesh else {}
    parts = math.prod(size for axis, size in mesh.items() if axis in meshes.BATCH_AXES and size > 0)
    ways = []
    if config.batch_size >= 2 * config.accumulate * parts and not state_alone:
        ways.append(f"--accumulate {2 * config.accumulate}: half the activations, the same update.")
    if getattr(config.model, "remat", "full") != "full" and not state_alone:
        ways.append("--model.remat full: only the input of each block is kept, a third more FLOPs.")
    if "fsdp" not in mesh:
        ways.append("--mesh fsdp=-1: state and gradients are cut among the target's devices.")
    ways.append("more devices, as in --target tpu-v5e:4x4 or gpu-h100:8, with fsdp in the mesh.")
    return tuple(ways)


def estimate(config: Config, target: str) -> plan.Estimate:
    """The estimate of a config's step on a target, its mesh over the target's devices.

    Raises DoesNotFit where the compiler refuses the step for want of memory, and ConfigError for a target
    that is unknown, lacks its compiler or does not suit the mesh.
    """
    try:
        devices = targets.devices(target)
    except ValueError as error:
        raise ConfigError(f"--target: {error}") from error
    if targets.parse_target(target).device_count > 1 and not config.mesh:
        raise ConfigError(
            f"--target: {target} has {len(devices)} devices and the config uses one; say how they share the "
            f"work, such as --mesh fsdp={len(devices)} or data={len(devices)}."
        )
    parts = build.build(config, devices=devices)
    with build.model_mistakes():
        state, batch = build.abstract_arguments(parts)
    try:
        with build.model_mistakes():
            program = _compile(parts, state, batch, target)
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        if _OUT_OF_MEMORY.search(said):
            memory = targets.parse_target(target).chip.memory_bytes
            raise DoesNotFit(
                f"does NOT fit {target}; its compiler says: {said[:300]}",
                state_alone=0 < memory < cost.device_bytes(state),
            ) from error
        raise ConfigError(_refusal(target, said)) from error
    return plan.estimate(program, state, batch, kept(parts, state, batch))


def kept(parts: build.Experiment, state: Any, batch: Any) -> dict[str, int]:
    """Bytes of one device for its part of the 16-bit parameters, and for a microbatch's activations.

    As the step is written: the compiler fuses, computes again and reuses. The axis `tensor`, which the
    compiler divides, is not counted in activations.
    """
    config, abstract = parts.config, jax.ShapeDtypeStruct
    loss, cast = parts.loss, parts.policy.cast_to_compute
    if config.autocast and parts.policy.compute_dtype.itemsize == 2:
        loss, cast = autocast(parts.loss, parts.policy), lambda tree: tree
    copy = jax.tree.map(
        lambda x, cast: abstract(x.shape, cast.dtype, sharding=getattr(x, "sharding", None)),
        state.params,
        jax.eval_shape(cast, state.params),
    )
    sharing = 1 if parts.shardings is None else meshes.batch_parts(meshes.mesh_of(parts.shardings))
    rows = config.batch_size // (sharing * config.accumulate)
    share = jax.tree.map(lambda x: abstract((rows, *x.shape[1:]), x.dtype), batch)
    inputs = jax.eval_shape(cast, share["inputs"])
    plain = lambda tree: jax.tree.map(lambda x: abstract(x.shape, x.dtype), tree)
    activations = residuals.residual_bytes(
        loss, plain(copy), share | {"inputs": inputs}, *plain((state.rng, state.model_state))
    )
    return {"compute copy, this device's part": cost.device_bytes(copy), "activations": activations}


def _compile(parts: build.Experiment, state: Any, batch: Any, target: str) -> compiling.Compiled:
    """The report of the step that training would run."""
    if parts.shardings is None:
        return plan.compile_for(parts.step, state, batch, target)
    lowered = training.jit_step(parts.step, parts.shardings).lower(state, batch)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    return compiling.describe(compiled, target, state=state, compile_seconds=seconds)


def _refusal(target: str, said: str) -> str:
    """What to tell when a target's compiler gives up for another reason, and what to try."""
    return (
        f"--target: the compiler of {target} gives up on this step: {said[:200]}\nAn absent GPU cannot "
        "try its kernels: widths that are multiples of 64 are safe; or leave the products to its "
        "library with XLA_FLAGS=--xla_gpu_enable_triton_gemm=false."
    )
