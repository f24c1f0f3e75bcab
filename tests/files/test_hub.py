"""What the Hugging Face hub may do wrong, tried on a local server: one line each, with the code."""

import contextlib
import http.server
import json
import socket
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import constants
from tiny_models import hf_tensors, write_hf

import jaxpeft as jp
from jaxpeft.core.errors import UserError
from jaxpeft.files.locate import locate
from jaxpeft.pretrained.load import load_model_config

SHA = "0123456789abcdef0123456789abcdef01234567"
NAME = "org/name"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one repository; `faults` say what it does wrong at which question."""

    protocol_version = "HTTP/1.1"
    files, faults, asked = {}, {}, []

    def log_message(self, *_):
        pass

    def send(self, status=200, body=b"", kind="application/json", length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
        self.close_connection = True

    def stage(self):
        if "/api/" in self.path:
            return "tree" if "/tree/" in self.path else "info"
        return "head" if self.command == "HEAD" else "get"

    def do_GET(self):
        stage = self.stage()
        self.asked.append(stage)
        fault = self.faults.get(stage)
        if fault is not None:
            fault(self)
            return
        if stage == "info":
            info = {"id": NAME, "modelId": NAME, "sha": SHA, "siblings": [], "private": False}
            self.send(body=json.dumps(info | {"tags": [], "downloads": 0, "likes": 0}).encode())
        elif stage == "tree":
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": "a" * 40}
                for name, data in self.files.items()
            ]
            self.send(body=json.dumps(found).encode())
        else:
            data = self.files[self.path.rpartition("/")[2]]
            tag = '"' + format(hash(data) % 2**64, "x") + '"'
            self.send(body=data, kind="text/plain", X_Repo_Commit=SHA, ETag=tag)

    do_HEAD = do_GET


def status(code, **headers):
    return lambda hub: hub.send(code, b'{"error": "x"}', **headers)


def page(hub):
    hub.send(body=b"<!DOCTYPE html><html>Log in to the network</html>", kind="text/html")


def broken(hub):
    hub.send(body=b'{"id": "org/na')


def other(hub):
    hub.send(body=b"[1, 2]")


def circle(hub):
    hub.send(302, Location=hub.path)


def cut(hub):
    hub.send(body=b"{", length=100_000, kind="text/plain", X_Repo_Commit=SHA, ETag='"x"')


def silent(hub):
    time.sleep(3)
    hub.close_connection = True


def hang_up(hub):
    hub.connection.shutdown(socket.SHUT_RDWR)
    hub.close_connection = True


FAULTS = {
    "401": (
        "info",
        status(401),
        2,
        "(HTTP 401), or it is private; look at the spelling, or log in",
    ),
    "403": ("info", status(403), 2, "(HTTP 403); log in with an account that may read"),
    "404": ("info", status(404), 2, "(HTTP 404), or it is private; look at the spelling"),
    "gated": ("info", status(403, X_Error_Code="GatedRepo"), 2, "accept its terms on the hub"),
    "revision": ("info", status(404, X_Error_Code="RevisionNotFound"), 2, "has no revision"),
    "429": ("info", status(429), 5, "(HTTP 429); wait some minutes"),
    "429 for an hour": ("tree", status(429, Retry_After="3600"), 5, "(HTTP 429)"),
    "429 of files": ("get", status(429), 5, "(HTTP 429)"),
    "500": ("info", status(500), 5, "the hub fails (HTTP 500); try again later"),
    "503 of the list": ("tree", status(503), 5, "(HTTP 503); try again later"),
    "500 of files": ("get", status(500), 5, "the hub fails (HTTP 500)"),
    "400": ("info", status(400), 2, "(HTTP 400)"),
    "a page": ("info", page, 5, "the answer is not one of a hub"),
    "a page for the list": ("tree", page, 5, "the answer is not one of a hub"),
    "a page for a file's head": ("head", page, 5, NAME),
    "broken JSON": ("info", broken, 5, "the answer is not one of a hub"),
    "other JSON": ("info", other, 5, "the answer is not one of a hub"),
    "other JSON for the list": ("tree", other, 5, "the answer is not one of a hub"),
    "a circle": ("info", circle, 5, "lead in a circle; look at HF_ENDPOINT"),
    "a circle of files": ("get", circle, 5, "lead in a circle; look at HF_ENDPOINT"),
    "a cut download": ("get", cut, 5, NAME),
    "silence": ("info", silent, 5, "did not answer in time"),
    "silence for the list": ("tree", silent, 5, "the hub does not answer"),
    "silence for files": ("get", silent, 5, NAME),
    "hung up": ("info", hang_up, 5, NAME),
    "hung up in files": ("get", hang_up, 5, NAME),
}
ADAPTER = ("404", "429", "a page", "a circle", "a cut download", "silence for the list")


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def point_to(endpoint, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    point_to(server, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    from huggingface_hub.utils import _http

    monkeypatch.setattr(
        _http.time,
        "sleep",
        lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01) if seconds != 3 else 3),
    )
    folder = write_hf(tmp_path / "model", "llama", hf_tensors("llama"))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files["adapter_config.json"] = b'{"peft_type": "LORA"}'
    monkeypatch.setattr(Hub, "files", files)
    monkeypatch.setattr(Hub, "faults", {})
    monkeypatch.setattr(Hub, "asked", [])
    yield Hub
    huggingface_hub.close_session()


def refusal(load, name=NAME, **options):
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        load(name, **options)
    assert time.monotonic() - started < 30
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(name)
    assert len(text) < 500
    return text, error.value.exit_code


def test_a_model_is_downloaded_and_found_again_without_the_hub(hub, monkeypatch):
    folder = locate(NAME, weights=True)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not (folder / "adapter_config.json").exists()
    monkeypatch.setattr(Hub, "faults", {"info": status(500)})
    assert locate(NAME, weights=True) == folder


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_hub_does_wrong_is_one_line(hub, monkeypatch, name):
    stage, fault, code, words = FAULTS[name]
    monkeypatch.setattr(Hub, "faults", {stage: fault})
    text, found = refusal(load_model_config)
    assert stage in hub.asked
    assert words in text
    assert found == code, text


@pytest.mark.parametrize("name", ADAPTER)
def test_the_same_for_an_adapter(hub, monkeypatch, name):
    stage, fault, code, words = FAULTS[name]
    monkeypatch.setattr(Hub, "faults", {stage: fault})
    text, found = refusal(jp.load_adapter)
    assert words in text
    assert found == code, text


def test_a_hub_that_is_not_there(hub, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", monkeypatch)
        text, code = refusal(load_model_config)
    assert code == 5
    assert "the hub was not reached" in text
    assert "look at the connection" in text


def test_a_name_that_is_not_resolved(hub, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    point_to("http://hub.invalid", monkeypatch)
    text, code = refusal(load_model_config)
    assert (code, "the hub was not reached" in text) == (5, True)


def test_an_address_that_is_none(hub, monkeypatch):
    point_to("huggingface.co", monkeypatch)
    text, code = refusal(load_model_config)
    assert (code, "HF_ENDPOINT is no address of the web" in text) == (2, True)


def test_offline_is_the_users_own_choice(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text, code = refusal(load_model_config)
    assert (code, "HF_HUB_OFFLINE is set; unset it" in text) == (2, True)


def test_an_own_client_is_put_back(hub):
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    load_model_config(NAME)
    assert _http._GLOBAL_CLIENT_FACTORY is before
