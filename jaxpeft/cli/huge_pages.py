"""Huge pages for the memory of commands, where the kernel leaves the choice to programs."""

import os
import sys
from pathlib import Path

_REEXECUTED = "JAXPEFT_REEXECUTED"
_TUNABLE = "glibc.malloc.hugetlb"
_THP_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def enable_huge_pages() -> None:
    """Restarts this command, in the same process, with huge pages for malloc.

    On Linux with glibc 2.35 or newer, ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` makes malloc ask
    for transparent huge pages if the kernel leaves the choice to programs (mode "madvise"). The
    variable is read when a process starts, so the program is executed again with the same arguments
    and process id. Call this before anything else in the command. It does nothing on other systems,
    under pytest, if the variable is set already, or with ``JAXPEFT_HUGE_PAGES=0``.
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
