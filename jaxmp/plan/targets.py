"""Names of accelerators and what they hold, so that a program can be compiled for one that is absent."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator, by its maker's public figures (dense products, no sparsity).

    Sources: NVIDIA's A100, H100 and H200 data sheets (SXM boards; memory as the driver reports it)
    and Google Cloud's TPU system architecture pages. Both give a link's two directions as one figure;
    here it is halved.
    """

    name: str
    platform: str
    """JAX's name for the compiler: "cuda", "tpu" or "cpu"."""
    memory_bytes: int
    """Memory of one device, 0 where it is not known."""
    memory_bandwidth: float
    """Bytes per second between one device and its memory."""
    peak_flops: Mapping[str, float]
    """Floating-point operations per second of matrix products, by dtype of the operands."""
    link_bandwidth: float
    """Bytes per second that one device can send to others of its node or slice, over all its links."""
    details: Mapping[str, int | float | str]
    """What the compiler must be told beyond the name: limits of a GPU, smallest slice of a TPU."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip and how many of it: what `compile_for` compiles for."""

    name: str
    chip: Chip
    layout: str
    """The slice: "1", "8" (devices of one node) or "4x4" (chips of a TPU slice)."""

    @property
    def device_count(self) -> int:
        """Devices that the program may use."""
        count = 1
        for side in self.layout.split("x"):
            count *= int(side)
        return count


def _frozen(**entries):
    return MappingProxyType(entries)


_TERA = 1e12
_GIB = 1 << 30
_MIB = 1 << 20
_HOPPER_FLOPS = _frozen(
    bfloat16=989.4 * _TERA,
    float16=989.4 * _TERA,
    float8_e4m3fn=1978.9 * _TERA,
    float8_e5m2=1978.9 * _TERA,
    float32=494.7 * _TERA,  # through TF32, which is what a float32 product may use at best
)
_HOPPER = {
    "capability": 9,
    "cores": 132,
    "fpus_per_core": 128,
    "clock_ghz": 1.98,
    "l2_bytes": 50 * _MIB,
    "shared_bytes_per_core": 233472,
    "shared_bytes_per_block": 232448,
}

CHIPS: Mapping[str, Chip] = _frozen(
    **{
        # The machine at hand: figures of traffic and memory hold, those of speed are not known.
        "cpu": Chip("cpu", "cpu", 0, 0.0, _frozen(), 0.0, _frozen()),
        "gpu-a100": Chip(
            "gpu-a100",
            "cuda",
            81920 * _MIB,
            2.039e12,
            _frozen(bfloat16=312 * _TERA, float16=312 * _TERA, float32=156 * _TERA),
            300e9,
            _frozen(
                description="NVIDIA A100-SXM4-80GB",
                capability=8,
                cores=108,
                fpus_per_core=64,
                clock_ghz=1.41,
                l2_bytes=40 * _MIB,
                shared_bytes_per_core=167936,
                shared_bytes_per_block=166912,
            ),
        ),
        "gpu-h100": Chip(
            "gpu-h100",
            "cuda",
            81559 * _MIB,
            3.352e12,
            _HOPPER_FLOPS,
            450e9,
            _frozen(description="NVIDIA H100 80GB HBM3", **_HOPPER),
        ),
        "gpu-h200": Chip(
            "gpu-h200",
            "cuda",
            143771 * _MIB,
            4.8e12,
            _HOPPER_FLOPS,
            450e9,
            _frozen(description="NVIDIA H200", **_HOPPER),
        ),
        "tpu-v5e": Chip(
            "tpu-v5e",
            "tpu",
            16 * _GIB,
            0.819e12,
            _frozen(bfloat16=197 * _TERA, int8=394 * _TERA),
            200e9,
            _frozen(slice="v5e", smallest="2x2"),
        ),
        "tpu-v5p": Chip(
            "tpu-v5p",
            "tpu",
            95 * _GIB,
            2.765e12,
            _frozen(bfloat16=459 * _TERA, int8=918 * _TERA),
            600e9,
            _frozen(slice="v5p", smallest="2x2x1"),
        ),
        "tpu-v6e": Chip(
            "tpu-v6e",
            "tpu",
            32 * _GIB,
            1.64e12,
            _frozen(bfloat16=918 * _TERA, int8=1836 * _TERA),
            400e9,
            _frozen(slice="v6e", smallest="2x2"),
        ),
    }
)

# The compiler asks for every one of these; fields that all NVIDIA chips share stand here as they are.
_GPU_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_bytes_per_block}
  shared_memory_per_core: {shared_bytes_per_core}
  core_count: {cores}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{description}"
"""


def gpu_config_text(chip: Chip) -> str:
    """Returns XLA's `GpuTargetConfigProto` for a GPU, in protobuf text form."""
    return _GPU_TEXT.format(
        bandwidth=int(chip.memory_bandwidth), memory=chip.memory_bytes, **chip.details
    )


def parse_target(name: str) -> Target:
    """Returns the target of a name such as "gpu-h100", "gpu-h200:8", "tpu-v5e:1", "tpu-v5e:4x4".

    The part after the colon is the number of devices of a GPU node or the shape of a TPU slice;
    none means one device. Raises ValueError for a name that is not known.
    """
    kind, _, layout = name.partition(":")
    layout = layout or "1"
    if kind not in CHIPS:
        raise ValueError(f"Unknown target {name!r}: the chips are {', '.join(CHIPS)}.")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout):
        raise ValueError(
            f"Target {name!r} ends in {layout!r}: write a number of devices or a slice, as in "
            f"'gpu-h100:8' or 'tpu-v5e:4x4'."
        )
    chip = CHIPS[kind]
    if chip.platform != "tpu" and "x" in layout:
        raise ValueError(f"Target {name!r}: devices are counted, as in '{kind}:8', not laid out.")
    if chip.platform == "tpu" and "x" not in layout and layout != "1":
        raise ValueError(
            f"Target {name!r}: a TPU slice has a shape, as in '{kind}:4x4'; one chip is '{kind}:1'."
        )
    return Target(name, chip, layout)


def missing_wheel(name: str) -> str | None:
    """Returns a sentence naming the extra to install for a target, or None if nothing is missing."""
    platform = parse_target(name).chip.platform
    if platform == "cpu":
        return None
    if platform == "tpu":
        found = importlib.util.find_spec("libtpu")
    else:
        found = any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13, 14))
    if found:
        return None
    extra = {"tpu": "tpu", "cuda": "cuda"}[platform]
    return (
        f"Compiling for {name!r} needs the {extra} compiler, which is not installed here (no such "
        f'device is needed): pip install "jaxmp[{extra}]".'
    )


@contextlib.contextmanager
def _environment(**wanted: str) -> Iterator[None]:
    """Sets the variables that are unset, and unsets them again afterwards."""
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def topology(name: str) -> topologies.TopologyDescription:
    """Returns JAX's description of the target: its `.devices` can be compiled for, not run on.

    A slice smaller than what the TPU compiler knows (one chip) is given as the smallest slice; take
    the first `parse_target(name).device_count` devices, as `devices(name)` does. Raises ValueError
    for an unknown name, a slice the chip is not sold in, or a compiler that is not installed.
    """
    target = parse_target(name)
    missing = missing_wheel(name)
    if missing:
        raise ValueError(missing)
    details = target.chip.details
    try:
        if target.chip.platform == "cuda":
            # JAX would look for a driver first, and register no compiler where it finds none.
            with _environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):
                return topologies.get_topology_desc(
                    platform="cuda",
                    topology_name=target.chip.name,
                    topology=f"1x1x{target.device_count}",
                    target_config=gpu_config_text(target.chip),
                )
        layout = details["smallest"] if target.layout == "1" else target.layout
        # Without these the TPU library asks a metadata server, which only a cloud machine has, and lets
        # one process at a time in, though compiling touches no TPU.
        with _environment(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"):
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{details['slice']}:{layout}"
            )
    except Exception as error:
        late = target.chip.platform == "cuda" and "not implemented" in str(error)
        hint = (
            ". JAX started before this without CUDA's compiler, for want of a driver: set "
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment, or JAX_PLATFORMS=cpu."
        )
        raise ValueError(
            f"The {target.chip.platform} compiler refuses the target {name!r}: {error}"
            + (hint if late else "")
        ) from error


def devices(name: str) -> list:
    """Returns the devices of a target, in the compiler's order."""
    target = parse_target(name)
    here = target.chip.platform == "cpu"
    found = jax.devices("cpu") if here else list(topology(name).devices)
    if len(found) < target.device_count:
        raise ValueError(f"Target {name!r} has {len(found)} device(s), not {target.device_count}.")
    return found[: target.device_count]
