"""What all tests share: the CPU, programs that compile quickly, property tests judged by their results."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once, so LLVM's optimisations cost more than they bring; 0 tests with them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import pytest

# Derandomised, so that a run can be repeated; no deadline, since a first call compiles.
hypothesis.settings.register_profile("jaxmp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxmp")


def pytest_collection_modifyitems(items):
    """Slow tests first, so that no worker has one left when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def optimized():
    """For a test that trains for long or counts what a compiler made: compiled as a user's programs are."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    asked = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
    jax.config.update("jax_disable_most_optimizations", asked)
