"""What is extracted from models that PEFT and diffusers merged does in them what was merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checkpoints import planted, plus

from adapterkit import ExtractOptions, RankRule, extract

pytestmark = pytest.mark.oracle

TARGETS = {"llama": ["q_proj", "down_proj"], "qwen3": ["v_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"]}
TOKENS = torch.arange(3, 23).reshape(2, 10)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS).logits
    return found


def merged(build: Any, targets: list[str]) -> Any:
    """A model with a random LoRA of rank 4 merged into it by PEFT."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build(),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets,
            init_lora_weights=False,
            fan_in_fan_out=build is models.gpt2,
        ),
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.merge_and_unload()


@pytest.mark.parametrize("name", TARGETS)
def test_a_lora_that_peft_merged_comes_back_and_runs_in_peft(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    build = models.MODELS[name]
    tuned = merged(build, TARGETS[name])
    done = extract(tuned.state_dict(), build().state_dict(), tmp_path / "out", RankRule(rank=4))
    loaded = PeftModel.from_pretrained(build(), str(tmp_path / "out"))
    plain, wanted, found = logits(build()), logits(tuned), logits(loaded)
    assert (wanted - plain).abs().max() > 0.01
    assert torch.allclose(found, wanted, atol=1e-5)
    changed = {outcome.line.name for outcome in done.outcomes if outcome.what == "extracted"}
    assert changed and all(any(target in each for target in TARGETS[name]) for each in changed)


def test_everything_that_peft_can_say_of_a_tuned_model_makes_its_logits(tmp_path: Path) -> None:
    """Norms as modules_to_save, embeddings and the output layer as LoRA, at full rank."""
    from peft import PeftModel

    base = models.llama()
    tuned = models.llama()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    options = ExtractOptions(full_small=True, embeddings=True)
    done = extract(tuned.state_dict(), base.state_dict(), tmp_path / "out", RankRule(rank=128), options)
    assert done.kept == pytest.approx(1.0)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert torch.allclose(logits(loaded), logits(tuned), atol=1e-4)


def test_biases_are_trained_biases_for_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    base, tuned = models.gpt2(), models.gpt2()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".attn.c_attn" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    extract(
        tuned.state_dict(),
        base.state_dict(),
        tmp_path / "out",
        RankRule(rank=32),
        ExtractOptions(full_small=True),
    )
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    assert torch.allclose(logits(loaded), logits(tuned), atol=1e-5)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_diffusers_loads_what_was_extracted_and_fuses_it_to_the_tuned_model(to: str, tmp_path: Path) -> None:
    pipeline, tuned = models.sd1_pipeline(), models.sd1_pipeline()
    words = ("attn1.to_", "attn2.to_")
    unet = plus(tuned.unet.state_dict(), planted(tuned.unet.state_dict(), 3, 0.2, words))
    clip = tuned.text_encoder.state_dict()
    clip = plus(clip, planted(clip, 2, 0.2, ("q_proj", "out_proj")))
    tuned_names = {f"unet/{k}": t for k, t in unet.items()} | {
        f"text_encoder/{k}": t for k, t in clip.items()
    }
    base = {f"unet/{k}": t for k, t in pipeline.unet.state_dict().items()}
    base |= {f"text_encoder/{k}": t for k, t in pipeline.text_encoder.state_dict().items()}
    extract(tuned_names, base, tmp_path / "out.safetensors", RankRule(rank=3), ExtractOptions(to=to))
    pipeline.load_lora_weights(tmp_path / "out.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for model, wanted in ((pipeline.unet, unet), (pipeline.text_encoder, clip)):
        found = model.state_dict()
        assert all(torch.allclose(found[key], wanted[key], atol=1e-5) for key in wanted)


@pytest.mark.parametrize("excluded", [(), ("classifier",)])
def test_what_a_tuned_classifier_has_more_loads_in_peft(excluded: tuple[str, ...], tmp_path: Path) -> None:
    """With its task's name PEFT would also want the whole head, which an extraction seldom has."""
    from peft import PeftModel

    base, tuned = models.bert(), models.bert()
    tensors = tuned.state_dict()
    wanted = plus(tensors, planted(tensors, 2, 0.2, ("query", "classifier")))
    tuned.load_state_dict(wanted)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    options = ExtractOptions(exclude=excluded)
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", RankRule(rank=2), options)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).merge_and_unload().state_dict()
    before = models.bert().state_dict()
    for name, weight in loaded.items():
        expected = before if name.startswith(excluded or "-") else wanted
        assert torch.allclose(weight, expected[name], atol=1e-5), name
