"""The loss contract, run on a user's own config, model and data: what must change no number is shown to change none.

Each row of the table is a pair of runs from the same state over the same examples, for a few small steps in float32.
`docs/verify.md` says what each row means and how to read a failure.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from itune.config import Config
from itune.runtime import distributed
from itune.runtime.compilation import use_compilation_cache
from itune.types import InputError
from itune.verify.bench import Bench
from itune.verify.cases import CASES, WHOLE_RUNS
from itune.verify.devices import ask_for_cpu_devices
from itune.verify.small import LEARNING_RATE, STEPS, make_small
from itune.verify.table import HEADER, Row, summarise, timed

Log = Callable[[str], None]


def say(text: str) -> None:
    print(text, flush=True)


def verify(
    config: Config, workdir: str | Path | None = None, *, only: Sequence[str] = (), log: Log = say
) -> dict[str, Any]:
    """Run every pair of the loss contract on `config`, print the table, and return it.

    -> {"passed", "settings", "notes", "rows": [{"name", "loss", "grad_norm", "parameters" (largest relative
    differences, None where they are not compared), "bounds", "passed" (None where the row is impossible), "reason",
    "seconds"}]}. Runs and exports stand in `workdir` afterwards; without it they are removed. `only` names the cases
    to run (keys of `CASES`; default all). On a CPU this needs eight devices, which it asks for unless jax has started.
    Raises InputError for a config that cannot be run at all.
    """
    if unknown := [name for name in only if name not in CASES]:
        raise InputError(f"verify: no case {unknown[0]!r}; cases are {', '.join(CASES)}")
    ask_for_cpu_devices()
    distributed.start()
    if jax.process_count() > 1:
        raise InputError("verify: runs as one process; found several; run it on one host, outside the job")
    use_compilation_cache()
    with _folder(workdir) as folder:
        small = make_small(config)
        bench = Bench(small.config, small.data, folder)
        settings = _settings(small.config)
        titles = {name: case.title.format(all=bench.devices, half=bench.devices // 2) for name, case in CASES.items()}
        log(f"itune verify: {config.model.path} in float32 on {settings['devices']} {settings['platform']} device(s)")
        log(f"{STEPS} steps of {settings['rows']} rows of {settings['length']} tokens, learning rate {LEARNING_RATE:g}")
        for note in small.notes:
            log(f"note: {note}")
        log(HEADER)
        rows: list[Row] = []
        if set(only or CASES) - WHOLE_RUNS:
            _ = bench.reference  # an InputError here is about the config, and about no row
        for name in only or CASES:
            row = timed(titles[name], functools.partial(CASES[name].run, bench))
            log(row.line())
            rows.append(row)
    log(summarise(rows))
    failed = any(row.passed is False for row in rows)
    return {"passed": not failed, "settings": settings, "notes": small.notes, "rows": [row.to_dict() for row in rows]}


def _settings(config: Config) -> Mapping[str, Any]:
    return {
        "model": config.model.path, "devices": jax.device_count(), "platform": jax.devices()[0].platform.upper(),
        "steps": STEPS, "rows": config.train.batch_size, "length": config.data.max_length,
        "learning_rate": LEARNING_RATE,
    }  # fmt: skip


@contextlib.contextmanager
def _folder(workdir: str | Path | None) -> Iterator[Path]:
    """A new folder in `workdir`, or one that is removed afterwards."""
    if workdir is None:
        with tempfile.TemporaryDirectory(prefix="itune-verify-") as name:
            yield Path(name)
        return
    folder = Path(workdir)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--workdir {folder}: is not empty; name a new folder for the runs that verify makes")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
