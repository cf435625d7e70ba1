"""`adapterkit extract` on the command line: what it shows, what it writes, what it refuses."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from checkpoints import planted, plus
from cli_support import document, run
from safetensors.torch import load_file, save_file

UNET = models.sd1_unet().state_dict()
MOVED = planted(UNET, 2, 0.1, ("attn1.to_",))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tuned model with a VAE's tensor and moved norms, and its base."""
    folder = tmp_path_factory.mktemp("models")
    tuned = plus(UNET, MOVED)
    tuned |= {key: tensor + 1e-3 for key, tensor in UNET.items() if "conv_norm_out" in key}
    save_file(tuned | {"first_stage_model.x": torch.zeros(2)}, folder / "tuned.safetensors")
    save_file(UNET, folder / "base.safetensors")
    return folder / "tuned.safetensors", folder / "base.safetensors"


def test_the_receipt_adds_up_and_says_what_is_left(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", *pair, "-o", tmp_path / "out.safetensors", columns=200)
    assert result.exit_code == 0, result.output
    assert f"kohya: {len(MOVED)} modules, rank 2" in result.stdout
    assert f"{len(UNET) + 1} = " in result.stdout
    assert "norms and biases; --full-small keeps them" in result.stdout
    assert "unknown to the tables" in result.stdout
    assert (tmp_path / "out.safetensors").is_file()


def test_the_document_has_every_module_and_every_tensor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", *pair, "-o", tmp_path / "out.safetensors", "--rank", "1", "--json")
    found = document(result)
    assert found["rule"] == {"rank": 1}
    assert sum(found["tensors"].values()) == len(UNET) + 1  # type: ignore[union-attr]
    extracted = [m for m in found["modules"] if m["outcome"] == "extracted"]  # type: ignore[union-attr]
    assert len(extracted) == len(MOVED) and all(module["rank"] == 1 for module in extracted)
    assert found["proof"]["measured"] == pytest.approx(found["proof"]["predicted"], rel=1e-3)  # type: ignore[index]
    assert found["not_compared"] == {"first_stage_model.x": "unknown"}


def test_an_energy_that_the_ranks_permitted_do_not_reach_is_said(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run("extract", *pair, "-o", tmp_path / "o", "--energy", "0.999", "--max-rank", "1", columns=200)
    assert "takes ranks above 1" in result.stdout
    result = run("extract", *pair, "-o", tmp_path / "o", "--energy", "0.999", "--force", columns=200)
    assert "takes ranks above" not in result.stdout


def test_quiet_says_where_the_result_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", *pair, "-o", tmp_path / "out.safetensors", "-q", columns=400)
    assert result.stdout.strip() == str(tmp_path / "out.safetensors")


def test_residual_lists_what_is_left_worst_first(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", *pair, "-o", tmp_path / "o", "--rank", "1", "--residual", columns=200)
    lines = [
        line for line in result.stdout.splitlines() if line.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    shares = [float(line.split()[0]) for line in lines if not line.strip().startswith("<")]
    assert len(lines) == len(MOVED) and shares == sorted(shares, reverse=True)
    assert "unet.conv_norm_out" in result.stdout


def test_a_plan_reads_headers_and_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", *pair, "--plan", columns=200)
    assert result.exit_code == 0 and "linear layers" in result.stdout
    found = document(run("extract", *pair, "--plan", "--json"))
    assert len(found["lines"]) == len(UNET)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_options_reach_the_library(pair: tuple[Path, Path], tmp_path: Path) -> None:
    options = ["--alpha", "1", "--full-small", "--dtype", "bf16", "--only", "down_blocks", "--exact"]
    result = run("extract", *pair, "-o", tmp_path / "o", "--rank", "linear=2,conv=1", *options)
    assert result.exit_code == 0, result.output
    tensors = load_file(tmp_path / "o")
    assert all("down_blocks" in key for key in tensors)
    assert {float(t) for key, t in tensors.items() if key.endswith(".alpha")} == {1.0}
    assert {t.dtype for key, t in tensors.items() if key.endswith("up.weight")} == {torch.bfloat16}


def test_without_an_output_or_with_two_rules_it_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "-o OUT" in run("extract", *pair).stderr
    result = run("extract", *pair, "-o", tmp_path / "o", "--rank", "2", "--energy", "0.9")
    assert result.exit_code == 2 and "one of" in result.stderr


def test_the_same_model_twice_is_refused_with_its_code(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("extract", pair[1], pair[1], "-o", tmp_path / "o", "--json")
    assert result.exit_code == 1 and document(result)["code"] == "no-difference"
    assert not (tmp_path / "o").exists()
