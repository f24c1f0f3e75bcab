"""Kills a training run, or fails its disk, at every step of a save and of an export.

A tiny run is done once undisturbed, and every operation on its checkpoints and its export is
counted: folders made, files opened to be written, synced, renamed, removed. Then one case after
the other: the process is killed at one of these operations or a few milliseconds later (while C++
code writes), or the operation fails as on a full, failing or forbidden disk, once or until the
process ends. The same command then goes on. It must end with the adapter, the optimizer state in
the newest checkpoint, the metrics but for times, and the names of all files of the undisturbed
run: nothing is left over. Every case is forked from this process, which has imported everything
and computed nothing.

Usage: python scripts/chaos.py [--count 200] [--seed 0] [--folder FOLDER]
"""

import argparse
import collections
import errno
import hashlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from typing import Any, NamedTuple

os.environ.pop("XLA_FLAGS", None)  # one device, whatever the caller simulates
os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import grain  # noqa: F401
import jax
import numpy as np
import yaml
from orbax.checkpoint import v1 as orbax  # noqa: F401
from safetensors.numpy import save_file

from jaxpeft import train
from jaxpeft.checkpoints.checkpoints import Checkpoints
from jaxpeft.config import run_config
from jaxpeft.core.errors import UserError
from jaxpeft.files import patience

STEPS, EVERY, KEEP = 6, 2, 2
SIZES = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "vocab_size": 64}
TIMES = ("seconds", "tokens_per_second", "data_wait_seconds")
ERRORS = {"full disk": errno.ENOSPC, "failing disk": errno.EIO, "forbidden": errno.EACCES}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {
    "open": "open",
    "os.mkdir": "make",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "remove folder",
    "os.truncate": "cut",
    "os.chmod": "chmod",
}
MOST_SECONDS = 300


class Case(NamedTuple):
    """What happens at which operation.

    Attributes:
        place: The number of the operation.
        fault: "kill", "kill later", or a key of ERRORS.
        lasting: Whether all later operations fail too.
    """

    place: int
    fault: str
    lasting: bool


class Result(NamedTuple):
    """How a process ended: its exit code, or minus the signal; and what it wrote down."""

    code: int
    found: Any


def main() -> int:
    """Does as many cases as asked for; 0 if all of them ended as the undisturbed run."""
    parser = argparse.ArgumentParser(description="Kills a run, or fails its disk, while it saves.")
    parser.add_argument("--count", type=int, default=3, help="cases (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="decides about the cases")
    parser.add_argument("--folder", type=pathlib.Path, help="where to work; kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_inputs(folder)
        return try_all(folder, args.count, args.seed)


def try_all(folder: pathlib.Path, count: int, seed: int) -> int:
    """Does the cases and prints what they gave."""
    expected, operations = undisturbed(folder)
    again = run(folder, "again", None)
    if again != Result(0, {**again.found, "end": expected}):
        print("two undisturbed runs differ: nothing can be compared on this machine")
        return 1
    print(f"{len(operations)} operations: {dict(collections.Counter(operations))}", flush=True)
    good, ways, begin = 0, collections.Counter(), time.monotonic()
    for number, case in enumerate(itertools.islice(cases(len(operations), seed), count), 1):
        first, problem = try_case(folder, f"case-{number}", case, expected)
        good += not problem
        ways[case.fault, first] += 1
        at = operations[case.place]
        if problem:
            print(f"{number}: {case} ({at}): {problem}", flush=True)
        elif number % 20 == 0:
            seconds = time.monotonic() - begin
            print(f"{good} of {number} so far, {seconds:.0f} s", flush=True)
    for (fault, code), times in sorted(ways.items()):
        print(f"{fault}: {times} times, ended with {code}")
    print(f"{good} of {count} ended byte-identical")
    return 0 if good == count else 1


def cases(places: int, seed: int):
    """All faults at all places in random order, again and again."""
    draw = random.Random(seed)
    while True:
        faults = ("kill", "kill later", *ERRORS)
        pairs = [(place, fault) for place in range(places) for fault in faults]
        draw.shuffle(pairs)
        for place, fault in pairs:
            yield Case(place, fault, draw.random() < 0.5)


def undisturbed(folder: pathlib.Path) -> tuple[Any, list[str]]:
    """What a run ends with that nothing disturbs, and the operations that it does."""
    result = run(folder, "whole", None)
    if result.code != 0:
        raise SystemExit(f"the undisturbed run failed: see {folder / 'whole.log'}")
    return result.found["end"], result.found["operations"]


def try_case(folder: pathlib.Path, name: str, case: Case, expected: Any) -> tuple[int, str]:
    """Disturbs a run and goes on.

    Returns:
        How the disturbed process ended, and what is wrong with the end, "" for nothing.
    """
    first = run(folder, name, case)
    last = run(folder, name, None)
    problem = ""
    if first.code not in (0, 5, -signal.SIGKILL):
        problem = f"ended with {first.code}"
    elif last.code != 0:
        problem = f"the same command ended with {last.code}"
    else:
        end = last.found["end"]
        problem = ", ".join(f"{key} differ" for key in expected if end[key] != expected[key])
    if not problem:
        shutil.rmtree(folder / name)
        (folder / f"{name}.log").unlink()
    return first.code, problem


def run(folder: pathlib.Path, name: str, case: Case | None) -> Result:
    """The training command in a forked process."""
    told = folder / f"{name}.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = child_main(folder, name, case, told)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + MOST_SECONDS
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Result(-signal.SIGALRM, None)
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(found[1])
    text = told.read_text() if told.exists() else "null"
    told.unlink(missing_ok=True)
    return Result(code, json.loads(text))


def child_main(folder: pathlib.Path, name: str, case: Case | None, told: pathlib.Path) -> int:
    """Trains, with a fault if there is one, and writes down what there is at the end."""
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    patience.DELAYS = (0.05, 0.1)
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(folder / "compiled")
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    output = folder / name
    config = run_config.load_config(str(folder / "run.yaml"), [f"--output_dir={output}"])
    disk = Disk(output, case)
    try:
        train.train(config)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    finally:
        sys.stdout.flush()
        disk.done = True
    told.write_text(json.dumps({"end": describe(output), "operations": disk.seen}))
    return 0


class Disk:
    """Watches the operations of this process on checkpoints and exports, and lets them fail.

    Args:
        output: The run's folder.
        case: What fails, if anything.
    """

    def __init__(self, output: pathlib.Path, case: Case | None):
        self.seen: list[str] = []
        self.done = False
        self._places = [str(output / name) for name in ("checkpoints", "adapter", ".adapter.")]
        self._case = case
        self._lock = threading.Lock()
        sys.addaudithook(self._hook)
        sync = os.fsync

        def syncing(file: int) -> None:
            self._reach("sync", os.readlink(f"/proc/self/fd/{file}"))
            sync(file)

        os.fsync = syncing

    def _hook(self, event: str, args: tuple) -> None:
        if event not in EVENTS or self.done:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        path = args[0]
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        self._reach(EVENTS[event], os.fsdecode(path))

    def _reach(self, what: str, path: str) -> None:
        if self.done or not path.startswith(tuple(self._places)):
            return
        with self._lock:
            place = len(self.seen)
            self.seen.append(what)
        case = self._case
        if case is None or place < case.place:
            return
        if case.fault in ERRORS and (place == case.place or case.lasting):
            number = ERRORS[case.fault]
            raise OSError(number, os.strerror(number), path)
        if place == case.place and case.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if place == case.place and case.fault == "kill later":
            seconds = random.Random(case.place).uniform(0, 0.02)
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def describe(output: pathlib.Path) -> dict[str, Any]:
    """All that must not depend on what happened to a run."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {
        "adapters": digest((output / "adapter" / "adapter_model.safetensors").read_bytes()),
        "states": read_state(output / "checkpoints"),
        "metrics": [{key: line[key] for key in line if key not in TIMES} for line in lines],
        "names": names(output),
    }


def read_state(folder: pathlib.Path) -> dict[str, str]:
    """The digest of every leaf of the newest checkpoint: adapter, optimizer, keys, counters."""
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest() or 0
        signatures = json.loads((folder / str(step) / "manifest.json").read_text())["leaves"]
        like = {name: from_signature(text) for name, text in signatures.items()}
        state = checkpoints.restore(step, like)
    return {name: digest(as_bytes(leaf)) for name, leaf in state.items()}


def from_signature(text: str) -> jax.ShapeDtypeStruct:
    """The leaf that a manifest describes as, say, ``float32[30,576,8]``."""
    kind, _, sizes = text.rstrip("]").partition("[")
    dtype = jax.random.key(0).dtype if kind.startswith("key") else np.dtype(kind)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = tuple(map(int, filter(None, sizes.split(","))))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def names(output: pathlib.Path) -> list[str]:
    """The files and folders of a run, down to the steps and what the export holds.

    A save that failed is made good by the next one, of a newer step: so the older step that is
    kept may be another one.
    """
    folders = (output, output / "checkpoints", output / "adapter")
    found = [str(path.relative_to(output)) for folder in folders for path in folder.iterdir()]
    older = {f"checkpoints/{step}" for step in range(EVERY, STEPS, EVERY)}
    return sorted("an older step" if name in older else name for name in found)


def as_bytes(leaf: Any) -> bytes:
    """The values of a leaf, with dtype and shape."""
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()


def digest(data: bytes) -> str:
    """A sha256."""
    return hashlib.sha256(data).hexdigest()


def write_inputs(folder: pathlib.Path) -> None:
    """A Hugging Face folder with a random model, rows, and a config."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    settings = SIZES | {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    (model / "config.json").write_text(json.dumps(settings))
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(0, 0.3, shape) for name, shape in shapes().items()}
    weights |= {name: np.ones(shape) for name, shape in shapes().items() if "norm" in name}
    save_file({name: x.astype("f4") for name, x in weights.items()}, model / "model.safetensors")
    write_tokenizer(model)
    letters = random.Random(0)
    rows = [{"text": "".join(letters.choices("abcdefgh", k=9))} for _ in range(32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(model)},
        "method": {"name": "lora", "rank": 2, "targets": ["q_proj"], "dropout": 0.1},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 16},
        "optim": {"learning_rate": 0.01},
        "train": {"steps": STEPS, "batch_size": 4},
        "checkpoint": {"every": EVERY, "keep": KEEP},
        "output_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the model."""
    width, inner, head = (SIZES[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (SIZES["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    for layer in range(2):
        place = f"model.layers.{layer}."
        found |= {
            f"{place}input_layernorm.weight": (width,),
            f"{place}post_attention_layernorm.weight": (width,),
            f"{place}self_attn.q_proj.weight": (2 * head, width),
            f"{place}self_attn.k_proj.weight": (head, width),
            f"{place}self_attn.v_proj.weight": (head, width),
            f"{place}self_attn.o_proj.weight": (width, 2 * head),
            f"{place}mlp.gate_proj.weight": (inner, width),
            f"{place}mlp.up_proj.weight": (inner, width),
            f"{place}mlp.down_proj.weight": (width, inner),
        }
    return found


def write_tokenizer(model: pathlib.Path) -> None:
    """A tokenizer of single letters."""
    vocab = {"<end>": 0} | {chr(ord("a") + index): 1 + index for index in range(26)}
    end = {"id": 0, "content": "<end>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    backend = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | flags],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (model / "tokenizer.json").write_text(json.dumps(backend))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))


if __name__ == "__main__":
    sys.exit(main())
