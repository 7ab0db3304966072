"""BLIP-2's first stage in one process: masks, negatives, the library's own logits, take-over."""

import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from eval.zero_shot import similarity
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from mm_moe.moe.layer import moe_layers
from pretrain.blip2 import Blip2StageOne, Contrast, generation_loss
from pretrain.hard_negatives import WANTS_IMAGE, WANTS_TEXT, Candidates, gumbel, id_keys, text_keys
from tests.blip2_rows import FIELDS, FULL, PRESENT, ROWS, batch_of, stage_one_model

torch.set_num_threads(1)
REAL = torch.ones(ROWS, dtype=torch.bool)


def passes_of(model, present=FULL):
    batch = batch_of(present=present)
    passes = model.backbone.stage_one()
    memory = passes.image.memory(batch.inputs["image"])
    return passes, memory, batch.inputs["text"]


def library_folder(folder):
    torch.manual_seed(0)
    fields = FIELDS | {
        "qformer_config": FIELDS["qformer_config"] | {"use_qformer_text_input": True}
    }
    library = Blip2ForImageTextRetrieval(Blip2Config(**fields)).eval()
    torch.nn.init.normal_(library.query_tokens)
    library.save_pretrained(folder)
    return library


def test_logits_equal_the_librarys_own(tmp_path):
    library = library_folder(tmp_path)
    config = MultimodalMoEConfig(
        backbone="blip2", backbone_config={"stage_one": True}, num_labels=0
    )
    model = build_model(config, pretrained=str(tmp_path)).eval()
    batch = batch_of(present=FULL)
    image = {"pixel_values": batch.inputs["image"]["pixel_values"].float()}
    text = batch.inputs["text"]
    with torch.no_grad():
        itc = library(**image, **text).logits_per_image
        itm = library(**image, **text, use_image_text_matching_head=True).logits_per_image
        passes = model.backbone.stage_one()
        memory = passes.image.memory(image)
        ours = passes.match(memory, text, REAL)
        found = model(batch.present, {"image": image, "text": text}).features
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".vision." in n)
    assert (ours - itm).abs().max() <= 1e-5
    unit = torch.nn.functional.normalize(found["text"], dim=-1)
    scores = torch.from_numpy(similarity(found["image"].numpy(), unit.numpy()))
    assert (scores - itc).abs().max() <= 1e-5
    assert itc.std() > 1e-2
    assert itm.std() > 1e-3


def test_a_later_token_changes_no_earlier_logit_and_the_image_all():
    model = stage_one_model().eval()
    passes, memory, text = passes_of(model)
    changed = {**text, "input_ids": text["input_ids"].clone()}
    changed["input_ids"][:, 2] = 38
    with torch.no_grad():
        found = passes.queries(memory, REAL)
        before = passes.words(found, text, REAL, start=39)
        after = passes.words(found, changed, REAL, start=39)
        assert torch.equal(before[:, :2], after[:, :2])
        assert (before[:, 2] - after[:, 2]).abs().amax(1).min() > 1e-3
        other = passes.words(passes.queries(memory.flip(0), REAL), text, REAL, start=39)
    assert (before[:, 0] - other[:, 0]).abs().amax(1).min() > 1e-4


def test_kept_queries_give_what_one_pass_over_queries_and_text_gives():
    """The multimodal causal mask, written out."""
    model = stage_one_model().eval()
    passes, memory, text = passes_of(model)
    ids = text["input_ids"].clone()
    ids[:, 0] = 39
    with torch.no_grad():
        ours = passes.words(passes.queries(memory, REAL), text, REAL, start=39)
        q, (t, mask) = passes.image.queries(ROWS), passes.text.embed({**text, "input_ids": ids})
        num_q, length = q.shape[1], t.shape[1]
        sees = torch.zeros(num_q + length, num_q + length, dtype=torch.bool)
        sees[:, :num_q] = True
        sees[num_q:, num_q:] = torch.ones(length, length).tril().bool()
        bias = torch.zeros(sees.shape).double().masked_fill(~sees, -torch.inf)[None, None]
        real = torch.cat([torch.ones(ROWS, num_q, dtype=torch.bool), mask], 1)
        for both, own in zip(passes.image.blocks, passes.text.blocks, strict=True):
            x = torch.cat([q, t], 1)
            y = both.attention(x, mask_NL=real, bias_1HLL=bias)
            q, t = both.attention_norm(x + y).split([num_q, length], 1)
            q, _ = both.behind_attention(q, None, None, memory)
            t, _ = own.behind_attention(t, None, None)
        whole = model.backbone.heads.words(t, passes.text.token_embedding)
    assert torch.allclose(ours[mask], whole[mask], atol=1e-12)


def test_a_text_does_not_see_the_image_in_the_contrast_and_does_in_the_matching():
    model = stage_one_model().eval()
    passes, memory, text = passes_of(model)
    with torch.no_grad():
        model.backbone.towers["image"].query_tokens += 1.0
        changed = passes.texts(text, REAL)
        model.backbone.towers["image"].query_tokens -= 1.0
        assert torch.equal(passes.texts(text, REAL), changed)
        match = passes.match(memory, text, REAL)
        assert (passes.match(memory.flip(0), text, REAL) - match).abs().max() > 1e-4
        assert (
            passes.match(memory, {**text, "input_ids": text["input_ids"].flip(1)}, REAL) - match
        ).abs().max() > 1e-4


def test_contrast_by_hand():
    image = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [0.0, 1.0]]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    contrast = Contrast.of(image, text, torch.tensor([0.0]))
    assert contrast.image_BG.tolist() == [[1, 1], [0, 1]]
    assert contrast.text_BG.tolist() == [[1, 0], [1, 1]]
    both = torch.ones(2, dtype=torch.bool)
    log2, other = torch.tensor(2.0).log(), (1 + torch.tensor(-1.0).exp()).log()
    loss = contrast.loss(both, both, smoothing=0.0)
    assert loss.item() == pytest.approx(((log2 + other) / 2).item())
    # smoothing moves a tenth of the label to the mean of all logits: 1 -> 1 and 1 -> 0.5
    smooth = contrast.loss(both, both, smoothing=0.1)
    assert smooth.item() == pytest.approx(loss.item() + 0.1 * 0.5 / 2)


def test_generation_asks_for_the_words_behind_the_first():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = 50.0  # behind the first token comes 2, for certain
    text = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)}
    loss = generation_loss(logits, text, REAL[:1], smoothing=0.0)
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item() / 2)


def test_no_negative_is_the_match_or_has_its_text_or_lacks_something():
    complete = torch.tensor([True, True, True, False, True, True])
    texts = torch.tensor([7, 8, 7, 9, 10, 7])
    rows = complete.nonzero().squeeze(1)
    seen = set()
    for seed in range(300):
        keys = id_keys([f"s{i}" for i in range(6)], seed=seed)
        candidates, first = Candidates.of(keys, texts, complete)
        assert first == 0
        for what in (WANTS_TEXT, WANTS_IMAGE):
            chosen, found = candidates.draw(torch.zeros(len(rows), 6), rows, what=what)
            assert found.all()
            seen |= set(zip(rows.tolist(), chosen.tolist(), strict=True))
    allowed = {(i, j) for i in rows.tolist() for j in rows.tolist() if texts[i] != texts[j]}
    assert seen == allowed  # never another, and each of them now and then


def test_negatives_do_not_hang_on_the_order_and_follow_the_similarity():
    names = [f"s{i}" for i in range(64)]
    keys, texts = id_keys(names, seed=0), torch.arange(64)
    logits = torch.randn(64, 64, generator=torch.manual_seed(0))
    order = torch.randperm(64, generator=torch.manual_seed(1))
    every = torch.arange(64)
    plain, _ = Candidates(keys, texts, REAL.new_ones(64)).draw(logits, every, what=WANTS_TEXT)
    turned, _ = Candidates(keys[order], texts[order], REAL.new_ones(64)).draw(
        logits[order][:, order], every, what=WANTS_TEXT
    )
    assert torch.equal(order[turned], plain[order])
    logits[:, 5] += 30.0  # one that all are close to
    hard, _ = Candidates(keys, texts, REAL.new_ones(64)).draw(logits, every, what=WANTS_TEXT)
    assert (hard == 5).sum() == 63
    noise = gumbel(keys, keys, salt=torch.tensor(3))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.06)


def test_one_pair_alone_has_no_negative():
    found = Candidates(torch.arange(2), torch.arange(2), torch.tensor([True, False]))
    assert not found.draw(torch.zeros(1, 2), torch.tensor([0]), what=WANTS_TEXT)[1].any()


def test_texts_differ_by_their_real_tokens_only():
    ids = torch.tensor([[1, 2, 0, 0], [1, 2, 3, 0], [2, 1, 0, 0], [1, 2, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    a, b, c, d = text_keys(ids, mask).tolist()
    assert a == d == text_keys(ids[:1, :2], mask[:1, :2]).item()
    assert len({a, b, c}) == 3


def test_sparse_starts_dense_and_counts_every_pass():
    losses = []
    for moe in (None, {"num_experts": 2}):
        torch.manual_seed(0)
        config = MultimodalMoEConfig(
            backbone="blip2",
            backbone_config=FIELDS | {"stage_one": True},
            moe=moe,
            num_labels=0,
        )
        model = build_model(config).double()
        _, parts, output = Blip2StageOne()(model, batch_of())
        losses.append([parts[name].item() for name in ("itc", "itm", "itg")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert sorted(output.routing) == ["image.1", "text.1"]
    pairs, queries, tokens = 3, 3, 3 + 3 + 5  # rows 0, 2 and 3 are pairs; 0 and 2 share a text
    # contrast, matching of pairs, and of two negatives for each pair
    assert output.routing["image.1"].tokens_E.sum() == pairs * queries * 4
    text = output.routing["text.1"].tokens_E.sum().item()
    # contrast, generation, pairs, their texts with other images; then the wrong texts: rows 0 and 2
    # can only get row 3's (5 tokens), which can get either (3)
    assert text == 4 * tokens + 5 + 5 + 3


def test_the_model_reloads_and_becomes_a_supervised_one(tmp_path):
    model = stage_one_model(moe={"num_experts": 2}).float().eval()
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    batch = batch_of(present=FULL)
    inputs = {"image": {"pixel_values": batch.inputs["image"]["pixel_values"].float()}}
    inputs["text"] = batch.inputs["text"]
    projected = []
    part = again.backbone.towers["image"].projection
    part.register_forward_hook(lambda _module, _inputs, out: projected.append(out))
    with torch.no_grad():
        first = model(batch.present, inputs).features
        assert first["image"].shape == (ROWS, 3 * 8)
        second = again(batch.present, inputs).features
        assert all(torch.equal(first[name], second[name]) for name in first)
    config = MultimodalMoEConfig(
        backbone="blip2", moe={"num_experts": 2}, moe_layers=[0, 1], num_labels=3
    )
    tuned = build_model(config, pretrained=str(tmp_path)).eval()
    assert len(moe_layers(tuned)) == 4
    with torch.no_grad():
        found = tuned(batch.present, inputs)
    assert found.logits.shape == (ROWS, 3)
    assert torch.allclose(found.features["text"], first["text"], atol=1e-6)
    assert torch.allclose(found.features["image"], projected[-1].mean(1), atol=1e-6)
    tuned.save_pretrained(tmp_path / "tuned")
    third = MultimodalMoEModel.from_pretrained(tmp_path / "tuned").eval()
    with torch.no_grad():
        assert torch.equal(third(batch.present, inputs).logits, found.logits)
    with pytest.raises(ConfigError, match="stage_one"):
        build_model(
            MultimodalMoEConfig(
                backbone="blip2", backbone_config={"stage_one": True}, num_labels=0
            ),
            pretrained=str(tmp_path / "tuned"),
        )


def test_recomputed_blocks_change_nothing():
    found = []
    for every in (0, 1):
        model = stage_one_model(moe={"num_experts": 2}).train()
        model.backbone.set_recompute(every)
        loss = Blip2StageOne()(model, batch_of())[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_a_query_of_several_vectors_counts_by_the_closest():
    image = np.array([[1.0, 0.0, 0.0, 1.0], [0.6, 0.8, -1.0, 0.0]])  # two vectors each
    text = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert np.allclose(similarity(image, text), [[1.0, 1.0], [0.8, 0.6]])
    assert np.allclose(similarity(text, image), [[1.0, 0.8], [1.0, 0.6]])
    assert np.allclose(similarity(text, text), np.eye(2))


def test_incomplete_pairs_feed_nothing():
    model = stage_one_model()
    loss = Blip2StageOne()(model, batch_of())[0]
    kept = [i for i, has in enumerate(PRESENT) if all(has)]
    only = [(1, 1) if i in kept else (0, 1) for i in range(ROWS)]
    assert Blip2StageOne()(model, batch_of(present=only))[0].item() == pytest.approx(loss.item())


def test_the_frozen_image_tower_has_no_graph():
    model = stage_one_model(freeze_vision=True)
    _, memory, _ = passes_of(model)
    assert not memory.requires_grad
    Blip2StageOne()(model, batch_of())[0].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if ".vision." not in n}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"blocks": "vision"}, "does not go with stage_one"),
        ({"text": "language_model"}, "does not go with stage_one"),
        ({"start_token": 40}, "must be a token id from 0 to 39"),
    ],
)
def test_wrong_settings_are_refused(own, words):
    with pytest.raises(ConfigError, match=words):
        stage_one_model(**own)


@pytest.mark.parametrize(
    "options", [{"itc_weight": -1}, {"itm_weight": "a"}, {"itg_smoothing": 1.0}, {"seed": 0.5}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ConfigError, match="objective_config"):
        Blip2StageOne(**options)
