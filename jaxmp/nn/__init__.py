"""Which layers keep it bounded?

`jaxmp.nn.functional` and `jaxmp.nn.models` need nothing but JAX and Flax Linen; `jaxmp.nn.linen`
and `jaxmp.nn.nnx` adapt Flax modules to the training step. `jaxmp.nn.lipschitz` holds layers with a
bound as functions, `lipschitz_layers` and `lipschitz_nnx` as modules. Each is imported when it is
first used, because Flax costs half a second and NNX a whole one.
"""

import importlib

_SUBMODULES = (
    "blocks",
    "functional",
    "init",
    "layers",
    "linen",
    "lipschitz",
    "lipschitz_layers",
    "lipschitz_nnx",
    "models",
    "nnx",
)


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
