"""How processes share the reading of a matrix, and how rows reach their final devices.

Files hold a matrix row by row, and a mesh may need columns of it on every device; reading columns
would mean thousands of tiny reads. So each device of a mesh over several processes first takes a
share of the *rows*, in one large read, and a compiled program moves the pieces over the
interconnect to the target sharding. Every byte of a matrix is read once, by one process.

The rows are distributed by the parts of the fingerprint: if a matrix has ``p`` parts, device ``n``
of ``count`` gets those from ``p n / count`` to ``p (n + 1) / count``. Devices are numbered so that
moving takes the fewest steps: first along the mesh axes that cut the rows in the end, then along
those that cut another dimension (an all-to-all), last along those that hold copies (an all-gather).

A share exceeds the mean by at most one part, a factor of ``count / p``. Shares are equal if
``count`` is a power of two up to ``p``; beyond ``p`` devices some read nothing. So the shares of
large matrices (1024 parts) are within a tenth of the mean for up to 102 devices, those of others
(256 parts) for up to 25.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.files.tensors import deinterleave
from jaxpeft.pretrained.weights.fingerprint import num_parts, part_rows
from jaxpeft.pretrained.weights.names import Entry


@dataclasses.dataclass(frozen=True)
class Cut:
    """The distribution of the rows of a stored matrix to the devices of a mesh.

    Attributes:
        shape: Shape of the matrix in the file.
        row_dim: Axis of the parameter that runs along the file's rows: 0, or -1 if files hold the
            transpose.
        stacked: Whether the parameter has a layer axis in front.
        heads: Heads whose rows are interleaved in the file; 0 for none.
        mesh: The devices.
        axes: The mesh axes that cut the array in the end, in the order in which devices are
            numbered: those along the rows first.
        copies: The other mesh axes, which number devices last.
    """

    shape: tuple[int, ...]
    row_dim: int
    stacked: bool
    heads: int
    mesh: Mesh
    axes: tuple[str, ...]
    copies: tuple[str, ...]

    @property
    def devices(self) -> list[Any]:
        """All devices of the mesh."""
        return list(self.mesh.devices.flat)

    @functools.cached_property
    def width(self) -> int:
        """The number of rows that every device makes room for: those of the largest share."""
        return max(stop - start for start, stop in map(self._rows_of, range(self.mesh.size)))

    def parts(self, device: Any) -> tuple[int, int]:
        """The parts of a device, from the first up to but without the second."""
        return self._parts_of(self._numbers[device])

    def staged(self, ndim: int) -> NamedSharding:
        """The sharding of an array with this many axes right after reading."""
        return self._over((*self.axes, *self.copies), ndim)

    def gathered(self, ndim: int) -> NamedSharding:
        """The sharding after devices that hold copies have gathered their shares.

        XLA needs this step spelled out; on its own it would replicate the whole array first.
        """
        return self._over(self.axes, ndim)

    def places(self) -> np.ndarray | None:
        """The place of each row of the parameter in the staged array; None if all are in order."""
        places = np.concatenate(
            [
                number * self.width + np.arange(stop - start, dtype=np.int32)
                for number, (start, stop) in enumerate(map(self._rows_of, range(self.mesh.size)))
            ]
        )
        if self.heads:
            return deinterleave(places, self.heads)
        return None if self.shape[0] == self.width * self.mesh.size else places

    def _over(self, axes: tuple[str, ...], ndim: int) -> NamedSharding:
        spec: list[Any] = [None] * ndim
        spec[self.row_dim] = axes
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    @functools.cached_property
    def _numbers(self) -> dict[Any, int]:
        line = NamedSharding(self.mesh, PartitionSpec((*self.axes, *self.copies)))
        slices = line.devices_indices_map((self.mesh.size,))
        return {device: index[0].start or 0 for device, index in slices.items()}

    def _parts_of(self, number: int) -> tuple[int, int]:
        parts = num_parts(self.shape)
        return parts * number // self.mesh.size, parts * (number + 1) // self.mesh.size

    def _rows_of(self, number: int) -> tuple[int, int]:
        start, stop = self._parts_of(number)
        return part_rows(self.shape, start), part_rows(self.shape, stop)


def cut_rows(entry: Entry, interleaved: bool, mesh: Mesh, target: PartitionSpec, ndim: int) -> Cut:
    """The distribution from which a target sharding is reached in the fewest steps.

    Args:
        entry: The parameter.
        interleaved: Whether the file interleaves the rows of heads.
        mesh: The devices.
        target: The target sharding.
        ndim: The number of axes of the array.
    """
    row_dim = -1 if entry.transposed else 0
    spec = [axes if isinstance(axes, tuple) else (axes,) for axes in target]
    names = [[axis for axis in axes if axis is not None] for axes in spec]
    names += [[] for _ in range(ndim - len(names))]
    along = names.pop(row_dim)
    across = [axis for axes in names for axis in axes]
    axes = (*along, *reversed(across))
    copies = tuple(axis for axis in mesh.axis_names if axis not in axes)
    heads = entry.heads if interleaved else 0
    return Cut(entry.file_shape, row_dim, entry.stacked, heads, mesh, axes, copies)


def stage(leaf: Any, cut: Cut, device: Any) -> Any:
    """Puts the rows that a process has read for one of its devices on that device.

    Args:
        leaf: An array, or a tree of arrays that all have the rows on the same axis.
        cut: The distribution of the rows.
        device: The device.
    """

    def put(array: np.ndarray) -> jax.Array:
        missing = cut.width - array.shape[cut.row_dim]
        if missing:
            room = [(0, 0)] * array.ndim
            room[cut.row_dim] = (0, missing)
            array = np.pad(array, room)
        return jax.device_put(array, device, may_alias=False)

    return jax.block_until_ready(jax.tree.map(put, leaf))


def assemble(pieces: Mapping[Any, Any], cut: Cut, targets: Any) -> Any:
    """Moves staged rows to their final devices; all processes must call.

    Args:
        pieces: The results of `stage`, for every device of this process.
        cut: The distribution of the rows.
        targets: Target sharding of every array.

    Returns:
        Arrays with the target shardings.
    """
    found = cut.places()
    places = () if found is None else (found,)

    def move(target: NamedSharding, *parts: jax.Array) -> jax.Array:
        shape = list(parts[0].shape)
        shape[cut.row_dim] *= cut.mesh.size
        staged = jax.make_array_from_single_device_arrays(
            tuple(shape), cut.staged(len(shape)), list(parts)
        )
        return mover(cut, target)(staged, *places)

    return jax.block_until_ready(jax.tree.map(move, targets, *pieces.values()))


@functools.lru_cache(maxsize=64)
def mover(cut: Cut, target: NamedSharding) -> Callable[..., jax.Array]:
    """The compiled function that moves a staged array and reorders its rows.

    Layers are moved one after the other, which bounds the memory that moving needs.
    """
    by_layer = cut.stacked and not any(target.spec[:1])
    spec = target.spec[1:] if by_layer else target.spec
    last = NamedSharding(cut.mesh, PartitionSpec(*spec))

    def move(array: jax.Array, *places: jax.Array) -> jax.Array:
        array = jax.lax.with_sharding_constraint(array, cut.gathered(array.ndim))
        array = jax.lax.with_sharding_constraint(array, last)
        for rows in places:
            array = jnp.take(array, rows, axis=cut.row_dim, mode="clip")
        return array

    def move_all(array: jax.Array, *places: jax.Array) -> jax.Array:
        if by_layer:
            return jax.lax.map(lambda layer: move(layer, *places), array)
        return move(array, *places)

    return jax.jit(move_all, out_shardings=target)
