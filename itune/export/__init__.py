"""Trained parameters -> a Hugging Face folder that is proven to hold them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from itune.export.check import check_with
from itune.export.companions import write_companions, write_tokenizer
from itune.export.hashes import PROOF, prove_tensors
from itune.export.proof import probe_tokens, prove_tokenizer, prove_weights, write_proof
from itune.export.record import commit_of, run_record
from itune.export.target import barrier, check_target, staged
from itune.models import Model, forward, load_model, save_pretrained
from itune.models.hf.files import find_folder
from itune.models.hf.write import check_shard_size
from itune.models.lora import Lora
from itune.models.peft import check_exportable, read_adapter, write_adapter
from itune.runtime import distributed
from itune.setup_run import make_tuning
from itune.start_run import run_config
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
    check_target(folder, {"the model that training started from": origin})
    with staged(folder) as staging:
        written = save_pretrained(
            staging, model, params, source=source, revision=revision, dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        if jax.process_index() == 0:
            write_companions(staging, origin, tokenizer)
        barrier("export written")
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

    check_shard_size(max_shard_bytes)
    check_target(Path(out), _needed(Path(workdir)))
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

    Raises InputError for a run without adapters, for adapters that peft cannot hold, and where they belong to no model
    that it could load: to the parameters of another run, or to an embedding that grew for added tokens.
    """
    from itune.saved_run import load_run

    folder = Path(out)
    check_target(folder, _needed(Path(workdir)))
    if _is_run(Path(workdir)):
        config = run_config(Path(workdir))
        if not config.lora.rank:
            raise InputError(f"{workdir}: this run tuned without LoRA and has no adapter; export it without --adapter")
        base_model = load_model(config.model.path, revision=config.model.revision or None)
        check_exportable(base_model, cast(Lora, make_tuning(config, base_model).lora))
    run = load_run(workdir, step, log=log)
    section, lora, adapters = run.config.model, run.tuning.lora, run.halves[0]
    origin = find_folder(section.path, section.revision or None, weights=False)
    rows = load_model(section.path, revision=section.revision or None).config.vocab_size
    if run.config.train.init_from or run.model.config.vocab_size != rows:
        why = (f"they stand beside the parameters of {run.config.train.init_from}" if run.config.train.init_from else
               f"its tokenizer has {run.model.config.vocab_size} tokens, {section.path} has {rows} embedding rows")
        raise InputError(f"{workdir}: peft cannot use its adapters alone: {why}; export it merged, without --adapter")
    base, revision = section.path, commit_of(origin, section.revision or None)
    if Path(section.path).is_dir():
        base, revision = str(Path(section.path).absolute()), None
    with staged(folder) as staging:
        size = write_adapter(staging, run.model, lora, adapters, base, revision)
        barrier("adapter written")
        read = read_adapter(staging, run.model, lora)
        wrong = [leaf.shape for leaf, again in zip(*map(jax.tree.leaves, (adapters, read)), strict=True)
                 if not bool(jnp.array_equal(leaf, again))]
        if wrong:
            raise RunError(f"{folder}: {len(wrong)} adapter tensors read back with other values")
        report = {"folder": str(folder), "source": base, "revision": revision, "step": run.step,
                  "workdir": str(workdir), "bytes": size,
                  "parameters": sum(leaf.size for leaf in jax.tree.leaves(adapters))}
        if jax.process_index() == 0:
            write_tokenizer(staging, origin, run.tokenizer)
            write_proof(staging, report, {})
    log(f"exported the adapters of step {run.step} to {out}: {report['parameters']:,} parameters, {size:,} bytes, "
        f"for {base}; read back equal")
    return report


def _needed(workdir: Path) -> dict[str, Path]:
    """The folders that an export of this run reads, by what a message calls them."""
    needed = {"the run": workdir}
    if _is_run(workdir):
        needed["the model that training started from"] = Path(run_config(workdir).model.path)
    return needed


def _is_run(workdir: Path) -> bool:
    """Where not, `load_run` says why."""
    return (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir()
