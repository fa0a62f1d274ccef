"""An S3 of this machine, in a process of its own: `moto`'s server, one bucket called `bucket`."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

import pytest

# the server is told to take a free port and to say which
_SERVE = ("from moto.server import DomainDispatcherApplication, create_backend_app\n"
          "from werkzeug.serving import make_server\n"
          "server = make_server('127.0.0.1', 0, DomainDispatcherApplication(create_backend_app), threaded=True)\n"
          "print(server.server_port, flush=True)\n"
          "server.serve_forever()\n")


@contextmanager
def s3_server():
    """The environment that makes s3fs, here and in child processes, use an S3 of its own with an empty `bucket`."""
    for module in ("moto", "flask", "flask_cors", "s3fs"):
        pytest.importorskip(module, reason=f"an S3 on this machine needs {module}: pip install 'itune[dev]'")
    process = subprocess.Popen([sys.executable, "-c", _SERVE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=60).close()
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()  # of an earlier server
        yield {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
               "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
               "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "no_proxy": "127.0.0.1"}
    finally:
        process.kill()
        process.wait()
