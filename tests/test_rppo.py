"""The objective (rppo.py): advantages, the clipped loss, the choice of prompts, and one update of a policy."""
import copy
import math
import zlib

import numpy as np
import pytest
import torch

import data
import env
import rppo
from conftest import amplify
from rppo import group_advantages, policy_loss

INF, NAN = math.inf, math.nan


# ---------------------------------------------------------------------------------------------------------------
# 1. Advantages.

def test_advantages_by_hand():
    """Two groups of three, worked out by hand: the group's mean, and the unbiased std (n - 1)."""
    rewards = [[1.0, 0.0, -0.25], [0.0, 0.0, 1.0]]
    plain = torch.tensor([[0.75, -0.25, -0.5], [-1 / 3, -1 / 3, 2 / 3]], dtype=torch.float64)
    std = torch.tensor([[(0.875 / 2) ** 0.5], [(2 / 3 / 2) ** 0.5]], dtype=torch.float64)
    assert torch.equal(group_advantages(rewards, False)[0], plain[0])
    torch.testing.assert_close(group_advantages(torch.tensor(rewards), False), plain, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(group_advantages(torch.tensor(rewards), True), plain / std, rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [0.1, -0.3, 1 / 3, 1e-20, 1e6 + 0.1, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm_std", [False, True])
def test_a_flat_group_is_exactly_zero(value, dtype, norm_std):
    """Equal rewards give 0.0 and not the rounding residue of their mean, which the std would blow up to size 1."""
    for samples in (1, 2, 3, 7, 8):
        a = group_advantages(torch.full((2, samples), value, dtype=dtype), norm_std)
        assert a.shape == (2, samples) and a.dtype == torch.float64 and (a == 0).all()


def test_a_flat_group_beside_another_one():
    """Zeroing a flat group leaves its neighbours alone, and a spread of one part in 10^6 is not flat."""
    r = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.1, 0.1 + 1e-6, 0.1, 0.1], [1, 0, 0, 0]], dtype=torch.float64)
    a = group_advantages(r, True)
    assert (a[0] == 0).all() and (a[1:] != 0).all()
    torch.testing.assert_close(a[1], torch.tensor([-0.5, 1.5, -0.5, -0.5], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm_std", [False, True])
def test_advantages_do_not_depend_on_order(norm_std):
    """Permuting groups, or samples within a group, permutes the advantages; each group sums to 0."""
    g = torch.Generator().manual_seed(0)
    r = torch.rand(5, 6, generator=g, dtype=torch.float64)
    a, rows, cols = group_advantages(r, norm_std), torch.randperm(5, generator=g), torch.randperm(6, generator=g)
    torch.testing.assert_close(group_advantages(r[rows][:, cols], norm_std), a[rows][:, cols], rtol=1e-13, atol=1e-15)
    assert a.sum(1).abs().max() < 1e-13
    if norm_std:
        torch.testing.assert_close(a.std(1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_advantages_are_computed_in_float64():
    """fp32 rewards that fp32 arithmetic would blur: a difference of 2^-10 on top of 10^4."""
    r = torch.tensor([[1e4, 1e4, 1e4 + 2 ** -10]])
    want = torch.tensor([[-1, -1, 2]], dtype=torch.float64) / 3 / 2 ** 10
    torch.testing.assert_close(group_advantages(r, False), want, rtol=1e-8, atol=0)
    assert torch.equal(r, torch.tensor([[1e4, 1e4, 1e4 + 2 ** -10]]))  # and the rewards are left as they were


# ---------------------------------------------------------------------------------------------------------------
# 2. The loss.

def loop(logp, old, advantages, mask, low, high, n_tokens=None):
    """The clipped loss and its gradient with respect to logp, number by number."""
    value, grad, n = 0.0, np.zeros(logp.shape), 0
    for i in range(logp.shape[0]):
        for t in range(logp.shape[1]):
            if not mask[i, t]:
                continue
            n += 1
            a, ratio = float(advantages[i]), math.exp(float(logp[i, t]) - float(old[i, t]))
            clipped = min(max(ratio, 1 - low), 1 + high)
            value -= min(ratio * a, clipped * a)
            if ratio * a <= clipped * a:        # the unclipped branch is the smaller one: d ratio / d logp = ratio
                grad[i, t] = -ratio * a
    n = max(n, 1) if n_tokens is None else n_tokens
    return value / n, grad / n


def loss_and_gradient(logp, *args):
    logp = logp.clone().requires_grad_()
    loss = policy_loss(logp, *args)
    loss.backward()
    return loss.detach(), logp.grad


@pytest.fixture
def batch():
    """logp, old_logp, advantages, mask: both signs of the advantage, and ratios from 0.1 to 8."""
    g = torch.Generator().manual_seed(1)
    logp = -3 * torch.rand(6, 9, generator=g, dtype=torch.float64)
    old = logp + 0.7 * torch.randn(6, 9, generator=g, dtype=torch.float64)
    mask = (torch.rand(6, 9, generator=g) < 0.7).double()
    return logp, old, torch.tensor([1.5, -0.8, 0.0, -2.0, 0.3, 1.0], dtype=torch.float64), mask


@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.1, 0.1), (0.5, 3.0)])
@pytest.mark.parametrize("n_tokens", [None, 17])
def test_loss_against_a_plain_loop(batch, low, high, n_tokens):
    """Value and gradient equal those of a plain loop in float64, with clipped and free ratios of both signs."""
    logp, old, a, mask = batch
    ratio, up, down = (logp - old).exp()[mask > 0], (a[:, None] > 0).expand_as(mask)[mask > 0], (a[:, None] < 0).expand_as(mask)[mask > 0]
    for sign in (up, down):                     # each of the three regions of the ratio occurs under each sign
        for region in (ratio < 1 - low, (ratio > 1 - low) & (ratio < 1 + high), ratio > 1 + high):
            assert (sign & region).any()
    value, grad = loop(logp, old, a, mask, low, high, n_tokens)
    loss, got = loss_and_gradient(logp, old, a, mask, low, high, n_tokens)
    assert loss.shape == () and loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(got, torch.from_numpy(grad), rtol=1e-12, atol=1e-14)


def test_on_policy_gradient(batch):
    """At ratio 1 the gradient is -advantage / n on every sampled token: plain policy gradient, nothing is clipped."""
    logp, _, a, mask = batch
    _, grad = loss_and_gradient(logp, logp.clone(), a, mask, 0.2, 0.28)
    torch.testing.assert_close(grad, -a[:, None] * mask / mask.sum(), rtol=1e-14, atol=0)


def test_loss_does_not_depend_on_padding_or_micro_batches(batch):
    """More padding changes nothing; with n_tokens given, pieces of the batch add up to the whole."""
    logp, old, a, mask = batch
    whole, grad = loss_and_gradient(logp, old, a, mask, 0.2, 0.28)
    pad = lambda x: torch.nn.functional.pad(x, (0, 5), value=-7.0 if x is not mask else 0.0)
    loss, wide = loss_and_gradient(pad(logp), pad(old), a, pad(mask), 0.2, 0.28)
    torch.testing.assert_close(loss, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(wide, pad(grad).where(pad(mask) > 0, 0.0), rtol=1e-13, atol=0)
    for size in (1, 2, 4):
        parts = [loss_and_gradient(logp[i:i + size], old[i:i + size], a[i:i + size], mask[i:i + size], 0.2, 0.28, mask.sum())
                 for i in range(0, 6, size)]
        torch.testing.assert_close(sum(p[0] for p in parts), whole, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad, rtol=1e-13, atol=0)


def test_loss_leaves_its_inputs_alone(batch):
    """No argument is written to, and old_logp, advantages and mask get no gradient."""
    before = [x.clone() for x in batch]
    logp, old, a, mask = (x.requires_grad_() if i == 0 else x for i, x in enumerate(batch))
    policy_loss(logp, old, a, mask, 0.2, 0.28).backward()
    assert all(torch.equal(x, y) for x, y in zip(batch, before))
    assert old.grad is None and a.grad is None and mask.grad is None


@pytest.mark.parametrize("n_tokens", [None, 12])
def test_empty_mask(batch, n_tokens):
    """Nothing sampled: the loss is 0 and so is the gradient, neither is NaN."""
    logp, old, a, mask = batch
    loss, grad = loss_and_gradient(logp, old, a, torch.zeros_like(mask), 0.2, 0.28, n_tokens)
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("junk", [(NAN, 0.0), (0.0, NAN), (INF, 0.0), (-INF, -INF), (0.0, -INF), (INF, INF), (500.0, -500.0)])
def test_junk_under_the_mask(batch, junk):
    """NaN, infinite or huge numbers where the mask is 0 change neither the loss nor the gradient."""
    logp, old, a, mask = batch
    want, grad = loss_and_gradient(logp, old, a, mask, 0.2, 0.28)
    loss, got = loss_and_gradient(logp.where(mask > 0, junk[0]), old.where(mask > 0, junk[1]), a, mask, 0.2, 0.28)
    assert torch.equal(loss, want) and torch.equal(got, grad)


# ---------------------------------------------------------------------------------------------------------------
# 3. Which rows a step trains on.

@pytest.mark.parametrize("n, prompts", [(12, 4), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_prompts_cover_the_rows(n, prompts):
    """Steps are consecutive pieces of one stream, each n of which are a permutation of all rows, drawn anew every pass."""
    cfg, epochs = rppo.Config(seed=5, prompts=prompts), 6
    stream = [i for step in range(-(-n * epochs // prompts)) for i in rppo.prompts_of(step, cfg, n)]
    passes = [tuple(stream[e * n:(e + 1) * n]) for e in range(epochs)]
    assert all(sorted(p) == list(range(n)) for p in passes)
    assert len(set(passes)) > 1 or n == 1
    assert all(len(rppo.prompts_of(s, cfg, n)) == prompts for s in range(3))
    assert rppo.prompts_of(1, cfg, n) == stream[prompts:2 * prompts]    # as a resumed run asks, out of order


def test_prompts_depend_on_the_seed():
    """Same seed, same rows; another seed, another order."""
    stream = lambda seed: [i for s in range(5) for i in rppo.prompts_of(s, rppo.Config(seed=seed, prompts=8), 40)]
    assert stream(0) == stream(0) and len({tuple(stream(s)) for s in range(4)}) == 4


# ---------------------------------------------------------------------------------------------------------------
# 4. One update.

SMALL = dict(max_crops=2, turn_tokens=6, lr=1e-3, clip_norm=1e9)


parse_action = env.parse_action


def acting(text):
    """Read text that holds no action as one, by its checksum: so that the gibberish of a random policy crops, errs and
    answers, and is penalised and right by chance."""
    action, n = parse_action(text), zlib.crc32(text.encode())
    if action.kind != "none":
        return action
    if n % 4 == 0:
        return env.Action("answer", answer=list(data.COLOURS)[n // 4 % 6])
    if n % 4 == 1:
        return env.Action("malformed", error="by chance")
    x, y = n // 4 % 5 * 100, n // 64 % 5 * 100
    return env.Action("crop", bbox=(float(x), float(y), x + 400.0, y + 500.0))


@pytest.fixture
def learner(policy):
    """A copy of the tiny policy that a test may train, with weights large enough that its choices differ."""
    torch.manual_seed(0)
    learner = copy.deepcopy(policy)
    amplify(learner.vlm, 3.0)
    return learner


@pytest.fixture
def trajs(learner, scenes, monkeypatch):
    """Twelve sampled trajectories of several turns: images that arrive mid-way, errors, answers, and none at all."""
    with monkeypatch.context() as m:
        m.setattr(env, "parse_action", acting)
        rows = data.load_rows(f"{scenes}/train.jsonl")[:3]
        trajs = env.rollout(learner, rows, rppo.Config(**SMALL, temperature=0.7), samples=4, seed=(0, 3))
    assert {"answered", "over_turns"} == {t.status for t in trajs} and any(t.crops for t in trajs)
    assert len({len(t.ids) for t in trajs}) > 3         # ragged
    return trajs


ADVANTAGES = [1.0, -0.5, 0.0, 2.0, 0.0, -1.5, 0.7, -0.2, 0.0, 0.9, -1.1, 0.4]


class Recorder(torch.optim.SGD):
    """An optimizer that keeps each step's gradient instead of following it, so that an update can be looked at."""

    def __init__(self, policy):
        super().__init__(policy.parameters(), lr=0.0)
        self.seen = []

    def step(self):
        self.seen.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
                                    for p in self.param_groups[0]["params"]]).double())


def gradient(policy, trajs, advantages, cfg):
    """The gradient of an update, its token count and its sums."""
    recorder = Recorder(policy)
    n_tokens, stats = rppo.update(policy, recorder, trajs, advantages, cfg, 1)
    return recorder.seen[-1] if recorder.seen else torch.zeros(1), n_tokens, stats     # an empty step may leave it out


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def tokens(trajs):
    return sum(sum(t.mask) for t in trajs)


def test_gradient_is_that_of_the_formula(learner, trajs, rows):
    """update() follows -sum advantage * logp / n over every sampled token of every trajectory: written out here one
    trajectory at a time, with full-vocabulary log-probabilities and without skipping those of advantage 0."""
    cfg = rppo.Config(**SMALL, temperature=0.7, micro_batch=5)
    trajs = trajs + [env.render(learner.proc, rows[0], rows[0]["turns"], env.World())]     # ends in a sampled <|im_end|>
    advantages = ADVANTAGES + [0.8]
    got, n_tokens, stats = gradient(learner, trajs, advantages, cfg)
    loss = entropy = 0.0
    for t, a in zip(trajs, advantages):
        b = env.collate([t], learner.proc)
        features, deep = learner.see(b["views"])
        h = learner.hidden(b["ids"], b["pos"], (features[b["feature"]], [d[b["feature"]] for d in deep]))
        logp = (learner.vlm.lm_head(h) / 0.7).masked_fill(learner.proc.banned, -INF).log_softmax(-1)[0]
        sampled = [i for i in range(len(t.ids)) if t.mask[i]]
        loss = loss - a * sum(logp[i - 1, t.ids[i]] for i in sampled)
        entropy -= sum((x.exp() * x).nansum().item() for x in logp[[i - 1 for i in sampled]]) if a else 0.0
    (loss / tokens(trajs)).backward()
    want = torch.cat([p.grad.flatten() for p in learner.parameters()]).double()
    assert n_tokens == tokens(trajs) and want.norm() > 1e-3 and distance(got, want) <= 1e-5
    assert stats["entropy"] == pytest.approx(entropy, rel=1e-5)          # of the trajectories that were computed


def test_gradient_does_not_depend_on_micro_batches(learner, trajs):
    """The same step in micro-batches of 1, of 3 and whole: the same gradient, token count and logged sums."""
    runs = [gradient(learner, trajs, ADVANTAGES, rppo.Config(**SMALL, temperature=0.7, micro_batch=m)) for m in (12, 3, 1)]
    for grad, n_tokens, stats in runs[1:]:
        assert distance(grad, runs[0][0]) <= 1e-5 and n_tokens == runs[0][1]
        assert stats == pytest.approx(runs[0][2], rel=1e-4, abs=1e-3)


def test_micro_batches_are_balanced():
    """Every trajectory is in one micro-batch, beside others of like length; none is larger, padding included, than `size`
    trajectories of mean length or than the longest one; and there are hardly more of them than n / size."""
    rng = np.random.default_rng(0)
    for n, size in ((0, 4), (1, 4), (4, 4), (60, 16), (37, 5), (50, 1)):
        lengths, use = rng.integers(100, 900, 60).tolist(), rng.permutation(60)[:n].tolist()
        micro = rppo.balanced(use, lengths, size)
        flat = [i for m in micro for i in m]
        assert sorted(flat) == sorted(use) and [lengths[i] for i in flat] == sorted((lengths[i] for i in use), reverse=True)
        assert len(micro) <= 1.5 * n / size + 1 and all(micro)
        room = size * sum(lengths[i] for i in use) / max(n, 1)
        assert all(len(m) * lengths[m[0]] <= max(room, lengths[flat[0]]) for m in micro)
    assert rppo.balanced([3, 1, 2], [0, 10, 10, 10], 1) == [[3], [1], [2]]
    assert rppo.balanced([0, 1, 2, 3], [90, 10, 20, 30], 1) == [[0], [3, 2, 1]]


def test_zero_advantages_are_not_computed(learner, trajs, monkeypatch):
    """A trajectory of advantage 0 is not run through the model; its tokens still count in the normaliser."""
    cfg, computed = rppo.Config(**SMALL, micro_batch=4), []
    forward = type(learner).forward
    monkeypatch.setattr(type(learner), "forward",
                        lambda self, b, temperature=1.0: computed.append(len(b["ids"])) or forward(self, b, temperature))
    grad, n_tokens, stats = gradient(learner, trajs, ADVANTAGES, cfg)
    assert sum(computed) == 9 and max(computed) <= 4
    trained = [t for t, a in zip(trajs, ADVANTAGES) if a]
    assert n_tokens == tokens(trajs) and stats["trained"] == tokens(trained)
    alone, n_alone, _ = gradient(learner, trained, [a for a in ADVANTAGES if a], cfg)
    assert distance(grad * n_tokens, alone * n_alone) <= 1e-5


def test_a_flat_step_leaves_the_weights_alone(learner, trajs):
    """All advantages 0: not a bit of a weight changes, not even by the optimizer's momentum, and nothing is NaN."""
    cfg = rppo.Config(**SMALL)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2, weight_decay=0.0)
    start = [p.clone() for p in learner.parameters()]
    rppo.update(learner, optimizer, trajs, ADVANTAGES, cfg, 1)          # gives the optimizer a momentum
    moved = [p.clone() for p in learner.parameters()]
    n_tokens, stats = rppo.update(learner, optimizer, trajs, [0.0] * 12, cfg, 1)
    assert not all(torch.equal(a, b) for a, b in zip(start, moved))
    assert all(torch.equal(p, b) for p, b in zip(learner.parameters(), moved))
    assert n_tokens == tokens(trajs) and all(map(math.isfinite, stats.values())) and stats["trained"] == stats["grad_norm"] == 0


def test_clipping_over_two_updates(learner, trajs, monkeypatch):
    """updates=2: the old log-probabilities are those of the first pass (its ratios are exactly 1), they stay for the
    second, the weights move in between, and clip_share counts the ratios outside the range in the last pass."""
    calls = []
    loss = policy_loss
    monkeypatch.setattr(rppo, "policy_loss", lambda logp, old, a, mask, *more:
                        calls.append((logp.detach(), old, a, mask)) or loss(logp, old, a, mask, *more))
    cfg = rppo.Config(**SMALL, temperature=0.7, updates=2, micro_batch=5)
    _, stats = rppo.update(learner, torch.optim.AdamW(learner.parameters(), lr=3e-3), trajs, ADVANTAGES, cfg, 1)
    half = len(calls) // 2                      # 9 trajectories in micro-batches of about 5, twice
    first, second = calls[:half], calls[half:]
    assert len(calls) == 2 * half >= 4
    ratios = []
    for (logp, old, a, mask), (logp2, old2, a2, mask2) in zip(first, second):
        assert torch.equal(logp, old) and torch.equal(old, old2) and torch.equal(a, a2) and torch.equal(mask, mask2)
        ratios.append((logp2 - old)[mask > 0].exp())
    ratios = torch.cat(ratios)
    clipped = ((ratios < 1 - cfg.clip_low) | (ratios > 1 + cfg.clip_high)).sum()
    assert stats["clipped"] == clipped and 0 < clipped < len(ratios) == stats["trained"]
    # the loss that was given these is the one of the formula: old log-probabilities have no gradient
    assert not any(old.requires_grad for _, old, *_ in calls)


def test_one_update_is_on_policy(learner, trajs):
    """updates=1: every ratio is 1 and nothing counts as clipped, even under a clip range of nothing."""
    cfg = rppo.Config(**SMALL, temperature=0.7, clip_low=0.0, clip_high=0.0, micro_batch=5)
    wide = rppo.Config(**SMALL, temperature=0.7, clip_low=0.9, clip_high=9.0, micro_batch=5)
    grad, _, stats = gradient(learner, trajs, ADVANTAGES, cfg)
    assert stats["clipped"] == 0 and distance(grad, gradient(learner, trajs, ADVANTAGES, wide)[0]) <= 1e-6


def test_masking_of_trajectories_without_an_answer(learner, trajs):
    """mask_over_turns leaves trajectories that ran out of turns or tokens out of the loss and of the token count."""
    cfg = dict(SMALL, temperature=0.7)
    kept = [i for i, t in enumerate(trajs) if t.status == "answered"]
    ones = [1.0 + i for i in range(12)]          # none is 0: only the mask can leave one out
    grad, n_tokens, _ = gradient(learner, trajs, ones, rppo.Config(**cfg, mask_over_turns=True))
    want, n_want, _ = gradient(learner, [trajs[i] for i in kept], [ones[i] for i in kept], rppo.Config(**cfg))
    assert n_tokens == n_want == tokens(trajs[i] for i in kept) < tokens(trajs) and distance(grad, want) <= 1e-5
    nothing = [t for t in trajs if t.status != "answered"]
    grad, n_tokens, stats = gradient(learner, nothing, ones[:len(nothing)], rppo.Config(**cfg, mask_over_turns=True))
    assert n_tokens == 0 and (grad == 0).all() and all(map(math.isfinite, stats.values()))


def test_log_probabilities_of_rollout_and_update_agree(learner, trajs):
    """The numbers recorded while sampling, through a cache and with images arriving mid-way, are those of the update;
    under another temperature they are not, so that the agreement means something."""
    _, _, stats = gradient(learner, trajs, [1.0] * 12, rppo.Config(**SMALL, temperature=0.7))
    n, entropy, gap, most = (stats[k] for k in ("trained", "entropy", "gap", "gap_max"))
    assert n == tokens(trajs) and gap / n <= most < 1e-4
    assert 0 < entropy / n < math.log(len(learner.proc.banned))
    _, _, stats = gradient(learner, trajs, [1.0] * 12, rppo.Config(**SMALL, temperature=1.0))
    assert stats["gap_max"] > 0.1


def test_gradient_clipping(learner, trajs):
    """The gradient that reaches the optimizer has at most norm clip_norm; the logged norm is the one before."""
    free, _, stats = gradient(learner, trajs, ADVANTAGES, rppo.Config(**SMALL))
    assert stats["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4)
    short, _, stats = gradient(learner, trajs, ADVANTAGES, rppo.Config(**{**SMALL, "clip_norm": 1e-3}))
    assert short.norm().item() == pytest.approx(1e-3, rel=1e-2) and stats["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4)
    assert distance(short / short.norm(), free / free.norm()) <= 1e-5


# ---------------------------------------------------------------------------------------------------------------
# 5. It learns.

def test_updates_raise_what_was_good(learner, trajs):
    """A few updates make trajectories of positive advantage likelier and the others less so."""
    def logp(sign):
        with torch.no_grad():
            return [learner(env.collate([t], learner.proc))[0].sum().item() for t, a in zip(trajs, ADVANTAGES) if a * sign > 0]
    up, down = logp(1), logp(-1)
    optimizer, cfg = torch.optim.AdamW(learner.parameters(), lr=1e-3), rppo.Config(**{**SMALL, "clip_norm": 1.0})
    for _ in range(4):
        rppo.update(learner, optimizer, trajs, ADVANTAGES, cfg, 1)
    assert np.mean(logp(1)) > np.mean(up) + 1 and np.mean(logp(-1)) < np.mean(down) - 1
