"""The command line: `train.py configs/NAME.py [--dotted.overrides ...]`.

Exit codes: 0 finished, 1 given up by the run itself, 2 a user's mistake, 75 saved on a signal (run
again to go on), 130 stopped at once by a second Ctrl-C. A mistake is told in a few lines that name
the setting and what to write instead, without a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import os
import pathlib
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxmp.run import config as configs
from jaxmp.run import hosts, loop, signals, validate
from jaxmp.run.checkpoint import CheckpointError
from jaxmp.run.config import Config, ConfigError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_KILLED = 130
USAGE = """usage: train.py configs/NAME.py [--setting VALUE ...]

Trains the experiment of a config file, or resumes it: the same command goes on where the run stopped.
  train.py configs/NAME.py --help              all settings of that experiment
  train.py configs/NAME.py --steps 500 --optimizer.learning_rate 3e-3 --workdir runs/try
On several hosts every process runs this command with --mesh data=-1 or another mesh. Under srun and on a
TPU they find each other; elsewhere add
  --coordinator HOST:PORT --processes N --process I   (auto: JAX finds them; none: this process alone)"""

_HELP = ("-h", "--help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what the command line asks for; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)

    def train() -> int:
        launch, settings = _launch(arguments)
        hosts.join(launch)
        config, name = parse(settings)
        use_compilation_cache()
        outcome = loop.train(config, name=name, stop=stop)
        stream = sys.stderr if outcome.exit_code == 1 else sys.stdout
        if hosts.is_first():
            print(f"{name}: {outcome.message}", file=stream, flush=True)
        hosts.gather(None)  # they part together
        return outcome.exit_code

    interrupted = "stopped at once; the same command resumes from the newest checkpoint."
    with signals.listening() as stop:
        return hosts.finish(lambda: exit_code_of(train, interrupted))


def exit_code_of(action: Callable[[], int], interrupted: str = "stopped.") -> int:
    """What `action` returns; a user's mistake is told in a few lines instead of a traceback."""
    try:
        return action()
    except (ConfigError, CheckpointError) as error:
        print(f"error: {shorten(str(error))}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except SystemExit as answered:  # help was asked for, or no config was given
        return int(answered.code or 0)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return EXIT_KILLED


def parse(arguments: Sequence[str], usage: str = USAGE) -> tuple[Config, str]:
    """(config with the command line's overrides, its name). Raises ConfigError, or SystemExit after help.

    The first line of `usage` is how the program is called; it is shown where nothing or --help comes.
    """
    if not arguments or arguments[0] in _HELP:
        print(usage)
        raise SystemExit(0 if arguments else EXIT_USAGE)
    path, *overrides = arguments
    program = usage.split()[1]
    if path.startswith("-"):
        raise ConfigError(
            f"the config file comes first, before {path}; write {program} configs/NAME.py {path} …"
        )
    config = load(pathlib.Path(path))
    config = override(config, overrides, program)
    validate.check(config)
    return config, pathlib.Path(path).stem


def take(arguments: Sequence[str], option: str) -> tuple[list[str] | None, list[str]]:
    """(the words behind a program's own option, None without it; the other arguments)."""
    words = [
        part
        for argument in arguments
        for part in (argument.split("=", 1) if argument.startswith(option + "=") else [argument])
    ]
    if option not in words:
        return None, list(arguments)
    start = words.index(option)
    behind = range(start + 1, len(words))
    end = next((i for i in behind if words[i].startswith("--")), len(words))
    return words[start + 1 : end], words[:start] + words[end:]


def take_one(arguments: Sequence[str], option: str, default: str) -> tuple[str, list[str]]:
    """(the value of a program's own option, the other arguments). Raises ConfigError."""
    words, rest = take(arguments, option)
    if words is not None and len(words) != 1:
        given = " ".join(words) or "none"
        raise ConfigError(f"{option} takes one value, such as {default or 'FILE'}; given: {given}.")
    return words[0] if words else default, rest


def _launch(arguments: Sequence[str]) -> tuple[hosts.Launch, list[str]]:
    """(how this process finds the others, the other arguments). Raises ConfigError."""
    coordinator, rest = take_one(arguments, "--coordinator", "")
    found = []
    for option in ("--processes", "--process"):
        value, rest = take_one(rest, option, "")
        if value and not value.isdigit():
            raise ConfigError(f"{option} cannot be {value!r}; write a whole number, such as 1.")
        found.append(int(value) if value else None)
    return hosts.Launch(coordinator, *found), rest


def load(path: pathlib.Path) -> Config:
    """What `get_config()` of the file returns, checked. Raises ConfigError."""
    if not path.is_file():
        names = {str(p): p for p in sorted(path.parent.glob("*.py")) if p.parent.is_dir()}
        near = difflib.get_close_matches(str(path), names, n=1) or list(names)[:1]
        raise ConfigError(
            f"the config file {path} does not exist; "
            + (f"did you mean {near[0]}?" if near else "check its path.")
        )
    with _mistakes_in(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ConfigError(
                f"the config file {path} is not a Python file; its name must end in .py."
            )
        module = importlib.util.module_from_spec(spec)
        # A config may build on another: `from configs import digits_vit_float32`.
        sys.path.insert(0, str(path.resolve().parent.parent))
        try:
            spec.loader.exec_module(module)
            if not callable(getattr(module, "get_config", None)):
                raise ConfigError(
                    f"the config file {path} has no get_config(); write one that returns a Config(...)."
                )
            config = module.get_config()
        finally:
            sys.path.pop(0)
        validate.check(config)
    return config


def override(config: Config, arguments: Sequence[str], program: str = "train.py") -> Config:
    """The config with `--dotted.name VALUE` settings replaced. Raises ConfigError, or SystemExit(0)."""
    try:
        import tyro
    except ImportError as error:
        raise ConfigError(
            "the command line needs the package tyro, which is not installed: pip install 'jaxmp[train]' "
            "(in a checkout: pip install -e '.[train]') brings all that training needs."
        ) from error
    if not any(argument in _HELP for argument in arguments):
        _check_names(config, arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Config,
                default=config,
                args=list(arguments),
                prog=f"{program} configs/NAME.py",
                use_underscores=True,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_explain(config, arguments, said.getvalue())) from stop
    except ValueError as error:  # a dataclass of the model refused its settings
        raise ConfigError(str(error)) from error


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs in the user's cache directory, unless JAX was told of another.

    The directory's name carries the processor's features, since programs for a CPU are compiled for
    them and a home directory may be shared by unlike machines.
    """
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = pathlib.Path(home).expanduser() / "jaxmp" / f"xla-{_processor()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # without a cache every start compiles, which is slower and nothing else
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def shorten(text: str, lines: int = 5, width: int = 300) -> str:
    """The first lines of a message, the long ones cut."""
    rows = [
        line if len(line) <= width else line[: width - 1] + "…"
        for line in text.strip().splitlines()
    ]
    return "\n".join(rows[:lines])


def _processor() -> str:
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        features += "".join(
            re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.MULTILINE)[:2]
        )
    return hashlib.sha256(features.encode()).hexdigest()[:12]


def _check_names(config: Config, arguments: Sequence[str]) -> None:
    """Every `--name` must be a setting of this config."""
    settings = configs.flatten(config)
    for argument in arguments:
        key = argument[2:].partition("=")[0].replace("-", "_")
        if argument.startswith("--") and key not in settings:
            raise ConfigError(
                f"--{key} is not a setting of this config; {_nearest(key, list(settings))}"
            )


def _nearest(key: str, settings: list[str]) -> str:
    """What somebody who wrote `key` may have meant."""
    members = [f"--{name}" for name in settings if name.startswith(key.partition(".")[0] + ".")]
    if members and "." not in key:
        return f"there are {', '.join(members)}."
    last = {setting.rpartition(".")[2]: setting for setting in settings}
    near = difflib.get_close_matches(key, settings, n=1, cutoff=0.8)
    near += [
        last[tail]
        for tail in difflib.get_close_matches(key.rpartition(".")[2], last, n=2, cutoff=0.8)
    ]
    if near:
        return "did you mean " + " or ".join(f"--{name}" for name in dict.fromkeys(near)) + "?"
    return f"there are {', '.join(members)}." if members else "--help lists all."


def _explain(config: Config, arguments: Sequence[str], said: str) -> str:
    """tyro's boxed message as one sentence: which setting, what it takes, what it is now."""
    text = " ".join(re.sub(r"[─-╿|+]|-{3,}", " ", said).split())
    settings, kinds = configs.flatten(config), validate.setting_types(config)
    for key in re.findall(r"--([\w.-]+)", text):
        key = key.replace("-", "_")
        if key in settings:
            given = _given(arguments, key)
            head = f"--{key} cannot be {given!r}" if given else f"--{key} lacks a value"
            wanted, example = validate.describe_type(kinds[key]), _example(key, settings[key])
            return f"{head}; write {wanted}, such as {example}."
    stray = re.search(r"Unrecognized options: (.+?)(?: Perhaps| For full|$)", text)
    if stray:
        return f"{stray[1].strip()!r} belongs to no setting; write --name VALUE, one value each (see --help)."
    refused = re.search(r"Error parsing (\w+: .+?)(?: For full|$)", text)
    return refused[1] if refused else text


def _given(arguments: Sequence[str], key: str) -> str:
    """The first value that the command line gives to a setting; "" if none."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.replace("-", "_") == "__" + key:
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            return value or ("" if following.startswith("--") else following)
    return ""


def _example(key: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"--{key} " + (" ".join(map(str, value)) or "'**/LayerNorm_*' float32")
    return f"--{key} {value}" if str(value) else f"--{key} runs/try"


@contextlib.contextmanager
def _mistakes_in(path: pathlib.Path) -> Iterator[None]:
    """Turns what goes wrong inside a config file into a ConfigError with its line."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}\nin {path}") from error
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
        place = f"{path}, line {line}" if line else str(path)
        raise ConfigError(
            f"{place}: {type(error).__name__}: {error}{_known_fields(error)}"
        ) from error


def _known_fields(error: Exception) -> str:
    """For a misspelt keyword of one of the config's dataclasses: the nearest that exists."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    cls = vars(configs).get(found[1]) if found else None
    if not found or cls is None:
        return ""
    fields = list(cls.__dataclass_fields__)
    near = difflib.get_close_matches(found[2], fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; {found[1]} has {', '.join(fields)}"
