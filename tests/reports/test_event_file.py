"""Event files are compared with bytes that tensorboardX 2.6.5 wrote, and read back by hand."""

import struct

import pytest

from jaxpeft.reports import event_file
from jaxpeft.reports.event_file import EventFile, crc32c, encode_event, encode_record


@pytest.mark.parametrize(
    ("data", "expected"),
    [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)],
)
def test_crc32c_matches_the_examples_of_rfc_3720(data, expected):
    assert crc32c(data) == expected


def test_two_files_of_one_second_and_process_are_two(tmp_path, monkeypatch):
    """A run that goes on in a container soon after may have the same number of its process."""
    monkeypatch.setattr(event_file.time, "time", lambda: 1234.5)
    for step in range(3):
        file = EventFile(tmp_path, step)
        file.add(step, {"loss": 1.0})
        file.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.removeprefix(names[0]) for name in names] == ["", ".1", ".2"]
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (
            encode_event(1700000000.5, version="brain.Event:2"),
            "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e743a322b353110",
        ),
        (
            encode_event(1700000000.5, step=301, session_start=True),
            "100000000000000095fbfe180900002040fc54d94110ad023a020801596f3f79",
        ),
        (
            encode_event(1700000001.25, step=300, scalars={"loss": 0.1, "learning_rate": 0.0}),
            "31000000000000009d8383e90900005040fc54d94110ac022a230a0b0a046c6f737315cdcccc3d0a140a0d"
            "6c6561726e696e675f72617465150000000029665170",
        ),
    ],
)
def test_records_are_byte_identical_to_those_of_tensorboardx(event, expected):
    assert encode_record(event).hex() == expected


def test_every_event_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    events = EventFile(tmp_path / "tensorboard", 0)
    events.add(1, {"loss": 2.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    lengths, data = [], file.read_bytes()
    events.close()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        lengths.append(length)
        data = data[length + 16 :]
    assert len(lengths) == 3
    assert file.name.startswith("events.out.tfevents.")


@pytest.mark.parametrize(
    ("value", "expected"), [(1e300, "0000807f"), (-1e300, "000080ff"), (float("inf"), "0000807f")]
)
def test_values_beyond_32_bits_become_infinite(value, expected):
    event = encode_event(0.0, step=1, scalars={"x": value})
    assert event.hex().endswith(expected)
