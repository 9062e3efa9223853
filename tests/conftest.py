"""What all tests share: the CPU, and property tests judged by their results, not by their speed."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis

# Derandomised, so that a run can be repeated; no deadline, since a first call compiles.
hypothesis.settings.register_profile("jaxmp", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxmp")
