"""LoRA against peft and torch: one step on the same adapters, adapter folders read by either, merged folders."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
import torch
import transformers

from itune.config import OptimizerSection
from itune.feed import to_device
from itune.models import forward, load_pretrained
from itune.models.lora import Lora, abstract_adapters, merge
from itune.models.peft import SIDES, read_adapter, write_adapter
from itune.objectives import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.sharding import make_mesh
from itune.step import init_state, make_train_step
from itune.types import Batch, InputError

V, ROWS, L = 40, 4, 12
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
FAMILIES = {
    "gemma2": transformers.Gemma2Config(**SIZES, query_pre_attn_scalar=16, sliding_window=6),
    "phi3": transformers.Phi3Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, **MOE),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}
TARGETS = {"gemma2": "q_proj|v_proj|mlp/.*", "phi3": "qkv_proj|gate_up_proj"}


@functools.cache
def base(family, root):
    """(folder, torch model) with random weights, every one of them in use."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and family != "gemma2" else 0.0, 0.1)
    folder = root / family
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("peft")


def random_adapters(model, lora, seed=0):
    rng = np.random.default_rng(seed)
    shapes = abstract_adapters(model, lora)
    return jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)


def tokens():
    return np.random.default_rng(1).integers(3, V, (ROWS, L)).astype(np.int32)


def opened_by_peft(folder, adapter, trainable=False):
    import peft

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    return peft.PeftModel.from_pretrained(theirs, adapter, is_trainable=trainable)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_adapter_and_the_merged_folder_equals_it(family, root, tmp_path):
    folder, _ = base(family, root)
    model, params = load_pretrained(folder)
    lora = Lora(3, 5.0, TARGETS.get(family, r".*_proj"), rslora=family == "phi3")
    adapters = random_adapters(model, lora)
    write_adapter(tmp_path / "adapter", model, lora, adapters, str(folder))
    judge = opened_by_peft(folder, tmp_path / "adapter")
    with torch.no_grad():
        wanted = judge(torch.tensor(tokens())).logits.numpy()
    beside = np.asarray(forward(model, lora.parameters(adapters, params), tokens()))
    assert np.abs(beside - np.asarray(forward(model, params, tokens()))).max() > 0.1, "the adapter matters"
    np.testing.assert_allclose(beside, wanted, atol=1e-4)
    merged = forward(model, merge(model, lora, adapters, params), tokens())
    np.testing.assert_allclose(merged, beside, atol=1e-5)
    again = read_adapter(tmp_path / "adapter", model, lora)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_one_step_equals_peft_and_torch(root, tmp_path):
    """Loss, gradient of every adapter tensor, and the tensors after AdamW, from an adapter that peft made."""
    import peft

    folder, _ = base("gemma2", root)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    torch.manual_seed(1)
    modules = ["q_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM")
    )
    with torch.no_grad():  # B begins at zero, and then A has no gradient
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "init")

    mesh = make_mesh({}, jax.devices()[:1])
    lora = Lora(4, 8.0, "q_proj|v_proj|down_proj")
    model, params = load_pretrained(folder, mesh)
    adapters = read_adapter(tmp_path / "init", model, lora)
    ids = tokens()
    weights = np.random.default_rng(2).integers(0, 2, ids.shape).astype(np.float32)
    weights[:, -1] = 0
    ones = np.ones_like(ids)
    batch = Batch(ids, np.roll(ids, -1, 1), weights, ones, np.tile(np.arange(L, dtype=np.int32), (ROWS, 1)))

    labels = torch.tensor(np.where(weights[:, :-1] > 0, ids[:, 1:], -100)).long()
    logits = theirs(torch.tensor(ids)).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    section = OptimizerSection(learning_rate=1e-3, schedule="constant", weight_decay=0.1, clip_norm=0.0)
    gradients = {n: p.grad.clone() for n, p in theirs.named_parameters() if p.requires_grad}
    torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1).step()

    objective = make_sft(model, chunk=16, parameters=lora.parameters)

    def mean_loss(adapters):
        loss_sum, weight_sum, _ = objective(adapters, params, to_device(batch, mesh), None)
        return loss_sum / weight_sum

    value, ours = jax.jit(jax.value_and_grad(mean_loss))(adapters)
    assert abs(float(value) - loss.item()) < 1e-6
    compared = 0
    for (layer, module, side), array in flat(ours):
        grad = next(g for n, g in gradients.items() if f".{layer}." in n and module in n and SIDES[side] in n)
        np.testing.assert_allclose(array, grad.numpy(), atol=1e-5)
        assert np.abs(grad.numpy()).max() > 1e-4
        compared += 1
    assert compared == len(gradients) == 3 * 3 * 2

    optimizer = make_optimizer(section, 1)
    state = init_state(model, adapters, optimizer, 0, mesh, frozen=params)
    moments, trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.opt_state, adapters))
    assert moments == 2 * trained + 1
    step = make_train_step(objective, optimizer, make_schedule(section, 1), mesh, clip_norm=0.0, accumulation=2)
    state, metrics = step(state, to_device(batch, mesh))
    assert abs(float(metrics["loss"]) - loss.item()) < 1e-6
    stepped = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for (layer, module, side), array in flat(state.trainable):
        wanted = next(p for n, p in stepped.items() if f".{layer}." in n and module in n and SIDES[side] in n)
        np.testing.assert_allclose(array, wanted.detach().numpy(), atol=1e-5)


def flat(adapters):
    """((layer, module, side), array) of every adapter tensor: three layers of Gemma 2 are a block of two and a rest."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        first, *rest, module, side = (entry.key for entry in path)
        if first == "blocks":
            start, count = int(rest[0].removeprefix("layer_")), leaf.shape[0]
            period = len(adapters["blocks"])
            yield from (((start + i * period, module, side), np.asarray(leaf[i])) for i in range(count))
        else:
            before = sum(jax.tree.leaves(block)[0].shape[0] for block in adapters.get("blocks", {}).values())
            yield (before + int(first.removeprefix("rest_")), module, side), np.asarray(leaf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"lora.rank is 3 here and 8 there; to continue this adapter set --config.lora.rank=8"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern={'q_proj': 4} is not supported"),
        *[({"init_lora_weights": start}, f"init_lora_weights is '{start}': this adapter belongs to a base")
          for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")],
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(root, tmp_path, change, message):
    folder, _ = base("gemma2", root)
    model, _ = load_pretrained(folder)
    lora = Lora(3, 5.0, "q_proj")
    write_adapter(tmp_path, model, lora, random_adapters(model, lora), str(folder))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(InputError, match=r"missing: base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"):
        read_adapter(tmp_path, model, Lora(3, 5.0, "[qv]_proj"))
    with pytest.raises(InputError, match=r"extra: .*q_proj.lora_A"):
        read_adapter(tmp_path, model, Lora(3, 5.0, "v_proj"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        read_adapter(tmp_path, model, lora)
    with pytest.raises(InputError, match=r"has no adapter_config.json; expected an adapter folder of peft"):
        read_adapter(folder, model, lora)


def test_adapters_that_leave_the_base_alone_are_read_and_the_others_would_not_be_what_peft_computes(root, tmp_path):
    import peft

    folder, _ = base("gemma2", root)
    model, params = load_pretrained(folder)
    lora = Lora(4, 5.0, "q_proj")
    for start in (True, "gaussian", "orthogonal", "mica", "pissa", "olora"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
        settings = peft.LoraConfig(r=4, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=start)
        peft.get_peft_model(theirs, settings).save_pretrained(tmp_path / str(start))
        with torch.no_grad():
            wanted = opened_by_peft(folder, tmp_path / str(start))(torch.tensor(tokens())).logits.numpy()
        if start in ("pissa", "olora"):  # taken for a plain one
            config = json.loads((tmp_path / start / "adapter_config.json").read_text())
            (tmp_path / start / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
        ours = forward(model, lora.parameters(read_adapter(tmp_path / str(start), model, lora), params), tokens())
        assert (np.abs(np.asarray(ours) - wanted).max() < 1e-4) == (start not in ("pissa", "olora")), start


def test_adapters_that_peft_would_leave_out_are_not_written(root, tmp_path):
    """A dense MLP in a model with experts has the experts' names, and those of experts in one tensor have none."""
    moe = transformers.Qwen3MoeConfig(**SIZES, **MOE, mlp_only_layers=[1])
    packed = transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    for name, config, targets, message in (
        ("dense", moe, "mlp/(gate|up|down)_proj", "adapters on dense MLPs .* which peft cannot hold apart; export"),
        ("both", moe, r".*_proj", r"adapters on dense MLPs"),
        ("packed", packed, r".*_proj", r"^lora.targets: a folder of peft cannot hold adapters of .*mlp/experts/"),
    ):
        if not (root / name).exists():
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        model, _ = load_pretrained(root / name)
        lora = Lora(2, 4.0, targets)
        with pytest.raises(InputError, match=message):
            write_adapter(tmp_path, model, lora, random_adapters(model, lora), "base")
    held = Lora(2, 4.0, "attention/.*")
    write_adapter(tmp_path, model, held, random_adapters(model, held), "base")
    with pytest.raises(InputError, match="cannot hold adapters of"):
        read_adapter(tmp_path, model, lora)


def test_the_folder_names_the_revision_and_its_files_are_as_readable_as_any(root, tmp_path):
    import peft

    folder, _ = base("gemma2", root)
    model, _ = load_pretrained(folder)
    lora = Lora(2, 4.0, "q_proj")
    write_adapter(tmp_path, model, lora, random_adapters(model, lora), "me/base", "0123abcd")
    found = peft.PeftConfig.from_pretrained(tmp_path)
    assert (found.base_model_name_or_path, found.revision) == ("me/base", "0123abcd")
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]
