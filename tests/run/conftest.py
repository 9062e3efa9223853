"""What the tests of runs share: an experiment is compiled once, however often it runs."""

import dataclasses
import functools

import pytest

from jaxmp.run import build


@pytest.fixture(scope="module")
def built_once():
    """Gives the same functions for the same experiment, so that JAX compiles them once.

    That another process, which compiles for itself, arrives at the same bits is tested elsewhere.
    """
    compute = build.build
    once = functools.cache(compute)

    def build_once(config, source=None, **how):
        parts = once(dataclasses.replace(config, workdir=""), **how)
        return dataclasses.replace(parts, config=config, source=source or parts.source)

    build.build = build_once
    yield
    build.build = compute
