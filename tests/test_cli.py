"""The command line, seen from outside: what is asked, what is shown, how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_support import (
    HASH_OF_NOTHING,
    QKV,
    document,
    dora,
    flux,
    run,
    unknown,
    web_page,
    with_stranger,
)
from click.testing import Result

from adapterkit.specs.consents import CONSENTS

WIDTHS = (80, 40)


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return flux(tmp_path / "style.safetensors", ss_output_name="style")


def test_inspect_says_on_one_screen_what_a_file_is(style: Path) -> None:
    result = run("inspect", style)
    assert result.exit_code == 0
    assert not result.stderr
    for fact in (
        "LoRA for FLUX.1, kohya format",
        "transformer",
        "0.5 from `.alpha`",
        "f32",
        "output_name style",
    ):
        assert fact in result.stdout
    assert len(result.stdout.splitlines()) < 24


def test_inspect_gives_the_share_of_the_base(style: Path) -> None:
    # Two blocks, rank 2: (9216 + 3072 + 3072 + 3072) · 2 · 2 of FLUX.1's 11,901,408,320 parameters.
    assert "73.7 K  < 0.01 % of 11.9 B" in run("inspect", style).stdout


def test_keys_are_shown_by_pattern_with_dtype_and_shape(style: Path) -> None:
    lines = run("inspect", style, "--keys", columns=120).stdout.splitlines()
    pattern = QKV.format("{0..1}") + ".lora_up.weight"
    assert [line.split() for line in lines if pattern in line] == [["2", "f32", "9216×2", pattern]]


def test_keys_and_metadata_are_shown_of_a_file_that_nothing_explains(tmp_path: Path) -> None:
    result = run("inspect", unknown(tmp_path / "x.safetensors", note="hello"), "--keys", "--metadata")
    assert result.exit_code == 2
    assert "error[unrecognized]" in result.stderr
    assert "stages.{0..3}.mixer.kernel" in result.stdout
    assert "hello" in result.stdout


def test_long_metadata_is_cut_short_for_people_only(tmp_path: Path) -> None:
    path = flux(tmp_path / "x.safetensors", long="x" * 5000)
    shown = run("inspect", path, "--metadata").stdout
    assert "(5000 characters)" in shown
    assert shown.count("x") < 400
    (file,) = document(run("inspect", path, "--metadata", "--json"))["files"]  # type: ignore[misc]
    assert file["metadata"]["long"] == "x" * 5000  # type: ignore[index, call-overload]


def test_the_hash_is_of_the_whole_file(style: Path) -> None:
    import hashlib

    assert hashlib.sha256(style.read_bytes()).hexdigest() in run("inspect", style, "--hash").stdout


def test_problems_are_named_with_their_codes(tmp_path: Path) -> None:
    shown = run("inspect", flux(tmp_path / "x.safetensors", sshs_model_hash=HASH_OF_NOTHING)).stdout
    assert "(hash-of-nothing)" in shown
    assert run("explain", "hash-of-nothing").exit_code == 0


def test_one_bad_file_does_not_stop_inspect(style: Path, tmp_path: Path) -> None:
    result = run("inspect", web_page(tmp_path / "page.safetensors"), style, tmp_path / "missing.safetensors")
    assert result.exit_code == 2
    assert "LoRA for FLUX.1" in result.stdout
    assert "error[web-page]" in result.stderr
    assert "error[no-file]" in result.stderr


def receipt(result: Result) -> list[int]:
    """The numbers of the line of tensors."""
    (line,) = [line for line in result.stdout.splitlines() if " in = " in line]
    return [int(word) for word in line.split() if word.isdigit()]


def test_convert_ends_with_a_receipt_that_adds_up(style: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run("convert", style, "--to", "diffusers", "-o", out)
    assert result.exit_code == 0
    total, mapped, carried, dropped, written = receipt(result)
    assert (total, mapped, carried, dropped) == (12, 12, 0, 0)
    # Each of two blocks: q, k, v and the plain projection, with an up and a down each.
    assert written == 16
    assert "4 modules" in result.stdout
    assert "8 modules" in result.stdout
    assert "0.5 from `.alpha` → kept in lora_adapter_metadata" in result.stdout
    assert "8 of 8 modules read back, greatest relative error 0" in result.stdout
    assert "note: readers that ignore lora_adapter_metadata" in result.stdout
    assert out.is_file()


def test_what_was_converted_is_equal_to_what_it_was_made_from(style: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run("convert", style, "--to", "comfyui", "-o", out)
    result = run("diff", style, out)
    assert (result.exit_code, result.stdout.split(":")[0]) == (0, "equal")


def test_a_folded_scale_needs_no_note_and_its_rounding_is_counted(tmp_path: Path) -> None:
    path = flux(tmp_path / "x.safetensors", alpha=0.6)
    result = run(
        "convert", path, "--to", "diffusers", "--fold", "--dtype", "bf16", "-o", tmp_path / "y.safetensors"
    )
    assert result.exit_code == 0
    assert "put into the factors" in result.stdout
    assert "rounding" in result.stdout
    assert "note:" not in result.stdout


def test_a_plan_shows_the_mapping_and_writes_nothing(style: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    result = run("convert", style, "--to", "diffusers", "-o", tmp_path / "new" / "out", "--plan")
    assert result.exit_code == 0
    assert set(tmp_path.iterdir()) == before
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "cut in 3 (2 modules)" in lines
    assert "renamed (2 modules)" in lines
    assert "→ transformer.transformer_blocks.{0..1}.attn.to_k" in lines


def test_a_plan_back_says_what_is_stacked(style: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run("convert", style, "--to", "diffusers", "-o", out)
    assert "stacked from 3 (6 modules)" in run("convert", out, "--to", "kohya", "--plan").stdout


def test_loss_is_refused_until_it_is_allowed_by_name(tmp_path: Path) -> None:
    path, out = with_stranger(tmp_path / "x.safetensors"), tmp_path / "out.safetensors"
    refused = run("convert", path, "--to", "diffusers", "-o", out)
    assert refused.exit_code == 1
    assert "error[unclaimed]" in refused.stderr
    assert "--allow unclaimed" in refused.stderr
    assert not out.exists()
    allowed = run("convert", path, "--to", "diffusers", "-o", out, "--allow", "incomplete,unclaimed")
    assert allowed.exit_code == 0
    assert receipt(allowed)[:4] == [4, 3, 0, 1]
    assert "1 tensor: unclaimed" in allowed.stdout


def test_magnitudes_are_lost_only_with_consent(tmp_path: Path) -> None:
    path, out = dora(tmp_path / "x.safetensors"), tmp_path / "out.safetensors"
    assert run("convert", path, "--to", "xlabs", "-o", out).exit_code == 1
    assert not out.exists()
    assert run("convert", path, "--to", "diffusers", "-o", out).exit_code == 0


def test_an_unknown_consent_is_bad_usage_and_lists_those_there_are(style: Path) -> None:
    result = run("convert", style, "--to", "kohya", "--plan", "--allow", "unclaimed,everything")
    assert result.exit_code == 2
    assert "`everything`" in result.stderr
    assert all(name in result.stderr for name in CONSENTS)


def test_a_misspelt_format_gets_the_nearest_one(style: Path) -> None:
    result = run("convert", style, "--to", "kohia", "--plan")
    assert result.exit_code == 2
    assert "did you mean `kohya`?" in result.stderr


def test_nothing_is_replaced_without_force(style: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    result = run("convert", style, "--to", "diffusers", "-o", out)
    assert (result.exit_code, out.read_bytes()) == (2, b"precious")
    assert "--force" in result.stderr
    assert run("convert", style, "--to", "diffusers", "-o", out, "--force").exit_code == 0


def test_a_folder_is_converted_file_by_file_and_a_bad_one_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    flux(folder / "a.safetensors")
    web_page(folder / "b.safetensors")
    flux(folder / "c.safetensors")
    (folder / "notes.txt").write_text("not an adapter", encoding="utf-8")
    run("convert", folder / "a.safetensors", "--to", "peft", "-o", folder / "d")
    result = run("convert", folder, "--to", "comfyui", "-o", tmp_path / "new" / "out")
    assert result.exit_code == 2
    made = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert made == {"a.comfyui.safetensors", "c.comfyui.safetensors", "d.comfyui.safetensors"}
    assert "3 of 4 adapters converted" in result.stdout
    assert "error[web-page]" in result.stderr


def test_several_results_of_peft_are_folders_of_their_own(tmp_path: Path) -> None:
    files = [flux(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert run("convert", *files, "--to", "peft", "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "a" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "b" / "adapter_model.safetensors").is_file()


def test_a_result_can_be_put_into_a_folder(style: Path, tmp_path: Path) -> None:
    assert run("convert", style, "--to", "comfyui", "-o", f"{tmp_path}/new/").exit_code == 0
    assert (tmp_path / "new" / "style.comfyui.safetensors").is_file()


def test_two_results_of_one_name_are_refused_before_anything_is_written(style: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = flux(tmp_path / "other" / style.name)
    result = run("convert", style, twin, "--to", "comfyui", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "would both be written" in result.stderr
    assert not (tmp_path / "out").exists()


def test_diff_shows_the_worst_first_and_says_so_by_its_exit_code(tmp_path: Path) -> None:
    one, other = flux(tmp_path / "a.safetensors"), flux(tmp_path / "b.safetensors", alpha=1.5)
    result = run("diff", one, other)
    assert result.exit_code == 1
    # Half as much again of the same direction.
    assert "0.5  1.000000  transformer." in result.stdout
    assert "different: 4 of 4 modules, greatest relative error 0.5" in result.stdout
    assert run("diff", one, other, "--tolerance", "0.6").exit_code == 0


def test_diff_shows_twenty_modules_unless_all_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.compare import Difference
    from adapterkit.operations.diff import Comparison

    found = Comparison(tuple(Difference("unet", f"m{i}", "weight", 1.0 - i / 100) for i in range(30)), 1e-6)
    monkeypatch.setattr("adapterkit.operations.diff.diff", lambda *a, **k: found)
    assert run("diff", "a", "b").stdout.count("unet.m") == 20
    assert "10 more modules not shown; --all" in run("diff", "a", "b").stdout
    assert run("diff", "a", "b", "--all").stdout.count("unet.m") == 30


def test_adapters_for_different_models_are_not_compared(style: Path, tmp_path: Path) -> None:
    from cli_support import lora
    from safetensors.torch import save_file

    other = tmp_path / "sdxl.safetensors"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    save_file(lora(name, 640, 640, 1.0), other)
    result = run("diff", style, other)
    assert (result.exit_code, "error[families]" in result.stderr) == (2, True)


def test_formats_lists_every_format_and_quietly_their_names_alone() -> None:
    from adapterkit.operations.catalogue import formats

    names = [known.name for known in formats()]
    assert all(name in run("formats").stdout for name in names)
    assert run("-q", "formats").stdout.split() == names


@pytest.mark.parametrize(
    ("topic", "answer"),
    [
        (QKV.format(0) + ".lora_down.weight", "transformer: transformer_blocks.0.attn.to_v"),
        ("kohya", "kinds: LoRA"),
        ("scale-conflict", "--scale-from"),
    ],
)
def test_a_key_a_format_and_an_error_are_explained(topic: str, answer: str) -> None:
    result = run("explain", topic)
    assert result.exit_code == 0
    assert answer in result.stdout


def test_an_unknown_topic_gets_the_nearest_one() -> None:
    result = run("explain", "unclamed")
    assert (result.exit_code, "did you mean `unclaimed`?" in result.stderr) == (2, True)


def test_quiet_is_a_line_for_a_file(style: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert len(run("inspect", "-q", style, columns=30).stdout.splitlines()) == 1
    assert run("-q", "convert", style, "--to", "comfyui", "-o", out, columns=30).stdout == f"{out}\n"
    assert len(run("diff", style, out, "-q", columns=30).stdout.splitlines()) == 1


def test_without_a_command_the_help_is_shown() -> None:
    result = run()
    assert (result.exit_code, "Commands:" in result.stdout) == (0, True)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "{}", "--keys", "--metadata", "--hash"),
        ("convert", "{}", "--to", "diffusers", "--plan"),
        ("convert", "{}", "--to", "diffusers", "-o", "{}.out"),
        ("convert", "{}", "{}x", "--to", "diffusers", "-o", "{}.d"),
        ("diff", "{}", "{}"),
        ("formats",),
        ("explain", "truncated"),
        ("explain", QKV.format(0) + ".alpha"),
    ],
)
def test_nothing_is_wider_than_the_terminal(style: Path, arguments: tuple[str, ...], columns: int) -> None:
    flux(style.with_name(f"{style.name}x"))
    result = run(*(text.format(style) for text in arguments), columns=columns)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= columns


def test_names_for_completion_begin_with_what_was_typed() -> None:
    from adapterkit.cli.options import FORMATS

    nothing: Any = None
    assert FORMATS.complete(nothing, nothing, "koh") == ["kohya", "kohya-diffusers", "kohya-ldm"]
