"""What all ``python -m jaxpeft.VERB`` share: arguments, exit codes, and memory in huge pages.

Exit codes: 0 done, 2 bad config or input, 3 diverged, 4 no usable checkpoint, 5 out of disk or
memory or a bucket failed, 6 interrupted but saved, 7 another process of the run is lost, 70 a bug,
130 interrupted, 141 the reader of a pipe went away.
"""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jaxpeft.cli import signals
from jaxpeft.config.schema import Schema, describe
from jaxpeft.core import limits
from jaxpeft.core.errors import UserError, nearest
from jaxpeft.files.storage import explain, is_store_error, shown

_running: list[str] = []
"""The commands whose parser was made, the last one is running: hints name its options."""
_REEXECUTED = "JAXPEFT_REEXECUTED"
_TUNABLE = "glibc.malloc.hugetlb"
_THP_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`."""
        raise UserError(f"{message}; see {self.prog} --help")


def make_parser(verb: str, description: str, schema: Schema | None = None) -> Parser:
    """A parser for ``python -m jaxpeft.VERB``.

    Args:
        verb: The module's name.
        description: What the command does.
        schema: Where given, ``--help`` lists the config's keys.
    """
    _running.append(verb)
    keys = f"keys of CONFIG that may follow:\n{describe(schema)}" if schema else None
    return Parser(
        prog=f"python -m jaxpeft.{verb}",
        description=description,
        epilog=keys,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_compilation_cache(parser: Parser) -> None:
    """Adds the flag that `keep_compiled` reads."""
    parser.add_argument(
        "--no_compilation_cache",
        action="store_true",
        help="compile anew; else compiled programs are kept in ~/.cache/jaxpeft",
    )


def keep_compiled(args: argparse.Namespace) -> None:
    """Lets JAX find programs that an earlier process compiled, unless a flag says no.

    They are kept where JAX_COMPILATION_CACHE_DIR says, else in ``jaxpeft/compiled`` of the user's
    cache folder; those that took less than a second are not kept.
    """
    import jax

    if args.no_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "jaxpeft" / "compiled"))


def add_base(parser: Parser) -> None:
    """Adds the flags that say which base model to load, for `load_base`."""
    parser.add_argument("--model", required=True, help="HF folder, hub id or GGUF file")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", default="float32", help="dtype of the base")
    add_chat_template(parser)
    parser.add_argument("--quantization", help="nf4, int4 or int8 for the kernels of its layers")
    parser.add_argument(
        "--double_quantization", action="store_true", help="quantise their scales too"
    )
    add_compilation_cache(parser)


def load_base(args: argparse.Namespace) -> Any:
    """The `jaxpeft.Model` that the flags of `add_base` name."""
    import jaxpeft as jp
    from jaxpeft.pretrained.chat_template import override_template

    keep_compiled(args)
    template = chat_template(args)
    base = jp.load_model(
        args.model,
        revision=args.revision,
        dtype=args.dtype,
        quantization=args.quantization,
        double_quantization=args.double_quantization,
    )
    return base.replace(tokenizer=override_template(base.tokenizer, template))


def add_chat_template(parser: Parser) -> None:
    """Adds the flag for a chat template in place of the model's and the adapter's."""
    parser.add_argument(
        "--chat_template",
        metavar="FILE",
        help="a Jinja template, in place of the model's or the adapter's",
    )


def chat_template(args: argparse.Namespace) -> str:
    """The text of the file that ``--chat_template`` names; "" without the flag."""
    from jaxpeft.pretrained.chat_template import read_template

    return (
        "" if args.chat_template is None else read_template(args.chat_template, "--chat_template")
    )


def load_adapter(args: argparse.Namespace, path: str, base: Any) -> Any:
    """An adapter for a base; it chats with the template that a flag names.

    What is not known of the two is said on standard error.
    """
    import jaxpeft as jp
    from jaxpeft.pretrained.adapters import notes_of
    from jaxpeft.pretrained.chat_template import override_in_adapter

    adapter = jp.load_adapter(path, base)
    for note in notes_of(path, adapter, base):
        print(f"note: {note}", file=sys.stderr)
    return override_in_adapter(adapter, chat_template(args))


def parse_arguments(
    parser: argparse.ArgumentParser, argv: list[str], schema: Schema | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line, keeping config overrides apart.

    Args:
        parser: Knows the command's own options.
        argv: The arguments after the command.
        schema: The config's keys; without it there are no overrides.

    Returns:
        The parser's namespace, and the overrides for `jaxpeft.config.run_config.load_config`.

    Raises:
        UserError: For an unknown option, with the nearest known one.
    """
    own = list(parser._option_string_actions)
    plain = {key.path for key in schema.keys if "." not in key.path} if schema else set()
    rest, overrides, problems = [], [], []
    todo = list(argv)
    while todo:
        token = todo.pop(0)
        flag, equals, _ = token.partition("=")
        name = flag[2:]
        if token == "--":
            rest += [token, *todo]
            break
        if not token.startswith("--") or flag in own:
            rest.append(token)
        elif schema is not None and ("." in name or name in plain or name in schema.sections()):
            overrides.append(token)
            if not equals:
                if not todo or todo[0].startswith("--"):
                    problems.append(f"{flag}: needs a value, as in {flag} VALUE")
                else:
                    overrides.append(todo.pop(0))
        else:
            problems.append(f"{flag}: {_explain(name, own, schema)}")
    if problems:
        raise UserError("\n".join(problems))
    found = parser.parse_args(rest)
    for name, value in vars(found).items():
        if text := limits.exceeds(name, value):
            raise UserError(f"--{name} {text}")
    return found, overrides


def _explain(name: str, own: list[str], schema: Schema | None) -> str:
    """What to say about an unknown option."""
    known = [flag for flag in own if flag.startswith("--")]
    if schema is not None:
        leaf = name.replace("-", "_")
        paths = [key.path for key in schema.keys if key.path.rpartition(".")[2] == leaf]
        if paths:
            return f"unknown option, write {' or '.join('--' + p for p in dict.fromkeys(paths))}"
        if leaf in schema.foreign:
            return schema.explain("", leaf, [])
        known += [f"--{key.path}" for key in schema.keys]
    close = nearest(f"--{name}", known, 1)
    return f"unknown option, did you mean {close[0]}?" if close else "unknown option; see --help"


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls `main` with the command line's arguments and exits.

    What is the user's to mend is printed as ``error: ...`` without a traceback; only a bug in
    jaxpeft shows one.

    Args:
        main: Returns the exit code, None for 0.

    Raises:
        SystemExit: Always.
    """
    try:
        try:
            code = main(sys.argv[1:]) or 0
        except SystemExit as stop:  # argparse, after --help
            code = stop.code
        sys.stdout.flush()
    except Exception as error:
        code = report(error)
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    signals.end(code)


def report(error: Exception) -> int:
    """Prints what an exception means to the user; the exit code."""
    if isinstance(error, UserError):
        return _say(str(error), error.exit_code)
    if is_store_error(error):
        return _say(f"object store: {explain(error)}", 5)
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    number, text = getattr(error, "errno", None), " ".join(str(error).split())
    name = error.filename if isinstance(error, OSError) else ""
    file = f"{name}: " if name else ""
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return _say(
            f"{file}the disk is full or a quota is reached; {_more_space()} ({text[:200]})",
            5,
        )
    if number in (errno.ENAMETOOLONG, errno.ELOOP):
        return _say(f"{shown(name or 'path')}: {os.strerror(number)}; choose another path", 2)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _say(f"{file}{os.strerror(number)}; choose another place", 2)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return _say(
            f"out of memory; {_less_memory()} ({text[:200] or 'host'})",
            5,
        )
    traceback.print_exception(error)
    return _say("this is a bug in jaxpeft; please report it with the lines above", 70)


def _has_config() -> bool:
    """Whether the command that runs reads a config; so do those that are not known."""
    return not _running or _running[-1] not in ("generate", "evaluate", "merge")


def _more_space() -> str:
    if _has_config():
        return "free some space, lower checkpoint.keep, or choose another output_dir"
    return "free some space, or choose another place"


def _less_memory() -> str:
    if _has_config():
        return (
            "lower train.microbatch_size (or the batch size) or data.max_length, or spread the "
            "model over more devices with mesh.fsdp"
        )
    if _running[-1] == "merge":
        return "merge on a machine with more memory, or give --dtype bfloat16"
    return "lower --batch_size, or give --dtype bfloat16 or --quantization nf4"


def _say(text: str, code: int) -> int:
    for line in text.split("\n"):
        print(f"error: {line}", file=sys.stderr)
    return code


def enable_huge_pages() -> None:
    """Starts this command once more, in the same process, with malloc using huge pages.

    On Linux with glibc 2.35 or newer, ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` lets malloc ask
    for transparent huge pages where the kernel leaves that to programs (mode "madvise"); it is
    read when a process starts, so the program is executed again with the same arguments and
    process id. Call this before anything else of the command. It does nothing on other systems,
    under pytest, where the variable is set already, or with ``JAXPEFT_HUGE_PAGES=0``.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    unwanted = (
        os.environ.get("JAXPEFT_HUGE_PAGES") == "0"
        or _REEXECUTED in os.environ
        or "PYTEST_VERSION" in os.environ
        or _TUNABLE in tunables
    )
    if unwanted or not _madvise_works():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    os.environ[_REEXECUTED] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    # orig_argv[0] may be a bare "python" that another PATH would find.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _madvise_works() -> bool:
    """Whether glibc and the kernel let a program choose huge pages."""
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        new_enough = tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)
        return library == "glibc" and new_enough and "[madvise]" in _THP_MODE.read_text()
    except (ValueError, OSError, AttributeError):
        return False
