"""Grain under the data contract."""

import dataclasses

import numpy as np
import pytest

from jaxmp.run import build, cli, data, grain_adapter, loop, metrics

grain = pytest.importorskip("grain")


def examples(count=10):
    return grain.MapDataset.source(
        [{"inputs": np.full(2, i), "targets": np.int32(i)} for i in range(count)]
    )


def test_it_is_pure_and_covers_each_epoch_once():
    one = grain_adapter.batch_at_from(examples(), 4, seed=1)
    other = grain_adapter.batch_at_from(examples(), 4, seed=1)
    for step in (5, 0, 3):
        np.testing.assert_array_equal(one(step)["targets"], other(step)["targets"])
    line = np.concatenate([one(step)["targets"] for step in range(5)])
    assert sorted(line[:10]) == sorted(line[10:]) == list(range(10))
    assert list(line[:10]) != list(line[10:]) and one(0)["inputs"].shape == (4, 2)
    assert list(line) != list(
        np.concatenate(
            [grain_adapter.batch_at_from(examples(), 4, 2)(s)["targets"] for s in range(5)]
        )
    )


@pytest.mark.parametrize("processes", [2, 4])
def test_the_order_does_not_depend_on_the_number_of_processes(processes):
    whole = grain_adapter.batch_at_from(examples(), 4, seed=0)
    parts = [
        grain_adapter.batch_at_from(examples(), 4, 0, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for step in range(4):
        joined = np.concatenate([part(step)["targets"] for part in parts])
        np.testing.assert_array_equal(joined, whole(step)["targets"])


def test_a_run_reads_it(tmp_path):
    config, _ = cli.parse(
        [
            "configs/digits_mlp_float32.py",
            "--steps",
            "3",
            "--optimizer.warmup",
            "0",
            "--log.report",
            "False",
        ]
    )
    config = dataclasses.replace(config, workdir=str(tmp_path))
    images, labels = data.digits()
    dataset = grain.MapDataset.source(
        [{"inputs": x, "targets": y} for x, y in zip(images[:1500], labels[:1500])]
    )
    own = build.build(config).source
    source = dataclasses.replace(own, batch_at=grain_adapter.batch_at_from(dataset, 128, seed=0))
    assert loop.train(config, source=source).exit_code == 0
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 3
