"""A plan compiled in a process of its own: where libtpu finds a fault of its own, it ends the process that it is in."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import jax

from itune.config import Config, from_dict
from itune.plan.chips import Slice, parse_topology
from itune.plan.estimate import Estimate
from itune.plan.inputs import Known, sizes_only
from itune.plan.memory import Need
from itune.plan.report import Report
from itune.runtime.secrets import redact
from itune.runtime.supervisor import end_with_parent
from itune.types import InputError, RunError


class OutOfTime(RunError):
    """It was not compiled within the time that it was given."""


def compiled_apart(
    config: Config, where: Slice, facts: Known, table: dict[str, Any], seconds: float | None = None
) -> Report:
    """`itune.plan.run.compiled_report`, called in a process that may die of it and whose memory goes back with it.

    Raises RunError with what the compiler said where it refused the program or ended its process, or the system did;
    OutOfTime, a RunError, where it has not ended within so many seconds.
    """
    tokenizer, loader = facts.data.tokenizer, facts.data.loader
    asked = {
        "config": config.to_dict(), "topology": where.name, "prices": {where.chip.name: table.get(where.chip.name)},
        "facts": {"steps": facts.steps, "source": facts.source, "rows_full": facts.rows_full},
        "sizes": [tokenizer.vocab_size, len(tokenizer.added_tokens), loader.total_steps, loader.max_segments],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "TMPDIR": folder, "ITUNE_SUPERVISED": str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # -P: nothing of the current folder in its place
        }  # fmt: skip
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "itune.plan.apart", str(answer)], input=json.dumps(asked, default=str),
                text=True, errors="replace", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise OutOfTime(f"{where.name}: not compiled within {seconds:.0f} s") from error
        found = json.loads(answer.read_text()) if done.returncode == 0 else {}
    if done.returncode:
        raise RunError(redact(f"{where.name}: {_ended(done.returncode, done.stderr)}"))
    # jaxlib prints where it fails to read back some programs, for which compile.py has another way
    said = re.sub(r"(?s)^E\d{4}[^\n]*RET_CHECK.*?End stack trace \*\*\*\n*", "", done.stderr, flags=re.M)
    sys.stderr.write(redact(said))
    for key, kind in (("wrong", InputError), ("refused", RunError), ("bug", RuntimeError)):
        if key in found:
            raise kind(found[key])
    return Report(**{**found, "where": where, "need": Need(**found["need"]), "time": Estimate(**found["time"])})


def _ended(code: int, said: str) -> str:
    if code == -signal.SIGKILL:
        return (
            "the process that compiles was killed (SIGKILL), as a system does that runs out of memory; free some, or "
            "plan with --formula, which compiles nothing"
        )
    lines = [line for line in said.splitlines() if line.strip()] or ["nothing"]
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]
    words = re.sub(r"^F\d{4} .*?\] ", "", (fatal or lines)[0 if fatal else -1])
    if code > 0 and not fatal:
        return f"the process that compiles ended with exit code {code}, saying: {words}"
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return (
        f"the compiler ended its process {how}, saying: {words}\n"
        "A run on these chips would end in the same way. Change the mesh, train.remat or the slice; --formula compiles "
        "nothing"
    )


def main(answer: str) -> None:
    """In the process of its own: what is asked on standard input, the answer in a file."""
    from itune.plan.run import compiled_report

    end_with_parent()
    asked = json.load(sys.stdin)
    facts = Known(sizes_only(*asked["sizes"]), **asked["facts"])
    try:
        where = parse_topology(asked["topology"])
        report = compiled_report(from_dict(asked["config"]), where, facts, asked["prices"])
        found = dataclasses.asdict(report)
    except InputError as error:
        found = {"wrong": str(error)}
    except jax.errors.JaxRuntimeError as error:
        found = {"refused": f"{asked['topology']}: the compiler refused the program: {str(error).splitlines()[0]}"}
    except Exception:  # a bug: the other process tells of it; whoever ends this one without a word is the compiler
        found = {"bug": traceback.format_exc()}
    Path(answer).write_text(json.dumps(found, default=float))


if __name__ == "__main__":
    main(sys.argv[1])
