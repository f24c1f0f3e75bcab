"""Loads weights from files into a parameter tree on devices, one parameter at a time.

In one process, a stacked parameter is read into host memory, put on the devices and dropped. Host
memory holds one stacked parameter and one layer, and if the device is the host, the parameters
loaded so far.

On a mesh over several processes each process reads its share of the rows of every matrix (see
`jaxpeft.pretrained.weights.shares`), so host memory holds one device's share of one stacked
parameter. All processes read the vectors.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files.tensors import PLAIN_DTYPES
from jaxpeft.mesh.layouts import Layout, as_layout
from jaxpeft.mesh.placement import leaf_sharding, replicated
from jaxpeft.mesh.processes import exchange, spans_processes, together
from jaxpeft.ops.quant import quantize_kernel, quantize_scales
from jaxpeft.pretrained.weights.fingerprint import Fingerprint
from jaxpeft.pretrained.weights.names import Entry, name_table
from jaxpeft.pretrained.weights.reading import Form, Reader
from jaxpeft.pretrained.weights.shares import Cut, assemble, cut_rows, stage
from jaxpeft.pretrained.weights.source import Source


class Loaded(NamedTuple):
    """The result of loading.

    Attributes:
        params: The nested parameter dict.
        fingerprint: The identity of the weights, see `jaxpeft.pretrained.weights.fingerprint`.
        bytes_read: The number of bytes of tensors that this process has read.
    """

    params: dict
    fingerprint: str
    bytes_read: int


def read_params(
    source: Source,
    dtype: str | None = "float32",
    mesh: jax.sharding.Mesh | Layout | None = None,
    quantization: tuple[str, bool] | None = None,
) -> Loaded:
    """Reads every tensor of `source` into a nested parameter dict.

    Args:
        source: The places of the tensors.
        dtype: Target dtype; None keeps the stored dtype.
        mesh: Devices to spread the parameters over, or a layout. If the devices belong to several
            processes, all must call.
        quantization: The kind for kernels of the layers, and whether scales are quantised too.

    Returns:
        The parameters, the fingerprint of the tensors read, and the number of bytes read.

    Raises:
        UserError: Tensors are missing, unexpected, of another shape or not finite, or a file ends
            early.
    """
    kind, double = quantization or (None, False)
    form = Form(dtype, kind, double)
    layout = None if mesh is None else as_layout(mesh, source.config)
    shared = spans_processes(layout)
    table = name_table(source.config)
    together(lambda: check_tensors(source, table), shared)
    if shared:
        _check_same_headers(source)
    leaves: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        reader = Reader(source, stack)
        for entry in table:
            if layout is not None and shared and len(entry.shape) > 1:
                leaves[entry.path] = _load_shared(reader, entry, form, layout)
            else:
                task = functools.partial(reader.read_entry, entry, form)
                leaves[entry.path] = _put(entry.path, together(task, shared), layout)
    fingerprint = _common(source, reader.fingerprint) if shared else reader.fingerprint
    return Loaded(paths.unflatten(leaves), fingerprint.hexdigest(), reader.bytes_read)


def check_tensors(source: Source, table: tuple[Entry, ...]) -> None:
    """Compares the names, shapes and dtypes of `source` with those that its config needs.

    Raises:
        UserError: Some differ; the message lists everything missing, unexpected, or of another
            shape or dtype.
    """
    wanted = {
        name: entry.file_shape
        for entry in table
        for name in entry.file_names(source.style, source.config.num_layers)
    }
    missing = [name for name in wanted if name not in source.tensors]
    extra = [n for n in source.tensors if n not in wanted and n not in source.ignored]
    shapes = [
        f"{name} is {list(source.tensors[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in source.tensors and source.tensors[name].shape != shape
    ]
    dtypes = [
        f"{name} is {source.tensors[name].dtype}"
        for name in wanted
        if source.style == "hf"
        and name in source.tensors
        and source.tensors[name].dtype not in PLAIN_DTYPES
    ]
    faults = [
        f"{len(items)} {what}: {first_few(items)}"
        for what, items in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", shapes),
            (f"of an unsupported dtype (supported: {', '.join(PLAIN_DTYPES)})", dtypes),
        )
        if items
    ]
    if faults:
        raise UserError(
            f"{source.path}: tensors do not fit the {source.config.model_type} config; "
            + "; ".join(faults)
        )


def _load_shared(reader: Reader, entry: Entry, form: Form, layout: Layout) -> Any:
    """Loads a matrix onto the mesh; each process reads some rows, and all must call."""
    cut = cut_entry(reader, entry, form, layout)
    here = [device for device in cut.devices if device.process_index == jax.process_index()]
    pieces = together(functools.partial(read_pieces, reader, entry, form, cut, here))
    return place_pieces(pieces, reader, entry, form, cut, layout)


def cut_entry(reader: Reader, entry: Entry, form: Form, layout: Layout) -> Cut:
    """The distribution of a matrix's rows to the devices of a mesh."""
    shapes = _shapes(reader, entry, form, double=False)
    target = jax.tree.leaves(leaf_sharding(entry.path, shapes, layout))[0]
    ndim = jax.tree.leaves(shapes)[0].ndim
    return cut_rows(entry, reader.interleaved, layout.mesh, target.spec, ndim)


def read_pieces(
    reader: Reader, entry: Entry, form: Form, cut: Cut, devices: Sequence[Any]
) -> dict[Any, Any]:
    """Reads rows of a matrix for some devices and puts them there; scales are not quantised yet.

    Args:
        reader: The reader of the files.
        entry: The parameter.
        form: The form in which it is loaded.
        cut: The distribution of the rows.
        devices: Devices of this process.
    """
    single = dataclasses.replace(form, double=False)
    return {
        device: stage(reader.read_entry(entry, single, cut.parts(device), whole=False), cut, device)
        for device in devices
    }


def place_pieces(
    pieces: Mapping[Any, Any], reader: Reader, entry: Entry, form: Form, cut: Cut, layout: Layout
) -> Any:
    """Moves the pieces of `read_pieces` to their final devices; all processes must call."""
    shapes = _shapes(reader, entry, form, double=False)
    targets = leaf_sharding(entry.path, shapes, layout)
    if not (form.double and form.quantizes(entry.path)):
        return assemble(pieces, cut, targets)
    # Scales are quantised by the mean of all of them, so every process needs all scales.
    weight = assemble(pieces, cut, targets.replace(scale=replicated(layout.mesh)))
    layers = [quantize_scales(scale) for scale in weight.scale.addressable_data(0)]
    fields = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *layers)
    targets = leaf_sharding(entry.path, _shapes(reader, entry, form, double=True), layout)
    placed = {name: _place(field, getattr(targets, name)) for name, field in fields.items()}
    return weight.replace(**placed)


def _shapes(reader: Reader, entry: Entry, form: Form, double: bool) -> Any:
    """The shapes of a whole parameter in its loaded form."""
    stack = (reader.num_layers,) if entry.stacked else ()
    plain = jax.ShapeDtypeStruct((*stack, *entry.shape), reader.target(entry, form))
    if form.quantization is None or not form.quantizes(entry.path):
        return plain
    quantize = functools.partial(quantize_kernel, quant_type=form.quantization, double=double)
    return jax.eval_shape(quantize, plain)


def _put(path: str, host: Any, layout: Layout | None) -> Any:
    """Copies to the device; the copy belongs to the device alone, so it can be donated."""
    if layout is None:
        return jax.block_until_ready(jax.device_put(host, may_alias=False))
    return jax.block_until_ready(jax.tree.map(_place, host, leaf_sharding(path, host, layout)))


def _place(array: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_same_headers(source: Source) -> None:
    """Checks that all processes see the same model, because they load it together."""
    tensors = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
    text = json.dumps([repr(source.config), tensors], sort_keys=True)
    found = exchange(hashlib.sha256(text.encode()).digest())
    for index, digest in enumerate(found):
        if digest != found[0]:
            raise UserError(
                f"{source.path}: process {index} finds another config or other tensors there than "
                "process 0; put the same files on every host"
            )


def _common(source: Source, fingerprint: Fingerprint) -> Fingerprint:
    """The fingerprint of all processes; tensors that several have read must be the same."""
    common = Fingerprint()
    for index, exported in enumerate(exchange(fingerprint.export())):
        if other := common.merge(exported):
            raise UserError(
                f"{source.path}: process {index} has other bytes than those before it in "
                f"{first_few(other)}; put the same files on every host"
            )
    return common
