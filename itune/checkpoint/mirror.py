"""A run directory in a bucket: a staging folder here, in which the run works, and its mirror there.

Of a checkpoint the manifest is uploaded last and removed first: a step without one in the bucket is none, whatever was
killed. A step that the bucket has is the bucket's; staging may be newer by what had not reached it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from itune.checkpoint import manifest as manifests
from itune.checkpoint.commit import commit
from itune.runtime.distributed import meet, share_a_folder
from itune.runtime.marks import mark
from itune.storage.bucket import Bucket, is_url, leads_outside, reaching
from itune.types import InputError, RunError
from itune.writers import write_atomically

RECORD = "bucket.json"  # which run this is, and who writes it: in the bucket and in staging
_CHECKPOINTS = "checkpoints"
_OURS = (_CHECKPOINTS, "export", "run.lock", RECORD)  # not mirrored with the other files of a run


@contextlib.contextmanager
def mirrored(workdir: str | os.PathLike, folder: Path) -> Iterator[Mirror | None]:
    """The Mirror of a run that begins: brought up to date before the block, uploaded to after it, however it ends.

    None for a folder of this machine, and in all processes but the first. Raises InputError where the bucket cannot be
    used, or the processes of a job have no staging folder in common; RunError when the end could not be uploaded.
    """
    if not is_url(str(workdir)):
        yield None
        return
    if not share_a_folder(folder):
        raise InputError(f"--workdir {workdir}: the machines of this job have no staging folder in common ({folder}); "
                         "mount the bucket on each (gcsfuse) and name a folder there, or let ITUNE_STAGING name a "
                         "folder that all of them share")
    mirror = None
    if jax.process_index() == 0:
        mirror = Mirror(str(workdir), folder)
        mirror.take()
    meet("run directory fetched")
    try:
        yield mirror
    except BaseException:
        if mirror:
            try:
                mirror.push_files()
            except RunError as error:
                print(f"the last files of this run stay in {folder}: {error}", flush=True)
        raise
    if mirror:
        mirror.push_files()


class TakenOver(RunError):
    """The run directory of the bucket is no longer this run's."""


class Mirror:
    """The run directory `url` of a bucket and its copy in `folder`. Errors of the bucket are one message each."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self.bucket = Bucket(url)
        self._there: dict[str, Any] = {}  # run files in the bucket -> size and time of the file here that they equal
        self._owner = ""

    def steps(self) -> list[int]:
        """The checkpoints of the bucket that have a manifest, oldest first."""
        with reaching(self.url, RunError):
            parts = [name.split("/") for name in self.bucket.list(_CHECKPOINTS)]
        found = [manifests.step_of(p[1]) for p in parts if len(p) == 3 and p[2] == manifests.NAME]
        return sorted(step for step in found if step is not None)

    def take(self, say: Callable[[str], None] = print) -> None:
        """Begin a run: staging becomes the bucket's run where it is another one or older, and the bucket is told."""
        with reaching(f"--workdir {self.url}"):
            there, theirs, mine = self._files_there(), self._their_record(), _read_record(self.folder)
            if not theirs:
                self.bucket.write(RECORD, b"{}\n")  # an error where there is no bucket: staging stays as it is
            run = theirs.get("run") or (mine.get("run") if self._has_config_of_ours(there) else None)
            if mine.get("run") != run:
                self._set_aside(say)
            if max(self.steps(), default=-1) > max(self._steps_here(), default=-1):
                say(f"fetching the run in {self.url}")
                self.fetch_files()
            else:  # a reader may have added evaluations; those of steps that run again are cut here, then there
                here = self._files_here()
                self._fetch([name for name in there if name.startswith("eval/") and name not in here])
                self._there = {name: None for name in there if name.startswith(("eval/", "crash"))}
            self._owner = uuid.uuid4().hex
            record = {"run": run or uuid.uuid4().hex, "owner": self._owner, "host": socket.gethostname(),
                      "process": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}
            write_atomically(self.folder / RECORD, json.dumps(record) + "\n")
            self._write_record()
        say(f"the run in {self.url} is worked on in {self.folder} and uploaded at every checkpoint")

    def look(self) -> None:
        """Bring a reader's copy up to date, but for checkpoints. Raises InputError where there is no run."""
        with reaching(self.url):
            if not self._files_there():
                raise InputError(f"{self.url}: not a run directory: nothing is there")
            theirs = self._their_record()
            if _read_record(self.folder).get("run") != theirs.get("run"):
                shutil.rmtree(self.folder, ignore_errors=True)
            for step in set(self._steps_here()) - set(self.steps()):
                shutil.rmtree(self._here(step))
            self.fetch_files()
            write_atomically(self.folder / RECORD, json.dumps(theirs) + "\n")

    def fetch_files(self) -> None:
        """Download all of the run but its checkpoints."""
        names = self._files_there()
        self._fetch(names)
        self._there = {name: facts for name, facts in self._files_here().items() if name in names}

    def _fetch(self, names: list[str]) -> None:
        """Download files of the run; each replaces the one here in one step."""
        arriving = self.folder / ".fetching"
        shutil.rmtree(arriving, ignore_errors=True)
        self.bucket.get(names, arriving)
        for name in names:
            if (arriving / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(arriving / name, self.folder / name)
        shutil.rmtree(arriving, ignore_errors=True)

    def push_files(self) -> None:
        """Upload what changed since it was uploaded last, checkpoints left out; remove what is gone here."""
        with reaching(self.url, RunError):
            here = self._files_here()
            changed = {name: self.folder / name for name, facts in here.items() if self._there.get(name) != facts}
            for last in (False, True):  # an evaluation counts once its summary is there
                self.bucket.put({name: path for name, path in changed.items() if (path.name == "summary.json") == last})
            self.bucket.remove([name for name in self._there if name not in here])
            self._there = here

    def push(self, step: int) -> None:
        """Upload a committed checkpoint, and before it the files of the run: metrics reach as far as checkpoints do."""
        try:
            with reaching(self.url, RunError):
                self._check_owner()
                self.push_files()
                self._remove(step)  # of an upload that was killed
                base, folder = f"{_CHECKPOINTS}/{step}", self._here(step)
                sizes = {f"{base}/{name}": facts["size"] for name, facts in
                         manifests.read_manifest(folder)["files"].items()}
                mark("upload-begin", step)
                self.bucket.put({name: folder / name.removeprefix(f"{base}/") for name in sizes},
                                each=lambda name: mark("uploading", step))
                if (there := self.bucket.sizes(base)) != sizes:
                    wrong = sorted(name for name in {*sizes, *there} if sizes.get(name) != there.get(name))
                    raise RunError(f"{self.url}/{wrong[0]} has {there.get(wrong[0], 'no')} bytes there, "
                                   f"{sizes.get(wrong[0], 'none')} were sent")
                mark("before-manifest", step)
                self.bucket.write(f"{base}/{manifests.NAME}", (folder / manifests.NAME).read_bytes())
                mark("uploaded", step)
        except RunError as error:
            again = "" if isinstance(error, TakenOver) else "; the same command on this machine uploads it"
            raise RunError(f"checkpoint of step {step} is whole in {self._here(step)} but not in the bucket{again}: "
                           f"{error}") from error

    def retain(self, superseded: Callable[[list[int]], list[int]]) -> None:
        """Remove from the bucket the steps that `superseded` names of those there, and what killed uploads left."""
        with reaching(self.url, RunError):
            for step in superseded(self.steps()):
                self._remove(step)
            whole = self.steps()
            parts = {name.split("/")[1] for name in self.bucket.list(_CHECKPOINTS)}
            for step in sorted(found for part in parts if (found := manifests.step_of(part)) is not None):
                if step not in whole and step < max(whole, default=-1):
                    self._remove(step)

    def bring(self, step: int) -> list[str]:
        """Make the checkpoint here the one of the bucket; returns its damage, a line each, as `find_damage` does."""
        with reaching(self.url, RunError):
            manifest = self._here(step) / manifests.NAME
            same = manifest.is_file() and manifest.read_bytes() == self.bucket.read(self._manifest(step))
            return [] if same and not manifests.find_damage(self._here(step), step) else self.fetch(step)

    def fetch(self, step: int, damaged: bool = False) -> list[str]:
        """Download a checkpoint and verify it; returns its damage. With damage it is kept only where that is asked."""
        checkpoints = self.folder / _CHECKPOINTS
        arriving, bucket = checkpoints / f".tmp-fetch-{step}", Bucket(f"{self.url}/{_CHECKPOINTS}/{step}")
        shutil.rmtree(arriving, ignore_errors=True)
        with reaching(bucket.url, RunError):
            arriving.mkdir(parents=True)
            bucket.get([manifests.NAME], arriving)
            with contextlib.suppress(ValueError):  # `find_damage` says what is wrong with it
                files = manifests.read_manifest(arriving)["files"]
                bucket.get([name for name in files if not leads_outside(name)], arriving)
        damage = [line.replace(str(arriving), bucket.url) for line in manifests.find_damage(arriving, step)]
        if not damage or damaged:
            shutil.rmtree(self._here(step), ignore_errors=True)
            commit(arriving, self._here(step)) if not damage else os.rename(arriving, self._here(step))
        else:
            shutil.rmtree(arriving)
        return damage

    def set_aside_after(self, step: int) -> list[int]:
        """Take their manifests from the damaged checkpoints after `step`, so that none counts; returns which."""
        later = [newer for newer in self.steps() if newer > step]
        with reaching(self.url, RunError):
            for newer in later:
                name = self._manifest(newer)
                self.bucket.write(f"{name}.damaged", self.bucket.read(name) or b"")
                self.bucket.remove([name])
        return later

    def _remove(self, step: int) -> None:
        names = self.bucket.list(f"{_CHECKPOINTS}/{step}")
        self.bucket.remove([name for name in names if name == self._manifest(step)])
        self.bucket.remove(names)

    def _manifest(self, step: int) -> str:
        return f"{_CHECKPOINTS}/{step}/{manifests.NAME}"

    def _here(self, step: int) -> Path:
        return self.folder / _CHECKPOINTS / str(step)

    def _steps_here(self) -> list[int]:
        found = (self.folder / _CHECKPOINTS).glob(f"*/{manifests.NAME}")
        return sorted(step for path in found if (step := manifests.step_of(path.parent.name)) is not None)

    def _files_here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for top in self.folder.iterdir() if self.folder.is_dir() else ():
            for path in top.rglob("*") if top.is_dir() and _mirrored(top.name) else (top,):
                name = path.relative_to(self.folder).as_posix()
                if path.is_file() and _mirrored(name):
                    found[name] = (path.stat().st_size, path.stat().st_mtime_ns)
        return found

    def _files_there(self) -> list[str]:
        return [name for name in self.bucket.list() if _mirrored(name)]

    def _their_record(self) -> dict[str, Any]:
        return _parsed(self.bucket.read(RECORD))

    def _write_record(self) -> None:
        self.bucket.write(RECORD, (self.folder / RECORD).read_bytes())

    def _has_config_of_ours(self, there: list[str]) -> bool:
        """Whether the run there is the one of staging, though the record was removed (by a rule for old objects)."""
        ours = self.folder / "config.json"
        return "config.json" in there and ours.is_file() and self.bucket.read("config.json") == ours.read_bytes()

    def _check_owner(self) -> None:
        theirs = self._their_record()
        if self._owner and not theirs:
            if not self._files_there():
                raise TakenOver(f"all of {self.url} was removed; this run ends, and stands in {self.folder}")
            self._write_record()
        elif self._owner and theirs.get("owner") != self._owner:
            raise TakenOver(f"{self.url} was taken over by another run (host {theirs.get('host')}, process "
                           f"{theirs.get('process')}, started {theirs.get('start')}); this one ends")

    def _set_aside(self, say: Callable[[str], None]) -> None:
        """Move what staging holds of another run out of the way: the bucket's was removed, or replaced."""
        others = [path for path in self.folder.iterdir() if path.name != "run.lock"]
        if others:
            names = (f"{self.folder.name}.aside{number}" for number in ("", *range(2, 1000)))
            aside = next(path for name in names if not (path := self.folder.with_name(name)).exists())
            aside.mkdir()
            for path in others:
                os.rename(path, aside / path.name)
            say(f"{self.folder} held another run than {self.url}; it now stands in {aside}; "
                f"to go on with that one, give it as --workdir")


def _mirrored(name: str) -> bool:
    parts = name.split("/")
    return parts[0] not in _OURS and not any(part.startswith(".") for part in parts)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return _parsed(path.read_bytes() if path.is_file() else None)


def _parsed(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
