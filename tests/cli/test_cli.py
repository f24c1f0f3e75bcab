"""What every command shares: how it ends, its options, and starting again with huge pages."""

import dataclasses
import os
import subprocess
import sys

import pytest

from jaxpeft.cli import arguments
from jaxpeft.config.schema import Schema
from jaxpeft.core.errors import UserError
from jaxpeft.core.foreign_names import FOREIGN


@dataclasses.dataclass(frozen=True)
class Optim:
    """Toy.

    Attributes:
        learning_rate: How fast.
    """

    learning_rate: float = 1.0


@dataclasses.dataclass(frozen=True)
class Root:
    """Toy.

    Attributes:
        optim: Section.
        output_dir: Where to.
    """

    optim: Optim = dataclasses.field(default_factory=Optim)
    output_dir: str = "x"


SCHEMA = Schema(Root, FOREIGN)


@pytest.fixture
def command(tmp_path):
    """Runs ``python -m toy ARGS`` with the given body of main."""

    def command(body, *args, prelude="", stdout=subprocess.PIPE, **variables):
        (tmp_path / "toy.py").write_text(
            "import os, sys\nfrom jaxpeft.cli import arguments, exits, huge_pages\n"
            f"from jaxpeft.core import errors\n{prelude}\n"
            f"def main(argv):\n    {body}\nexits.run(main)\n"
        )
        ours = {"JAXPEFT_REEXECUTED", "JAXPEFT_HUGE_PAGES", "GLIBC_TUNABLES", "PYTEST_VERSION"}
        env = {name: text for name, text in os.environ.items() if name not in ours} | variables
        env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.getcwd()])
        return subprocess.run(
            [sys.executable, "-m", "toy", *args],
            env=env,
            text=True,
            timeout=60,
            stdout=stdout,
            stderr=subprocess.PIPE,
        )

    return command


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise errors.UserError('a\\nb')", 2, "error: a\nerror: b\n"),
        ("raise errors.CheckpointError('torn')", 4, "error: torn\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("raise PermissionError(13, 'x', 'out/a')", 2, "error: out/a: Permission denied; choose"),
        ("raise OSError(28, 'No space left on device', 'a')", 5, "error: a: the disk is full"),
        ("raise ValueError('write: No space left on device')", 5, "error: the disk is full"),
        ("raise MemoryError", 5, "error: out of memory; lower train.microbatch_size"),
        ("raise RuntimeError('RESOURCE_EXHAUSTED: 9 bytes')", 5, "error: out of memory; lower"),
        (
            "arguments.Parser(prog='p').parse_args(['x'])",
            2,
            "error: unrecognized arguments: x; see p ",
        ),
    ],
)
def test_a_command_ends_with_the_code_of_what_happened(command, body, code, stderr):
    done = command(body)
    assert (done.returncode, done.stderr[: len(stderr)]) == (code, stderr)
    assert "Traceback" not in done.stderr
    assert (done.stderr == "") == (code in (0, 3))


def test_only_a_bug_shows_a_traceback(command):
    done = command("raise KeyError('lost')")
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert done.stderr.endswith(
        "error: this is a bug in jaxpeft; please report it with the lines above\n"
    )


def test_a_closed_pipe_is_quiet(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = command("print('x' * 100)", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_overrides_are_kept_apart_from_a_commands_own_options():
    parser = arguments.make_parser("train", "Trains.", SCHEMA)
    parser.add_argument("config")
    parser.add_argument("--resume")
    line = "--optim.learning_rate -1 c.yaml --resume never --output_dir=o --optim {learning_rate:3}"
    args, overrides = arguments.parse_arguments(parser, line.split(), SCHEMA)
    assert (args.config, args.resume) == ("c.yaml", "never")
    assert overrides == [
        *("--optim.learning_rate=-1", "--output_dir=o", "--optim={learning_rate:3}")
    ]
    assert "--optim.learning_rate (1.0)  How fast." in parser.format_help()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--hlep", "--hlep: unknown option, did you mean --help?"),
        ("--res", "--res: unknown option, did you mean --resume?"),
        ("--learning_rate", "--learning_rate: unknown option, write --optim.learning_rate"),
        ("--learning-rate=3", "--learning-rate: unknown option, write --optim.learning_rate"),
        ("--lora_alpha", '--lora_alpha: unknown key, PEFT\'s lora_alpha is "method.alpha" here'),
        ("--zzz", "--zzz: unknown option; see --help"),
        ("--optim.learning_rate", "--optim.learning_rate: needs a value, as in --optim.learning"),
    ],
)
def test_unknown_option_is_answered_with_the_nearest(flag, message):
    parser = arguments.make_parser("train", "Trains.")
    parser.add_argument("--resume")
    with pytest.raises(UserError) as caught:
        arguments.parse_arguments(parser, [flag], SCHEMA)
    assert str(caught.value).startswith(message)


def test_without_a_schema_there_are_no_overrides():
    with pytest.raises(UserError, match=r"--optim\.learning_rate: unknown option"):
        arguments.parse_arguments(arguments.make_parser("merge", ""), ["--optim.learning_rate=3"])


SHOW = "print(argv, os.environ.get('GLIBC_TUNABLES'), *open('starts').read().split())"
START = "open('starts', 'a').write(f'{os.getpid()} ')\nhuge_pages.enable_huge_pages()"
FORCE = "huge_pages._madvise_works = lambda: True\n"


def test_huge_pages_start_the_same_command_once_more_in_the_same_process(command, tmp_path):
    prelude = f"os.chdir({str(tmp_path)!r})\n" + FORCE + START
    done = command(SHOW, "a b", "--c", prelude=prelude, GLIBC_TUNABLES="glibc.malloc.check=0")
    *shown, first, second = done.stdout.rsplit(maxsplit=2)
    assert done.stderr == ""
    assert shown == ["['a b', '--c'] glibc.malloc.check=0:glibc.malloc.hugetlb=1"]
    assert first == second


@pytest.mark.parametrize(
    "variables",
    [
        {"JAXPEFT_HUGE_PAGES": "0"},
        {"PYTEST_VERSION": "9"},
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"},
        {"JAXPEFT_REEXECUTED": "1"},
    ],
)
def test_huge_pages_are_left_alone_where_unwanted(command, tmp_path, variables):
    prelude = f"os.chdir({str(tmp_path)!r})\n" + FORCE + START
    done = command(SHOW, prelude=prelude, **variables)
    tunables = variables.get("GLIBC_TUNABLES")
    *shown, pid = done.stdout.rsplit(maxsplit=1)
    assert shown == [f"[] {tunables}"]
    assert pid.isdigit()


CACHED = """
import sys
from jaxpeft.cli import arguments
parser = arguments.make_parser("verb", "Does something.")
arguments.add_compilation_cache(parser)
arguments.keep_compiled(arguments.parse_arguments(parser, sys.argv[1:])[0])
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))).shape)
"""


@pytest.mark.parametrize("flags", [[], ["--no_compilation_cache"]])
def test_compiled_programs_are_kept_in_the_users_cache_unless_a_flag_says_no(tmp_path, flags):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", CACHED, *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "(3, 3)\n", result.stderr
    assert any((tmp_path / "jaxpeft" / "compiled").glob("*")) == (not flags)
