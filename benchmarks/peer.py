"""The peer: TRL's SFTTrainer, float32 on CPU, and a clock that reads at the end of every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.row import Clock


def trainer(folder: Path, dataset: Any, *, dtype: str = "float32", **changes: Any) -> Any:
    """An SFTTrainer with SFTConfig's defaults but for what CPU and this comparison need, and `changes`."""
    import torch
    import transformers
    import trl

    from benchmarks.row import THREADS

    torch.set_num_threads(THREADS)
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    # its default, checkpointing on, is slower and saves memory: rows that compare memory say which they ran
    settings = {
        "output_dir": str(folder / "trl"), "use_cpu": True, "bf16": dtype == "bfloat16", "num_train_epochs": 1,
        "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 42,
        "disable_tqdm": True, **changes,
    }  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    return trl.SFTTrainer(judge, trl.SFTConfig(**settings), train_dataset=dataset, processing_class=tokenizer)


def timed(made: Any) -> dict[str, Any]:
    """Train, and measure from the end of the first step: wall, CPU and real tokens of the steps after it."""
    import transformers

    clock, reads = Clock(), []

    class Reader(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            reads.append(clock.read())

    made.add_callback(Reader())
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    tokens = logged[-1]["num_tokens"] - logged[0]["num_tokens"]
    return measures([entry["loss"] for entry in logged], reads, tokens)


def measures(losses: list[float], reads: list[tuple[float, float]], tokens: float) -> dict[str, Any]:
    """`reads`: (wall, CPU) at the end of each step; `tokens`: those of the steps after the first."""
    wall, cpu = (reads[-1][i] - reads[0][i] for i in (0, 1))
    return {"losses": losses, "first_loss": losses[0], "tokens": tokens, "seconds": wall, "cpu_seconds": cpu,
            "tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}  # fmt: skip
