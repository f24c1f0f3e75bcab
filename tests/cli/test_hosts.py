"""One run in several processes: the whole command, two processes of two CPU devices each."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import compiled_programs
import jax
import numpy as np
import pytest
from places import HELPERS, ROOT
from safetensors.numpy import load_file
from tiny_run import evaluation_lines, make_files, training_lines, write_config

from jaxpeft import train as program
from jaxpeft.cli import find_hosts, host_errors, supervision
from jaxpeft.core.errors import ResourceError, UserError
from jaxpeft.mesh import layouts, processes
from jaxpeft.training.output import folder

STEPS = 10
SETTINGS = {
    "method": {"dropout": 0.1},
    "train": {"steps": STEPS},
    "checkpoint": {"every": 4},
}
LOST = "error: another process of this run ended or cannot be reached"
NAMES = ("coordinator", "num_processes", "process_id")
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    """The folder of the same run in one process with four devices."""
    return run_in_one(files, tmp_path_factory.mktemp("one") / "run")


def run_in_one(files, output, **changes):
    with pytest.MonkeyPatch.context() as patch:
        make_mesh, devices = layouts.make_mesh, jax.devices()[:4]
        patch.setattr(layouts, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=devices))
        program.main([write_config(files, output, **SETTINGS | changes)])
    return output


def start(config, *flags, fault=("-", "-"), devices=2, **environment) -> subprocess.Popen:
    """Starts the command in a process of its own."""
    hidden = ("PYTEST_VERSION", "PYTEST_CURRENT_TEST", "JAXPEFT_REEXECUTED")
    kept = (name for name in os.environ if not name.startswith(("SLURM_", "JAX_")))
    env = {name: os.environ[name] for name in kept if name not in hidden}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env |= compiled_programs.SETTINGS | environment
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(HELPERS / "faulty_train.py"), *fault, config, *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)


def start_two(config, *flags, faults=("-", "-"), **environment) -> list[subprocess.Popen]:
    """Starts both processes, one told by flags who it is, the other by the environment.

    Args:
        config: The config's path.
        flags: Further flags.
        faults: For each process, as ``"step:3 SIGTERM"``.
        environment: Further variables.
    """
    address = free_address()
    who = [(address, "2", str(index)) for index in range(2)]
    told = [f"--distributed.{name}={value}" for name, value in zip(NAMES, who[0], strict=True)]
    variables = dict(zip(VARIABLES, who[1], strict=True)) | environment
    flags = (*flags, "--distributed.heartbeat", "10")
    first, second = (fault.split() if " " in fault else (fault, "-") for fault in faults)
    return [
        start(config, *flags, *told, fault=first, **environment),
        start(config, *flags, fault=second, **variables),
    ]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def ends(processes, seconds=150) -> tuple[list[int], list[str]]:
    """Exit statuses and errors of processes, which have no traceback of Python's."""
    errors = [process.communicate(timeout=seconds)[1] for process in processes]
    for text in errors:
        assert "Traceback" not in text, text
        assert not re.search(r"Check failure|coordination_service|@  +0x", text), text
    return [process.returncode for process in processes], errors


def same_run(output, expected) -> None:
    """The loss curve, the evaluations, the answers and the adapter of both are the same."""
    told = ("step", "loss", "learning_rate", "grad_norm", "supervised_tokens", "skipped_updates")
    for lines, wanted in (
        (training_lines(output), training_lines(expected)),
        (evaluation_lines(output), evaluation_lines(expected)),
    ):
        assert [line["step"] for line in lines] == [line["step"] for line in wanted]
        for line, other in zip(lines, wanted, strict=True):
            for name in set(other) & {*told, "eval_loss", "eval_exact_match"}:
                assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)
    assert (output / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    (file,) = (path.relative_to(expected) for path in expected.glob("*/*.safetensors"))
    tensors, others = load_file(output / file), load_file(expected / file)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, others[name], rtol=0, atol=1e-5, err_msg=name)


def slurm(index: int, address: str) -> dict[str, str]:
    """What SLURM tells a process; JAX makes a port of the job's number."""
    host, _, port = address.rpartition(":")
    return {
        "SLURM_JOB_ID": str(int(port) - (65535 - 2**12 + 1)),
        "SLURM_STEP_NODELIST": host,
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": "0",
    }


def free_slurm_address() -> str:
    for port in range(65535 - 2**12 + 1, 65535):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return f"127.0.0.1:{port}"
    raise AssertionError("no free port")


def test_two_processes_that_slurm_names_do_the_run_of_one(files, tmp_path, one_process):
    output, address = tmp_path / "run", free_slurm_address()
    config = write_config(files, output, **SETTINGS)
    codes, errors = ends([start(config, **slurm(index, address)) for index in range(2)])
    assert codes == [0, 0], errors
    same_run(output, one_process)
    manifest = json.loads((output / "checkpoints" / "8" / "manifest.json").read_text())
    environment = manifest["meta"]["environment"]
    assert (environment["num_processes"], environment["num_devices"]) == (2, 4)
    assert "step" not in errors[1]  # only the first process speaks, and writes:
    steps = [line["step"] for line in training_lines(output)]
    assert steps == list(range(1, STEPS + 1))
    assert sorted(path.name for path in output.iterdir() if path.name[0] != ".") == sorted(
        path.name for path in one_process.iterdir() if path.name[0] != "."
    )


@pytest.mark.slow
def test_a_run_goes_on_after_a_signal_to_one_process_a_lost_one_and_in_one_process(
    files, tmp_path, one_process
):
    output, states = tmp_path / "run", tmp_path / "states"
    states.mkdir()
    config = write_config(files, output, **SETTINGS)
    told = {"STATES": str(states)}

    codes, errors = ends(start_two(config, faults=("slow:0.4", "step:2 SIGTERM"), **told))
    assert codes == [6, 6], errors
    last = {text.rpartition("error: ")[2] for text in errors}
    (line,) = {text.strip() for text in last}
    assert line.startswith("interrupted by SIGTERM at step ")
    saved = max(int(path.stem.removeprefix("saved-")) for path in states.glob("saved-*"))
    assert f"at step {saved}, saved" in line
    assert saved < 8

    began = time.monotonic()
    codes, errors = ends(start_two(config, faults=("-", "step:9 SIGKILL"), **told))
    assert codes == [supervision.LOST_EXIT_CODE, 128 + signal.SIGKILL], errors
    assert time.monotonic() - began < 120
    assert LOST in errors[0]
    assert f"going on after step {saved}" in errors[0]

    codes, errors = ends([start(config, devices=4, **told)])
    assert codes == [0], errors
    found = re.search(r"going on after step (\d+)", errors[0])
    assert found is not None
    same_run(output, one_process)
    for step in (saved, int(found[1])):
        before, after = (np.load(states / f"{what}-{step}.npz") for what in ("saved", "restored"))
        assert set(before) == set(after)
        for name in before:
            assert before[name].tobytes() == after[name].tobytes(), name


TARGETS = ["q_proj", "down_proj"]
VARIANTS = {
    "answers": {"evaluation": {"exact_match": True, "max_new_tokens": 3}},
    "fsdp": {"mesh": {"data": 1, "fsdp": 4}},
    "tensor": {"mesh": {"data": 2, "tensor": 2}},
    "tensor over processes": {"mesh": {"data": 1, "tensor": 4}},
    "microbatches": {"mesh": {"data": 2, "fsdp": 2}, "train": {"steps": 4, "microbatch_size": 4}},
    "best": {"checkpoint": {"every": 2, "best": "eval_loss"}},
    "nf4": {"model": {"quantization": "nf4"}, "mesh": {"data": 1, "fsdp": 4}},
    "loftq": {
        "model": {"quantization": "nf4"},
        "method": {"name": "lora", "targets": TARGETS, "rank": 4, "init_weights": "loftq"},
        "mesh": {"data": 1, "fsdp": 4},
    },
    "full": {"method": {"name": "full"}, "mesh": {"data": 1, "fsdp": 4}},
    "pissa": {"method": {"name": "lora", "targets": TARGETS, "rank": 4, "init_weights": "pissa"}},
    "eva": {"method": {"name": "lora", "targets": TARGETS, "rank": 4, "init_weights": "eva"}},
    "dora": {
        "method": {"name": "lora", "targets": TARGETS, "rank": 4, "dora": True},
        "mesh": {"data": 1, "tensor": 4},
    },
    "vera": {"method": {"name": "vera", "targets": TARGETS, "rank": 4}},
    "prefix": {"method": {"name": "prefix_tuning", "num_tokens": 3}},
    "prompt": {"method": {"name": "prompt_tuning", "num_tokens": 3}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_do_any_run_of_one(files, tmp_path, name):
    changes = {"train": {"steps": 4}, "evaluation": {"every": 2}} | VARIANTS[name]
    expected = run_in_one(files, tmp_path / "one", **changes)
    config = write_config(files, tmp_path / "two", **SETTINGS | changes)
    codes, errors = ends(start_two(config))
    assert codes == [0, 0], errors
    same_run(tmp_path / "two", expected)


@pytest.mark.slow
def test_a_lost_coordinator_ends_the_others_and_the_same_command_goes_on(
    files, tmp_path, one_process
):
    output = tmp_path / "run"
    config = write_config(files, output, **SETTINGS)
    processes = start_two(config, faults=("slow:1", "-"))
    stream = processes[0].stderr
    assert any(line.startswith("step 6/") for line in stream or ())
    processes[0].kill()
    killed = time.monotonic()
    codes, errors = ends(processes)
    assert time.monotonic() - killed < 60
    assert codes == [-signal.SIGKILL, supervision.LOST_EXIT_CODE]
    assert LOST in errors[1]
    codes, errors = ends(start_two(config))
    assert codes == [0, 0], errors
    assert "going on after step 4" in errors[0]
    same_run(output, one_process)


@pytest.mark.slow
def test_a_signal_to_the_parent_of_one_process_saves_in_all(files, tmp_path):
    config = write_config(files, tmp_path / "run", **SETTINGS)
    processes = start_two(config, faults=("slow:0.4", "-"))
    assert any(line.startswith("step 1/") for line in processes[0].stderr or ())
    processes[1].send_signal(signal.SIGINT)
    codes, errors = ends(processes)
    assert codes == [6, 6], errors
    assert "SIGINT: all processes stop after a step" in errors[1]
    processes = start_two(config, faults=("slow:30", "-"))
    assert any("going on after step" in line for line in processes[0].stderr or ())
    began = time.monotonic()
    for _ in range(2):
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(1)
    codes, errors = ends(processes)
    assert codes == [supervision.LOST_EXIT_CODE, 128 + signal.SIGKILL], errors
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_mistake_that_all_processes_find_is_one_line_of_each(files, tmp_path):
    config = write_config(files, tmp_path / "run", data={"train": "nowhere.jsonl"})
    codes, errors = ends(start_two(config))
    assert codes == [2, 2], errors
    for text in errors:
        assert own_lines(text)[-1].startswith("error: nowhere.jsonl: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_that_one_process_finds_ends_both(files, tmp_path):
    config = write_config(files, tmp_path / "run", **SETTINGS)
    other = write_config(files, tmp_path / "other", **SETTINGS, data={"train": "nowhere.jsonl"})
    began = time.monotonic()
    codes, errors = ends(start_each(config, other))
    assert time.monotonic() - began < 120
    assert codes == [supervision.LOST_EXIT_CODE, 2], errors
    assert LOST in errors[0]
    assert own_lines(errors[1])[-1].startswith("error: nowhere.jsonl: ")


@pytest.mark.slow
def test_all_wait_for_a_manifest_that_takes_long(files, tmp_path):
    config = write_config(files, tmp_path / "run", **SETTINGS | {"checkpoint": {"every": 100}})
    faults = ("step:2 SIGTERM", "slow:0.4")
    codes, errors = ends(start_two(config, faults=faults, COMMIT="15"))
    assert codes == [6, 6], errors
    found = re.search(r"interrupted by SIGTERM at step (\d+), saved", errors[1])
    assert found is not None
    assert (tmp_path / "run" / "checkpoints" / found[1] / "manifest.json").exists()


def start_each(*configs) -> list[subprocess.Popen]:
    """Starts two processes, each with its own config."""
    address = free_address()
    return [
        start(
            config,
            *[f"--distributed.{n}={v}" for n, v in zip(NAMES, (address, 2, index), strict=True)],
            "--distributed.heartbeat=10",
        )
        for index, config in enumerate(configs)
    ]


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(files, tmp_path):
    config = write_config(files, tmp_path / "run", **SETTINGS)
    other = write_config(files, tmp_path / "other", **SETTINGS, optim={"learning_rate": 1e-3})
    codes, errors = ends(start_each(config, other))
    assert codes == [2, 2], errors
    for text in errors:
        assert "the config and training data of process 1 are not those of process 0" in text


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_stays_alone_says_so_in_one_line(files, tmp_path, index):
    config = write_config(files, tmp_path / "run")
    who = (free_address(), 2, index)
    flags = [f"--distributed.{name}={value}" for name, value in zip(NAMES, who, strict=True)]
    codes, errors = ends([start(config, *flags, "--distributed.timeout=3")])
    assert codes == [2]
    (line,) = own_lines(errors[0])
    assert line.startswith("error: ")
    assert who[0] in line
    assert "within 3 s" in line


def own_lines(text: str) -> list[str]:
    """Lines of standard error but those of other packages."""
    lines = [line for line in text.splitlines() if line]
    return [line for line in lines if not line.startswith(("[transformers]", "[Gloo]"))]


def find(*flags: str) -> find_hosts.Hosts | None:
    parser = argparse.ArgumentParser()
    find_hosts.add_flags(parser)
    return find_hosts.find_hosts(parser.parse_args(flags))


@pytest.fixture
def no_cluster(monkeypatch):
    for name in (*VARIABLES, *find_hosts._CLUSTER_SIGNS, *slurm(0, "a:1")):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_cluster")
def test_without_settings_or_cluster_a_run_is_alone():
    assert find() is None


@pytest.mark.usefixtures("no_cluster")
def test_flags_go_before_the_environment(monkeypatch):
    for name, value in zip(VARIABLES, ("a:1", "4", "3"), strict=True):
        monkeypatch.setenv(name, value)
    found = find("--distributed.process_id=2", "--distributed.heartbeat=7")
    assert found == find_hosts.Hosts(300, 7, coordinator="a:1", num_processes=4, process_id=2)


@pytest.mark.usefixtures("no_cluster")
def test_slurm_with_several_tasks_is_found_and_one_task_is_alone(monkeypatch):
    for name, value in slurm(1, "node[1-2]:62000").items():
        monkeypatch.setenv(name, value)
    assert find() == find_hosts.Hosts(300, 30, cluster="slurm")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find() is None


@pytest.mark.usefixtures("no_cluster")
def test_what_is_given_goes_before_what_slurm_says(monkeypatch):
    for name, value in slurm(1, "node[1-2]:62000").items():
        monkeypatch.setenv(name, value)
    assert find("--distributed.num_processes=1") is None
    given = find("--distributed.coordinator=a:1")
    assert given == find_hosts.Hosts(300, 30, coordinator="a:1", cluster="slurm")
    with pytest.raises(UserError, match="numbered from 0 to 1, got 2"):
        find("--distributed.process_id=2")
    monkeypatch.setenv("SLURM_NTASKS", "2(x3)")
    with pytest.raises(UserError, match=r"\(ValueError: .*--distributed.num_processes 1 for a run"):
        find()


@pytest.mark.usefixtures("no_cluster")
def test_without_signs_of_a_cluster_or_with_another_jax_a_run_is_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.clusters", None)
    assert find() is None
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert find() is None


def test_a_folder_that_only_the_first_process_sees_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_SEEN_SECONDS", 0.1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(folder, "together", lambda act: act())
    monkeypatch.setattr(folder, "from_first", lambda find: find())
    output = tmp_path / "mine"
    output.mkdir()
    folder.check_shared(output)
    assert not list(output.iterdir())
    monkeypatch.setattr(folder, "from_first", lambda find: "of another folder")
    with pytest.raises(UserError, match=r"output_dir: .* does not see .*/mine; give all processes"):
        folder.check_shared(output)


def test_any_error_fits_into_what_the_others_are_told():
    for letter in ("a", "\0", "\U0001f600", "\ud800"):
        told = processes._failure(ResourceError(letter * 10_000))
        assert len(json.dumps(told)) < processes._ANSWER_BYTES
        assert told["code"] == 5


@pytest.mark.usefixtures("no_cluster")
def test_tpu_vms_with_several_workers_are_found_and_one_worker_is_alone(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert find() == find_hosts.Hosts(300, 30, cluster="gketpu")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a")
    assert find() is None


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("a:1", None, None), r"needs --distributed.num_processes \(JAX_NUM_PROCESSES\), --dist"),
        ((None, "2", "0"), r"needs --distributed.coordinator \(JAX_COORDINATOR_ADDRESS\) too"),
        (("a:1", "2", "2"), "numbered from 0 to 1, got 2"),
        (("a:1", "2", "-1"), "process_id: expected a whole number of at least 0, got '-1'"),
        (("a:1", "two", "1"), "num_processes: expected a whole number of at least 1, got 'two'"),
        (("a:1", "0", "0"), "num_processes: expected a whole number of at least 1, got '0'"),
        (("a", "2", "1"), "coordinator: expected HOST:PORT"),
        (("a:99999", "2", "1"), "coordinator: expected HOST:PORT"),
    ],
)
def test_settings_that_name_no_process_are_refused(values, words):
    flags = [f"--distributed.{n}={v}" for n, v in zip(NAMES, values, strict=True) if v is not None]
    with pytest.raises(UserError, match=words):
        find(*flags)


DUMP = """\
W1130 17:41:47.874607   11446 preemption_sync_manager.cc:147] Failed to retrieve a notice: gone
Additional GRPC error information from remote target coordination_service
F1130 17:41:28.016049   11178 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors.
*** Check failure stack trace: ***
    @     0x7f47eea40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LOSING = """
import os, sys
from jaxpeft.cli import find_hosts, supervision
told = supervision.run_in_child(find_hosts.Hosts(300, 30, "a:1", 2, 0))
os.write(told, supervision.JOINED)
print("python", file=sys.stderr)
os.write(2, b"I0000 before\\n" + sys.argv[1].encode())
os.abort() if sys.argv[2] == "lost" else os._exit(3)
"""


@pytest.mark.parametrize("how", ["lost", "failed"])
def test_only_a_lost_process_ends_the_others_without_what_the_runtime_dumps(how):
    command = [sys.executable, "-c", LOSING, DUMP, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "python"
    assert lines[1] == "I0000 before"
    if how == "lost":
        assert done.returncode == supervision.LOST_EXIT_CODE
        assert len(lines) == 4
        assert lines[3].startswith(LOST)
    else:
        assert done.returncode == 3
        assert done.stderr.endswith(DUMP)


def test_what_the_runtime_says_long_before_a_process_ends_is_passed_on():
    now, written = [0.0], []
    relay = host_errors.Relay(written.append, 90, clock=lambda: now[0])
    relay.take(DUMP[:100].encode())
    relay.take(DUMP[100:].encode() + b"half a ")
    assert written == []
    now[0] = 91
    relay.take(b"line\nnext")
    assert b"".join(written) == DUMP.encode() + b"half a line\n"
    relay.end(drop=True)
    assert written[-1] == b"next"


def test_heartbeat_is_a_number_of_seconds():
    with pytest.raises(UserError, match="heartbeat: expected a whole number of at least 1"):
        find("--distributed.heartbeat=soon")
