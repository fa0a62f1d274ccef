"""Runs `itune train` once for each plan of a list, in forks of one process that has imported everything already.

    python killed_runs.py PLANS.json    -> exit codes. A plan that is a list of plans is one job of several processes.

    {"arguments": [...], "environment": {...}, "log": FILE}, and if wanted
    "batches": FILE             a line [step, hash of each row of this process] a batch
    "at": {"phase:step" or "start": COMMAND or bytes}   there run the shell command, or let no file grow past the bytes

When a process has left, LOG.left is written: its time of change is when. A process that starts from nothing spends
seconds on imports; fifty of them would spend minutes.
"""

import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys

import itune.checkpoint.store
import itune.loop
from itune.cli import main


def start(plan):
    """The process id of a run."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # the run itself, with no supervisor: this process is its parent
    os.environ.update({**plan["environment"], "ITUNE_SUPERVISED": str(parent)})
    if "batches" in plan:
        record_batches(plan["batches"])
    if "at" in plan:
        act_at_marks(plan["at"])
    code = main(plan["arguments"])
    sys.stdout.flush()
    os._exit(code)


def record_batches(path):
    feed = itune.loop.feed

    def recording(batches, mesh, **rows):
        def told():
            with open(path, "a") as stream:
                for step, batch in batches:
                    rows = [hashlib.sha256(b"".join(array[row].tobytes() for array in batch)).hexdigest()[:16]
                            for row in range(len(batch.tokens_BL))]
                    stream.write(json.dumps([step, rows]) + "\n")
                    stream.flush()
                    yield step, batch

        return feed(told(), mesh, **rows)

    itune.loop.feed = recording


def act_at_marks(actions):
    mark = itune.checkpoint.store.mark

    def acting(phase, step):
        mark(phase, step)
        if (action := actions.get(f"{phase}:{step}")) is None:
            return
        if isinstance(action, int):
            resource.setrlimit(resource.RLIMIT_FSIZE, (action, resource.RLIM_INFINITY))
        else:
            subprocess.run(["sh", "-c", action], check=True)

    if "start" in actions:
        subprocess.run(["sh", "-c", actions["start"]], check=True)
    itune.checkpoint.store.mark = acting


def run(plan):
    """Exit code of one run, or the list of a job's; minus the signal's number when one ended it."""
    plans = plan if isinstance(plan, list) else [plan]
    codes = []
    for one, child in zip(plans, [start(one) for one in plans]):
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        pathlib.Path(f"{one['log']}.left").touch()
    return codes if isinstance(plan, list) else codes[0]


if __name__ == "__main__":
    import transformers.tokenization_utils_tokenizers  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401

    with open(sys.argv[1]) as stream:
        print(json.dumps([run(plan) for plan in json.load(stream)]))
