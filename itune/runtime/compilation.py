"""Compiled programs are kept on disk, so that the second run of a command starts sooner."""

from __future__ import annotations

import os

import jax
from jax.experimental.compilation_cache import compilation_cache

from itune.storage.cache import cache_folder


def use_compilation_cache() -> None:
    """Turn on jax's persistent compilation cache, for programs of any size. JAX_COMPILATION_CACHE_DIR is respected."""
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compilation"))
        compilation_cache.reset_cache()  # a program compiled before this has settled that there is none
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def use_deterministic_kernels() -> None:
    """Ask XLA for GPU kernels that give the same bits every time. Has no effect once a device has been used."""
    flag = "--xla_gpu_deterministic_ops=true"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
