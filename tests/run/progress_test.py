"""What a person sees."""

import io

import pytest

from jaxmp.run import progress


def record(step, **more):
    base = {
        "loss": 0.5,
        "grad_norm": 1.25,
        "loss_scale": 1.0,
        "skipped": False,
        "tokens_per_second": 12345.6,
    }
    return {"step": step, **base, **more}


def test_plain_lines_come_every_so_often_and_at_the_end(capsys):
    shown = progress.start(total=25, done=0, every=10, unit="tokens")
    for step in range(1, 26):
        shown.step(record(step))
    shown.note("a note")
    shown.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines] == ["step 10/25", "step 20/25", "step 25/25", "a note"]
    assert "loss 0.5  grad norm 1.25  12.3k tokens/s" in lines[0] and lines[0].endswith("left")


def test_scale_and_skips_are_shown_where_there_are_any():
    text = progress.describe(
        record(1, loss_scale=32768.0, skipped=True, loss=float("inf")), "tokens"
    )
    assert "loss inf" in text and "scale 32768" in text and "SKIPPED" in text


def test_a_terminal_gets_a_live_bar(monkeypatch):
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    shown = progress.start(total=3, done=1, every=10, unit="tokens")
    assert isinstance(shown, progress.Live)
    shown.step(record(2))
    shown.note("[half] done")
    shown.step(record(3))
    shown.close()
    assert "3/3" in terminal.getvalue() and "[half] done" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(8.44, "8.4 s"), (72, "1 min 12 s"), (7500, "2 h 05 min"), (59.99, "60.0 s")],
)
def test_durations(seconds, words):
    assert progress.duration(seconds) == words
