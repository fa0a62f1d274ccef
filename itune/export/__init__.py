"""Trained parameters -> a Hugging Face folder that is proven to hold them."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from itune.config import load_config
from itune.export.check import check_with
from itune.export.companions import write_companions, write_tokenizer
from itune.export.hashes import PROOF, prove_tensors
from itune.export.proof import probe_tokens, prove_tokenizer, prove_weights, write_proof
from itune.export.record import commit_of, run_record
from itune.models import Model, forward, load_model, save_pretrained
from itune.models.hf.files import find_folder
from itune.models.peft import read_adapter, write_adapter
from itune.runtime import distributed
from itune.types import InputError, RunError


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how it was proven; `report["max_abs_logit_difference"]` reads like a mapping.

    max_abs_logit_difference: reloaded folder against the parameters in memory, rounded to the dtype that was asked for.
    rounding_logit_difference: what that rounding itself changed. Both over the probe tokens. checks: what another
    library found, by its name.
    """

    folder: str
    source: str
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    max_abs_logit_difference: float
    rounding_logit_difference: float
    tokenizer: dict[str, Any]
    checks: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def export_pretrained(
    folder: str | os.PathLike,
    model: Model,
    params: Any,
    source: str | os.PathLike,
    tokenizer: Any = None,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    *,
    revision: str | None = None,
    info: Mapping[str, Any] | None = None,
    check: str | None = None,
) -> ExportReport:
    """Write model, tokenizer, chat template and generation config to a folder, and prove it by loading it again.

    `source` is the checkpoint that the model was loaded from; what training did not change is copied from it byte for
    byte. `tokenizer` is the one of the training run: where it differs from the source's (a chat template, added tokens)
    it is written too, and its end of turn becomes a stop token of the generation config. Weights keep the source's
    dtype unless `dtype` is given. `info` is entered in the proof file, `itune_proof.json`, beside the hash of every
    file and tensor. `check="transformers"` has transformers load the folder too, in a process of its own, and compares.

    The folder appears whole and proven, or not at all; an earlier export there is replaced, anything else refused
    (InputError). Raises RunError when the proof fails or the disk does. On several hosts all must call this.
    """
    folder, origin = Path(folder), find_folder(source, revision)
    check_target(folder, origin)
    with _staged(folder) as staging:
        written = save_pretrained(
            staging, model, params, source=source, revision=revision, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        if jax.process_index() == 0:
            write_companions(staging, origin, tokenizer)
        _barrier("export written")
        weights = prove_weights(staging, model, params)
        report = ExportReport(
            folder=str(folder), source=str(source), tokenizer=prove_tokenizer(staging, tokenizer), **weights
        )
        if jax.process_index() == 0:
            entries = {"revision": commit_of(origin, revision), **(info or {})}
            entries["tensors"] = prove_tensors(staging, written)
            write_proof(staging, report.to_dict(), entries)
            if check:
                report = dataclasses.replace(report, checks={check: check_with(check, staging)})
                write_proof(staging, report.to_dict(), entries)
    return report


@distributed.joined()
def export_run(
    workdir: str | os.PathLike,
    out: str | os.PathLike,
    step: int | None = None,
    dtype: str | None = None,
    log: Callable[[str], None] = print,
    check: str | None = None,
    max_shard_bytes: float = 5e9,
) -> dict[str, Any]:
    """Export a run's checkpoint (the newest, or that of `step`); says what was written and proven. See above."""
    from itune.saved_run import load_run

    check_target(Path(out), None)
    run = load_run(workdir, step, log=log)
    section = run.config.model
    model, params, info = run.model, run.params, {"workdir": str(workdir), "step": run.step}
    if run.config.lora.rank:
        model, params, difference = merged(run.model, run.tuning, *run.halves, dtype)
        info["merge_logit_difference"] = difference
        log(f"merged in {model.param_dtype}: logits differ by at most {difference:.3g} from those of the adapters "
            "beside their base")
    report = export_pretrained(
        out, model, params, section.path, run.tokenizer, dtype, max_shard_bytes,
        revision=section.revision or None, info=run_record(Path(workdir), run) | info, check=check,
    )
    log(f"exported step {run.step} to {out}: {report.parameters:,} parameters, {report.bytes:,} bytes of weights")
    log(f"proof: reloaded, largest difference of a logit {report.max_abs_logit_difference:.3g} (see {PROOF})")
    for name, found in report.checks.items():
        log(f"{name} {found['version']}: largest difference of a logit {found['max_abs_logit_difference']:.3g}")
    return {**report.to_dict(), **info}


def merged(model: Model, tuning: Any, trainable: Any, frozen: Any, dtype: str | None) -> tuple[Model, Any, float]:
    """(model, parameters with the adapters in them, what merging changed in a logit of the probe, in float32 compute).

    Merging rounds to the dtype of the base; a base in bfloat16 is widened first where float32 is asked for.
    """
    params = tuning.parameters(trainable, frozen)
    if dtype == "float32" and model.param_dtype != "float32":
        frozen = jax.tree.map(lambda leaf: leaf.astype("float32"), frozen)
        model = dataclasses.replace(model, param_dtype="float32")
    whole = tuning.merged(trainable, frozen)
    judge, tokens_BL = dataclasses.replace(model, compute_dtype="float32"), probe_tokens(model)
    difference = jnp.max(jnp.abs(forward(judge, params, tokens_BL) - forward(judge, whole, tokens_BL)))
    return model, whole, float(difference)


@distributed.joined()
def export_adapter(
    workdir: str | os.PathLike, out: str | os.PathLike, step: int | None = None, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Export a LoRA run's adapters as a folder of peft, with the run's tokenizer, proven by reading it again.

    Raises InputError for a run without adapters, and where they belong to no model that peft could load: to the
    parameters of another run, or to an embedding that grew for added tokens.
    """
    from itune.saved_run import load_run

    folder = Path(out)
    check_target(folder, None)
    config = load_config(Path(workdir) / "config.json") if (Path(workdir) / "config.json").is_file() else None
    if config is not None and not config.lora.rank:
        raise InputError(f"{workdir}: this run tuned without LoRA, there is no adapter; export it without --adapter")
    run = load_run(workdir, step, log=log)
    section, lora, adapters = run.config.model, run.tuning.lora, run.halves[0]
    origin = find_folder(section.path, section.revision or None, weights=False)
    rows = load_model(section.path, revision=section.revision or None).config.vocab_size
    if run.config.train.init_from or run.model.config.vocab_size != rows:
        why = (f"they stand beside the parameters of {run.config.train.init_from}" if run.config.train.init_from else
               f"its tokenizer has {run.model.config.vocab_size} tokens, {section.path} has {rows} embedding rows")
        raise InputError(f"{workdir}: peft cannot use its adapters alone: {why}; export it merged, without --adapter")
    base = str(Path(section.path).absolute()) if Path(section.path).is_dir() else section.path
    with _staged(folder) as staging:
        size = write_adapter(staging, run.model, lora, adapters, base)
        _barrier("adapter written")
        read = read_adapter(staging, run.model, lora)
        wrong = [leaf.shape for leaf, again in zip(*map(jax.tree.leaves, (adapters, read)), strict=True)
                 if not bool(jnp.array_equal(leaf, again))]
        if wrong:
            raise RunError(f"{folder}: {len(wrong)} adapter tensors read back with other values")
        report = {"folder": str(folder), "source": base, "step": run.step, "workdir": str(workdir), "bytes": size,
                  "parameters": sum(leaf.size for leaf in jax.tree.leaves(adapters))}
        if jax.process_index() == 0:
            write_tokenizer(staging, origin, run.tokenizer)
            write_proof(staging, report, {})
    log(f"exported the adapters of step {run.step} to {out}: {report['parameters']:,} parameters, {size:,} bytes, "
        f"for {base}; read back equal")
    return report


def check_target(folder: Path, origin: Path | None) -> None:
    """Raise InputError unless the folder may be written: it is new, empty, or an earlier export."""
    if origin is not None and folder.exists() and folder.resolve() == origin.resolve():
        raise InputError(f"{folder}: is the model that training started from; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder to write")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROOF).is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:4])
        raise InputError(f"{folder}: is not empty and no earlier export (it has {found}); choose a new folder")


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when all went well, and is removed otherwise."""
    first = jax.process_index() == 0
    staging, aside = folder.parent / f".{folder.name}.exporting", folder.parent / f".{folder.name}.replaced"
    if first:
        partial = folder.parent.glob(f".{glob.escape(staging.name)}.*.partial")
        for left in (staging, *partial):  # of exports that were killed
            shutil.rmtree(left, ignore_errors=True)
        if (aside / PROOF).is_file() and not folder.exists():  # killed between the two renames of _replace
            os.replace(aside, folder)
    try:
        yield staging
        if first:
            _replace(staging, folder)
    except OSError as error:
        raise RunError(f"{folder}: could not be written: {error}") from error
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
    _barrier("export done")


def _replace(staging: Path, folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        aside = folder.parent / f".{folder.name}.replaced"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        os.replace(staging, folder)
        shutil.rmtree(aside)
    else:
        os.replace(staging, folder)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
