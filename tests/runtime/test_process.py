"""Secrets are hidden; compiled programs are cached where the environment says."""

import jax

from itune.runtime import compilation
from itune.runtime.secrets import redact


def test_values_of_secret_variables_and_known_forms_are_hidden(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "canary-canary")
    monkeypatch.setenv("HARMLESS", "plain-value")
    text = "a canary-canary b hf_abcdefghijklmnopqrst c plain-value https://me:pw@host/x"
    assert redact(text) == "a [hidden] b [hidden] c plain-value https://[hidden]@host/x"


def test_cache_folder_and_respect_for_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        compilation.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/elsewhere"
        jax.config.update("jax_compilation_cache_dir", None)
        compilation.use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "itune" / "compilation")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
