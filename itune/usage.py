"""What the command line understands: verbs, options, help texts with an example each."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from typing import Any

START = """start here:
  itune demo
  itune train --config sft --config.model.path=MODEL --config.data.train=FILE --workdir runs/x

every config key can be set on the command line: --config.optimizer.learning_rate=1e-5"""

_CONFIG_HELP = "a recipe's file or shipped name (sft), or a run's config.json"
_TRAIN_EXAMPLE = "itune train --config sft --config.model.path=MODEL --config.data.train=my.jsonl --workdir runs/x"


def _whole(lowest: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number of at least this."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}, found {text!r}")
        return int(text)

    return parse


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated options."""

    def __init__(self, **kwargs: Any) -> None:
        shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**kwargs, **shape})

    def error(self, message: str) -> Any:
        choice = re.match(r".*invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1) if choice else []
        message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"itune: {message}; see {self.prog} --help\n")


def build_parser(version: str) -> Parser:
    """The parser of all verbs; the chosen verb is in `.verb` (and `.action` for data)."""
    parser = Parser(
        prog="itune", description="From a pretrained language model to one that follows instructions.", epilog=START
    )
    parser.add_argument("--version", action="version", version=f"itune {version}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    sub = _verb(verbs, "demo", "the whole job on a small model, offline, in minutes", "itune demo")
    sub.add_argument("--workdir", default="runs/demo", metavar="DIR", help="where the run goes (default: runs/demo)")
    _json(sub)

    sub = _verb(verbs, "train", "tune a model; the same command again resumes", _TRAIN_EXAMPLE)
    _config(sub)
    sub.add_argument("--workdir", required=True, metavar="DIR", help="the run directory: a folder, gs://... or s3://...")
    sub.add_argument("--restart-on-failure", type=_whole(0), default=0, metavar="N",
                     help="start again after a failure, until N restarts bring no new step (default 0)")
    _json(sub)

    sub = _verb(verbs, "plan", "what a run needs and takes on chips that need not be here",
                "itune plan --config sft --config.model.path=MODEL --topology v5e:4x4 --config.train.max_steps=1000")
    _config(sub)
    sub.add_argument("--topology", metavar="SLICE",
                     help="v5e:4x4, v6e:2x4, v5p:2x2x1, gpu:h200:8, 2*v5e:4x4 for two slices (default: this machine)")
    sub.add_argument("--search", action="store_true",
                     help="the fastest mesh, micro-batch and rematerialisation that fits")
    sub.add_argument("--formula", action="store_true", help="compile nothing: within about 15 %%, in seconds")
    sub.add_argument("--prices", metavar="FILE", help="another price table (default: the shipped prices.toml)")
    _json(sub)

    sub = _verb(verbs, "eval", "judge a checkpoint or a model folder on held-out items",
                "itune eval --config runs/x/config.json --workdir runs/x")
    _config(sub)
    _judged(sub)
    sub.add_argument("--base", action="store_true", help="judge the base model (model.path) too and compare in pairs")
    sub.add_argument("--lm-eval", metavar="TASK[,TASK]", help="run tasks of lm-evaluation-harness instead")
    sub.add_argument("--lm-eval-path", metavar="DIR", help="a folder with task files of your own")
    _json(sub)

    sub = _verb(verbs, "export", "write a run's model as a Hugging Face folder, proven by reloading it",
                "itune export --workdir runs/x --out models/x")
    sub.add_argument("--workdir", required=True, metavar="DIR", help="a run directory")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    sub.add_argument("--step", type=_whole(0), metavar="N", help="checkpoint of this step (default: the newest)")
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights (default: the source's)")
    kind.add_argument("--adapter", action="store_true", help="a LoRA run's adapters as a folder of peft, not merged")
    sub.add_argument("--shard-gb", type=float, default=5.0, metavar="N", help="largest weight file, GB (default 5)")
    sub.add_argument("--check", choices=("transformers",), help="have it load the folder and compare logits as well")
    _json(sub)

    sub = _verb(verbs, "generate", "answer the prompts of a file",
                "itune generate --model models/x --prompts questions.txt")
    _model(sub)
    sub.add_argument("--prompts", required=True, metavar="FILE", help="text (a prompt a line) or JSONL")
    sub.add_argument("--out", metavar="FILE", help="write the answers there as JSONL")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="sampling seed (default 0)")
    _json(sub)

    _model(_verb(verbs, "chat", "talk to a model in the terminal", "itune chat --model models/x"))

    sub = _verb(verbs, "verify", "prove on your config, model and data that no setting changes the loss",
                "itune verify --config demo")
    _config(sub)
    sub.add_argument("--workdir", metavar="DIR", help="a new folder that keeps the runs (default: they are removed)")
    sub.add_argument("--only", action="append", metavar="CASE", help="run this case alone; may be repeated")
    _json(sub)

    sub = _verb(verbs, "checkpoints", "list a run's checkpoints, each verified", "itune checkpoints runs/x")
    sub.add_argument("workdir", metavar="DIR", help="a run directory")
    _json(sub)

    sub = _verb(verbs, "report", "write a run's report page, or compare two", "itune report runs/x runs/y")
    sub.add_argument("workdir", metavar="DIR", help="a run directory")
    sub.add_argument("other", metavar="DIR", nargs="?", help="a second one, to compare with")
    sub.add_argument("--out", metavar="FILE", help="the page to write (default: report.html in the first directory)")
    _json(sub)

    data = _verb(verbs, "data", "look at the data before spending compute", "itune data stats --config sft ...")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    arguments = "--config sft --config.model.path=MODEL --config.data.train=my.jsonl"
    sub = _verb(actions, "show", "decoded examples, coloured by weight, with tokens and truncation",
                f"itune data show {arguments}")
    _config(sub)
    sub.add_argument("--index", type=_whole(0), metavar="I", help="one example by its number")
    sub.add_argument("--source", metavar="NAME", help="examples of this source only")
    sub.add_argument("--limit", type=_whole(1), default=3, metavar="N", help="how many examples (default 3)")
    sub.add_argument("--random", type=_whole(0), metavar="SEED", help="examples drawn at random with this seed")
    sub.add_argument("--worst", metavar="SCORES", help="worst first, by the data_scores.jsonl of itune data score")
    _json(sub)
    sub = _verb(actions, "stats", "lengths, drops with reasons, packing efficiency, steps per epoch",
                f"itune data stats {arguments}")
    _config(sub)
    _json(sub)
    sub = _verb(actions, "report", "a page: rows in and out with reasons, lengths, quality, balance, what is held out",
                f"itune data report {arguments} --out data-report")
    _config(sub)
    _out(sub, "data-report")
    _json(sub)
    sub = _verb(actions, "split", "files to train on and to judge by, with the proof that they share nothing",
                "itune data split --config sft --config.data.train=my.jsonl --config.data.held_out_share=0.1")
    _config(sub)
    _out(sub, "data-split")
    _json(sub)
    sub = _verb(actions, "score", "rank the training examples by how little a tuned model expects their answers",
                "itune data score --config runs/x/config.json --workdir runs/x")
    _config(sub)
    _judged(sub)
    sub.add_argument("--limit", type=_whole(0), default=10, metavar="N",
                     help="how many of the worst to print (default 10)")
    _json(sub)
    return parser


def _judged(sub: Parser) -> None:
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", metavar="DIR", help="a run directory")
    which.add_argument("--model", metavar="FOLDER", help="a model folder or hub id")
    sub.add_argument("--step", type=_whole(0), metavar="N", help="checkpoint of this step (default: the newest)")
    sub.add_argument("--out", metavar="DIR", help="where the items go (default: the run's eval folder, or eval-MODEL)")


def _out(sub: Parser, default: str) -> None:
    sub.add_argument("--out", default=default, metavar="DIR", help=f"where the files go (default: {default})")


def _verb(parent: Any, name: str, summary: str, example: str) -> Parser:
    return parent.add_parser(name, help=summary, description=summary, epilog=f"example:\n  {example}")


def _json(sub: Parser) -> None:
    sub.add_argument("--json", metavar="PATH", help="also write the numbers there, unrounded")


def _config(sub: Parser) -> None:
    sub.add_argument("--config", required=True, metavar="F", help=_CONFIG_HELP)
    sub.epilog = f"{sub.epilog}\n\nany config key: --config.train.epochs=2 (configs/default.py explains each)"


def _model(sub: Parser) -> None:
    sub.add_argument("--model", required=True, metavar="FOLDER", help="a model folder, hub id or run directory")
    sub.add_argument("--max-new-tokens", type=_whole(1), default=256, metavar="N", help="longest answer (default 256)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
