"""A stand-in for the Hugging Face Hub: the endpoints that huggingface_hub uses, with faults on demand."""

import hashlib
import json
import random
import re
import time
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlparse

import pytest

COMMIT = "c0ffee" + "0" * 34
EXPERTS = ("high_noise_model", "low_noise_model")


def native_files(shard_nbytes=300_000):
    """A repository in the native layout, as far as a download looks at it, with what text-to-video does not need."""
    chance = random.Random(1)
    files = {
        "README.md": b"# a model",
        "assets/logo.png": b"png",
        "examples/cat.mp4": chance.randbytes(1000),
        "configuration.json": b"{}",
        "models_t5_umt5-xxl-enc-bf16.pth": chance.randbytes(50_000),
        "Wan2.1_VAE.pth": chance.randbytes(40_000),
        "google/umt5-xxl/tokenizer.json": b'{"a": 1}',
        "google/umt5-xxl/tokenizer_config.json": b"{}",
        "google/umt5-xxl/spiece.model": chance.randbytes(3000),
    }
    stem = "diffusion_pytorch_model"
    for expert in EXPERTS:
        shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        files[f"{expert}/config.json"] = b"{}"
        index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
        files[f"{expert}/{stem}.safetensors.index.json"] = json.dumps(index).encode()
        files |= {f"{expert}/{shard}": chance.randbytes(shard_nbytes) for shard in shards}
    return files


def needed(files):
    return {n for n in files if n.split("/")[0] not in ("README.md", "assets", "examples", "configuration.json")}


class Hub:
    """What the stand-in serves, and what it was asked for."""

    def __init__(self):
        self.repositories = {"Wan-AI/Wan2.2-T2V-A14B": native_files()}
        self.token = None
        """Where set, only this one is let in."""
        self.gated = False
        self.served = {}
        """path -> other bytes than the listing describes"""
        self.listed = {}
        """path -> another length than the file has"""
        self.cut = {}
        """path -> how many times the connection breaks in the middle"""
        self.ranges = True
        self.pause_s = 0.0
        """Between pieces of 64 KiB."""
        self.broken_status = None
        self.requests = []
        """(method, path, range, authorization)"""
        self.endpoint = self.cdn = ""

    def got(self, path):
        """Ranges of a file that were asked for."""
        return [r for method, name, r, _ in self.requests if method == "GET" and name.endswith(path)]

    def is_large(self, path):
        return path.endswith((".safetensors", ".pth", ".model"))


def handler(hub, *, is_cdn):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            path = unquote(urlparse(self.path).path)
            authorization = self.headers.get("Authorization")
            hub.requests.append((self.command, path, self.headers.get("Range"), authorization))
            try:
                if hub.broken_status:
                    self.reply(hub.broken_status, b"")
                elif is_cdn:
                    _, owner, name, *rest = path.split("/")
                    self.content(f"{owner}/{name}", "/".join(rest), body)
                elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
                    self.modelscope(found[1])
                elif found := re.fullmatch(r"/models/([^/]+/[^/]+)/resolve/master/(.+)", path):
                    self.resolve(found[1], found[2], body)
                elif hub.token and authorization != f"Bearer {hub.token}":
                    self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
                elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                    self.listing(found[1], found[2])
                elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    self.resolve(found[1], found[3], body)
                else:
                    self.reply(404, b"")
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def reply(self, status, content, headers=None):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def listing(self, repository, revision):
            if repository not in hub.repositories:
                self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif revision not in (None, "main", COMMIT):
                self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            else:
                files = hub.repositories[repository]
                siblings = [self.sibling(path, content) for path, content in files.items()]
                document = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
                self.reply(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def modelscope(self, repository):
            """List the files as ModelScope does."""
            if repository not in hub.repositories:
                self.reply(404, b"{}")
                return
            rows = [{"Path": "high_noise_model", "Type": "tree", "Size": 0, "Sha256": ""}]
            for path, content in hub.repositories[repository].items():
                size = hub.listed.get(path, len(content))
                digest = hashlib.sha256(content).hexdigest()
                rows.append({"Path": path, "Type": "blob", "Size": size, "Sha256": digest})
            document = {"Code": 200, "Success": True, "Data": {"Files": rows}}
            self.reply(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

        def sibling(self, path, content):
            size = hub.listed.get(path, len(content))
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            found = {"rfilename": path, "size": size, "blobId": git}
            if hub.is_large(path):
                found["lfs"] = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            return found

        def resolve(self, repository, path, body):
            if hub.gated:
                self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
            elif path not in hub.repositories.get(repository, {}):
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif hub.is_large(path):
                self.reply(302, b"", {"Location": f"{hub.cdn}/{repository}/{path}", "X-Repo-Commit": COMMIT})
            else:
                self.content(repository, path, body)

        def content(self, repository, path, body):
            content = hub.served.get(path, hub.repositories[repository][path])
            start, status = 0, 200
            if hub.ranges and (found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
                start, status = int(found[1]), 206
                if start >= len(content):
                    self.reply(416, b"")
                    return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) - start))
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            stop = len(content)
            if hub.cut.get(path, 0) > 0:
                hub.cut[path] -= 1
                stop = start + (len(content) - start) // 2
                self.close_connection = True
            for position in range(start, stop if body else start, 64 << 10):
                self.wfile.write(content[position : min(stop, position + (64 << 10))])
                time.sleep(hub.pause_s)

    return Handler


def point_to(monkeypatch, endpoint):
    """What HF_ENDPOINT does in a process that has not imported huggingface_hub yet."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name in ("constants", "file_download", "hf_api"):  # older versions hold copies
        module = pytest.importorskip(f"huggingface_hub.{name}")
        for key, value in (("HUGGINGFACE_CO_URL_TEMPLATE", template), ("ENDPOINT", endpoint)):
            if hasattr(module, key):
                monkeypatch.setattr(module, key, value)
