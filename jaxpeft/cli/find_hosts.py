"""Finds the processes of a run from flags, environment variables, or the cluster."""

import argparse
import contextlib
import dataclasses
import os
import re

from jaxpeft.core.errors import UserError

_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
_CLUSTERS = ("gcetpu", "gketpu", "slurm")
_CLUSTER_SIGNS = (  # JAX itself sets the second one if it finds TPUs
    *("SLURM_JOB_ID", "TPU_ML_PLATFORM", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),
    "TPU_PROCESS_ADDRESSES",
)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run, as flags and environment name them.

    Attributes:
        timeout: Seconds to wait for the others at the start.
        heartbeat: Seconds of silence after which a process counts as lost.
        coordinator: ``host:port`` of process 0; None if JAX finds it.
        num_processes: The number of processes; None if JAX finds it.
        process_id: The number of this process; None if JAX finds it.
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
    JAX_NUM_PROCESSES, JAX_PROCESS_ID), else from JAX's detection on TPU VMs and under SLURM. If the
    number of processes is one, the other values are ignored.

    Args:
        args: The values of the flags of `add_flags`.

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


def _detect_cluster() -> tuple[str | None, int]:
    """The kind of cluster that JAX finds this process in, and how many processes it has."""
    if not any(name in os.environ for name in _CLUSTER_SIGNS):
        return None, 1
    # JAX has no public function for it, and jax.distributed.initialize would start a service even
    # if there is only one process.
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


def cannot_meet(hosts: Hosts) -> str:
    """The error text for a run whose processes cannot connect."""
    where = hosts.coordinator or f"the coordinator that {hosts.cluster} names"
    return (
        f"the processes of this run did not meet at {where} within {hosts.timeout} s; start all of "
        "them, each with its own --distributed.process_id, and check address and port."
    )
