"""The command line: verbs -> one call each; nothing else."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast

from itune import __version__
from itune.at_hand import at_hand, by_url
from itune.runtime.cuda import set_up_jax
from itune.runtime.libtpu import quiet_without_tpu
from itune.runtime.output import drop_output, make_output_safe
from itune.storage.cache import local_workdir
from itune.targets import check_targets
from itune.types import InputError, RunError
from itune.usage import build_parser
from itune.writers import plain


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 1 the run failed, 2 the input is wrong, 143 preempted."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    make_output_safe()
    parser = build_parser(__version__)
    given = [_at_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments, rest = parser.parse_known_args(given)
    if not arguments.verb:
        parser.print_help()
        return 2
    try:
        if rest and "config" not in arguments:
            raise InputError(f"argument {rest[0]!r} is not understood; see itune {arguments.verb} --help")
        arguments.overrides, arguments.words = rest, given
        quiet_without_tpu()
        set_up_jax()
        check_targets(arguments)
        with _hidden_secrets(arguments.verb), at_hand(arguments):
            return VERBS[arguments.verb](arguments)
    except (InputError, RunError) as error:
        from itune.runtime.secrets import redact

        print(f"itune: {redact(by_url(arguments, str(error)))}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("itune: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        drop_output()
        return 0
    except Exception as error:
        import traceback

        from itune.runtime.crash import explained, of_the_machine, without_device
        from itune.runtime.secrets import redact

        if isinstance(error, RuntimeError | AssertionError) and (wrong := without_device()):
            print(f"itune: {wrong}", file=sys.stderr)
            return 2
        if of_the_machine(error):
            print(f"itune: {redact(by_url(arguments, explained(error)))}", file=sys.stderr)
            return 1
        # a bug: its traceback helps us, with no secret in it
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        print(f"itune: {arguments.verb} failed; this is a bug of itune: please report the lines above", file=sys.stderr)
        return 1


def _at_home(word: str) -> str:
    """`--key=~/path` with the home folder in it: a shell does not expand that."""
    key, equals, value = word.partition("=")
    return f"{key}={os.path.expanduser(value)}" if equals and key.startswith("--") and value[:2] == "~/" else word


def _hidden_secrets(verb: str) -> Any:
    """What a verb prints passes through `redact`, but for the answers of a model: they are not ours to change."""
    from itune.runtime.secrets import HidingStream

    return contextlib.nullcontext() if verb in ("chat", "generate") else contextlib.redirect_stdout(
        cast(TextIO, HidingStream(sys.stdout)))


def _config(arguments: argparse.Namespace) -> Any:
    from itune.config import load_config, parse_overrides

    overrides = {**parse_overrides(arguments.overrides), **getattr(arguments, "settings", {})}
    return load_config(arguments.config, overrides)


def _finish(arguments: argparse.Namespace, result: Any) -> int:
    """Write a verb's numbers, unrounded, where --json asks for them: of a job of several processes the first does."""
    if arguments.json and _is_first():
        try:
            Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.json).write_text(
                by_url(arguments, json.dumps(result, indent=2, default=plain)) + "\n")
        except OSError as error:
            raise InputError(f"--json {arguments.json}: cannot be written: {error.strerror}") from error
    return 0


def _is_first() -> bool:
    """Of the job that the verb joined, if it joined one; asked without starting a device."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _demo(arguments: argparse.Namespace) -> int:
    from itune.demo.run import main as run_demo

    return _finish(arguments, run_demo(workdir=arguments.workdir))


def _train(arguments: argparse.Namespace) -> int:
    from itune.runtime import supervisor

    if supervisor.wanted(arguments.restart_on_failure):
        _config(arguments)  # what is wrong in it is said at once
        command = [sys.executable, "-m", "itune", *arguments.words]
        return supervisor.supervise(command, arguments.restart_on_failure, local_workdir(arguments.workdir))
    supervisor.end_with_parent()
    gc.disable()  # until the step is there (ahead.py): imports and tracing keep what they make; 1/8 of a warm start
    from itune.kept_step import kept_steps
    from itune.loop import train

    with kept_steps():
        result = train(_config(arguments), workdir=arguments.workdir)
    _finish(arguments, result.summary)
    return 143 if result.preempted else 0


def _plan(arguments: argparse.Namespace) -> int:
    import jax

    from itune.plan.run import plan

    if arguments.topology:  # of chips elsewhere: no device of this machine is taken
        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
    result = plan(
        _config(arguments), arguments.topology, search=arguments.search, compiled=not arguments.formula,
        price_file=arguments.prices,
    )
    _finish(arguments, result)
    return 0 if result.get("best", result)["fits"] else 1


def _eval(arguments: argparse.Namespace) -> int:
    from itune.saved_run import evaluate_saved

    if arguments.lm_eval_path and not arguments.lm_eval:
        raise InputError("--lm-eval-path: goes with --lm-eval; in a config it is eval.lm_eval_path")
    if arguments.lm_eval:
        tasks = tuple(name.strip() for name in arguments.lm_eval.split(",") if name.strip())
        arguments.settings = {"evaluators": ("lm_eval",), "eval.lm_eval": tasks}
        if arguments.lm_eval_path:
            arguments.settings["eval.lm_eval_path"] = arguments.lm_eval_path
    return _finish(arguments, evaluate_saved(
        _config(arguments), workdir=arguments.workdir, step=arguments.step, model_folder=arguments.model,
        out=arguments.out, base=arguments.base,
    ))


def _export(arguments: argparse.Namespace) -> int:
    from itune.export import export_adapter, export_run

    if arguments.adapter:
        return _finish(arguments, export_adapter(arguments.workdir, arguments.out, step=arguments.step))
    return _finish(arguments, export_run(
        arguments.workdir, arguments.out, step=arguments.step, dtype=arguments.dtype, check=arguments.check,
        max_shard_bytes=arguments.shard_gb * 1e9,
    ))


def _generate(arguments: argparse.Namespace) -> int:
    from itune.chat import generate_file

    return _finish(arguments, generate_file(
        arguments.model, arguments.prompts, max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature, seed=arguments.seed, out=arguments.out,
    ))


def _chat(arguments: argparse.Namespace) -> int:
    from itune.chat import chat

    chat(arguments.model, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature)
    return 0


def _checkpoints(arguments: argparse.Namespace) -> int:
    from itune.checkpoint.listing import list_checkpoints, table

    rows = list_checkpoints(arguments.workdir)
    print(table(rows))
    return max(_finish(arguments, rows), int(any(row["damage"] for row in rows)))


def _report(arguments: argparse.Namespace) -> int:
    from itune.report import report_numbers, write_report

    print(write_report(arguments.workdir, arguments.other, arguments.out))
    return _finish(arguments, report_numbers(arguments.workdir, arguments.other) if arguments.json else None)


def _verify(arguments: argparse.Namespace) -> int:
    from itune.verify import verify

    result = verify(_config(arguments), arguments.workdir, only=arguments.only or ())
    return max(_finish(arguments, result), int(not result["passed"]))


def _data(arguments: argparse.Namespace) -> int:
    from itune.data import report, show

    config = _config(arguments)
    if arguments.action == "score":
        from itune.saved_run import score_data

        return _finish(arguments, score_data(
            config, workdir=arguments.workdir, step=arguments.step, model_folder=arguments.model, out=arguments.out,
            limit=arguments.limit,
        ))
    if arguments.action in ("report", "split"):
        return _finish(arguments, getattr(report, arguments.action)(config, arguments.out))
    if arguments.action == "stats":
        return _finish(arguments, show.stats(config))
    return _finish(arguments, show.show(
        config, index=arguments.index, source=arguments.source, limit=arguments.limit, random=arguments.random,
        worst=arguments.worst,
    ))


VERBS = {
    "demo": _demo, "train": _train, "plan": _plan, "eval": _eval, "export": _export, "generate": _generate,
    "chat": _chat, "report": _report, "data": _data, "checkpoints": _checkpoints,
    "verify": _verify,
}
