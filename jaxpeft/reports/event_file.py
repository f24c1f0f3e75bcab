"""Writes TensorBoard's event files for scalars, without TensorBoard.

A file is a sequence of records ``length | crc(length) | data | crc(data)``, where `data` is an
``Event`` message of protocol buffers and the checksum is a masked CRC-32C. The packages that write
such files import TensorFlow or PyTorch if they are installed, and write from a thread that a full
disk stops. This writer does one ``write`` per step and raises errors at once.

References:
    https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto
    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

import itertools
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MASK = 0xFFFFFFFF


class EventFile:
    """A new event file in `folder`.

    Args:
        folder: Made if it is missing; all files of a run are in one folder.
        first_step: TensorBoard hides events of older files in the folder from this step on. A
            resumed run repeats those steps.

    Raises:
        OSError: The file cannot be written; the methods raise it too.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        # In containers the numbers of processes are often the same.
        names = (f"{name}.{number}" if number else name for number in itertools.count())
        free = next(name for name in names if not (folder / name).exists())
        self._file = (folder / free).open("xb", buffering=0)
        self._write(encode_event(time.time(), version="brain.Event:2"))
        self._write(encode_event(time.time(), step=first_step, session_start=True))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of one step.

        Raises:
            OSError: The file could not be written, or only a part of the event was.
        """
        self._write(encode_event(time.time(), step=step, scalars=scalars))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        data = encode_record(event)
        if self._file.write(data) != len(data):
            raise OSError(f"{self._file.name}: only a part could be written; is the disk full?")


def encode_record(data: bytes) -> bytes:
    """`data` with its length and both checksums around it."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def encode_event(
    wall_time: float,
    *,
    step: int = 0,
    scalars: Mapping[str, float] | None = None,
    version: str = "",
    session_start: bool = False,
) -> bytes:
    """An ``Event`` message: a version, the start of a session, or the scalars of a step.

    Args:
        wall_time: Seconds since 1970.
        step: Left out if it is 0, as in protocol buffers.
        scalars: Value by tag.
        version: Version of the file format, for the first event of a file.
        session_start: Whether this event says that events from `step` on begin anew.

    Returns:
        The serialized message.
    """
    event = _field(1, _FIXED64, struct.pack("<d", wall_time))
    if step:
        event += _field(2, _VARINT, _varint(step))
    if version:
        event += _field(3, _BYTES, version.encode())
    if scalars:
        values = (
            _field(1, _BYTES, tag.encode()) + _field(2, _FIXED32, _float32(value))
            for tag, value in scalars.items()
        )
        event += _field(5, _BYTES, b"".join(_field(1, _BYTES, value) for value in values))
    if session_start:
        event += _field(7, _BYTES, _field(1, _VARINT, _varint(1)))
    return event


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum of RFC 3720, appendix B.4."""
    crc = _MASK
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ _MASK


def _table() -> list[int]:
    table = []
    for entry in range(256):
        for _ in range(8):
            entry = (entry >> 1) ^ (0x82F63B78 if entry & 1 else 0)
        table.append(entry)
    return table


_TABLE = _table()


def _checksum(data: bytes) -> bytes:
    """The CRC, rotated and shifted as TensorBoard's records require."""
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _MASK)


def _field(number: int, kind: int, content: bytes) -> bytes:
    length = _varint(len(content)) if kind == _BYTES else b""
    return _varint(number << 3 | kind) + length + content


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _float32(value: float) -> bytes:
    """Little-endian float32; numbers that are too large become infinite."""
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))
