"""A run in several processes: how they connect, stop together, and notice a lost one.

`jax.distributed` does the work. It ends a process whose peers are lost by SIGABRT, at any moment.
So each process runs in a child of its own, and the parent explains its end in one line. The parent
lives as long as the child, passes signals on to it, and does nothing else.

Reference:
    https://docs.jax.dev/en/latest/multi_process.html
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxpeft.cli import exits
from jaxpeft.cli.find_hosts import Hosts, cannot_meet
from jaxpeft.cli.signals import StopRequest
from jaxpeft.cli.supervision import JOINED, LEAVING_SECONDS, run_in_child, silence, silenced
from jaxpeft.core.errors import UserError


@contextlib.contextmanager
def joined(hosts: Hosts | None) -> Iterator[None]:
    """Joins the other processes for its block, which then runs in a child process.

    Call it before anything asks JAX for its devices.

    Args:
        hosts: From `find_hosts`; None does nothing.

    Raises:
        SystemExit: Joining or the block failed, and the error was printed.
    """
    if hosts is None:
        yield
        return
    tell = run_in_child(hosts)
    code = 0
    try:
        _connect(hosts)
        os.write(tell, JOINED)
        yield
        _meet("the end")  # the first process may still be writing
    except Exception as error:
        if not isinstance(error, UserError):
            # A collective fails if its other side is lost. In that case JAX ends this process here.
            time.sleep(min(hosts.heartbeat, 30) + 10)
        code = exits.report(error)
    os.write(tell, bytes([code]))
    if code:
        silence()  # JAX ends this process with a trace if the others go on
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        raise SystemExit(code)
    jax.distributed.shutdown()


class StopTogether(StopRequest):
    """Replaces `StopRequest` in a run of several processes.

    JAX itself notices SIGTERM and tells all processes, which agree on a step to stop after. Before
    the first step, a request waits. A second signal is handled by the parent.

    Reference:
        ``jax.experimental.multihost_utils.reached_preemption_sync_point``
    """

    def __enter__(self) -> "StopTogether":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def note(self, step: int) -> None:
        """Sets `requested` once all processes have agreed to stop after this step."""
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.requested = "SIGTERM"

    def run_interruptible(self, call: Any, doing: str = "") -> Any:
        """Calls `call` without interruption, since the other processes would wait for this one."""
        del doing
        return call()


def stop_request() -> StopRequest:
    """The object that tells this run to stop."""
    return StopRequest() if jax.process_count() == 1 else StopTogether()


def _connect(hosts: Hosts) -> None:
    """Joins the other processes."""
    if hosts.coordinator is not None and hosts.process_id:  # an unknown number may turn out to be 0
        _await_coordinator(hosts.coordinator, hosts.timeout)
    with silenced():  # a failure prints a trace, which the parent explains
        try:
            jax.distributed.initialize(
                hosts.coordinator,
                hosts.num_processes,
                hosts.process_id,
                cluster_detection_method=hosts.cluster,
                initialization_timeout=hosts.timeout,
                heartbeat_timeout_seconds=hosts.heartbeat,
                shutdown_timeout_seconds=LEAVING_SECONDS,
            )
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(f"{cannot_meet(hosts)} ({text})") from error


def _await_coordinator(address: str, seconds: int) -> None:
    """Waits until process 0 listens; without it, JAX would end this process."""
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


def _meet(where: str) -> None:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(f"jaxpeft: {where}")
