"""Processes load a model together: each reads its share, and all hold what one would."""

import contextlib
import json

import jax
import numpy as np
import pytest
from gguf_files import Type, write_gguf
from hlo import Program
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file
from shared_loading import (
    CASES,
    FORMS,
    HIDDEN,
    LAYERS,
    UNEVEN_VOCAB,
    most_bytes,
    run_pair,
    shards_of,
    write_model,
)
from tiny_models import hf_tensors

from jaxpeft.core import paths
from jaxpeft.mesh import layouts
from jaxpeft.mesh.layouts import as_layout
from jaxpeft.mesh.placement import leaf_sharding
from jaxpeft.pretrained.gguf.reader import open_gguf
from jaxpeft.pretrained.hf.folder import open_folder
from jaxpeft.pretrained.weights.fingerprint import Fingerprint, num_parts, part_rows
from jaxpeft.pretrained.weights.names import Entry, name_table
from jaxpeft.pretrained.weights.params import cut_entry, place_pieces, read_params, read_pieces
from jaxpeft.pretrained.weights.reading import Form, Reader
from jaxpeft.pretrained.weights.shares import cut_rows, mover

SIZES = {"fsdp": {"fsdp": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}, "data": {"data": 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("files") / "model")


def mesh_of(**sizes):
    return layouts.make_mesh(**{"data": 1, **sizes})


def kernel_of(*shape):
    return Entry(path="kernel", hf="", gguf="", shape=shape, transposed=True)


def load_shared(source, form, mesh, count):
    """Loads as `count` processes would, each with its devices, one after the other.

    Returns:
        The parameters by path, and the reader and the devices of every process.
    """
    layout = as_layout(mesh, source.config)
    each = mesh.size // count
    devices = [jax.devices()[i * each : (i + 1) * each] for i in range(count)]
    leaves = {}
    with contextlib.ExitStack() as stack:
        readers = [Reader(source, stack) for _ in range(count)]
        for entry in name_table(source.config):
            if len(entry.shape) == 1:
                hosts = [reader.read_entry(entry, form) for reader in readers]
                leaves[entry.path] = jax.device_put(
                    hosts[0], leaf_sharding(entry.path, hosts[0], layout)
                )
                continue
            cut = cut_entry(readers[0], entry, form, layout)
            pieces = {}
            for reader, own in zip(readers, devices, strict=True):
                pieces |= read_pieces(reader, entry, form, cut, own)
            leaves[entry.path] = place_pieces(pieces, readers[0], entry, form, cut, layout)
    return leaves, list(zip(readers, devices, strict=True))


def fingerprint_of(readers):
    """The fingerprint that the first process finds by what the others export."""
    first = readers[0].fingerprint
    for reader in readers[1:]:
        assert first.merge(reader.fingerprint.export()) == []
    return first.hexdigest()


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert jax.tree.structure(actual[path]) == jax.tree.structure(leaf), path
        for ours, theirs in zip(*map(jax.tree.leaves, (actual[path], leaf)), strict=True):
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim), path
            np.testing.assert_array_equal(ours, theirs, err_msg=path)


@pytest.mark.parametrize(
    ("sizes", "count", "form"),
    [
        ("fsdp", 8, "nf4, scales quantised"),
        ("all", 4, "nf4"),
        ("all", 8, "float32"),
        ("data", 2, "float32"),
    ],
)
def test_shares_of_rows_become_what_one_process_loads(folder, sizes, count, form):
    source, mesh = open_folder(folder), mesh_of(**SIZES[sizes])
    kind, double = FORMS[form] or (None, False)
    actual, processes = load_shared(source, Form("float32", kind, double), mesh, count)
    expected = read_params(source, "float32", mesh, FORMS[form])
    assert_equal(actual, paths.flatten(expected.params))
    readers = [reader for reader, _ in processes]
    vectors = (2 * LAYERS + 1) * HIDDEN * 4
    assert sum(reader.bytes_read for reader in readers) - (count - 1) * vectors == (
        expected.bytes_read
    )
    for reader, devices in processes:
        assert reader.bytes_read <= most_bytes(actual, devices, stored=4)
    assert fingerprint_of(readers) == expected.fingerprint


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_rows_that_divide_by_nothing_are_shared_too(tmp_path, count):
    source = open_folder(write_model(tmp_path, vocab=UNEVEN_VOCAB))
    mesh = mesh_of(fsdp=4, tensor=2)
    actual, processes = load_shared(source, Form(), mesh, count)
    expected = read_params(source, "float32", mesh)
    assert_equal(actual, paths.flatten(expected.params))
    for reader, devices in processes:
        assert reader.bytes_read <= most_bytes(actual, devices, stored=4)
    assert fingerprint_of([reader for reader, _ in processes]) == expected.fingerprint


@pytest.mark.parametrize("quant", [Type.F32, Type.Q8_0])
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_rows_of_gguf_files_are_shared_and_put_in_order(tmp_path, monkeypatch, quant, kind):
    from tiny_models import CONFIGS

    wide = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 12}
    monkeypatch.setitem(CONFIGS, "llama", {**CONFIGS["llama"], **wide})
    for name, size in (("D", 32), ("FF", 64), ("HEAD", 16)):
        monkeypatch.setattr(f"tiny_models.{name}", size)
    monkeypatch.setitem(CONFIGS["llama"], "head_dim", 16)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), quant))
    assert source.interleaved
    mesh = mesh_of(fsdp=4, tensor=2)
    actual, processes = load_shared(source, Form("float32", kind, True), mesh, 4)
    expected = read_params(source, "float32", mesh, kind and (kind, True))
    assert_equal(actual, paths.flatten(expected.params))
    assert fingerprint_of([reader for reader, _ in processes]) == expected.fingerprint


def test_a_stored_copy_of_a_tied_head_is_compared_by_rows(tmp_path):
    from jaxpeft.core.errors import UserError

    folder = write_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    load_shared(open_folder(folder), Form(), mesh_of(fsdp=8), 2)
    head[-1, 0] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load_shared(open_folder(folder), Form(), mesh_of(fsdp=8), 2)


@pytest.mark.parametrize(
    ("columns", "parts", "counts"),
    [(3, 256, (1, 7, 255, 256, 257, 1003, 128256)), (4096, 1024, (1024, 1025, 4099, 128256))],
)
def test_every_row_is_in_one_part_and_parts_of_devices_are_even(columns, parts, counts):
    for rows in counts:
        assert num_parts((rows, columns)) == parts
        edges = [part_rows((rows, columns), part) for part in range(parts + 1)]
        assert (edges[0], edges[-1]) == (0, rows)
        assert set(np.diff(edges)) <= {rows // parts, -(-rows // parts)}
        assert (part_rows((rows,), 0), part_rows((rows,), num_parts((rows,)))) == (0, rows)
    spec = PartitionSpec(None, "fsdp", "tensor")
    cut = cut_rows(kernel_of(columns, 128256), False, mesh_of(fsdp=4, tensor=2), spec, 3)
    each = parts // 8
    dealt = sorted(cut.parts(device) for device in cut.devices)
    assert dealt == [(n, n + each) for n in range(0, parts, each)]
    assert cut.places() is None


def test_many_devices_take_almost_even_shares_of_large_matrices():
    def largest_over_mean(shape, count):
        mesh = Mesh(np.array([jax.devices()[0]] * count), ("fsdp",))
        cut = cut_rows(kernel_of(*shape), False, mesh, PartitionSpec(None, "fsdp"), 2)
        return cut.width * count / shape[1]

    # Of Llama 3 8B: k and v, q and o, the layers of the MLP, the head.
    for shape in ((4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096), (4096, 128256)):
        for count in (*range(1, 101), 128, 256, 512, 1024):
            assert largest_over_mean(shape, count) <= 1.1, (shape, count)
    for count in (*range(1, 26), 32, 64, 128, 256):
        assert largest_over_mean((576, 1536), count) <= 1.1, count


def test_files_that_differ_between_processes_are_named():
    ours, theirs = Fingerprint(), Fingerprint()
    for found, digest in ((ours, "a"), (theirs, "b")):
        found.add("norm", "F32", (1,), {0: digest})
        found.add("same", "F32", (1,), {0: "c"})
    assert ours.merge(theirs.export()) == ["norm"]


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), ("tensor", "fsdp")])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2)])
def test_moving_rows_replicates_nothing_that_is_cut_in_the_end(sizes, spec):
    mesh, spec = layouts.make_mesh(*sizes), PartitionSpec(None, *spec)
    cut = cut_rows(kernel_of(512, 1024), False, mesh, spec, 3)
    rows = jax.ShapeDtypeStruct((4, 512, 1024), np.float32, sharding=cut.staged(3))
    compiled = mover(cut, jax.sharding.NamedSharding(mesh, spec)).lower(rows).compile()
    kinds = {collective.kind for collective in Program(compiled.as_text()).collectives}
    assert kinds <= {"all-gather", "all-to-all"}
    needed = compiled.memory_analysis()
    assert needed.temp_size_in_bytes < 1.01 * needed.output_size_in_bytes
    assert needed.output_size_in_bytes == 4 * 4 * 512 * 1024 // (sizes[1] * sizes[2])


# Two processes.


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """What two processes with two devices each report."""
    root, out = folder.parent, tmp_path_factory.mktemp("out")
    write_model(root / "uneven", vocab=UNEVEN_VOCAB)
    tensors = load_file(folder / "model.safetensors")
    for fault in ("damaged", "short", "another", "missing", "other config"):
        (root / fault).mkdir()
        (root / fault / "config.json").write_bytes((folder / "config.json").read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (root / "other config" / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = tensors[name].copy()
    damaged[-1, 3] = np.nan  # a row of the second process
    save_file({**tensors, name: damaged}, root / "damaged" / "model.safetensors")
    other = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}
    save_file(other, root / "another" / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (root / "other config" / "model.safetensors").write_bytes(whole)
    (root / "short" / "model.safetensors").write_bytes(whole[:-1])
    run_pair("tests/helpers/shared_loading.py", str(root), str(out))
    return out, [json.loads((out / f"{index}.json").read_text()) for index in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_hold_what_one_loads_and_read_their_share(two, folder, case):
    out, reports = two
    model, form, sizes = CASES[case]
    mesh = layouts.make_mesh(**{"data": 1, **sizes}, devices=jax.devices()[:4])
    source = open_folder(folder.parent / model)
    expected = read_params(source, "float32", mesh, FORMS[form])
    assert expected.bytes_read == sum(info.nbytes for info in source.tensors.values())
    leaves = paths.flatten(expected.params)
    for index, report in enumerate(reports):
        assert report[case]["fingerprint"] == expected.fingerprint
        assert report[case]["read"] <= report[case]["most"]
        assert report[case]["read"] < 0.52 * expected.bytes_read
        shards = np.load(out / f"{index} {case}.npz")
        wanted = shards_of(leaves, jax.devices()[2 * index : 2 * index + 2])
        assert shards.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_array_equal(shards[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("damaged", "damaged/model.safetensors: model.layers.1.mlp.up_proj.weight: 1 of "),
        ("short", "short/model.safetensors: cut short"),
        ("missing", "missing: no weights"),
        ("another", "process 1 has other bytes than those before it in model.norm.weight"),
        ("other config", "process 1 finds another config or other tensors there than process 0"),
    ],
)
def test_what_one_process_finds_wrong_stops_both_with_the_same_words(two, fault, words):
    _, (ours, theirs) = two
    assert words in ours["errors"][fault]
    assert words in theirs["errors"][fault]  # beside the path, which may differ
    if words.startswith(fault):
        assert ours["errors"][fault].endswith("(in process 1 of 2)")
        assert ours["errors"][fault] == theirs["errors"][fault]
