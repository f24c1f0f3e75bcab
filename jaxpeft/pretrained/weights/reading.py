"""Reads tensors of files as host arrays: read once, hashed, decoded, transposed, cast.

A stacked parameter is one ``(layers, d_in, d_out)`` buffer in the target dtype, filled layer by
layer, or codes and scales of one layer after the other. Beside it, host memory holds one layer.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.errors import UserError
from jaxpeft.files.storage import Ranges, StoragePath
from jaxpeft.files.tensors import PLAIN_DTYPES, TensorInfo
from jaxpeft.ops.quant import is_quantized
from jaxpeft.pretrained.weights.fingerprint import Fingerprint, num_parts, part_rows
from jaxpeft.pretrained.weights.names import Entry
from jaxpeft.pretrained.weights.source import Source
from jaxpeft.pretrained.weights.stacks import PlainStack, QuantStack, fill


@dataclasses.dataclass(frozen=True)
class Form:
    """The form in which parameters are loaded.

    Attributes:
        dtype: Target dtype; None keeps the stored dtype.
        quantization: The kind for kernels of the layers; None for none.
        double: Whether their scales are quantised too.
    """

    dtype: str | None = "float32"
    quantization: str | None = None
    double: bool = False

    def quantizes(self, path: str) -> bool:
        """Whether the parameter at `path` is quantised."""
        return self.quantization is not None and is_quantized(path)


class Reader:
    """Reads parameters of one model, or some of their rows, and counts and hashes the bytes.

    Attributes:
        bytes_read: The number of bytes of tensors that were read.
        fingerprint: The fingerprint of these bytes.
        interleaved: Whether the file interleaves rows, see `jaxpeft.pretrained.weights.names`.
        num_layers: Layers of the model.
    """

    def __init__(self, source: Source, stack: contextlib.ExitStack):
        self.bytes_read = 0
        self.fingerprint = Fingerprint()
        self.interleaved = source.interleaved
        self.num_layers = source.config.num_layers
        self._source, self._stack = source, stack
        self._files: dict[StoragePath, Ranges] = {}

    def target(self, entry: Entry, form: Form) -> np.dtype:
        """The dtype of a parameter; for a quantised one, the dtype of the kernel it stands for."""
        if form.dtype:
            return jnp.dtype(form.dtype)
        infos = self._infos(entry).values()
        stored = {PLAIN_DTYPES.get(info.dtype, np.dtype(np.float32)) for info in infos}
        return stored.pop() if len(stored) == 1 else np.dtype(np.float32)

    def read_entry(
        self,
        entry: Entry,
        form: Form,
        parts: tuple[int, int] | None = None,
        whole: bool = True,
    ) -> Any:
        """One parameter in host memory, layers stacked: an array, or codes and scales.

        Args:
            entry: The parameter.
            form: The form in which it is loaded.
            parts: The parts of the fingerprint to read, from the first up to but without the
                second; None for all.
            whole: Whether rows that a GGUF file interleaves are put in order, which needs all of
                them.

        Raises:
            UserError: Values are not finite, or a file ends early.
        """
        infos, target = self._infos(entry), self.target(entry, form)
        parts = parts or (0, num_parts(entry.file_shape))
        start, stop = (part_rows(entry.file_shape, part) for part in parts)
        rows = (stop - start, *entry.file_shape[1:])
        shape = rows[::-1] if entry.transposed else rows
        layers = len(infos) if entry.stacked else None
        if form.quantization is not None and form.quantizes(entry.path):
            stack = QuantStack(shape, layers, target, form.quantization, form.double)
        else:
            stack = PlainStack(shape, layers, target)
        heads = entry.heads if self.interleaved and whole else 0
        for layer, (name, info) in enumerate(infos.items()):
            raw, digests = self._read(info, parts)
            self.fingerprint.add(name, info.dtype, info.shape, digests)
            if entry.path == paths.EMBEDDING:
                self._check_tied_head(info, parts, digests)
            part = dataclasses.replace(info, shape=rows, nbytes=len(raw))
            if not len(raw):
                continue
            bad = fill(stack.buffer(layer), raw, part, entry.transposed, heads)
            if bad:
                raise UserError(
                    f"{info.file}: {name}: {bad} of {math.prod(rows)} values are not finite "
                    f"as {target.name}; the weights are damaged, or too large for this dtype"
                )
            stack.done(layer)
        return stack.result

    def _infos(self, entry: Entry) -> dict[str, TensorInfo]:
        names = entry.file_names(self._source.style, self._source.config.num_layers)
        return {name: self._source.tensors[name] for name in names}

    def _read(self, info: TensorInfo, parts: tuple[int, int]) -> tuple[np.ndarray, dict[int, str]]:
        """The bytes of some parts of a tensor, and the digest of each that is not empty."""
        row_bytes = info.nbytes // info.shape[0]
        edges = [part_rows(info.shape, part) * row_bytes for part in range(parts[0], parts[1] + 1)]
        raw = np.empty(edges[-1] - edges[0], np.uint8)
        try:
            read_into(raw.data, self._open(info.file), info.offset + edges[0])
        except EOFError as error:
            raise UserError(f"{info.file}: cut short while reading: {error}") from error
        self.bytes_read += len(raw)
        spans = enumerate(itertools.pairwise(edges), parts[0])
        return raw, {
            part: hashlib.sha256(raw.data[start - edges[0] : stop - edges[0]]).hexdigest()
            for part, (start, stop) in spans
            if start < stop
        }

    def _open(self, file: StoragePath) -> Ranges:
        if file not in self._files:
            self._files[file] = Ranges(file)
            self._stack.callback(self._files[file].close)
        return self._files[file]

    def _check_tied_head(
        self, embedding: TensorInfo, parts: tuple[int, int], digests: dict[int, str]
    ) -> None:
        """Checks that a head stored in spite of tying is the embedding, byte for byte."""
        head = self._source.tensors.get("lm_head.weight")
        if "lm_head.weight" not in self._source.ignored or head is None or head == embedding:
            return
        same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        if same and self._read(head, parts)[1] == digests:
            return
        raise UserError(
            f"{head.file}: lm_head.weight differs from model.embed_tokens.weight although "
            'config.json says "tie_word_embeddings": true; set it to false if the model has its '
            "own head"
        )


def read_into(view: memoryview, file: Ranges, offset: int) -> None:
    """Fills a buffer from a place in a file.

    Args:
        view: The buffer.
        file: The file.
        offset: The place to begin, in bytes.

    Raises:
        EOFError: The file ends before the buffer is full.
    """
    done = 0
    while done < len(view):
        count = file.read_into(view[done:], offset + done)
        if count == 0:
            raise EOFError(f"file ends {len(view) - done} bytes early")
        done += count
