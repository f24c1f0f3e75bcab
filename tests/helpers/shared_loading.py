"""What tests of loading by several processes share: a model to load, and what a process may read.

Run as a program, this is one process of two: it loads a model and writes down what it holds.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
from places import ROOT

HIDDEN, LAYERS, VOCAB = 256, 2, 1024
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
FORMS = {
    "float32": None,
    "nf4": ("nf4", False),
    "nf4, scales quantised": ("nf4", True),
}
# What two processes with two devices each load: a model, a form, and the mesh.
CASES = {
    "fsdp": ("model", "float32", {"fsdp": 4}),
    "fsdp and tensor": ("model", "float32", {"fsdp": 2, "tensor": 2}),
    "fsdp and data": ("model", "float32", {"fsdp": 2, "data": 2}),
    "nf4": ("model", "nf4", {"fsdp": 4}),
    "nf4, scales quantised": ("model", "nf4, scales quantised", {"fsdp": 2, "tensor": 2}),
    "uneven rows": ("uneven", "float32", {"fsdp": 2, "tensor": 2}),
    "uneven rows, copies": ("uneven", "float32", {"fsdp": 2, "data": 2}),
}
UNEVEN_VOCAB = 1003  # no number of devices divides it


def write_model(folder: pathlib.Path, vocab: int = VOCAB, **changes) -> pathlib.Path:
    """A Hugging Face folder with random float32 weights of about 7 MB."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    d, ff = HIDDEN, CONFIG["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    if not changes.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, d)
    for layer, (name, shape) in itertools.product(
        range(LAYERS),
        {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            **{f"self_attn.{kind}_proj": (d, d) for kind in "qkvo"},
            **{f"mlp.{kind}_proj": (ff, d) for kind in ("gate", "up")},
            "mlp.down_proj": (d, ff),
        }.items(),
    ):
        shapes[f"model.layers.{layer}.{name}.weight"] = shape
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "vocab_size": vocab, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def most_bytes(leaves: dict, devices: list, stored: int) -> float:
    """What a process with these devices may read: 1.1 times its share, and all vectors.

    Args:
        leaves: Parameters by path, on the mesh.
        devices: The devices of the process.
        stored: Bytes of a value in the files.
    """
    import jax

    share = 0.0
    for path, leaf in leaves.items():
        size = math.prod(leaf.shape)
        if path.endswith(("scale", "bias")):
            share += size * stored
            continue
        array = jax.tree.leaves(leaf)[0]
        indices = array.sharding.devices_indices_map(array.shape)
        held = {
            tuple(s.indices(n) for s, n in zip(indices[d], array.shape, strict=True))
            for d in devices
        }
        part = sum(math.prod(stop - start for start, stop, _ in one) for one in held)
        share += 1.1 * size * stored * part / array.size
    return share


def shards_of(leaves: dict, devices: list) -> dict[str, np.ndarray]:
    """What some devices hold, by path, leaf, number of the device and place."""
    import jax

    return {
        f"{path}|{number}|{devices.index(shard.device)}|{shard.index}": np.asarray(shard.data)
        for path, leaf in leaves.items()
        for number, array in enumerate(jax.tree.leaves(leaf))
        for shard in array.addressable_shards
        if shard.device in devices
    }


def run_pair(*command: str) -> list[str]:
    """Runs a Python program as two processes with two devices each.

    Args:
        command: Arguments of the interpreter; a free port and the number of the process follow.

    Returns:
        What each wrote to stdout; that both ended well is asserted.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    root = ROOT
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(root)}
    with contextlib.ExitStack() as stack:
        both = []
        for index in "01":
            process = subprocess.Popen(
                [sys.executable, *command, port, index],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                cwd=root,
            )
            both.append(stack.enter_context(process))
            stack.callback(process.kill)
        found = [process.communicate(timeout=240) for process in both]
    for process, (_, errors) in zip(both, found, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in found]


def main(folder: str, out: str, port: str, index: str) -> None:
    """Loads a model in this process and its peer; writes what it read and found."""
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
    from jaxpeft.core import paths
    from jaxpeft.core.errors import UserError
    from jaxpeft.mesh import layouts
    from jaxpeft.pretrained.hf.folder import open_folder
    from jaxpeft.pretrained.load import load_params
    from jaxpeft.pretrained.weights.params import read_params

    report: dict = {}
    for case, (model, form, sizes) in CASES.items():
        mesh = layouts.make_mesh(**{"data": 1, **sizes})
        source = open_folder(pathlib.Path(folder, model))
        loaded = read_params(source, "float32", mesh, FORMS[form])
        leaves = paths.flatten(loaded.params)
        report[case] = {
            "fingerprint": loaded.fingerprint,
            "read": loaded.bytes_read,
            "most": most_bytes(leaves, jax.local_devices(), 4),
        }
        np.savez(pathlib.Path(out, f"{index} {case}.npz"), **shards_of(leaves, jax.local_devices()))
    report["errors"] = {}
    for fault in ("damaged", "short", "missing", "another", "other config"):
        path = pathlib.Path(folder, fault if index == "1" else "model")
        try:
            load_params(path, mesh=layouts.make_mesh(data=1, fsdp=4))
        except UserError as error:
            report["errors"][fault] = str(error)
    pathlib.Path(out, f"{index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*sys.argv[1:])
