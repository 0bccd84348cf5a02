"""The method (rppo.py): advantages, the clipped loss, one update against plain autograd, what is logged.

The loss is compared with a loop over single numbers, an update with transformers' own model that reads whole
sequences one by one.
"""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import env
import eval as evaluation
import rppo
from conftest import amplify
from rppo import group_advantages, policy_loss

INF, NAN = math.inf, math.nan
close = torch.testing.assert_close


# --- Advantages -----------------------------------------------------------------------------------------

def test_advantages_by_hand():
    """The group's mean is taken away; the std is the unbiased one (n - 1). Computed in float64: in fp32 the
    last group would be a blur. The rewards stay as they were."""
    rewards = torch.tensor([[1, 0, -0.25], [0, 0, 1], [1e4, 1e4, 1e4 + 2 ** -10]])
    before = rewards.clone()
    small = 2 ** -10 / 3
    plain = torch.tensor([[0.75, -0.25, -0.5], [-1 / 3, -1 / 3, 2 / 3], [-small, -small, 2 * small]])
    std = torch.tensor([[0.4375], [1 / 3], [3 * small ** 2]]).sqrt()
    close(group_advantages(rewards, False).float(), plain)
    close(group_advantages(rewards, True).float(), plain / std)
    assert torch.equal(rewards, before)


@pytest.mark.parametrize("value", [0.1, -0.3, 1 / 3, 1e-20, 1e6 + 0.1])
@pytest.mark.parametrize("norm_std", [False, True])
def test_a_flat_group_is_exactly_zero(value, norm_std):
    """Not the rounding residue of the mean, which a tiny std would blow up. The group beside it is kept."""
    for size in (1, 2, 3, 7, 8):
        rewards = torch.full((2, size), value)
        rewards[1, 0] += 1
        advantages = group_advantages(rewards, norm_std)
        assert advantages.shape == (2, size) and advantages.dtype == torch.float64
        assert (advantages[0] == 0).all()
        assert (advantages[1] != 0).all() or size == 1


@pytest.mark.parametrize("norm_std", [False, True])
def test_advantages_do_not_depend_on_order(norm_std):
    """Permuted groups and samples have permuted advantages."""
    rewards = torch.rand(5, 6)
    rows, columns = torch.randperm(5), torch.randperm(6)
    advantages = group_advantages(rewards, norm_std)
    close(group_advantages(rewards[rows][:, columns], norm_std), advantages[rows][:, columns])


# --- The loss -------------------------------------------------------------------------------------------

def loop(logp, old, advantages, mask, low, high, n_tokens=None):
    """The clipped loss and its gradient with respect to logp, number by number."""
    loss, gradient = 0.0, torch.zeros_like(logp)
    for i, t in torch.nonzero(mask).tolist():
        a = advantages[i].item()
        ratio = math.exp(logp[i, t] - old[i, t])
        clipped = min(max(ratio, 1 - low), 1 + high)
        loss -= min(ratio * a, clipped * a)
        if ratio * a <= clipped * a:     # the free branch is the smaller one: d ratio / d logp = ratio
            gradient[i, t] = -ratio * a
    n_tokens = n_tokens or max(mask.sum().item(), 1)
    return loss / n_tokens, gradient / n_tokens


def loss_and_gradient(logp, *rest):
    logp = logp.clone().requires_grad_()
    loss = policy_loss(logp, *rest)
    loss.backward()
    return loss.detach(), logp.grad


@pytest.fixture
def numbers():
    """logp, old_logp, advantages, mask: advantages of both signs, ratios from 0.1 to 8."""
    torch.manual_seed(1)
    logp = -3 * torch.rand(6, 9).double()
    old = logp + 0.7 * torch.randn(6, 9).double()
    mask = (torch.rand(6, 9) < 0.7).double()
    return logp, old, torch.tensor([1.5, -0.8, 0.0, -2.0, 0.3, 1.0]).double(), mask


@pytest.mark.parametrize("low, high", [(0.2, 0.28), (0.1, 0.1), (0.5, 3.0)])
@pytest.mark.parametrize("n_tokens", [None, 17])
def test_loss_against_a_plain_loop(numbers, low, high, n_tokens):
    """Ratios below, in and above the clip range, advantages of both signs. Nothing is written to."""
    before = copy.deepcopy(numbers)
    expected, gradient = loop(*numbers, low, high, n_tokens)
    loss, found = loss_and_gradient(*numbers, low, high, n_tokens)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    close(found, gradient)
    close(numbers, before, rtol=0, atol=0)


def test_on_policy_gradient(numbers):
    """At ratio 1 it is -advantage / n on every sampled token: nothing is clipped."""
    logp, _, advantages, mask = numbers
    _, gradient = loss_and_gradient(logp, logp, advantages, mask, 0.2, 0.28)
    close(gradient, -advantages[:, None] * mask / mask.sum())


def test_padding_and_micro_batches_do_not_matter(numbers):
    """With n_tokens given, the losses of pieces add up to that of the whole."""
    logp, old, advantages, mask = numbers
    whole, gradient = loss_and_gradient(*numbers, 0.2, 0.28)
    wide = F.pad(logp, (0, 5)), F.pad(old, (0, 5)), advantages, F.pad(mask, (0, 5))
    loss, found = loss_and_gradient(*wide, 0.2, 0.28)
    close(loss, whole)
    close(found, F.pad(gradient, (0, 5)))
    total, pieces = 0.0, []
    for part in zip(*[x.split(2) for x in numbers]):
        loss, found = loss_and_gradient(*part, 0.2, 0.28, mask.sum().item())
        total += loss
        pieces.append(found)
    close(total, whole)
    close(torch.cat(pieces), gradient)


@pytest.mark.parametrize("n_tokens", [None, 12])
def test_empty_mask(numbers, n_tokens):
    """Nothing sampled: loss and gradient are 0, not NaN."""
    numbers[3][:] = 0
    loss, gradient = loss_and_gradient(*numbers, 0.2, 0.28, n_tokens)
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("junk", [(NAN, 0.0), (0.0, NAN), (INF, 0.0), (-INF, -INF), (500.0, -500.0)])
def test_junk_under_the_mask(numbers, junk):
    """Whatever stands where the mask is 0 changes nothing."""
    logp, old, advantages, mask = numbers
    expected = loss_and_gradient(*numbers, 0.2, 0.28)
    logp, old = logp.where(mask > 0, junk[0]), old.where(mask > 0, junk[1])
    close(loss_and_gradient(logp, old, advantages, mask, 0.2, 0.28), expected, rtol=0, atol=0)


# --- Rows and micro-batches -----------------------------------------------------------------------------

@pytest.mark.parametrize("n, prompts", [(12, 4), (10, 4), (7, 3), (3, 8)])
def test_prompts_cover_the_rows(n, prompts):
    """Every n rows of the stream are all rows, in an order of their own that the seed decides."""
    def stream(seed):
        cfg = rppo.Config(seed=seed, prompts=prompts)
        chosen = []
        for step in range(6 * n):
            chosen += rppo.prompts_of(step, cfg, n)
        return chosen[:6 * n]

    passes = np.reshape(stream(5), (6, n))
    assert (np.sort(passes, 1) == np.arange(n)).all()
    assert len(np.unique(passes, axis=0)) > 1 and stream(5) != stream(6)


def test_hold_out_is_by_image():
    """No image of a held-out row is trained on; every other row is."""
    rows = [{"images": [image], "doc_id": i} for i, image in enumerate("abacbdced")]
    train, held_out = rppo.hold_out(rows, 3)     # c, e, d
    assert held_out == rows[6:] and train == rows[:3] + rows[4:5]
    assert rppo.hold_out(rows, 0) == (rows, [])


@pytest.mark.parametrize("n, size", [(0, 4), (1, 4), (4, 4), (60, 16), (37, 5), (50, 1)])
def test_micro_batches_are_balanced(n, size):
    """Longest first. None has more tokens than `size` samples of mean length, or than the longest one."""
    lengths = np.random.default_rng(n).integers(100, 900, n).tolist()
    samples = []
    for length in lengths:
        samples.append(rppo.Sample(env.Trajectory({}, ids=[0] * length), {}, 1.0))
    micro = rppo.micro_batches(samples, size)
    assert len(micro) <= 1.5 * n / size + 1
    order = []
    for part in micro:
        order += map(rppo.length, part)
        assert len(part) * rppo.length(part[0]) <= max(size * np.mean(lengths), max(lengths))
    assert order == sorted(lengths, reverse=True)


# --- One update of a policy -----------------------------------------------------------------------------

CFG = rppo.Config(temperature=0.7, micro_batch=5, clip_norm=1e9, samples=4)
ADVANTAGES = [1.0, -0.5, 0.0, 2.0, 0.0, -1.5, 0.7, -0.2, 0.0, 0.9, -1.1, 0.4]


@pytest.fixture
def learner(policy):
    """A copy that a test may train, with weights large enough that its choices differ."""
    learner = copy.deepcopy(policy)
    amplify(learner.vlm, 3.0)
    return learner


@pytest.fixture
def samples(learner, rows):
    """Twelve ragged trajectories with crops; every third has no answer."""
    samples = []
    for i, row in enumerate(rows[:12]):
        answered = i % 3 < 2
        traj = env.render(learner.proc, row, row["turns"] if answered else row["turns"][:-1], CFG)
        traj.status = "answered" if answered else "over_turns"
        [parts] = env.rewards([traj], CFG)
        samples.append(rppo.Sample(traj, parts, ADVANTAGES[i]))
    assert len(set(map(rppo.length, samples))) > 3
    return samples


def weighted(samples, advantages):
    """The same with other advantages."""
    return [replace(s, advantage=a) for s, a in zip(samples, advantages)]


def tokens(samples):
    return sum(sum(s.traj.mask) for s in samples)


class Recorder(torch.optim.SGD):
    """Keeps the gradient of a step instead of following it."""
    gradient = torch.zeros(1).double()           # without a step

    def step(self):
        parts = []
        for p in self.param_groups[0]["params"]:
            parts.append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        self.gradient = torch.cat([part.flatten() for part in parts]).double()


def gradient(policy, samples, **changes):
    """The gradient of one update, and what the log says."""
    recorder = Recorder(policy.parameters(), lr=0.0)
    stats = rppo.update(policy, [recorder], samples, replace(CFG, **changes))
    return recorder.gradient, stats


def assert_same(found, expected):
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("micro_batch", [12, 5, 1])
def test_update_against_plain_autograd(learner, samples, micro_batch):
    """-sum advantage * logp / n over every sampled token, one whole sequence after the other through the
    stock model, those of advantage 0 too."""
    found, stats = gradient(learner, samples, micro_batch=micro_batch)
    stock = type(learner.vlm)(learner.vlm.config).eval()
    stock.load_state_dict(learner.vlm.state_dict())
    for s in samples:
        ids = torch.tensor([s.traj.ids])
        views = [shown.view.numpy() for shown in s.traj.shown]
        pixels = learner.image_processor(views, input_data_format="channels_last", return_tensors="pt")
        kinds = (ids == learner.proc.image).int()
        out = stock(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **pixels)
        logits = (out.logits[0, :-1] / 0.7).masked_fill(learner.banned, -INF)
        logp = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sampled = logp[torch.tensor(s.traj.mask[1:]) > 0]
        (-s.advantage * sampled.sum() / tokens(samples)).backward()
    expected = torch.cat([p.grad.flatten() for p in stock.parameters()]).double()
    assert stats["tokens"] == tokens(samples) and stats["skipped"] == 0
    assert_same(found, expected)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


def test_zero_advantages_are_not_computed(learner, samples):
    """Such a trajectory does not run through the model; its tokens still count in the divisor."""
    computed = []
    learner.register_forward_pre_hook(lambda _, args: computed.append(len(args[0]["ids"])))
    found, stats = gradient(learner, samples)
    assert sum(computed) == 9 and stats["tokens"] == tokens(samples)
    busy = [s for s in samples if s.advantage]
    alone, _ = gradient(learner, busy)
    assert_same(found * tokens(samples), alone * tokens(busy))


def test_a_flat_step_leaves_the_weights_alone(learner, samples):
    """Not a bit changes, not even by the optimizer's momentum."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    head = learner.vlm.lm_head.weight
    start = head.clone()
    rppo.update(learner, [optimizer], samples, CFG)            # gives it momentum
    moved = copy.deepcopy(learner.state_dict())
    assert not torch.equal(head, start)
    stats = rppo.update(learner, [optimizer], weighted(samples, [0.0] * 12), CFG)
    close(learner.state_dict(), moved, rtol=0, atol=0)
    assert stats["tokens"] == tokens(samples) and stats["grad_norm"] == stats["entropy"] == 0


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_nan_is_skipped(learner, samples, place):
    """The step is logged as skipped; weights and the optimizer's state stay as they were."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    before = copy.deepcopy(learner.state_dict())
    if place == "loss":
        samples[0].advantage = NAN
    else:
        learner.vlm.model.visual.pos_embed.weight.register_hook(lambda g: g * NAN)
    stats = rppo.update(learner, [optimizer], samples, CFG)
    assert stats["skipped"] == 1 and not optimizer.state
    close(learner.state_dict(), before, rtol=0, atol=0)


def test_clipping_over_two_updates(learner, samples, monkeypatch):
    """The old log-probabilities are those of the first pass and stay; ratios leave 1 in the second."""
    calls = []

    def recording(logp, old, advantages, mask, *rest):
        calls.append((logp.detach(), old, mask))
        return policy_loss(logp, old, advantages, mask, *rest)

    monkeypatch.setattr(rppo, "policy_loss", recording)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    stats = rppo.update(learner, [optimizer], samples, replace(CFG, updates=2))
    half = len(calls) // 2
    ratios = []
    for (logp, old, mask), (later, same, _) in zip(calls[:half], calls[half:]):
        assert torch.equal(logp, old) and torch.equal(old, same) and not old.requires_grad
        ratios.append((later - old)[mask > 0].exp())
    ratios = torch.cat(ratios)
    clipped = (ratios < 1 - CFG.clip_low) | (ratios > 1 + CFG.clip_high)
    assert half >= 2 and clipped.any()           # none is in the first pass, which counts, too
    assert stats["clip_share"] == pytest.approx(clipped.double().mean().item() / 2)


def test_mask_over_turns(learner, samples):
    """Trajectories without an answer leave the loss and its divisor."""
    every = weighted(samples, range(1, 13))
    answered = [s for s in every if s.traj.status == "answered"]
    found, stats = gradient(learner, every, mask_over_turns=True)
    expected, _ = gradient(learner, answered)
    assert stats["tokens"] == tokens(answered) < tokens(every)
    assert_same(found, expected)


def test_log_ratio_is_small(learner, rows):
    """Sampling through the cache and the update agree; at another temperature they do not."""
    cfg = replace(CFG, max_crops=2, turn_tokens=6)
    samples = rppo.collect(learner, rows[:3], [0, 1, 2], 3, cfg)
    assert len(samples) == 12
    samples = weighted(samples, [1.0] * 12)
    assert 0 <= gradient(learner, samples)[1]["log_ratio"] < 1e-4
    assert gradient(learner, samples, temperature=1.0)[1]["log_ratio"] > 0.05


def test_an_added_reward_part(samples):
    """It is logged under its own name; the reward stays the total, wherever in the dict the part stands."""
    for i, s in enumerate(samples):
        s.parts["total"] = i / 10
        s.parts = {"novelty": 3.0, **s.parts, "curiosity": 7.0}
    entry = rppo.summarise(samples, CFG)
    assert entry["reward"] == pytest.approx(0.55) and entry["flat_groups"] == 0
    assert entry["parts"]["novelty"] == 3 and entry["parts"]["curiosity"] == 7
    assert set(evaluation.METRICS) < set(entry)
    for s in samples[4:8]:
        s.parts["total"] = 0.1
    assert rppo.summarise(samples, CFG)["flat_groups"] == pytest.approx(1 / 3)
