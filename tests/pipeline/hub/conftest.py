"""The stand-in for the hub as a fixture."""

import threading
from http.server import ThreadingHTTPServer

import pytest
from hub_standin import Hub, handler, point_to


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, running; huggingface_hub of this process and of those it starts talk to it."""
    hub = Hub()
    servers = []
    for is_cdn in (False, True):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub, is_cdn=is_cdn))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    point_to(monkeypatch, hub.endpoint)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()
