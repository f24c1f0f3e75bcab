"""Adapters of models that are not of this package, in folders of our own format.

A folder holds ``adapter.safetensors``, with the arrays of the adapter under ``params/`` and
``buffers/``, and ``jaxpeft_adapter.json``: what is static, the shape of every base leaf that is
adapted, and the sha256 of the arrays. PEFT has no names for such models.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError, first_few
from jaxpeft.files import storage
from jaxpeft.files.folders import require_replaceable, write_folder
from jaxpeft.files.json_file import json_bytes, read_json
from jaxpeft.files.locate import locate_adapter
from jaxpeft.files.storage import StoragePath
from jaxpeft.lifting.folded import Axes, raw_shape
from jaxpeft.lifting.roles import Roles
from jaxpeft.lifting.trees import named_leaves
from jaxpeft.mesh.processes import is_first
from jaxpeft.methods.adapter import Adapter, Spec
from jaxpeft.methods.binding import check_fit
from jaxpeft.methods.foreign import as_dicts, fitted
from jaxpeft.methods.registry import KINDS
from jaxpeft.ops.linear import SHARED

RECORD = "jaxpeft_adapter.json"
TENSORS = "adapter.safetensors"
OTHER_MODEL = (
    "holds an adapter of a model that is not of jaxpeft; pass that model's parameters and roles, "
    "as in load_adapter(path, params, roles=roles)."
)
"""Why such a folder is no folder of PEFT."""
FORMAT = 1
FILES = frozenset({RECORD, TENSORS})
FIELDS = {
    "kind": str,
    "rank": int,
    "paths": list,
    "options": dict,
    "axes": dict,
    "biases": dict,
    "base": dict,
}


def save(folder: StoragePath, adapter: Adapter, params: Any) -> None:
    """Writes an adapter of a model that is not of this package.

    Args:
        folder: The folder; it may hold an older adapter of this format, but no other files.
        adapter: The adapter.
        params: The model's parameters, or their shapes.

    Raises:
        UserError: The adapter does not fit, is not finite, or the folder holds other files.
        ResourceError: The disk is full.
    """
    from safetensors.numpy import save as pack

    require_replaceable(folder, FILES)
    check_fit(fitted(as_dicts(params), adapter), adapter)
    arrays = {
        name: np.array(leaf, order="C")
        for part in ("params", "buffers")
        for name, leaf in paths.flatten({part: getattr(adapter, part)}).items()
    }
    _require_finite(folder, arrays)
    content, leaves, spec = pack(arrays), named_leaves(params), adapter.spec
    record = {
        "format": FORMAT,
        "kind": spec.kind,
        "rank": spec.rank,
        "paths": spec.paths,
        "options": dict(spec.options),
        "axes": {path: axes and dataclasses.asdict(axes) for path, axes in spec.axes},
        "biases": dict(spec.biases),
        "base": {path: raw_shape(leaves[path]) for path in spec.paths},
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    if is_first():
        write_folder(folder, {TENSORS: content, RECORD: json_bytes(record)})


def load(
    path: str | os.PathLike, params: Any, roles: Roles | None, revision: str | None = None
) -> Adapter:
    """Reads a folder that `save` wrote, strictly.

    Args:
        path: The folder, on disk or in a bucket; or a hub id.
        params: The model's parameters, or their shapes.
        roles: What `jaxpeft.describe` found of the model.
        revision: Branch, tag or commit of a hub id.

    Returns:
        The adapter.

    Raises:
        UserError: Anything is missing, damaged, unexpected or not finite, or the adapter was made
            for another model.
    """
    if roles is None:
        raise UserError(
            "load_adapter: parameters of a model that is not of this package need roles=, as "
            "jaxpeft.describe gives them."
        )
    folder = locate_adapter(path, revision, (RECORD, TENSORS))
    if not storage.exists(folder / RECORD):
        raise UserError(
            f"{folder}: has no {RECORD}, as folders have that are saved for models that are not of "
            "this package; a folder of PEFT is loaded with a jaxpeft.Model."
        )
    record = read_json(folder / RECORD)
    spec = _read_spec(folder / RECORD, record)
    _check_model(folder / RECORD, spec, record["base"], named_leaves(params), roles)
    arrays = _read_arrays(folder, record)
    parts = paths.unflatten(arrays)
    adapter = Adapter(parts.get("params", {}), parts.get("buffers", {}), spec)
    check_fit(fitted(as_dicts(params), adapter), adapter)
    return jax.tree.map(jnp.asarray, adapter)


def _read_spec(place: StoragePath, record: Mapping[str, Any]) -> Spec:
    if record.get("format") != FORMAT:
        raise UserError(
            f"{place}: format: this version reads {FORMAT}, got {record.get('format')!r:.60}."
        )
    for name, cls in FIELDS.items():
        found = record.get(name)
        if not isinstance(found, cls):
            raise UserError(f"{place}: {name}: expected {cls.__name__}, got {found!r:.60}.")
    if record["kind"] not in KINDS:
        raise UserError(f"{place}: kind: no method is called {record['kind']!r:.60}.")
    try:
        return Spec(
            kind=record["kind"],
            paths=_tuples(record["paths"]),
            rank=record["rank"],
            options=tuple((key, _tuples(value)) for key, value in record["options"].items()),
            axes=tuple((path, _axes(value)) for path, value in record["axes"].items()),
            biases=tuple(record["biases"].items()),
        )
    except (TypeError, AttributeError) as error:
        raise UserError(f"{place}: damaged: {error}.") from None


def _axes(values: Any) -> Axes | None:
    """The meaning of a weight's axes, from its fields."""
    if values is None:
        return None
    return Axes(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    """Lists as tuples, at all depths."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_model(
    place: StoragePath, spec: Spec, base: Mapping[str, Any], leaves: Mapping[str, Any], roles: Roles
) -> None:
    """Checks that the leaves are there, in the shapes and with the roles of the saved ones."""
    if lost := [path for path in spec.paths if path not in leaves or path not in roles]:
        raise UserError(
            f"{place}: the model has no parameter {first_few(lost)}; the adapter was made for "
            "another model."
        )
    axes = dict(spec.axes)
    for path in spec.paths:
        shape, now = _tuples(base.get(path)), roles[path].axes
        if shape != raw_shape(leaves[path]):
            raise UserError(
                f"{place}: {path}: the adapter was made for shape {shape}, the model has "
                f"{raw_shape(leaves[path])} there; it is another model."
            )
        if axes.get(path) not in (None, now):
            raise UserError(
                f"{place}: {path}: the adapter was made for the axes {axes[path]}, the model has "
                f"{now}; it is another model."
            )


def _read_arrays(folder: StoragePath, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as unpack

    file = folder / TENSORS
    if not storage.exists(file):
        raise UserError(f"{folder}: has no {TENSORS}; the download or save is incomplete.")
    content = storage.read_bytes(file)
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        raise UserError(f"{file}: damaged: its sha256 is not the one in {RECORD}.")
    try:
        arrays = unpack(content)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {error}.") from None
    known = {f"{part}/{path}/" for part in ("params", "buffers") for path in record["paths"]}
    known |= {f"{part}/{SHARED}/" for part in ("params", "buffers")}
    if odd := [name for name in arrays if f"{name.rpartition('/')[0]}/" not in known]:
        raise UserError(f"{file}: {first_few(odd)}: no place of the adapter has such arrays.")
    there = {name.rpartition("/")[0] for name in arrays}
    if lost := [path for path in record["paths"] if f"params/{path}" not in there]:
        raise UserError(f"{file}: no arrays for {first_few(lost)}.")
    _require_finite(file, arrays)
    return arrays


def _require_finite(place: Any, arrays: Mapping[str, np.ndarray]) -> None:
    odd = [name for name, x in arrays.items() if x.dtype.kind == "f" and not np.isfinite(x).all()]
    if odd:
        raise UserError(f"{place}: numbers that are not finite in {first_few(odd)}.")
