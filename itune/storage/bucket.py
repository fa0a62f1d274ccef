"""Folders in buckets (`gs://`, `s3://`), through fsspec: list, read, write, remove. An object appears whole or not.

fsspec comes with `datasets`; the libraries behind it (gcsfs, s3fs) are the extras `gcs` and `s3`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from itune.types import InputError, RunError

EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "memory": ""}  # scheme -> extra that reaches it
_AT_ONCE = 8  # objects on their way at a time
_SMALL = 16 << 20  # bytes
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_AWAY = ("Connect", "Timeout", "Disconnected", "Unavailable")  # in the names of what the libraries raise then
# what file systems call the facts that change when an object does
_VERSION = ("size", "ETag", "etag", "generation", "mtime", "updated", "LastModified", "created")


def is_url(text: Any) -> bool:
    """Whether text names an object or a folder in a bucket, or what looks like one; a path never does.

    Raises InputError for one whose second slash is missing: it would be a folder here.
    """
    if isinstance(text, str) and (scheme := re.match(r"(gs|gcs|s3):/(?!/)", text)):
        raise InputError(f"{text}: expected {scheme[1]}://BUCKET/PATH, with two slashes")
    return isinstance(text, str) and "://" in text


def open_url(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL.

    Raises InputError for a scheme that is not supported, a URL without a bucket, and where the extra is missing.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in EXTRAS:
        raise InputError(f"{url}: {scheme}:// is not supported; expected a path on this machine, gs:// or s3://")
    if not rest.strip("/"):
        raise InputError(f"{url}: names no bucket; expected {scheme}://BUCKET/PATH")
    if ".." in rest.split("/"):
        raise InputError(f"{url}: a path in a bucket has no '..'")
    import fsspec

    with reaching(url):
        try:  # no cached listings: others write there too
            fs = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            raise InputError(f"{url} needs the extra: pip install 'itune[{EXTRAS[scheme]}]' ({error})") from error
        return fs, fs._strip_protocol(url).rstrip("/")


@contextlib.contextmanager
def reaching(url: str, kind: type[Exception] = InputError) -> Iterator[None]:
    """Turns whatever the libraries raise (a dozen kinds, few of them OSError) into one message of `kind`.

    An outage of the network or the service is a RunError always.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except FileNotFoundError as error:
        raise kind(f"{url}: no such object or bucket ({_line(error)})") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise kind(f"{url}: its copy cannot be written: {error}") from error
        if any(word in each.__name__ for each in type(error).__mro__ for word in _AWAY):
            raise RunError(f"{url} cannot be reached: {_line(error)}; try again when the network, or the service, is "
                           "back") from error  # no wrong input: --restart-on-failure tries again
        raise kind(f"{url} cannot be reached: {_line(error)}; expected credentials that may use this bucket (gs://: "
                   "gcloud auth application-default login; s3://: AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret)"
                   ) from error


class Bucket:
    """A folder in a bucket; names in it are relative, with `/`. Errors are those of the library: see `reaching`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs, self.path = open_url(url)

    def list(self, below: str = "") -> dict[str, str]:
        """name -> version of every object of the folder, or of a folder in it. A version changes with its object."""
        return {name: version(info) for name, info in self._find(below).items()}

    def sizes(self, below: str = "") -> dict[str, int]:
        """name -> bytes."""
        return {name: int(info["size"]) for name, info in self._find(below).items()}

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        try:
            return bytes(self.fs.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self.fs.pipe_file(self._at(name), content)

    def put(self, files: Mapping[str, Path], each: Callable[[str], None] = lambda name: None) -> None:
        """Upload files under these names, several at a time; `each` is told which is there."""
        def send(name: str) -> None:
            path = files[name]
            if path.stat().st_size <= _SMALL:  # read at once: a log may grow while it is sent
                self.write(name, path.read_bytes())
            else:
                self.fs.put_file(str(path), self._at(name))
            each(name)

        _all(send, files)

    def get(self, names: Iterable[str], into: Path) -> None:
        """Download objects below a folder of this machine; one that is not there is left out."""
        def fetch(name: str) -> None:
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(self._at(name), str(target))
            except FileNotFoundError:
                target.unlink(missing_ok=True)

        _all(fetch, names)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at(name))

        _all(remove, names)

    def _find(self, below: str) -> dict[str, Any]:
        root = f"{self.path}/{below}" if below else self.path
        try:
            found = self.fs.find(root, detail=True)
        except FileNotFoundError:  # how some say that a folder is empty
            return {}
        prefix = self.path + "/"
        return {name.removeprefix(prefix): info for name, info in found.items()
                if info.get("type") == "file" and name.startswith(prefix) and not name.endswith("/")}

    def _at(self, name: str) -> str:
        if leads_outside(name):
            raise InputError(f"{self.url}: the name {name!r} leads outside the folder")
        return f"{self.path}/{name}"


def leads_outside(name: str) -> bool:
    """Whether a name would leave its folder: a key in a bucket may be any text."""
    return PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts


def version(info: Mapping[str, Any]) -> str:
    """A hash of what tells an object from the one that replaces it: size, ETag, generation, times."""
    return hashlib.sha256(repr([str(info.get(fact)) for fact in _VERSION]).encode()).hexdigest()


def _all(act: Callable[[str], None], names: Iterable[str]) -> None:
    """Act on all, several at a time; after the first failure nothing new is begun, and it is raised."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        waiting = [pool.submit(act, name) for name in names]
        try:
            for one in waiting:
                one.result()
        except BaseException:
            for one in waiting:
                one.cancel()
            raise


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
