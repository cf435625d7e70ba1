"""Our deltas are what PEFT merges into a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from adapterkit.deltas import Change, Magnitude, build

pytestmark = pytest.mark.oracle

peft = pytest.importorskip("peft")

# PEFT's name of a tensor in a saved state: our role, and whether the axes are kept.
ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude",
    **{f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "ia3_l": "vector",
    "oft_R.weight": "blocks",
    "boft_R": "blocks",
    "boft_s": "rescale",
    "lora_A": "down",
    "lora_B": "up",
    "lora_E": "e",
    "vera_lambda_b": "b",
    "vera_lambda_d": "d",
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 32)
        self.conv = nn.Conv2d(12, 16, (3, 3))
        self.point = nn.Conv2d(12, 16, 1)
        self.line = nn.Conv1d(12, 16, 3)
        self.embedding = nn.Embedding(20, 24)

    def forward(self, x: Tensor) -> Tensor:
        return x


def adapted(config: object) -> tuple[nn.Module, dict[str, Tensor], nn.Module]:
    """(base, saved state by tensor name, merged model) with every adapter weight random."""
    torch.manual_seed(0)
    base = Model().requires_grad_(False)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "vera_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if "magnitude" in name else 0.0))
    state = {
        key.removeprefix("base_model.model."): value.clone()
        for key, value in peft.get_peft_model_state_dict(model).items()
    }
    return base, state, model.merge_and_unload()


def roles_of(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    names = {key.removeprefix(f"{module}."): value for key, value in state.items() if key.startswith(module)}
    return {ROLES[name]: value for name, value in names.items() if name in ROLES}


def check_merge(
    config: object, module: str, kind: str, scale: float = 1.0, tolerance: float = 1e-5, **facts: object
) -> Change:
    base, state, merged = adapted(config)
    weight, target = base.get_submodule(module).weight, merged.get_submodule(module).weight
    roles = roles_of(state, module)
    change = build(kind, roles, scale=scale, weight_shape=tuple(weight.shape), **facts)  # type: ignore[arg-type]
    ours, theirs = change.dense(weight), target - weight
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    return change


@pytest.mark.parametrize("module", ["linear", "conv", "point", "line"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_is_merged_as_in_peft(module: str, dora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=[module], use_dora=dora)
    facts = {"axis": "out"} if dora else {}
    change = check_merge(config, module, "lora", 0.75, **facts)  # type: ignore[arg-type]
    assert isinstance(change, Magnitude) is dora


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_of_an_embedding_is_merged_as_in_peft(dora: bool) -> None:
    """Stored transposed, and its magnitude holds a length per column of the (vocabulary, width) table."""
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["embedding"], use_dora=dora)
    base, state, merged = adapted(config)
    roles = {
        "up": state["embedding.lora_embedding_A"].T,
        "down": state["embedding.lora_embedding_B"].T,
    }
    if dora:
        roles["magnitude"] = state["embedding.lora_magnitude_vector"]
    change = build("embedding", roles, scale=0.75, weight_shape=(20, 24), axis="in" if dora else None)
    weight, target = base.embedding.weight, merged.embedding.weight
    assert torch.allclose(weight + change.dense(weight), target, atol=1e-5)


@pytest.mark.parametrize(
    "module, effective, core",
    [
        ("linear", False, False),
        ("conv", False, False),
        ("conv", True, True),
        ("line", True, True),
        ("point", True, False),
    ],
)
def test_a_loha_is_merged_as_in_peft(module: str, effective: bool, core: bool) -> None:
    config = peft.LoHaConfig(r=3, alpha=2, target_modules=[module], use_effective_conv2d=effective)
    change = check_merge(config, module, "loha", 2 / 3)
    assert ("t1" in change.tensors()) is core


@pytest.mark.parametrize(
    "module, options, roles",
    [
        ("linear", {"r": 100}, {"w1", "w2"}),
        ("linear", {"r": 2, "decompose_factor": 4}, {"w1", "w2_a", "w2_b"}),
        ("linear", {"r": 1, "decompose_both": True}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
        ("conv", {"r": 100}, {"w1", "w2"}),
        ("conv", {"r": 1, "decompose_factor": 2}, {"w1", "w2_a", "w2_b"}),
        ("conv", {"r": 1, "decompose_factor": 2, "use_effective_conv2d": True}, {"w1", "w2_a", "w2_b", "t2"}),
        ("line", {"r": 1, "decompose_factor": 2}, {"w1", "w2_a", "w2_b"}),
    ],
)
def test_a_lokr_is_merged_as_in_peft(module: str, options: dict[str, object], roles: set[str]) -> None:
    """PEFT scales by alpha / r from its configuration even where neither factor is factored."""
    config = peft.LoKrConfig(alpha=3, target_modules=[module], init_weights=True, **options)
    change = check_merge(config, module, "lokr", 3 / options["r"])  # type: ignore[operator]
    assert set(change.tensors()) == roles


@pytest.mark.parametrize(
    "module, feedforward",
    [("linear", False), ("linear", True), ("conv", False), ("conv", True)],
)
def test_an_ia3_is_merged_as_in_peft(module: str, feedforward: bool) -> None:
    config = peft.IA3Config(target_modules=[module], feedforward_modules=[module] if feedforward else [])
    check_merge(config, module, "ia3", on_input=feedforward, additive=False)


def test_ia3_on_a_linear_layer_tells_by_its_shape_what_it_scales() -> None:
    for feedforward in (False, True):
        config = peft.IA3Config(
            target_modules=["linear"], feedforward_modules=["linear"] if feedforward else []
        )
        check_merge(config, "linear", "ia3")


@pytest.mark.parametrize("module", ["linear", "conv"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "neumann, terms", [(False, 5), (True, 1), (True, 2), (True, 3), (True, 4), (True, 5), (True, 6)]
)
def test_an_oft_turns_the_columns_as_in_peft(module: str, share: bool, neumann: bool, terms: int) -> None:
    config = peft.OFTConfig(
        target_modules=[module],
        oft_block_size=4,
        block_share=share,
        use_cayley_neumann=neumann,
        num_cayley_neumann_terms=terms,
    )
    if terms == 1:
        base, state, _ = adapted(config)
        weight = base.get_submodule(module).weight
        roles = roles_of(state, module)
        assert not build("oft_input", roles, block_share=share, terms=1).dense(weight).any()
        return
    facts = {"block_share": share, "cayley_neumann": neumann, "terms": terms}
    check_merge(config, module, "oft_input", **facts)  # type: ignore[arg-type]


def test_peft_turns_an_embedding_the_other_way() -> None:
    config = peft.OFTConfig(target_modules=["embedding"], oft_block_size=4)
    base, state, merged = adapted(config)
    change = build("oft_embedding", {"blocks": state["embedding.oft_embedding_R.weight"]})
    weight = base.embedding.weight
    assert torch.allclose(weight + change.dense(weight), merged.embedding.weight, atol=1e-5)


@pytest.mark.parametrize("module", ["linear", "conv"])
def test_a_boft_of_one_stage_is_merged_as_in_peft(module: str) -> None:
    check_merge(peft.BOFTConfig(target_modules=[module], boft_block_size=4), module, "boft_input")


def test_the_stages_of_a_boft_meet_as_peft_permutes_them() -> None:
    """PEFT runs several stages with its CUDA kernel only; its permutations and rotations run anywhere."""
    layer = pytest.importorskip("peft.tuners.boft.layer").BOFTLayer
    size, count, stages = 4, 8, 3
    torch.manual_seed(0)
    blocks, rescale = torch.randn(stages, count, size, size) * 0.3, torch.rand(6, 1)
    weight = torch.randn(6, size * count)
    product = torch.eye(size * count)
    for stage in range(stages):
        order = layer.block_butterfly_perm(None, size * count, count // 2**stage, size // 2, stages - 1)
        permutation = layer.perm2mat(None, order)
        rotations = layer.cayley_batch(None, blocks[stage])
        product = permutation @ torch.block_diag(*rotations) @ permutation.T @ product
    expected = (product @ weight.T).T * rescale
    change = build("boft_input", {"blocks": blocks, "rescale": rescale})
    assert torch.allclose(weight + change.dense(weight), expected, atol=1e-5)


def test_an_adalora_is_merged_as_in_peft() -> None:
    config = peft.AdaLoraConfig(init_r=5, target_r=2, lora_alpha=3, target_modules=["linear"], total_step=10)
    change = check_merge(config, "linear", "adalora", 3 / 5)
    assert set(change.tensors()) == {"up", "down", "e"}
    pruned = check_pruned(config)
    assert pruned.rank == 3


def check_pruned(config: object) -> Change:
    """A pruned module keeps the divisor of the rank it began with, which no file tells."""
    base, state, merged = adapted(config)
    weight = base.linear.weight
    kept = [0, 2, 4]
    roles = roles_of(state, "linear")
    full = build("adalora", roles, scale=3 / 5).dense()
    e = torch.zeros_like(roles["e"])
    e[kept] = roles["e"][kept]
    expected = build("adalora", {**roles, "e": e}, scale=3 / 5).dense()
    assert torch.allclose(weight + full, merged.linear.weight, atol=1e-6)
    pruned = {"up": roles["up"][:, kept], "down": roles["down"][kept], "e": roles["e"][kept]}
    change = build("adalora", pruned, scale=3 / 3, initial_rank=5)
    assert torch.allclose(change.dense(), expected, atol=1e-6)
    return change


def test_a_vera_is_merged_as_in_peft() -> None:
    config = peft.VeraConfig(r=4, target_modules=["linear"], save_projection=True)
    base, state, merged = adapted(config)
    weight = base.linear.weight
    roles = roles_of(state, "linear")
    shared = {
        f"shared_{key[-1].lower()}": value for key, value in state.items() if key[-6:] in ("vera_A", "vera_B")
    }
    change = build("vera", roles, weight_shape=tuple(weight.shape), **shared)  # type: ignore[arg-type]
    assert torch.allclose(weight + change.dense(weight), merged.linear.weight, atol=1e-5)
    assert set(change.tensors()) == {"b", "d"}


# PEFT takes the bias for a factor that lost an axis, and warns.
@pytest.mark.filterwarnings("ignore:.*have invalid shape")
def test_the_bias_of_up_is_scaled_as_up_is() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["linear"], lora_bias=True)
    base, state, merged = adapted(config)
    change = build("diff", {"value": state["linear.lora_B.bias"]}, scale=0.75)
    assert torch.allclose(base.linear.bias + change.dense(), merged.linear.bias, atol=1e-6)
