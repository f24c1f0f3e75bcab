"""What a full disk looks like to a writer, without filling one."""

import contextlib
import resource


@contextlib.contextmanager
def files_no_larger_than(limit: int):
    """Files of this process end after so many bytes: writing more fails."""
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))
