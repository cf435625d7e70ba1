"""Baking is what diffusers' fuse, LyCORIS's merge and a running model make of the same file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from oracle_law import relative
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkit.operations.bake import BakeOptions, bake

pytestmark = pytest.mark.oracle

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

# Model, the family's name where the names do not tell, the component.
FUSED = {
    "sd1": (models.sd1_unet, "unet"),
    "sdxl": (models.sdxl_unet, "unet"),
    "flux1": (models.flux_transformer, "transformer"),
    "SD 3 medium": (models.sd3_transformer, "transformer"),
}


def randomised(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def error(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, tensor in ours.items():
        change = float((theirs[name] - base[name]).norm())
        off = float((tensor - theirs[name]).norm())
        worst = max(worst, off / change if change else off)
    return worst


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("ignore")
def test_a_bake_is_what_diffusers_fuses(name: str, tmp_path: Path) -> None:
    build, component = FUSED[name]
    model: Any = build()
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    targets = ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj", "norm.linear"]
    tuned = copy.deepcopy(model)
    tuned.add_adapter(peft.LoraConfig(r=4, lora_alpha=3, target_modules=targets))
    randomised(tuned)
    # diffusers' own writer wants a folder; its names are the component's and PEFT's.
    from peft.utils import get_peft_model_state_dict

    state = {f"{component}.{key}": t.contiguous() for key, t in get_peft_model_state_dict(tuned).items()}
    config = {f"{component}.r": 4, f"{component}.lora_alpha": 3}
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    done = bake(base, [(tmp_path / "lora.safetensors", 0.7)], options=BakeOptions(family=name))
    tuned.fuse_lora(lora_scale=0.7)
    fused = {
        key.replace(".base_layer.", "."): t for key, t in tuned.state_dict().items() if "lora_" not in key
    }
    assert error(dict(done.tensors), fused, base) < 2e-6
    assert done.plan.changed > 50


LYCORIS = ["locon", "locon, core", "dora, rows", "dora, columns", "loha", "loha, core", "lokr, dora", "glora"]
LYCORIS += ["oft, rescaled", "oft, constrained", "boft", "ia3", "full", "norms"]


@pytest.mark.parametrize("name", LYCORIS)
def test_a_baked_model_answers_as_lycoris_has_it_answer(name: str, tmp_path: Path) -> None:
    lycoris = pytest.importorskip("test_oracle_lycoris")
    case = lycoris.CASES[name]
    network, model = lycoris.trained(case, tmp_path)
    plain = lycoris.unet(case.dtype)
    done = bake(
        plain.state_dict(), [lycoris.saved(case, network, tmp_path)], options=BakeOptions(family="sd1")
    )
    assert done.plan.outcomes.total() == done.plan.outcomes["applied"]
    baked = copy.deepcopy(plain)
    baked.load_state_dict(done.tensors)
    for layer in lycoris.layers_of(network):
        before = plain.get_submodule(layer)
        x = lycoris.sample(before)
        with torch.no_grad():
            ours, theirs = (each.get_submodule(layer)(x) - before(x) for each in (baked, model))
        assert relative(ours, theirs) <= case.tolerance, layer


TIED = {
    "head": ["lm_head", "q_proj"],
    "embedding": ["embed_tokens", "q_proj"],
    "both": ["embed_tokens", "lm_head", "q_proj"],
}


@pytest.mark.parametrize("which", TIED)
@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_is_parted_so_that_the_model_answers_as_the_tuned_one(which: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = models.llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TIED[which]))
    randomised(tuned)
    for name, parameter in tuned.named_parameters():
        if "lora_embedding" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    words = torch.tensor([[3, 14, 15, 92]])
    wanted = tuned(words).logits
    done = bake(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert [each.key for each in done.plan.new.values()] == ["lm_head.weight"]
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(baked(words).logits, wanted, atol=1e-5)
