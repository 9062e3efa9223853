"""The README tells the truth: its program runs and learns, its Quickstart has the two commands."""

import contextlib
import io
import pathlib
import re

from jaxmp.precision import autocast_rules

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_first_program_runs_and_learns():
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "README.md", "exec"), {})
    metrics = eval(printed.getvalue())
    assert metrics["loss"] < 0.1 and metrics["finite"] == 1.0


def test_the_quickstart_has_two_blocks_and_ci_runs_the_second():
    section = README.split("## Quickstart")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    ci = (pathlib.Path(__file__).parents[1] / ".ci" / "run").read_text()
    assert blocks[1].strip().splitlines()[-1] in ci


def test_the_table_of_autocast_is_the_one_in_the_code():
    assert autocast_rules.as_markdown() in README
