"""The rollout (eval.py): its cache against whole forward passes, its budgets, its random streams and bans."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import crop, plain, refusal, refused, stock
import torch
from PIL import Image

import env
import eval as evaluation
import sft

# Large images (several windows of attention), and a temperature that is not 1.
ROOMY = evaluation.RolloutConfig(
    max_crops=5,
    max_pixels=150 * 150,
    max_crop_pixels=90 * 90,
    turn_tokens=17,
    max_tokens=900,
    temperature=0.8)
SHORT = evaluation.RolloutConfig(max_crops=2, turn_tokens=4)
ANSWER = "<think>At A1 green.</think>\n<answer>green</answer>"
IDLE = "<think>hm</think>"


def script(patch, turns, cfg):
    """Rollouts sample these tokens: {(prompt, sample): [ids of turn 1, ids of turn 2, ...]}.

    Only the draw is replaced: the random number of a token becomes its id.
    """
    def uniforms(seed, prompt, sample, n):
        numbers = torch.zeros(n // cfg.turn_tokens, cfg.turn_tokens, dtype=torch.float64)
        for row, ids in zip(numbers, turns[prompt, sample]):
            row[:len(ids)] = torch.tensor(ids) / 2 ** 20
        return numbers.flatten()
    patch.setattr(evaluation, "uniforms", uniforms)
    patch.setattr(evaluation, "draw", lambda logp, u: (u * 2 ** 20).round().long())


def turns_of(policy, texts):
    return [policy.proc.encode_data(text, keep=env.TAGS) + [policy.proc.end] for text in texts]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two rows with images of different shape; every region looks different."""
    rows = []
    for i, (width, height) in enumerate(((320, 200), (150, 400))):
        path = str(tmp_path_factory.mktemp("pictures") / f"{i}.png")
        noise = Image.effect_noise((width // 10, height // 10), 90)
        noise.convert("RGB").resize((width, height), Image.BICUBIC).save(path)
        rows.append({
            "images": [path],
            "problem": f"Which colour is it{' now' * i}?",
            "solution": "green"})
    return rows


@pytest.fixture(scope="module")
def search(policy):
    """The turns of six searches; one is cut by the budget of a turn."""
    left = crop(0, 0, 500, 999)
    right = crop(500, 100, 999, 900)
    lower = crop(0, 500, 900, 999, img_idx=1)
    upper = crop(0, 0, 999, 400, img_idx=1)
    texts = {
        (0, 0): [left, lower, ANSWER],
        (0, 1): [ANSWER],
        (0, 2): [IDLE, right, "cut off", ANSWER],
        (1, 0): [crop(0, 0, 500, 500, img_idx=9), right, upper, IDLE],
        (1, 1): [left, ANSWER],
        (1, 2): [right, lower, left, ANSWER]}
    turns = {}
    for key, value in texts.items():
        turns[key] = turns_of(policy, value)
    turns[0, 2][2] = (policy.proc.encode(" black") * 200)[:ROOMY.turn_tokens]
    return turns


@pytest.fixture(scope="module")
def searched(any_policy, pictures, search):
    """Six searches of 1 to 4 turns in four slots: images arrive midway, slots idle and are refilled, a group is cut."""
    with pytest.MonkeyPatch.context() as patch:
        script(patch, search, ROOMY)
        return evaluation.rollout(any_policy, pictures, replace(ROOMY, in_flight=4), samples=3)


def sampled_logp(trajs):
    numbers = []
    for t in trajs:
        numbers += [p for p, m in zip(t.logp, t.mask) if m]
    return torch.tensor(numbers)


@torch.no_grad()
def test_cached_decoding_equals_a_full_forward(any_policy, searched):
    """What was recorded while sampling equals the update's (one padded batch) and the stock model's."""
    assert [len(t.crops) for t in searched] == [2, 0, 1, 2, 1, 3]
    model = stock(any_policy)
    want = []
    for t in searched:
        at = np.flatnonzero(t.mask)
        logp = plain(model, any_policy, t, ROOMY.temperature)
        want.append(logp[at - 1, np.array(t.ids)[at]])
    want = torch.cat(want)
    assert want.std() > 0.5                      # the policy prefers something
    torch.testing.assert_close(sampled_logp(searched), want, atol=1e-4, rtol=0)
    updated, _ = any_policy(sft.collate(searched, any_policy.proc), ROOMY.temperature)
    torch.testing.assert_close(updated, sampled_logp(searched), atol=2e-5, rtol=0)


@pytest.mark.parametrize("any_policy", ["qwen3_vl", "qwen3_5"], indirect=True)
def test_slots_and_parts_change_nothing(any_policy, pictures, search, searched, monkeypatch):
    """Nor does it matter how many slots a step computes, or how seldom ended turns are acted on."""
    script(monkeypatch, search, ROOMY)
    cases = (2, dict(STEPS=1, SHARE=0.01)), (6, dict(STEPS=18, SHARE=1, PREFILL=1, WIDTH=1))
    for in_flight, changes in cases:
        for name, value in changes.items():
            monkeypatch.setattr(evaluation, name, value)
        again = evaluation.rollout(any_policy, pictures, replace(ROOMY, in_flight=in_flight), samples=3)
        assert [t.ids for t in again] == [t.ids for t in searched]
        torch.testing.assert_close(sampled_logp(again), sampled_logp(searched), atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_tokens(any_policy, rows):
    """Greedy tokens are those that the stock model finds likeliest, given the whole sequence so far."""
    model = stock(any_policy)
    cfg = replace(SHORT, turn_tokens=12)
    for t in evaluation.rollout(any_policy, rows[:3], cfg, samples=2, greedy=True):
        at = np.flatnonzero(t.mask)
        want = plain(model, any_policy, t)[at - 1].argmax(-1)
        assert want.tolist() == [t.ids[i] for i in at]


def test_render_is_a_scripted_rollout(policy, pictures, monkeypatch):
    """An SFT example and a rollout that samples the same turns: same ids, mask, boxes, views, answer."""
    texts = [
        crop(250, 0, 750, 1000),
        crop(0, 500, 500, 1000, img_idx=1),
        crop(0, 0, 1, 1, img_idx=7),
        ANSWER]
    script(monkeypatch, {(0, 0): turns_of(policy, texts)}, ROOMY)
    [sampled] = evaluation.rollout(policy, pictures[:1], ROOMY)
    rendered = env.render(policy.proc, pictures[0], texts, ROOMY)
    for name in ("ids", "mask", "crops", "answer", "status"):
        assert getattr(sampled, name) == getattr(rendered, name), name
    assert np.array_equal(sampled.pos, rendered.pos)
    assert rendered.answer == "green"


def test_budgets(policy, pictures, monkeypatch):
    """Never a token above max_tokens; an observation is entered whole or not at all; one token is enough."""
    texts = [crop(0, 0, 500, 500), crop(0, 0, 500, 500, img_idx=1), ANSWER]
    script(monkeypatch, {(0, 0): turns_of(policy, texts)}, ROOMY)
    whole = env.render(policy.proc, pictures[0], texts[:1], ROOMY)     # up to the header of turn 2
    budget = len(whole.ids) + 2
    [traj] = evaluation.rollout(policy, pictures[:1], replace(ROOMY, max_tokens=budget))
    assert traj.mask[budget - 2:] == [1, 0]
    assert len(traj.shown) == 2
    assert traj.status == "over_tokens"
    prompt = len(env.reset(policy.proc, pictures[0], ROOMY).ids)
    for room in (2, 40, 100):
        cfg = replace(ROOMY, max_tokens=prompt + room)
        [traj] = evaluation.rollout(policy, pictures[:1], cfg)
        assert len(traj.ids) <= cfg.max_tokens
        assert traj.ids[-1] == policy.proc.end
    refused("max_tokens", evaluation.rollout, policy, pictures[:1], replace(ROOMY, max_tokens=prompt + 1))


def test_several_end_ids(policy, pictures, monkeypatch):
    """Any id in proc.ends ends a turn."""
    other = policy.proc.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    monkeypatch.setattr(policy.proc, "ends", {policy.proc.end, other})
    first, second = turns_of(policy, [IDLE, ANSWER])
    script(monkeypatch, {(0, 0): [first[:-1] + [other, 5, 5], second]}, ROOMY)
    [traj] = evaluation.rollout(policy, pictures[:1], ROOMY)
    assert [turn.text for turn in traj.turns] == [IDLE, ANSWER]
    assert traj.answer == "green"


def test_random_streams(any_policy, rows):
    """What is sampled depends on (seed, step, prompt, sample) alone: not on the batch or how it is cut."""
    def ids(rows, streams, in_flight=128, seed=(0, 0)):
        cfg = replace(SHORT, in_flight=in_flight)
        trajs = evaluation.rollout(any_policy, rows, cfg, samples=2, seed=seed, streams=streams)
        return [tuple(t.ids) for t in trajs]
    first, second, third = list({row["problem"]: row for row in rows}.values())[:3]
    together = ids([first, second, third], [4, 7, 9])
    assert ids([third, first, second], [9, 4, 7], in_flight=5) == together[4:] + together[:4]
    assert ids([second], [7], in_flight=1) == together[2:4]
    if any_policy.vlm.config.model_type == "qwen3_vl":
        different = {*together[2:4]}
        for stream, seed in ((8, (0, 0)), (7, (1, 0)), (7, (0, 1))):
            different.update(ids([second], [stream], seed=seed))
        assert len(different) == 8


@torch.no_grad()
def test_banned_ids_are_never_sampled(policy25, rows, monkeypatch):
    """However much the model wants them; and the update's distribution is the sampler's."""
    tokenizer = policy25.proc.tokenizer
    head = policy25.vlm.lm_head
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    banned = tokenizer.convert_tokens_to_ids(names)
    banned += range(len(tokenizer), len(tokenizer) + 8)
    assert policy25.banned.nonzero()[:, 0].tolist() == sorted(banned)
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda h: forward(h) + 100 * policy25.banned)
    for greedy in (False, True):
        trajs = evaluation.rollout(policy25, rows[:4], SHORT, samples=4, greedy=greedy)
        for t in trajs:
            sampled = [i for i, m in zip(t.ids, t.mask) if m]
            assert not set(sampled) & set(banned)
        logp, _ = policy25(sft.collate(trajs, policy25.proc))
        torch.testing.assert_close(logp, sampled_logp(trajs), atol=1e-4, rtol=0)


def test_draws_follow_the_distribution():
    """Ids are drawn as often as they are likely. The extreme numbers draw possible ones, too."""
    torch.manual_seed(0)
    impossible = torch.arange(1000) % 997 < 5
    logp = torch.randn(1000).masked_fill(impossible, -torch.inf).log_softmax(-1)
    n = 20_000
    numbers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids = evaluation.draw(logp.expand(n, -1), numbers)
    share = ids.bincount(minlength=1000) / n
    torch.testing.assert_close(share, logp.exp(), atol=2 / n, rtol=0)
    ends = torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64)
    assert evaluation.draw(logp.expand(2, -1), ends).tolist() == [5, 996]


@pytest.mark.parametrize("greedy", [False, True])
def test_logits_that_are_no_numbers_end_in_one_line(policy, rows, greedy):
    broken = copy.deepcopy(policy)
    torch.nn.init.constant_(broken.vlm.model.language_model.norm.weight, float("nan"))
    refused("logits are not finite", evaluation.rollout, broken, rows[:2], SHORT, greedy=greedy)


def test_memory_is_arithmetic(any_policy, monkeypatch):
    """A slot's bytes are what the cache takes, here all in fp32; a card with less than one slot is refused."""
    cfg = replace(ROOMY, in_flight=3)
    config = any_policy.vlm.config
    size = evaluation.slot_bytes(config, cfg)
    taken = 0
    for first, second in evaluation.Cache(any_policy, 2, cfg.max_tokens).layers:
        is_state = first.shape != second.shape
        taken += first.nbytes / 2 + second.nbytes / (1 if is_state else 2)
    assert taken == 2 * size
    enough = 2 ** 34
    longer = replace(cfg, max_tokens=7000)
    assert evaluation.slots_in(enough, config, cfg) > evaluation.slots_in(enough, config, longer)
    on_cuda = SimpleNamespace(device=torch.device("cuda"), vlm=any_policy.vlm, parameters=any_policy.parameters)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (enough, enough))
    assert evaluation.fitting(on_cuda, cfg, 3) == 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 ** 32, enough))
    assert "0 of 3 trajectories of --max_tokens=900" in refusal(evaluation.fitting, on_cuda, cfg, 3)
    free = []
    monkeypatch.setattr(evaluation, "slots_in", lambda left, *_: free.append(left) or 3)
    evaluation.fitting(on_cuda, cfg, 3)
    assert free == [2 ** 32 - 2 * sum(p.numel() for p in any_policy.parameters())]       # copies in bf16
