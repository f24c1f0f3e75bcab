"""One run in several processes: how they meet, stop together, and notice that one is lost.

`jax.distributed` does the work. It ends a process whose peers are lost by SIGABRT, whatever the
process is doing, so each one runs in a child of its own: the parent says in one line what its end
means. The parent lives as long as the child, hands signals on to it, and does nothing else.

Reference:
    https://docs.jax.dev/en/latest/multi_process.html
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

from jaxpeft.cli import exits, host_errors
from jaxpeft.cli.signals import StopRequest
from jaxpeft.core.errors import UserError

LOST_EXIT_CODE = 7
_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_CLUSTERS = ("gcetpu", "gketpu", "slurm")
_CLUSTER_SIGNS = (  # JAX itself sets the second where it finds TPUs
    *("SLURM_JOB_ID", "TPU_ML_PLATFORM", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
    "TPU_PROCESS_ADDRESSES",
)
_LEAVING_SECONDS = 10  # in which a process that failed waits for others to fail alike
_JOINED = b"\xff"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run, as flags and environment name them.

    Attributes:
        timeout: Seconds to wait for the others at the start.
        heartbeat: Seconds of silence after which a process is lost.
        coordinator: ``host:port`` of process 0; None where JAX finds it.
        num_processes: How many there are; None where JAX finds it.
        process_id: Which of them this is; None where JAX finds it.
        cluster: JAX's name of the cluster that was detected.
    """

    timeout: int
    heartbeat: int
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    cluster: str | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `find_hosts` reads."""
    add = parser.add_argument
    add("--distributed.coordinator", metavar="HOST:PORT", help="of process 0, where all meet")
    add("--distributed.num_processes", metavar="N", help="how many processes the run has")
    add("--distributed.process_id", metavar="I", help="which of them this is, from 0")
    add("--distributed.timeout", metavar="SECONDS", default="300", help="to wait for the others")
    add("--distributed.heartbeat", metavar="SECONDS", default="30", help="of silence: one is lost")


def find_hosts(args: argparse.Namespace) -> Hosts | None:
    """The processes of this run.

    Each value comes from its flag, else from the environment (JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES, JAX_PROCESS_ID), else from what JAX finds out on TPU VMs and under SLURM.
    One process is alone, whatever else is said of it.

    Args:
        args: With the flags of `add_flags`.

    Returns:
        None for a run of one process; then nothing was contacted.

    Raises:
        UserError: A setting is missing or wrong.
    """
    given = {name: _given(args, name) for name in _VARIABLES}
    timeout, heartbeat = (_whole(args, name, 1) for name in ("timeout", "heartbeat"))
    missing = [name for name, value in given.items() if value is None]
    count = None if given["num_processes"] is None else _whole(args, "num_processes", 1)
    index = None if given["process_id"] is None else _whole(args, "process_id", 0)
    cluster, found = _detect_cluster() if missing and count != 1 else (None, 1)
    total = count or found
    if index is not None and index >= total and (count is not None or found > 1):
        raise UserError(
            f"--distributed.process_id: processes of {total} are numbered from 0 to {total - 1}, "
            f"got {index}."
        )
    if count == 1 or (found == 1 and len(missing) == len(given)):
        return None
    if missing and found == 1:
        names = ", ".join(f"--distributed.{name} ({_VARIABLES[name]})" for name in missing)
        raise UserError(f"a run of several processes needs {names} too.")
    if (coordinator := given["coordinator"]) is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 65536:
            raise UserError(
                "--distributed.coordinator: expected HOST:PORT, such as 10.0.0.1:8476, got "
                f"{coordinator!r}."
            )
    return Hosts(timeout, heartbeat, coordinator, count, index, cluster)


@contextlib.contextmanager
def joined(hosts: Hosts | None) -> Iterator[None]:
    """Joins the other processes for its block, which runs in a child process then.

    Call it before anything asks JAX for its devices.

    Args:
        hosts: From `find_hosts`; None does nothing.

    Raises:
        SystemExit: The block failed, and the error was printed.
    """
    if hosts is None:
        yield
        return
    tell = _run_in_child(hosts)
    code = 0
    try:
        _connect(hosts)
        os.write(tell, _JOINED)
        yield
        _meet("the end")  # the first process may have more to write than the others
    except Exception as error:
        if not isinstance(error, UserError):
            # Collectives fail when their other side is lost. Then JAX ends this process meanwhile.
            time.sleep(min(hosts.heartbeat, 30) + 10)
        code = exits.report(error)
    os.write(tell, bytes([code]))
    if code:
        _silence()  # if the others go on, JAX ends this process with a trace
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        raise SystemExit(code)
    jax.distributed.shutdown()


class StopTogether(StopRequest):
    """Takes the place of `StopRequest` in a run of several processes.

    JAX itself notices SIGTERM and tells all processes, which agree on a step to stop after. Until
    there are steps to do, a request waits. A second signal is the parent's business.

    Reference:
        ``jax.experimental.multihost_utils.reached_preemption_sync_point``
    """

    def __enter__(self) -> "StopTogether":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def note(self, step: int) -> None:
        """Notes a stop once all processes have to stop after this step."""
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.requested = "SIGTERM"

    def run_interruptible(self, call: Any, doing: str = "") -> Any:
        """Does the work: what one process left out the others would wait for."""
        del doing
        return call()


def stop_request() -> StopRequest:
    """What asks this run to stop."""
    return StopRequest() if jax.process_count() == 1 else StopTogether()


def _connect(hosts: Hosts) -> None:
    """Joins the other processes."""
    if hosts.coordinator is not None and hosts.process_id:  # not where it may turn out to be 0
        _await_coordinator(hosts.coordinator, hosts.timeout)
    with _silenced():  # in vain it ends with a trace; the parent says what it means
        try:
            jax.distributed.initialize(
                hosts.coordinator,
                hosts.num_processes,
                hosts.process_id,
                cluster_detection_method=hosts.cluster,
                initialization_timeout=hosts.timeout,
                heartbeat_timeout_seconds=hosts.heartbeat,
                shutdown_timeout_seconds=_LEAVING_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{_cannot_meet(hosts)} ({text})") from error


def _await_coordinator(address: str, seconds: int) -> None:
    """Waits until process 0 listens: JAX would end this process if it did not."""
    host, _, port = address.rpartition(":")
    last: OSError | None = None
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            last = error
            time.sleep(0.2)
    raise UserError(
        f"--distributed.coordinator: {address} cannot be reached within {seconds} s ({last}); "
        "start process 0, or correct the address."
    )


def _cannot_meet(hosts: Hosts) -> str:
    where = hosts.coordinator or f"the coordinator that {hosts.cluster} names"
    return (
        f"the processes of this run did not meet at {where} within {hosts.timeout} s; start all of "
        "them, each with its own --distributed.process_id, and check address and port."
    )


def _meet(where: str) -> None:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f"jaxpeft: {where}")


def _run_in_child(hosts: Hosts) -> int:
    """Goes on in a child process, in which it returns.

    Returns:
        Where the child writes what the parent should know: that it has joined, and its exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    hear, tell = os.pipe()
    errors, runtime = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(tell)
        os.close(runtime)
        _supervise(child, hear, errors, hosts)
    os.close(hear)
    os.close(errors)
    host_errors.keep_python_apart(runtime)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not without its parent
    if os.getppid() != parent:  # it was killed before that
        os._exit(128 + signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the parent too
    return tell


def _supervise(child: int, hear: int, errors: int, hosts: Hosts) -> NoReturn:
    """Waits for the child, hands signals on to it, and ends as it does.

    Args:
        child: Its process id.
        hear: What it tells, see `_run_in_child`.
        errors: What its C++ code writes on standard error.
        hosts: For messages.
    """
    seen = []
    relay = host_errors.Relay(_write_error, hosts.heartbeat + 60)
    reading = host_errors.follow(errors, relay)

    def hand_on(number: int, _: Any) -> None:
        seen.append(number)
        name = signal.Signals(number).name
        if len(seen) == 1:
            _say(f"{name}: all processes stop after a step; a second signal stops this one at once")
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGTERM if len(seen) == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hand_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reading.join(1)  # processes that it started may live on
    relay.end(drop=status == -signal.SIGABRT)
    told = os.read(hear, 64)
    code = 128 - status if status < 0 else status
    if status == -signal.SIGABRT:
        if told[-1:] not in (b"", _JOINED):
            code = told[-1]
        elif told:
            code = LOST_EXIT_CODE
            _say(
                "error: another process of this run ended or cannot be reached; its own output "
                "says why. The same command on all of them goes on from the last checkpoint."
            )
        else:
            code = UserError.exit_code
            _say(f"error: {_cannot_meet(hosts)}")
    elif status == -signal.SIGKILL:
        _say("error: this process was killed; the last checkpoint is intact")
    os._exit(code)


def _say(text: str) -> None:
    _write_error(f"\n{text}\n".encode())


def _write_error(text: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(2, text)


def _silence() -> None:
    """Drops what is still written on standard error."""
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Drops what the block, C++ code included, writes on standard error."""
    before = os.dup(2)
    _silence()
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _detect_cluster() -> tuple[str | None, int]:
    """The kind of cluster that JAX finds this process in, and how many processes it has."""
    if not any(name in os.environ for name in _CLUSTER_SIGNS):
        return None, 1
    # JAX has no public name for it, and to ask jax.distributed.initialize would start a service
    # where there is nothing to share.
    try:
        from jax._src.clusters import ClusterEnv

        kinds = [kind for kind in ClusterEnv._cluster_types if kind.name in _CLUSTERS]
        for kind in kinds:
            present = False
            with contextlib.suppress(OSError):  # no metadata server
                present = kind.is_env_present()
            if present:
                return kind.name, kind.get_process_count()
    except (ImportError, AttributeError):  # another version of JAX
        return None, 1
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"how many processes this run has cannot be found out ({text}); give all of "
            "--distributed.coordinator, --distributed.num_processes and --distributed.process_id, "
            "or --distributed.num_processes 1 for a run of one."
        ) from error
    return None, 1


def _given(args: argparse.Namespace, name: str) -> str | None:
    flag = getattr(args, f"distributed.{name}")
    return flag if flag is not None else os.environ.get(_VARIABLES.get(name, "")) or None


def _whole(args: argparse.Namespace, name: str, least: int) -> int:
    text = _given(args, name) or ""
    if not re.fullmatch(r"\d{1,6}", text) or int(text) < least:
        raise UserError(
            f"--distributed.{name}: expected a whole number of at least {least}, got {text!r}."
        )
    return int(text)
