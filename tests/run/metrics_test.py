"""JSON lines: strict, each step once, whatever was left behind."""

import json
import math
import os

import pytest

from jaxmp.run import metrics


def written(path):
    return [record["step"] for record in metrics.read(path)]


def fill(path, steps):
    lines = metrics.JsonLines(path, after=0)
    for step in steps:
        lines.write({"step": step, "loss": step / 3})
    lines.close()


def test_numbers_come_back_exactly(tmp_path):
    fill(tmp_path / "m.jsonl", range(1, 5))
    assert [r["loss"] for r in metrics.read(tmp_path / "m.jsonl")] == [s / 3 for s in range(1, 5)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(value):
    line = metrics.to_line({"step": 1, "loss": value, "skipped": True})
    assert line == '{"step": 1, "loss": null, "skipped": true}\n'
    assert json.loads(line)["loss"] is None


@pytest.mark.parametrize("after", [0, 1, 3, 4, 9])
def test_opening_drops_what_lies_behind(tmp_path, after):
    path = tmp_path / "m.jsonl"
    fill(path, range(1, 5))
    lines = metrics.JsonLines(path, after=after)
    lines.write({"step": after + 1})
    lines.close()
    assert written(path) == [s for s in range(1, 5) if s <= after] + [after + 1]


@pytest.mark.parametrize(
    "tail",
    [
        '{"step": 3, "lo',
        '{"step": 3}',
        "\n",
        "null\n",
        '{"loss": 1}\n',
        "\x00\x00\x00",
        '{"step": 2}\n',
        '{"step": 1}\n',
    ],
)
def test_a_broken_or_doubled_tail_goes(tmp_path, tail):
    path = tmp_path / "m.jsonl"
    fill(path, (1, 2))
    with path.open("a") as file:
        file.write(tail)
    lines = metrics.JsonLines(path, after=3)
    lines.write({"step": 3})
    lines.close()
    assert written(path) == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_a_crash_while_dropping_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    fill(path, range(1, 5))

    def crash(*_):
        raise SystemExit

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(SystemExit):
        metrics.JsonLines(path, after=2)
    assert written(path) == [1, 2, 3, 4]
    monkeypatch.undo()
    metrics.JsonLines(path, after=2).close()
    assert written(path) == [1, 2]


def test_a_line_is_seen_as_soon_as_it_is_written(tmp_path):
    lines = metrics.JsonLines(tmp_path / "m.jsonl", after=0)
    lines.write({"step": 1})
    assert written(tmp_path / "m.jsonl") == [1]
    lines.close()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    board = metrics.TensorBoard(tmp_path, after=0)
    board.write({"step": 1, "loss": 0.5, "skipped": False, "name": "no number"})
    board.close()
    (events,) = tmp_path.iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"skipped" in content and b"name" not in content


def test_tensorboard_without_its_package_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"log\.tensorboard needs the package tensorboardX"):
        metrics.TensorBoard(tmp_path, after=0)
