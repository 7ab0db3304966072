"""Every registered prompt: any number of modalities, any pattern, nothing dead, nothing shared."""

import itertools

import pytest
import torch
from torch import nn

from mm_moe.backbones.base import Backbone, Tower
from mm_moe.models.generation import generated_rows, generated_tokens
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings
from mm_moe.registry import PROMPTS

torch.set_num_threads(1)
WIDTHS = {"a": 8, "b": 12, "c": 16}
BLOCKS = {"a": 4, "b": 4, "c": 5}
VARIANTS = {
    "generative": [
        {"generative": False, "steps": 2},
        {"types": False, "steps": 3},
        {"signal": False, "length": 2},
    ],
    "correlated": [{"dynamic": False}, {"common": False, "layers": 3}, {"correlated": False}],
    "missing_aware": [{"mode": "attention", "init": "one_hot"}, {"layers": 1, "length": 2}],
    "rep_code": [{"train_queries": True, "train_attention": True}, {"layers": 1, "dynamic": False}],
    "rep_fixed": [{"private": False}, {"layers": 3, "shared": False, "attend_padding": True}],
    "replay": [
        {"aggregation": "attention"},
        {"aggregation": "mean", "gated": False},
        {"private": False, "shared": False},
        {"replay": False},
        {"read": False},
        {"bypass": False, "replay_tokens": False, "aggregation": "last"},
        {"shared": False, "cache_layers": 1, "replay_layers": [3]},
    ],
}
CASES = [(name, options) for name in PROMPTS for options in ({}, *VARIANTS.get(name, []))]


class TinyTower(Tower):
    """Tokens (N, L, D) in; each block is single-head attention and a tanh."""

    def __init__(self, width: int, num_blocks: int, *, causal: bool) -> None:
        super().__init__()
        self.width, self.num_blocks, self.out_width, self.causal = width, num_blocks, 6, causal
        self.mix = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(num_blocks))
        self.out = nn.Linear(width, 6)

    def embed(self, payload):
        return payload["x"], payload["mask"]

    def block(self, index, x_NLD, mask_NL=None, keys_values=None, context=None, memory=None):
        query, key, value = self.mix[index](x_NLD).chunk(3, dim=-1)
        if keys_values is not None:
            key, value = (
                torch.cat([extra, own], 1)
                for extra, own in zip(keys_values, (key, value), strict=True)
            )
        score = query @ key.transpose(1, 2) / self.width**0.5
        if mask_NL is not None:
            extra = key.shape[1] - x_NLD.shape[1]
            keep = torch.cat([mask_NL.new_ones(len(x_NLD), extra), mask_NL], 1)
            score = score.masked_fill(~keep[:, None], -1e4)
        return x_NLD + torch.tanh(score.softmax(-1) @ value), None

    def pool(self, x_NLD, payload, prefix):
        return self.out(x_NLD[:, prefix])

    def blank(self):
        return {
            "x": torch.zeros(1, 2, self.width),
            "mask": torch.ones(1, 2, dtype=torch.bool),
        }

    def stand_in(self, num_rows, length):
        return {}

    def feed_forwards(self):
        return []


class TinyBackbone(Backbone):
    supported = ("a", "b", "c")

    def __init__(self, modalities):
        super().__init__({}, modalities=modalities)
        self.set_towers({m: TinyTower(WIDTHS[m], BLOCKS[m], causal=False) for m in self.supported})


def all_patterns(num_modalities: int) -> torch.Tensor:
    """Every non-empty pattern twice: bool (2 * (2 ** M - 1), M)."""
    rows = [p for p in itertools.product([True, False], repeat=num_modalities) if any(p)]
    return torch.tensor(rows + rows)


def payloads(present_BM, modalities):
    generator = torch.Generator().manual_seed(0)
    result = {}
    for m, name in enumerate(modalities):
        x_BLD = torch.randn(len(present_BM), 5, WIDTHS[name], generator=generator)
        mask_BL = torch.arange(5) < torch.randint(2, 6, (len(x_BLD), 1), generator=generator)
        keep = present_BM[:, m]
        result[name] = {"x": x_BLD[keep], "mask": mask_BL[keep]}
    return result


def make(name, options, modalities, seed=0):
    torch.manual_seed(seed)
    backbone = TinyBackbone(modalities).requires_grad_(False)
    prompt = PROMPTS.resolve(name)(
        widths={m: WIDTHS[m] for m in modalities},
        num_blocks={m: BLOCKS[m] for m in modalities},
        modalities=modalities,
        **options,
    )
    return backbone, prompt.eval()  # dropout would draw


def encode(backbone, prompt, present_BM, inputs):
    """Features (B, M, 6), zero where absent and not generated; as the model does it."""
    generated = generated_tokens(prompt, backbone, present_BM, inputs)
    lacking = generated_rows(generated, backbone.modalities, present_BM)
    extra = torch.tensor([len(present_BM)])  # a complete sample, for the blank row
    own = {m: present_BM[:, i].nonzero().squeeze(1) for i, m in enumerate(backbone.modalities)}
    edits = prompt.start(
        torch.cat([present_BM, torch.ones_like(present_BM[:1])]),
        {m: torch.cat([own[m] if len(own[m]) else extra, lacking[m]]) for m in own},
    )
    result = torch.zeros(*present_BM.shape, 6)
    for i, m in enumerate(backbone.modalities):
        payload = inputs[m] if len(own[m]) else None
        features, _ = backbone.encode(m, payload, edits.get(m), generated=generated.get(m))
        used = torch.cat([own[m], lacking[m]])
        result[used, i] = features[len(features) - len(used) :]
        result = result + 0 * features.sum()
    return result


def step(backbone, prompt, present_BM, inputs, optimizer=None):
    features = encode(backbone, prompt, present_BM, inputs)
    loss = (features * torch.randn(features.shape)).sum() + sum(prompt.losses().values())
    prompt.zero_grad()
    if loss.requires_grad:
        loss.backward()
    if optimizer is not None:
        optimizer.step()


@pytest.mark.parametrize("modalities", [("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_after_one_step_every_parameter_has_a_gradient(name, options, modalities):
    backbone, prompt = make(name, options, modalities)
    present = all_patterns(len(modalities))
    inputs = payloads(present, modalities)
    parameters = {n: p for n, p in prompt.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1) if parameters else None
    step(backbone, prompt, present, inputs, optimizer)
    step(backbone, prompt, present, inputs)
    dead = [n for n, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []
    for n, p in parameters.items():  # tables: every row of every pattern lives
        if n.startswith("tables") or "_K" in n:
            assert (p.grad.flatten(1).abs().amax(1) > 0).all(), n


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_row_depends_on_itself_and_its_pattern_alone(name, options):
    modalities = ("a", "b", "c")
    backbone, prompt = make(name, options, modalities)
    randomise(prompt)
    present = all_patterns(3)
    inputs = payloads(present, modalities)
    together = encode(backbone, prompt, present, inputs)
    for b in (0, 3, 6):
        alone = {}
        for i, m in enumerate(modalities):
            place, rows = int(present[:b, i].sum()), int(present[b, i])
            alone[m] = {k: v[place : place + rows] for k, v in inputs[m].items()}
        features = encode(backbone, prompt, present[b : b + 1], alone)
        assert torch.allclose(features[0], together[b], atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [c for c in CASES if c[0] != "none"])
def test_rows_that_lack_different_things_are_told_apart(name, options):
    backbone, prompt = make(name, options, ("a", "b"))
    randomise(prompt)
    same = {"x": torch.ones(2, 3, 8), "mask": torch.ones(2, 3, dtype=torch.bool)}
    present = torch.tensor([[True, True], [True, False]])
    edits = prompt.start(present, {"a": torch.tensor([0, 1])})
    features, _ = backbone.encode("a", same, edits["a"])
    differs = (features[0] - features[1]).abs().max() > 1e-6
    tables = ("private", "shared") if name == "replay" else ("types",)
    has_tables = any(options.get(part, True) for part in tables)
    assert bool(differs) == has_tables


@pytest.mark.parametrize("modalities", [("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_all_state_is_in_the_state_dict(name, options, modalities):
    backbone, prompt = make(name, options, modalities)
    randomise(prompt)
    _, other = make(name, options, modalities, seed=5)
    other.load_state_dict(prompt.state_dict())
    present = all_patterns(len(modalities))
    inputs = payloads(present, modalities)
    before = encode(backbone, prompt, present, inputs)
    torch.manual_seed(99)
    assert torch.equal(encode(backbone, other, present, inputs), before)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_process_without_a_modality_gets_every_gradient(name, options):
    backbone, prompt = make(name, options, ("a", "b"))
    present = torch.tensor([[True, False]])
    loss = encode(backbone, prompt, present, payloads(present, ("a", "b"))).sum()
    loss = loss + sum(prompt.losses().values())
    if loss.requires_grad:
        loss.backward()
    assert [n for n, p in prompt.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(("name", "options"), CASES)
def test_prefix_tokens_of_the_blank_row_are_not_routed(name, options):
    """The mask of a blank row stays False over its prefix, whatever the prompt adds."""
    backbone, prompt = make(name, options, ("a", "b"))
    seen = []

    class Spy(TinyTower):
        def block(self, index, x_NLD, mask_NL=None, keys_values=None, context=None, memory=None):
            seen.append((x_NLD.shape[1], mask_NL))
            return super().block(index, x_NLD, mask_NL, keys_values, context)

    backbone.towers["a"] = Spy(8, 4, causal=False)
    edits = prompt.start(torch.ones(1, 2, dtype=torch.bool), {"a": torch.tensor([0])})
    backbone.encode("a", None, edits.get("a"))
    assert len(seen) == 4
    for length, mask_NL in seen:
        assert mask_NL.shape == (1, length)
        assert not mask_NL.any()


NOTHING = {
    "none": {},
    "generative": {"signal": False, "types": False},  # rows that lack nothing
    "correlated": {"layers": 0},
    "missing_aware": {"layers": 0},
    "rep_code": {"layers": 0},
    "rep_fixed": {"layers": 0},
    "replay": {"private": False, "shared": False},  # gates start closed
}


@pytest.mark.parametrize("modalities", [("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("name", PROMPTS)
def test_zero_prompts_are_the_plain_backbone_exactly(name, modalities):
    backbone, prompt = make(name, NOTHING[name], modalities)
    present = all_patterns(len(modalities))
    inputs = payloads(present, modalities)
    _, nothing = make("none", {}, modalities)
    plain = encode(backbone, nothing, present, inputs)[present]
    found = encode(backbone, prompt, present, inputs)[present]
    if name == "generative":  # runs in larger matrices, which round elsewhere
        assert torch.allclose(found, plain, atol=1e-6)
    else:
        assert torch.equal(found, plain)
    if name not in ("replay", "generative"):
        assert list(prompt.parameters()) == []


def randomise(prompt: nn.Module) -> None:
    """Open every gate: values as after some training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_moe_layer_accepts_the_extended_mask():
    layer = MoELayer(width=8, hidden=8, settings=MoESettings())
    out, record = layer(torch.ones(1, 3, 8), torch.tensor([[True, True, False]]))
    assert record.tokens_E.sum() == 2
    assert not out[0, 2].any()
