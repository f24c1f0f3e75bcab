"""Loading holds the parameters, one stacked tensor and little more, and takes each byte once."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import save_file
from shared_loading import run_pair
from tiny_models import BF16, hf_tensors, write_hf

from jaxpeft.core.paths import flatten
from jaxpeft.pretrained.load import load_params

MB = 2**20
WIDE = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# What loading may need beside the parameters and the largest of them: less than the 250 MB of the
# files, also where the largest is not held.
SLACK = 64 * MB
WATCH = """
import json, sys, threading, time
import jax
jax.config.update("jax_enable_compilation_cache", False)
from jaxpeft.pretrained import load
from jaxpeft.pretrained.weights import reading
from jaxpeft.core.paths import flatten
path, dtype, keep, quantization, *peers = sys.argv[1:]
mesh = None
if peers:
    jax.distributed.initialize(f"127.0.0.1:{peers[0]}", num_processes=2, process_id=int(peers[1]))
    from jaxpeft.mesh.layouts import make_mesh
    mesh = make_mesh(data=1, fsdp=-1)
peak, done, kept = 0, False, []
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
def read_and_keep(view, *place, read=reading.read_into):
    read(view, *place)
    kept.append(view)
if keep == "keep":
    reading.read_into = read_and_keep
jax.block_until_ready(jax.device_put(0.0))
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
try:
    params, *_ = load.load_params(path, dtype=dtype, quantization=quantization or None, mesh=mesh)
    held = [
        sum(shard.data.nbytes for x in jax.tree.leaves(node) for shard in x.addressable_shards)
        for node in flatten(params).values()
    ]
finally:
    done = True
    thread.join()
print(json.dumps({"peak": peak - before, "loaded": sum(held), "largest": max(held)}))
"""

measured_on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux says how much anonymous memory a process holds"
)


def write_wide(folder: pathlib.Path) -> pathlib.Path:
    """A sharded bfloat16 model of 250 MB, one file a layer."""
    d, ff, kv = 1024, 2560, 256
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(WIDE))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(1 << 16, np.float32).astype(BF16)
    layer_shapes = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ff, d),
        "mlp.up_proj": (ff, d),
        "mlp.down_proj": (d, ff),
    }
    parts = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in layer_shapes.items()}
        for i in range(WIDE["num_hidden_layers"])
    ]
    parts.append({"model.embed_tokens.weight": (16384, d), "model.norm.weight": (d,)})
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        save_file({name: np.resize(noise, shape) for name, shape in part.items()}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> pathlib.Path:
    return write_wide(tmp_path_factory.mktemp("wide"))


def measure(
    folder: pathlib.Path, dtype: str, keep: str = "", quantization: str = "", least: int = 240 * MB
) -> dict[str, int]:
    """Loads in a process of its own: bytes of anonymous memory above those before loading."""
    found = subprocess.run(
        [sys.executable, "-c", WATCH, str(folder), dtype, keep, quantization],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["loaded"] > least
    return result


@measured_on_linux
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_the_parameters_the_largest_one_and_little_more(wide, dtype):
    found = measure(wide, dtype)
    assert found["loaded"] < found["peak"] < found["loaded"] + found["largest"] + SLACK


@measured_on_linux
def test_a_loader_that_held_the_bytes_of_the_files_would_exceed_that_bound(wide):
    found = measure(wide, "float32", "keep")
    assert found["peak"] > found["loaded"] + found["largest"] + SLACK


@measured_on_linux
@pytest.mark.parametrize(("quantization", "most"), [("nf4", 0.57), ("int8", 1.07)])
def test_kernels_are_quantised_while_they_are_read(wide, quantization, most):
    found = measure(wide, "float32", quantization=quantization, least=120 * MB)
    assert found["loaded"] < found["peak"] < found["loaded"] + found["largest"] + 300 * MB
    kernels = WIDE["num_hidden_layers"] * 1024 * (1024 + 256 + 256 + 1024 + 3 * 2560)
    table = 16384 * 1024
    assert found["loaded"] < 4.01 * table + most * kernels


@measured_on_linux
def test_each_of_two_processes_holds_its_share_and_what_moving_a_parameter_needs(wide):
    for out in run_pair("-c", WATCH, str(wide), "float32", "", ""):
        found = json.loads(out.splitlines()[-1])
        assert 270 * MB < found["loaded"] < 274 * MB
        # The rows of a parameter, where they go, and the layer that is on its way.
        assert found["peak"] < found["loaded"] + 3 * found["largest"] + SLACK


def test_every_byte_of_a_tensor_is_read_once(tmp_path, monkeypatch):
    tensors = hf_tensors("llama")
    write_hf(tmp_path, "llama", tensors, shards=2)
    taken = []
    preadv = os.preadv

    def counted(fd, buffers, offset):
        count = preadv(fd, buffers, offset)
        taken.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    load_params(tmp_path)
    assert sum(taken) == sum(value.nbytes for value in tensors.values())


@pytest.mark.parametrize("rows", [600, 2**18 - 1, 2**18])
def test_the_fingerprint_is_this_hash_of_hashes(tmp_path, rows):
    import hashlib

    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    tensors = hf_tensors("llama")
    tensors["model.embed_tokens.weight"] = np.ones((rows, 16), np.float32)
    tensors["lm_head.weight"] = np.arange(rows * 16, dtype=np.float32).reshape(rows, 16)
    lines = []
    for name, value in tensors.items():
        count = 1 if value.ndim == 1 else 1024 if value.size >= 4 * 2**20 else 256
        edges = [len(value) * part // count for part in range(count + 1)]
        parts = [value[a:b] for a, b in itertools.pairwise(edges) if a != b]
        record = [name, "F32", list(value.shape), [sha(part.tobytes()) for part in parts]]
        lines.append(sha(json.dumps(record, separators=(",", ":")).encode()))
    expected = "v2:" + sha("\n".join(sorted(lines)).encode())
    folder = write_hf(tmp_path, "llama", tensors, vocab_size=rows)
    assert load_params(folder)[3] == expected


def test_parameters_on_a_mesh_have_the_same_values(tmp_path):
    write_hf(tmp_path, "llama", hf_tensors("llama"))
    mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    plain, spread = flatten(load_params(tmp_path)[0]), flatten(load_params(tmp_path, mesh=mesh)[0])
    for path, leaf in plain.items():
        np.testing.assert_array_equal(spread[path], leaf, err_msg=path)
    kernel = spread["layers/mlp/up_proj/kernel"]
    assert len(kernel.sharding.device_set) == 4
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_loaded_parameters_can_be_donated(tmp_path):
    params, *_ = load_params(write_hf(tmp_path, "llama", hf_tensors("llama")))
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    jax.block_until_ready(double(params))
    assert all(leaf.is_deleted() for leaf in flatten(params).values())
