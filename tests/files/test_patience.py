"""A disk that is full or fails is tried again a few times, and then it is said."""

import errno

import pytest

from jaxpeft.core.errors import CheckpointError, ResourceError, StoreError, UserError
from jaxpeft.files import patience
from jaxpeft.files.patience import DELAYS, persist


@pytest.fixture
def waits(monkeypatch):
    seconds = []
    monkeypatch.setattr(patience.time, "sleep", seconds.append)
    return seconds


def failing(errors: list[Exception]):
    def act():
        if errors:
            raise errors.pop(0)
        return "done"

    return act


def caused(number: int) -> UserError:
    error = UserError("x: cannot be written")
    error.__cause__ = OSError(number, "reason")
    return error


PASSING = {
    "full": lambda: ResourceError("full"),
    "store": lambda: StoreError("no answer"),
    "disk": lambda: caused(errno.EIO),
}


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("times", range(len(DELAYS) + 1))
def test_what_may_pass_is_tried_again_with_growing_waits(waits, kind, times):
    told = []
    act = failing([PASSING[kind]() for _ in range(times)])
    assert persist(act, told.append) == "done"
    assert waits == list(DELAYS[:times])
    assert waits == sorted(set(waits))
    assert [text.rpartition("(")[2] for text in told] == [
        f"trying again in {seconds} s)" for seconds in waits
    ]


@pytest.mark.parametrize("kind", PASSING)
def test_what_does_not_pass_ends_with_exit_code_5(waits, kind):
    error = PASSING[kind]()
    with pytest.raises(UserError, match=str(error)) as caught:
        persist(failing([error] * 9), lambda _: None)
    assert caught.value.exit_code == 5
    assert waits == list(DELAYS)


@pytest.mark.parametrize("error", [UserError("mistake"), CheckpointError("damaged"), KeyError("x")])
def test_what_is_no_fault_of_a_disk_is_not_tried_again(waits, error):
    with pytest.raises(type(error)):
        persist(failing([error]), pytest.fail)
    assert waits == []
