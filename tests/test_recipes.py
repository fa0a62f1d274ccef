"""Every shipped recipe is loaded, validated and traced: the train step's shapes and dtypes, no weights needed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from itune.config import configs_dir, load_config
from itune.models import load_model
from itune.objectives.sft import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.setup_run import make_tuning
from itune.sharding import make_mesh
from itune.step import abstract_state, make_train_step
from itune.types import Batch

RECIPES = sorted(path.stem for path in configs_dir().glob("*.py"))
HUB_CONFIGS = Path(__file__).parent / "goldens" / "configs"  # config.json of hub models, for machines without a network


def _model_folder(path: str, tmp_path: Path) -> Path:
    """A folder with the config.json that the recipe's model has; recipes without a model are traced on Qwen3-0.6B."""
    if path and Path(path).is_dir():
        return Path(path)
    golden = HUB_CONFIGS / f"{Path(path or 'Qwen3-0.6B-Base').name}.json"
    assert golden.is_file(), f"recipe names {path}: put its config.json at {golden}"
    (tmp_path / "config.json").write_text(json.dumps(json.loads(golden.read_text())))
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_traces(recipe, tmp_path):
    config = load_config(recipe)
    mesh = make_mesh(devices=jax.devices()[:1])
    model = load_model(
        _model_folder(config.model.path, tmp_path), mesh, config.model.param_dtype,
        compute_dtype=config.model.compute_dtype, remat=config.train.remat, attention=config.model.attention,
    )
    steps, tuning = 100, make_tuning(config, model)
    trainable, frozen = tuning.abstract()
    optimizer = make_optimizer(config.optimizer, steps, trainable)
    state = abstract_state(model, optimizer, mesh, trainable=trainable, frozen=frozen)
    objective = make_sft(model, config.loss.weighting, config.loss.chunk, parameters=tuning.parameters)
    step = make_train_step(
        objective, optimizer, make_schedule(config.optimizer, steps), mesh, accumulation=config.train.accumulation,
        clip_norm=config.optimizer.clip_norm, stochastic_rounding=config.optimizer.stochastic_rounding,
    )
    shape = (config.train.batch_size, config.data.max_length)
    ints, floats = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    after, metrics = step.lower(state, Batch(ints, ints, floats, ints, ints)).out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].dtype == jnp.float32
    assert metrics["loss"].shape == ()
