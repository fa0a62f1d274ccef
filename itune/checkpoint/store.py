"""The checkpoints of one run: saved in the background, committed by one rename, verified before use.

    checkpoints/<step>/  arrays/ (Orbax)     run.json (data position, config, shapes)
                         manifest.json (size and SHA-256 of every file)

Orbax writes into `.tmp-<step>`; a thread of ours waits for it, adds `run.json`, hashes every file, writes the manifest
and renames the folder. So a folder named by a number is whole, or was damaged after it was written. On a mounted
bucket, where the rename of a folder is many renames, the manifest comes last: a folder without one is none.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from itune.checkpoint import manifest as manifests
from itune.checkpoint.commit import commit, remove_while_written
from itune.checkpoint.mirror import Mirror
from itune.checkpoint.retention import steps_to_delete
from itune.runtime.distributed import meet
from itune.runtime.marks import mark
from itune.types import InputError, RunError

_TEMPORARY = ".tmp-"
_ARRAYS = "arrays"
_SPARE_BYTES = 16 << 20  # room for the manifest, logs and the file system's own needs


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside its arrays: `data` is the position in the data, `config` the resolved config."""

    step: int
    data: dict[str, Any]
    config: dict[str, Any]


def _no_metrics(step: int) -> Mapping[str, float]:
    return {}


class Store:
    """Saves and restores the checkpoints of one run directory.

    Args:
      folder: the `checkpoints` folder. Only a store that saves creates or changes anything in it.
      keep: how many of the newest checkpoints stay.
      keep_best: a metric whose best checkpoint stays too, such as `heldout_loss/loss`.
      metrics: step -> numbers of its evaluation, named as `keep_best` names them; {} where there was none.
      log: takes one line of text.
      keep_every: checkpoints whose step is a multiple of this stay too; 0 is none.
      mirror: the run directory in a bucket whose copy `folder` is in (of the first process).

    With several processes every one calls the same methods at the same steps; the folder must be shared by all.
    """

    def __init__(
        self, folder: str | os.PathLike, keep: int = 2, keep_best: str = "", *,
        metrics: Callable[[int], Mapping[str, float]] = _no_metrics, log: Callable[[str], None] = print,
        keep_every: int = 0, mirror: Mirror | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.keep, self.keep_best, self.metrics, self.log = keep, keep_best, metrics, log
        self.keep_every, self.mirror = keep_every, mirror
        self._thread: threading.Thread | None = None
        self._failure: RunError | None = None
        self._deleting = threading.Lock()

    def steps(self) -> list[int]:
        """The steps of committed checkpoints, oldest first; ordered by step, never by clock."""
        return [step for step in self._numbered() if (self.path(step) / manifests.NAME).is_file()]

    def latest(self) -> int | None:
        """The newest committed step, unverified; None when there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def size(self, step: int) -> int:
        """Bytes of all files of a checkpoint, as its manifest states them."""
        return sum(file["size"] for file in manifests.read_manifest(self.path(step))["files"].values())

    def verify(self, step: int) -> list[str]:
        """What is damaged in this checkpoint, a line for each file; empty when it is whole."""
        return manifests.find_damage(self.path(step), step)

    def newest_good(self) -> int | None:
        """The newest step that verifies; None when no checkpoint was ever written. Every damaged one is reported.

        Raises RunError when there are checkpoints but all are damaged.
        """
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            found = self.newest_good_here() if jax.process_index() == 0 else None
            meet("checkpoint found")  # it may take long, and what follows may not
            shared = int(multihost_utils.broadcast_one_to_all(-1 if found is None else found))
            return None if shared < 0 else shared
        return self.newest_good_here()

    def check_named(self, step: int) -> None:
        """Raise when the step that a user asked for does not exist (InputError) or is damaged (RunError)."""
        if not self.path(step).is_dir():
            have = ", ".join(map(str, self.steps())) or "none"
            raise InputError(f"{self.folder}: no checkpoint of step {step}; steps here: {have}")
        if damage := self.verify(step):
            raise RunError(f"checkpoint of step {step} was asked for by name and is damaged: {'; '.join(damage)}")

    def read(self, step: int) -> Saved:
        """Data position and config of a checkpoint."""
        run = json.loads((self.path(step) / "run.json").read_text())
        return Saved(step=step, data=run["data"], config=run["config"])

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a verified step, placed as the shardings of `abstract_state` say: any mesh will do.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings, of the structure that was saved.
        Raises RunError listing every array that is missing, extra, or of another shape or dtype.
        """
        from orbax.checkpoint import v1 as ocp

        self._check_shapes(step, describe(abstract_state), whole=True)
        return ocp.load(self.path(step) / _ARRAYS, abstract_state)

    def restore_part(self, step: int, name: str, abstract: Any) -> Any:
        """One field of the saved TrainState alone, such as `trainable`, placed as `abstract` says."""
        from orbax.checkpoint import v1 as ocp

        self._check_shapes(step, describe({name: abstract}), whole=False)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            return ocp.load(self.path(step) / _ARRAYS, {name: abstract})[name]

    def open(self) -> None:
        """Create the folder and remove what a killed run left half written. Call under the run's lock."""
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(f"{_TEMPORARY}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def set_aside_after(self, step: int) -> None:
        """Rename the damaged checkpoints newer than the step that a run goes on from, so that none counts as kept."""
        if jax.process_index() != 0:
            return
        for newer in [n for n in self._numbered() if n > step]:
            aside = self.folder / f"damaged-{newer}"
            shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)
            os.rename(self.path(newer), aside)
            self.log(f"the damaged checkpoint of step {newer} now stands in {aside}")
        if self.mirror:
            for newer in self.mirror.set_aside_after(step):
                self.log(f"the damaged checkpoint of step {newer} in {self.mirror.url} has no manifest any more")

    def check_space(self, state: Any) -> None:
        """Raise RunError when the disk has no room for one checkpoint of this state (arrays or their shapes)."""
        if jax.process_index() != 0:
            return
        need = state_bytes(state) + _SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise RunError(
                f"out of disk: a checkpoint needs {need / 1e9:.2f} GB, {self.folder} has {free / 1e9:.2f} GB free"
                f"{self._last_good()}; free some space or choose another --workdir"
            )

    def space_warning(self, state: Any) -> str:
        """A warning when the disk has room for a checkpoint but not for all that are kept and the next one; else ''."""
        need = state_bytes(state) * (self.keep + 1) + _SPARE_BYTES
        here = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free + here
        if free >= need:
            return ""
        return (f"warning: {self.keep} checkpoints (checkpoint.keep) and the next one need {need / 1e9:.2f} GB, "
                f"{self.folder} has room for {free / 1e9:.2f} GB")

    def save(self, step: int, state: Any, *, data: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Copy `state` to the host and return; the rest happens in the background.

        A save that is still running is waited for. Its failure, or that of the copy, is raised here as RunError.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        self.check_space(state)
        logging.getLogger("absl").addFilter(_told_elsewhere)
        mark("save-begin", step)
        temporary = self.folder / f"{_TEMPORARY}{step}"
        run = {"step": step, "data": dict(data), "config": dict(config), "arrays": describe(state)}
        try:
            response = ocp.save_async(temporary / _ARRAYS, state)
        except (OSError, ValueError, RuntimeError) as error:
            self._discard(temporary)
            raise self._failed(step, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(step, temporary, run, response), name=f"checkpoint-{step}"
        )
        self._thread.start()

    def retain(self) -> None:
        """Delete what neither `keep` nor `keep_best` covers. A save does it; call it again after an evaluation."""
        if jax.process_index() == 0:
            with self._deleting:
                for step in self._superseded(self.steps()):
                    self._remove(self.path(step))

    def _superseded(self, steps: list[int]) -> list[int]:
        return steps_to_delete({step: self.metrics(step) for step in steps}, self.keep, self.keep_best, self.keep_every)

    def check(self) -> None:
        """Raise RunError when a save in the background has failed. Cheap: call it every step."""
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait until the save in the background is committed; raise RunError when it failed."""
        if self._thread:
            self._thread.join()
            self._thread = None
            self.check()
            meet("checkpoint committed")  # process 0 renames: nobody may look before
        self.check()

    def close(self) -> None:
        """Let the save in the background end, whether it succeeds or not: nobody else may write here before."""
        if self._thread:
            self._thread.join()

    def _check_shapes(self, step: int, wanted: dict[str, str], whole: bool) -> None:
        saved = json.loads((self.path(step) / "run.json").read_text())["arrays"]
        names = sorted({*wanted, *saved}) if whole else sorted(wanted)
        wrong = [
            f"{name}: {saved.get(name, 'nothing')} saved, {wanted.get(name, 'nothing')} expected"
            for name in names if saved.get(name) != wanted.get(name)
        ]
        if wrong:
            raise RunError(f"{self.path(step)}: {len(wrong)} arrays do not fit this model: {'; '.join(wrong)}")

    def _finish(self, step: int, temporary: Path, run: dict[str, Any], response: Any) -> None:
        try:
            response.result()
            mark("arrays-written", step)
            if jax.process_index() == 0:
                (temporary / "run.json").write_text(json.dumps(run, indent=1) + "\n")
                manifests.write_manifest(temporary, step=step)
                mark("before-commit", step)
                self._commit(step, temporary)
                mark("committed", step)
                self.retain()
                mark("retained", step)
                self._upload(step)
        except BaseException as error:  # handed to the loop, which raises it at its next step
            self._discard(temporary)
            self._failure = self._failed(step, error)

    def _upload(self, step: int) -> None:
        if self.mirror:
            self.mirror.push(step)
            self.mirror.retain(self._superseded)

    def _commit(self, step: int, temporary: Path) -> None:
        if self.path(step).exists():  # damaged, or of a run that went back to an earlier step
            self._remove(self.path(step))
        commit(temporary, self.path(step))

    def _remove(self, path: Path) -> None:
        """Delete a checkpoint: renamed first, so that no reader ever sees half of it."""
        aside = self.folder / f"{_TEMPORARY}delete-{path.name}"
        os.rename(path, aside)
        shutil.rmtree(aside)

    def _discard(self, temporary: Path) -> None:
        if jax.process_index() == 0:
            remove_while_written(temporary)

    def newest_good_here(self) -> int | None:
        """`newest_good` of this process alone, before it has joined a job."""
        there = self.mirror.steps() if self.mirror else []
        steps = sorted({*self._numbered(), *there})
        for step in reversed(steps):
            damage = self.mirror.bring(step) if self.mirror and step in there else self.verify(step)
            if not damage:
                if step not in there:  # killed before it had reached the bucket
                    self._upload(step)
                return step
            self.log(f"checkpoint of step {step} is damaged and is passed over: {'; '.join(damage)}")
        if steps:
            where = self.mirror.url if self.mirror else self.folder
            raise RunError(
                f"{where}: every checkpoint is damaged (steps {', '.join(map(str, steps))}); "
                "to start again, choose another --workdir or delete this one"
            )
        return None

    def _numbered(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        folders = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted(step for name in folders if (step := manifests.step_of(name)) is not None)

    def _last_good(self) -> str:
        latest = self.latest()
        return "" if latest is None else f"; the checkpoint of step {latest} is kept"

    def _failed(self, step: int, error: BaseException) -> RunError:
        if isinstance(error, RunError):  # of the mirror, which says all
            return error
        return RunError(
            f"checkpoint of step {step} could not be saved in {self.folder}: {_line(error)}{self._last_good()}"
        )


def describe(state: Any) -> dict[str, str]:
    """Path -> dtype and shape of every array of a pytree, for people and for the check before a restore."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def state_bytes(state: Any) -> int:
    """Bytes of a pytree of arrays or shapes, all shards together."""
    total = 0
    for leaf in jax.tree.leaves(state):
        itemsize = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += leaf.size * itemsize
    return total


def _told_elsewhere(record: logging.LogRecord) -> bool:
    """Leaves out the traceback that Orbax prints from each of its threads when a save fails: the run says it once."""
    return "_SignalingThread" not in record.getMessage()


def _line(error: BaseException) -> str:
    """The first line of an error that says something."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:500]
