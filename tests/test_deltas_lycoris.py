"""Our deltas are what LyCORIS's own modules add to a layer's output."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from adapterkit.deltas import Change, Magnitude, TLora, build
from adapterkit.errors import Unrepresentable
from adapterkit.specs.kinds import KINDS

pytestmark = pytest.mark.oracle

# LyCORIS's name of a tensor: our role.
ROLES = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "dora_scale": "magnitude",
    **{f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft_blocks": "blocks",
    "rescale": "rescale",
    "weight": "vector",
    "on_input": "on_input",
    "q_layer.weight": "q",
    "p_layer.weight": "p",
    "lambda_layer": "lambda",
    "diff": "value",
}

LINEAR = "linear"
CONV1D, CONV2D, POINTWISE = "conv1d", "conv2d", "1x1"


def layer(form: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        LINEAR: lambda: nn.Linear(24, 32),
        CONV1D: lambda: nn.Conv1d(24, 32, 3, padding=1),
        CONV2D: lambda: nn.Conv2d(24, 32, (3, 2), padding=1),
        POINTWISE: lambda: nn.Conv2d(24, 32, 1),
    }
    return layers[form]().requires_grad_(False)


def sample(form: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn({LINEAR: (3, 24), CONV1D: (2, 24, 5)}.get(form, (2, 24, 4, 5)), generator=generator)


def trained(name: str, form: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """(layer, LyCORIS module over it) with every parameter random."""
    modules = pytest.importorskip("lycoris.modules")
    kinds = {
        "locon": "locon.LoConModule",
        "loha": "loha.LohaModule",
        "lokr": "lokr.LokrModule",
        "glora": "glora.GLoRAModule",
        "diag-oft": "diag_oft.DiagOFTModule",
        "boft": "boft.ButterflyOFTModule",
        "ia3": "ia3.IA3Module",
        "full": "full.FullModule",
        "tlora": "tlora.TLoraModule",
    }
    file, class_name = kinds[name].split(".")
    original = layer(form)
    module = getattr(getattr(modules, file), class_name)("x", original, 1.0, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if getattr(module, "rescaled", False):
            module.rescale.add_(1.0)
    return original, module.eval()


def change_of(kind: str, state: Mapping[str, Tensor], shape: torch.Size, **facts: object) -> Change:
    """The change in a saved state, its scale from alpha by the rule for files."""
    roles = {ROLES[key]: value for key, value in state.items() if key in ROLES}
    scale = 1.0
    if KINDS[kind].scales and not {"w1", "w2"} <= set(roles):
        rank = next(roles[role].shape[axis] for role, axis in KINDS[kind].rank if role in roles)
        scale = float(state["alpha"]) / rank
    return build(kind, roles, scale=scale, weight_shape=tuple(shape), **facts)  # type: ignore[arg-type]


def output(original: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    torch_layer = layer(LINEAR if isinstance(original, nn.Linear) else _form_of(original))
    torch_layer.weight.data = weight
    return torch_layer(x)


def _form_of(original: nn.Module) -> str:
    if isinstance(original, nn.Conv1d):
        return CONV1D
    return POINTWISE if original.weight.shape[-1] == 1 else CONV2D


def check_forward(kind: str, name: str, form: str, options: dict[str, object], **facts: object) -> Change:
    """The layer with our delta added answers as LyCORIS's module does."""
    original, module = trained(name, form, **options)
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    change = change_of(kind, state, original.weight.shape, **facts)
    x = sample(form)
    with torch.no_grad():
        theirs = module(x)
        ours = output(original, original.weight + change.dense(original.weight), x)
    assert float((ours - theirs).norm() / (theirs - original(x)).norm()) < 2e-5
    return change


@pytest.mark.parametrize(
    "form, options",
    [
        (LINEAR, {}),
        (LINEAR, {"rs_lora": True}),
        (LINEAR, {"use_scalar": True}),
        (LINEAR, {"weight_decompose": True, "wd_on_out": True}),
        (LINEAR, {"weight_decompose": True, "wd_on_out": False}),
        (POINTWISE, {}),
        (CONV1D, {}),
        (CONV1D, {"use_tucker": True}),
        (CONV2D, {}),
        (CONV2D, {"use_tucker": True}),
        (CONV2D, {"weight_decompose": True, "wd_on_out": True}),
        (CONV2D, {"weight_decompose": True, "wd_on_out": False}),
    ],
)
def test_a_lora_adds_what_it_adds_in_lycoris(form: str, options: dict[str, object]) -> None:
    change = check_forward("lora", "locon", form, {"lora_dim": 4, "alpha": 3.0, **options})
    if isinstance(change, Magnitude):
        assert change.axis == ("out" if options["wd_on_out"] else "in")


@pytest.mark.parametrize(
    "form, options",
    [
        (LINEAR, {}),
        (LINEAR, {"rs_lora": True}),
        (LINEAR, {"weight_decompose": True, "wd_on_out": True}),
        (LINEAR, {"weight_decompose": True, "wd_on_out": False}),
        (POINTWISE, {}),
        (CONV1D, {"use_tucker": True}),
        (CONV2D, {}),
        (CONV2D, {"use_tucker": True}),
        (CONV2D, {"use_tucker": True, "weight_decompose": True, "wd_on_out": False}),
    ],
)
def test_a_loha_adds_what_it_adds_in_lycoris(form: str, options: dict[str, object]) -> None:
    check_forward("loha", "loha", form, {"lora_dim": 3, "alpha": 2.0, **options})


@pytest.mark.parametrize(
    "form, options, roles",
    [
        (LINEAR, {"lora_dim": 100}, {"w1", "w2"}),
        (LINEAR, {"factor": 4}, {"w1", "w2_a", "w2_b"}),
        (LINEAR, {"factor": 4, "unbalanced_factorization": True}, {"w1", "w2_a", "w2_b"}),
        (LINEAR, {"decompose_both": True, "lora_dim": 1}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
        (LINEAR, {"factor": 4, "weight_decompose": True, "wd_on_out": True}, {"w1", "w2_a", "w2_b"}),
        (LINEAR, {"factor": 4, "weight_decompose": True, "wd_on_out": False}, {"w1", "w2_a", "w2_b"}),
        (POINTWISE, {"factor": 4}, {"w1", "w2_a", "w2_b"}),
        (CONV2D, {"full_matrix": True, "factor": 4}, {"w1", "w2"}),
        (CONV2D, {"factor": 4}, {"w1", "w2_a", "w2_b"}),
        (CONV2D, {"factor": 4, "use_tucker": True}, {"w1", "w2_a", "w2_b", "t2"}),
    ],
)
def test_a_lokr_adds_what_it_adds_in_lycoris(form: str, options: dict[str, object], roles: set[str]) -> None:
    change = check_forward("lokr", "lokr", form, {"lora_dim": 2, "alpha": 3.0, **options})
    assert set(change.tensors()) - {"magnitude"} == roles


@pytest.mark.parametrize("form", [LINEAR, POINTWISE, CONV2D])
def test_a_glora_adds_what_it_adds_in_lycoris(form: str) -> None:
    check_forward("glora", "glora", form, {"lora_dim": 4, "alpha": 3.0})


@pytest.mark.parametrize("form", [LINEAR, CONV2D])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("name", ["diag-oft", "boft"])
def test_an_oft_turns_the_rows_as_lycoris_does(
    name: str, constraint: float, rescaled: bool, form: str
) -> None:
    options = {"lora_dim": 8, "rescaled": rescaled, "constraint": constraint}
    kind = "oft" if name == "diag-oft" else "boft"
    change = check_forward(kind, name, form, options, constraint=constraint)
    assert change.kind == kind
    assert change.tensors()["blocks"].ndim == (3 if kind == "oft" else 4)


@pytest.mark.parametrize("form", [LINEAR, CONV2D])
@pytest.mark.parametrize("on_input", [False, True])
def test_an_ia3_scales_as_in_lycoris(form: str, on_input: bool) -> None:
    check_forward("ia3", "ia3", form, {"train_on_input": on_input})


@pytest.mark.parametrize("form", [LINEAR, CONV2D])
def test_a_full_difference_adds_what_it_adds_in_lycoris(form: str) -> None:
    original, module = trained("full", form)
    delta = module.weight.detach().clone()
    change = change_of("diff", {"diff": delta}, original.weight.shape)
    merged = module.get_merged_weight(shape=original.weight.shape)[0]
    assert torch.allclose(original.weight + change.dense(original.weight), merged, atol=1e-6)


@pytest.mark.parametrize("form", [LINEAR, CONV2D])
def test_a_tlora_is_carried_and_refused(form: str) -> None:
    original, module = trained("tlora", form, lora_dim=4)
    state = {key: value.detach() for key, value in module.state_dict().items()}
    roles = {ROLES[key]: value for key, value in state.items() if key in ROLES}
    change = build("tlora", roles)
    assert isinstance(change, TLora) and set(change.tensors()) == {"p", "q", "lambda"}
    with pytest.raises(Unrepresentable):
        change.dense(original.weight)


@pytest.mark.parametrize("name, kind", [("loha", "loha"), ("lokr", "lokr")])
def test_lycoris_merges_apply_the_scale_twice_and_its_forward_once(name: str, kind: str) -> None:
    """Why the forward pass is our oracle: `merge_to` of 4.1.3 is off by a factor of alpha / rank."""
    original, module = trained(name, LINEAR, lora_dim=2, alpha=1.0, factor=4)
    state = {key: value.detach().clone() for key, value in module.state_dict().items()}
    ours = change_of(kind, state, original.weight.shape).dense()
    theirs = module.get_diff_weight(shape=original.weight.shape)[0].detach()
    assert torch.allclose(theirs, ours * 0.5, rtol=1e-4, atol=1e-6)
