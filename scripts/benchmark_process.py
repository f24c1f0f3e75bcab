"""Runs the sides of the benchmark: their environments, their processes, what those need."""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmark_side as side
from benchmark_table import OURS
from quickstart_data import DATA, MODEL_LINK

SCRIPTS = Path(__file__).parent
BENCH = Path(".bench")
PACKAGES = {
    "torch": (
        "torch==2.13.0",
        "transformers==5.23.0",
        "peft==0.21.0",
        "bitsandbytes",
        "accelerate",
    ),
    "tunix": ("google-tunix==0.1.7",),
}
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
COLD, SECOND = "cold", "second run"
POLL_SECONDS = 0.1


def interpreter(name: str, given: dict[str, str]) -> str:
    """The Python that runs a side.

    Raises:
        ValueError: There is none, with the way to get one.
    """
    if name in given:
        python = Path(given[name])
        way_out = "name the Python of an environment that has the packages"
    elif name == OURS:
        return sys.executable
    else:
        python = BENCH / name / "bin" / "python"
        way_out = (
            f"`python scripts/benchmark.py --setup {name}` builds it; or name another Python with "
            f"--python {name}=PATH, or leave the side out with --sides"
        )
    if not python.is_file():
        raise ValueError(f"{python}: no such file; {way_out}.")
    return str(python.absolute())  # not resolved: a venv's Python is a link


def set_up(names: Sequence[str]) -> None:
    """Builds environments under ``.bench``.

    Raises:
        ValueError: A package could not be installed.
    """
    for name in names:
        place = BENCH / name
        print(f"{name}: installing {' '.join(PACKAGES[name])} into {place}", flush=True)
        python = str(place / "bin" / "python")
        for command in (
            [sys.executable, "-m", "venv", str(place)],
            [python, "-m", "pip", "install", "--quiet", *PACKAGES[name]],
        ):
            if code := subprocess.run(command).returncode:
                raise ValueError(f"{name}: `{' '.join(command)}` ended with exit code {code}.")


def take_turn(python: str, name: str, work: side.Work, environment: dict[str, str]) -> dict:
    """Runs one side once.

    Returns:
        What it reported; ``start_seconds`` from the start of the process to the end of its first
        call; ``peak_anonymous_bytes``; or why there is nothing, as "unsupported" or "failed".
    """
    command = [python, str(SCRIPTS / f"benchmark_{name}.py"), json.dumps(dataclasses.asdict(work))]
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | ENVIRONMENT | environment,
        ) as process:
            peak = AnonymousPeak(process.pid)
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    match side.heard(line):
                        case {"event": side.CALL, "number": 1}:
                            found["start_seconds"] = time.perf_counter() - begin
                        case {"event": side.RESULT, **result}:
                            found |= result
                        case {"event": side.UNSUPPORTED, "reason": reason}:
                            found["unsupported"] = reason
            except BaseException:  # Ctrl-C, above all
                process.kill()
                raise
            finally:
                peak.stop()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1]
    if process.returncode or not {"seconds", "unsupported"} & found.keys():
        return {"failed": f"exit code {process.returncode}: {last[:300]}"}
    return found | {"peak_anonymous_bytes": peak.bytes}


class AnonymousPeak:
    """Watches the anonymous memory of a process, from a thread."""

    def __init__(self, pid: int):
        self.bytes = 0
        self._status, self._over = Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            try:
                status = self._status.read_text()
            except OSError:
                return
            self.bytes = max(self.bytes, side.status_bytes(status, "RssAnon"))

    def stop(self) -> None:
        """Stops watching."""
        self._over.set()
        self._thread.join()


def cache_folder(cache: str, name: str) -> Path:
    """Where a process keeps compiled programs; a cold start finds it empty."""
    folder = BENCH / (f"compiled-{name}-start" if cache else f"compiled-{name}")
    if cache == COLD:
        shutil.rmtree(folder, ignore_errors=True)
    return folder.absolute()


def prepare_model(python: str, given: Path | None) -> dict[str, str]:
    """Writes the folder that all sides load, unless it is there.

    Args:
        python: Runs jaxpeft's side.
        given: Another model than the quickstart's: a GGUF file, or a Hugging Face folder, which
            is taken as it is.

    Returns:
        The folder, and where its weights are from.

    Raises:
        ValueError: It could not be written.
    """
    source = given or Path(DATA, MODEL_LINK)
    if source.is_dir():
        return {"folder": str(source.absolute()), "weights": str(source)}
    if given and not source.is_file():
        raise ValueError(f"--model {given}: no such file or folder.")
    real = source.is_file()
    folder = BENCH / (f"model-{source.stem}" if real else "model-random")
    if not (folder / "config.json").is_file():
        print(f"writing {folder}", flush=True)
        place = str(folder.absolute())
        work = side.Work(kind="prepare", model=place, source=str(source) if real else "")
        found = take_turn(python, OURS, work, {})
        if "failed" in found:
            raise ValueError(f"{folder}: {found['failed']}")
    return {"folder": str(folder.absolute()), "weights": str(source) if real else "random"}


def machine() -> dict[str, Any]:
    """What the figures depend on."""

    def text(file: str) -> str:
        return Path(file).read_text() if Path(file).is_file() else ""

    models = [line for line in text("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    memory = side.status_bytes(text("/proc/meminfo"), "MemTotal")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": cores,
        "memory_bytes": memory,
        "system": platform.platform(),
        "huge_pages": text("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
    }


def commit() -> str:
    """The checkout's commit, marked where files differ from it; "" outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True)
    return done.stdout.strip()
