"""A Hugging Face hub of this machine: the folders below one, served as models to huggingface_hub's own client."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40


@contextmanager
def hub_server(folder: Path, cache: Path):
    """(environment for child processes, files that were downloaded, revisions that were asked for).

    `folder`/OWNER/NAME is a model; every revision of it is the same commit.
    """
    given: list[str] = []
    revisions: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def _send(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"] and (folder / parts[2] / parts[3]).is_dir():
                home = folder / parts[2] / parts[3]
                revisions.append(parts[5] if parts[4:5] in (["revision"], ["tree"]) else "main")
                names = sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())
                files = [{"rfilename": name, "size": (home / name).stat().st_size} for name in names]
                body = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": files, "private": False, "tags": []}
                if "tree" in parts:
                    body = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0"} for f in files]
                return self._send(200, json.dumps(body).encode(), **{"Content-Type": "application/json"})
            file = folder.joinpath(*parts[:2], *parts[4:])
            if parts[2:3] != ["resolve"] or not file.is_file():
                return self._send(404, b"", **{"X-Error-Code": "EntryNotFound" if file.parent.is_dir() else
                                               "RepoNotFound"})  # fmt: skip
            body = file.read_bytes()
            if self.command == "GET":
                given.append("/".join(parts[4:]))
            return self._send(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', **{"X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        env = {**kept, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache),
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1"}  # fmt: skip
        yield env, given, revisions
    finally:
        server.shutdown()
        server.server_close()
