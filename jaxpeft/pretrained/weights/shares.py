"""How processes share the reading of a matrix, and how its rows get to where they belong.

Files hold a matrix row by row, and a mesh may want columns of it on every device; columns would be
thousands of tiny reads. So each device of a mesh over several processes first takes in its share
of the *rows*, one large read, and one compiled program moves the pieces over the interconnect to
the target sharding. Every byte of a matrix is read once, by one process.

The rows are dealt by the parts of the fingerprint: of a matrix of ``p`` parts device ``n`` of
``count`` gets those from ``p n / count`` to ``p (n + 1) / count``. Devices are numbered so that
moving needs the fewest steps: first along the mesh axes that cut the rows in the end, then along
those that cut another dimension (an all-to-all), last along those that hold copies (an all-gather).

The largest share is that of one part, or ``count / p``, above the mean at most, and even where
``count`` is a power of two up to ``p``; beyond ``p`` devices some read nothing. So the shares of
large matrices (1024 parts) are within a tenth of the mean for up to 102 devices, of others (256
parts) for up to 25.
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
    """How the rows of one stored matrix are dealt to the devices of a mesh.

    Attributes:
        shape: Of the matrix in the file.
        row_dim: Our axis that runs along its rows: 0, or -1 where files hold the transpose.
        stacked: Whether our array has a layer axis in front.
        heads: Heads whose rows are interleaved in the file; 0 for none.
        mesh: The devices.
        axes: The axes of the mesh that cut the array in the end, in the order in which devices
            are numbered: those along the rows first.
        copies: The others, which number devices last.
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
        """Rows that a device makes room for: as many as the one that has most."""
        return max(stop - start for start, stop in map(self._rows_of, range(self.mesh.size)))

    def parts(self, device: Any) -> tuple[int, int]:
        """The first part that a device gets, and the first that it doesn't get any more."""
        return self._parts_of(self._numbers[device])

    def staged(self, ndim: int) -> NamedSharding:
        """How an array of so many axes lies right after reading."""
        return self._over((*self.axes, *self.copies), ndim)

    def gathered(self, ndim: int) -> NamedSharding:
        """The same, with what copies share gathered on each.

        XLA has to be told this step: on its own it would replicate the whole array first.
        """
        return self._over(self.axes, ndim)

    def places(self) -> np.ndarray | None:
        """Where each row of ours lies in the staged array; None if all are in order."""
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
    """The cut from which a target sharding is reached in the fewest steps.

    Args:
        entry: The parameter.
        interleaved: Whether the file interleaves the rows of heads.
        mesh: The devices.
        target: Where the array belongs.
        ndim: Its number of axes.
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
    """The rows that a process has read for one of its devices, on that device.

    Args:
        leaf: An array, or a tree of arrays that all have the rows on the same axis.
        cut: How rows are dealt.
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
    """Moves rows that devices have taken in to where they belong; all processes must call.

    Args:
        pieces: What `stage` gave, for every device of this process.
        cut: How rows are dealt.
        targets: Sharding of every array.

    Returns:
        Arrays as `targets` wants them.
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
    """The compiled function that moves a staged array, and picks rows of it by their places.

    Layers move one after the other, which bounds the room that moving needs.
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
