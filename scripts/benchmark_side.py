"""What the sides of the benchmark share: the work they are given, the clock, and their report.

A side is a script that is started with one `Work` as JSON. It writes lines that begin with a mark,
one after every call and one at the end; what libraries write besides is not read. Only the
standard library is imported here: every side runs in an environment of its own.
"""

import dataclasses
import importlib.metadata
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MARK = "@benchmark "
CALL, RESULT, UNSUPPORTED = "call", "result", "unsupported"
LEARNING_RATE, CLIP_NORM = 2e-4, 1.0
GEMM_SIZE = 4096


class UnsupportedError(Exception):
    """A side cannot do this work; the text says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One thing to measure, in one process.

    Attributes:
        kind: "train", "generate", "gemm", or "prepare" for the model's folder.
        method: "lora", "dora", "qlora", "prompt" or "full"; "merged" to generate without adapter.
        model: The folder of the model, weights in float32.
        source: For "prepare": the GGUF file; empty for random weights of the same sizes.
        dtype: "float32" or "bfloat16".
        remat: What the backward pass computes again: "none", "dots" or "full".
        warmup: Calls that are not measured.
        calls: Calls that are.
        batch_size: Sequences, or prompts.
        seq_len: Tokens of a training sequence, without virtual ones.
        segment: Tokens of each example that is packed into a sequence; 0 for one of seq_len.
        rank: Of LoRA and its kin.
        virtual_tokens: Of a soft prompt.
        prompt_tokens: Tokens of a prompt.
        new_tokens: Tokens to generate behind it; nothing stops earlier.
    """

    kind: str
    method: str = ""
    model: str = ""
    source: str = ""
    dtype: str = "float32"
    remat: str = "none"
    warmup: int = 2
    calls: int = 5
    batch_size: int = 4
    seq_len: int = 512
    segment: int = 0
    rank: int = 16
    virtual_tokens: int = 20
    prompt_tokens: int = 24
    new_tokens: int = 128

    @property
    def amount(self) -> int:
        """Tokens that a call learns from, or writes; FLOPs of a matrix product."""
        if self.kind == "gemm":
            return 2 * GEMM_SIZE**3
        return self.batch_size * (self.new_tokens if self.kind == "generate" else self.seq_len)


def say(event: str, **content: Any) -> None:
    """Writes one line for the benchmark to read."""
    print(f"{MARK}{json.dumps({'event': event, **content})}", flush=True)


def heard(line: str) -> dict[str, Any] | None:
    """What a line says, or None if it is not meant for the benchmark."""
    if not line.startswith(MARK):
        return None
    return json.loads(line[len(MARK) :])


def timed(work: Work, call: Callable[[], float]) -> dict[str, Any]:
    """Calls again and again, and says so after every time.

    Args:
        work: How often.
        call: Does the work, waits for its end, and returns a number that tells that it was done:
            the loss of a step.

    Returns:
        ``seconds`` of the measured calls, and all ``values``.
    """
    seconds, values = [], []
    for number in range(1, work.warmup + work.calls + 1):
        begin = time.perf_counter()
        values.append(call())
        seconds.append(time.perf_counter() - begin)
        say(CALL, number=number, seconds=seconds[-1])
    return {"seconds": seconds[work.warmup :], "values": values}


def peak_bytes() -> int:
    """The most memory this process has had, in bytes."""
    try:  # the other figure is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return status_bytes(status, "VmHWM")


def status_bytes(status: str, field: str) -> int:
    """A size out of the text of ``/proc/PID/status``, in bytes; 0 where it is not there."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], **found}


def run(measure: Callable[[Work], dict[str, Any]], packages: Sequence[str]) -> None:
    """Does the work of the command line and reports it.

    Args:
        measure: Does it; returns what `timed` does, and whatever else was seen.
        packages: Those whose versions matter.
    """
    work = Work(**json.loads(sys.argv[1]))
    try:
        found = measure(work)
    except UnsupportedError as error:
        say(UNSUPPORTED, reason=str(error))
        return
    say(RESULT, **found, peak_bytes=peak_bytes(), versions=versions(packages))
