"""Runs `itune train` once for each plan of a list, in forks of one process that has imported everything already.

    python killed_runs.py PLANS.json     [{"arguments": [...], "environment": {...}, "log": FILE}, ...] -> exit codes

A process that starts from nothing spends seconds on imports; fifty of them would spend minutes.
"""

import json
import os
import sys

import itune.loop  # noqa: F401
from itune.cli import main


def run(plan):
    """Exit code of one run; minus the signal's number when one ended it."""
    child = os.fork()
    if child == 0:
        log = os.open(plan["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(plan["environment"])
        code = main(plan["arguments"])
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    import transformers.tokenization_utils_tokenizers  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401

    with open(sys.argv[1]) as stream:
        print(json.dumps([run(plan) for plan in json.load(stream)]))
