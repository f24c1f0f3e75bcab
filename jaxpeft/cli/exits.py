"""The end of a command: one line that explains an error, and the exit code.

Exit codes: 0 done, 2 bad config or input, 3 diverged, 4 no usable checkpoint, 5 out of disk or
memory or a bucket failed, 6 interrupted but saved, 7 another process of the run is lost, 70 a bug,
130 interrupted, 141 the reader of a pipe went away.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from jaxpeft.cli import signals
from jaxpeft.core.errors import UserError
from jaxpeft.files.storage import explain, is_store_error, shown

_running: list[str] = []
"""The commands whose parser was made. The last one is running, and hints name its options."""


def note_command(verb: str) -> None:
    """Lets hints name the options of ``python -m jaxpeft.VERB``."""
    _running.append(verb)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Calls `main` with the command line's arguments and exits.

    An error that the user can mend is printed as ``error: ...`` without a traceback; only a bug in
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
        code = _ended("interrupted", 130)
    signals.end(code)


def report(error: Exception) -> int:
    """Prints an explanation of an exception; returns the exit code."""
    if isinstance(error, UserError):
        return _ended(str(error), error.exit_code)
    if is_store_error(error):
        return _ended(f"object store: {explain(error)}", 5)
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    number, text = getattr(error, "errno", None), " ".join(str(error).split())
    name = error.filename if isinstance(error, OSError) else ""
    file = f"{name}: " if name else ""
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return _ended(
            f"{file}the disk is full or a quota is reached; {_more_space()} ({text[:200]})",
            5,
        )
    if number in (errno.ENAMETOOLONG, errno.ELOOP):
        return _ended(f"{shown(name or 'path')}: {os.strerror(number)}; choose another path", 2)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _ended(f"{file}{os.strerror(number)}; choose another place", 2)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return _ended(
            f"out of memory; {_less_memory()} ({text[:200] or 'host'})",
            5,
        )
    traceback.print_exception(error)
    return _ended("this is a bug in jaxpeft; please report it with the lines above", 70)


def _has_config() -> bool:
    """Whether the running command reads a config; unknown commands count as such."""
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


def _ended(text: str, code: int) -> int:
    for line in text.split("\n"):
        print(f"error: {line}", file=sys.stderr)
    return code
