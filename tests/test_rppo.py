"""The method (rppo.py): advantages, the clipped loss, one update against plain autograd, what is logged.

The loss is compared with a loop over single numbers, an update with transformers' own model that reads whole
sequences one by one.
"""
import copy
import math
import re
import sys
import textwrap
import types
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import amplify, gradient, plain, refusal, stock, whole
import torch

import data
import env
import eval as evaluation
import rppo
import sft
from rppo import group_advantages, policy_loss

close = torch.testing.assert_close


def test_advantages_by_hand():
    """The group's mean is taken away; the std is the unbiased one (n - 1). Computed in float64: in fp32 the
    third group would be a blur. A flat group is exactly 0, without the rounding residue of its mean."""
    rewards = torch.tensor([[1, 0, -0.25], [0, 0, 1], [1e4, 1e4, 1e4 + 2 ** -10], [0.1, 0.1, 0.1]]).double()
    small = 2 ** -10 / 3
    plain = torch.tensor([[0.75, -0.25, -0.5], [-1 / 3, -1 / 3, 2 / 3], [-small, -small, 2 * small]])
    std = torch.tensor([[0.4375], [1 / 3], [3 * small ** 2]]).sqrt()
    for norm_std, expected in ((False, plain), (True, plain / std)):
        advantages = group_advantages(rewards, norm_std)
        close(advantages[:3].float(), expected)
        assert (advantages[3] == 0).all()
        assert group_advantages(rewards[:, :1], norm_std).tolist() == [[0.0]] * 4
    close(group_advantages([[0.0, 1.0]], True), torch.tensor([[-0.5, 0.5]]).double() * 2 ** 0.5)


def test_loss_against_a_plain_loop():
    """Ratios from 0.1 to 8, advantages of both signs: value and gradient, number by number. Inputs stay."""
    torch.manual_seed(1)
    logp = -3 * torch.rand(60).double()
    old = logp + 0.7 * torch.randn(60).double()
    advantages = torch.tensor([1.5, -0.8, 0.0, -2.0, 0.3, 1.0]).double().repeat(10)
    inputs = [tensor.clone() for tensor in (logp, old, advantages)]
    loss, gradient = 0.0, []
    for new, before, a in zip(logp.tolist(), old.tolist(), advantages.tolist()):
        ratio = math.exp(new - before)
        clipped = min(max(ratio, 0.8), 1.28)
        loss -= min(ratio * a, clipped * a)
        gradient.append(-ratio * a if ratio * a <= clipped * a else 0.0)    # the free branch: d ratio = ratio
    for n_tokens, divisor in ((17, 17), (None, 60)):
        given = logp.clone().requires_grad_()
        found = policy_loss(given, old, advantages, 0.2, 0.28, n_tokens)
        found.backward()
        assert found.item() == pytest.approx(loss / divisor, rel=1e-12)
        close(given.grad, torch.tensor(gradient).double() / divisor)
    assert all(map(torch.equal, inputs, (logp, old, advantages)))
    empty = logp[:0].requires_grad_()
    found = policy_loss(empty, old[:0], advantages[:0], 0.2, 0.28)
    found.backward()                             # ranks that train nothing go backward, too
    assert found == 0 and empty.grad.shape == (0,)


def test_prompts_cover_the_rows():
    """Every pass over the rows takes them all, in an order of its own."""
    cfg = rppo.Config(prompts=3)
    chosen = []
    for step in range(14):
        chosen += rppo.prompts_of(step, cfg, 7)
    passes = np.reshape(chosen, (6, 7))
    assert (np.sort(passes, 1) == np.arange(7)).all()
    assert len(np.unique(passes, axis=0)) > 1
    assert rppo.prompts_of(0, replace(cfg, seed=1), 7) != chosen[:3]


PRESETS = {      # tiny, real
    "lam": (1.0, 1.0), "eps": (0.3, 0.3), "tool_bonus": (0.0, 0.0), "format_weight": (0.0, 0.0),
    "max_crops": (5, 5), "max_pixels": (1024, 2000000), "min_crop_pixels": (1024, 65536),
    "max_crop_pixels": (2401, 524288), "min_crop_side": (16, 28), "turn_tokens": (48, 1024),
    "max_tokens": (512, 12288), "in_flight": (128, 64), "temperature": (1.0, 1.0), "seed": (0, 0),
    "steps": (40, 200), "micro_batch": (32, 1), "lr": (0.0005, 1e-06), "warmup": (5, 5),
    "decay": (0.4, 0.0), "weight_decay": (0.0, 0.0), "clip_norm": (1.0, 1.0), "save_every": (20, 20),
    "save_minutes": (0.0, 30.0), "keep": (2, 2), "train_vision": (False, False), "lora": (0, 0),
    "lora_alpha": (32.0, 32.0), "lora_lr": (0.0025, 1e-05), "recompute": (False, True),
    "shard": (False, True), "prompts": (16, 32), "samples": (8, 8), "updates": (1, 1),
    "clip_low": (0.2, 0.2), "clip_high": (0.28, 0.28), "norm_std": (False, False),
    "mask_over_turns": (False, False), "eval_every": (10, 20), "eval_rows": (128, 64),
    "show_every": (20, 5), "n_score": (512, 0)}


def test_presets():
    """Every number of the tiny and the real preset: a change is deliberate."""
    found = {}
    for name, value in asdict(rppo.Config()).items():
        if type(value) is not str:
            found[name] = value, rppo.REAL.get(name, value)
    assert found == PRESETS


def test_schedule_and_adam(policy):
    """Warm-up, plateau, decay over the last share, in every parameter group; betas, weight decay, LoRA's rate."""
    cfg = rppo.Config(weight_decay=0.1)
    optimizers = sft.make_optimizers(policy, cfg, (0.9, 0.95), 0.02)
    optimizers[0].add_param_group(dict(params=[torch.nn.Parameter(torch.zeros(1))]))
    for step, share in ((0, 0.2), (2, 0.6), (4, 1), (24, 1), (25, 15 / 16), (32, 0.5), (39, 1 / 16)):
        assert sft.set_lr(optimizers, step, cfg) == pytest.approx(5e-4 * share)
        for optimizer, peak in zip(optimizers, (5e-4, 0.02), strict=True):
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(peak * share)
    assert sft.set_lr(optimizers, 199, replace(cfg, steps=200, decay=0.0)) == 5e-4
    [adam] = sft.make_optimizers(policy, replace(cfg, lora=4), (0.9, 0.95))
    assert (adam.defaults["betas"], adam.defaults["weight_decay"], adam.defaults["lr"]) == ((0.9, 0.95), 0.1, 2.5e-3)


def test_collect(monkeypatch):
    """Each trajectory has its own reward less the mean of its group, from the random streams of its step and
    prompts. Where the judge failed to judge one, its group is not learned from, but counts in the divisor."""
    cfg = rppo.Config(samples=4, seed=5)
    trajs = [env.Trajectory({}, answer=str(i), status="answered") for i in range(8)]
    seen = []

    def rollout(policy, rows, cfg, samples, **streams):
        seen.append((rows, samples, streams))
        return trajs

    def judge(trajs, cfg):
        trajs[5].verdict = "failed"

    monkeypatch.setattr(evaluation, "rollout", rollout)
    monkeypatch.setattr(evaluation, "judge", judge)
    monkeypatch.setattr(env, "rewards", lambda group, cfg: [dict(total=(int(t.answer) + 1.0) ** 2) for t in group])
    samples = rppo.collect(None, ["a", "b"], [3, 4], 7, cfg)
    assert seen == [(["a", "b"], 4, dict(seed=(5, 7), streams=[3, 4]))]
    assert all(s.traj is traj for s, traj in zip(samples, trajs, strict=True))
    assert [s.parts["total"] for s in samples] == [1, 4, 9, 16, 25, 36, 49, 64]
    assert [s.advantage for s in samples] == [-6.5, -3.5, 1.5, 8.5, 0, 0, 0, 0]
    assert not any(rppo.has_gradient(s, cfg) for s in samples[4:])
    assert all(rppo.counts(s, cfg) for s in samples)


@pytest.fixture
def loop(monkeypatch):
    """loop(first, rank, world_size, **settings): `train` without a model. Returns what it did, in order."""
    def loop(first=0, rank=0, world_size=1, broken=None, **settings):
        cfg = rppo.Config(**dict(prompts=4, steps=7, eval_every=3, save_every=2, eval_rows=2) | settings)
        did = []

        def collect(policy, rows, streams, step, cfg):
            did.append(("collect", step, rows, streams))
            if broken == ("collect", step):
                raise env.UserError("cut.jpg is cut short")
            return [f"sample {step}"]

        def evaluate(policy, rows, cfg, rank, world_size):
            did.append(("evaluate", rows))
            if broken == "evaluate":
                raise env.UserError("the judge refuses")
            return [dict(metrics=dict(accuracy=(1, 1)))]

        def note(*names):
            for module, name, *values in names:
                monkeypatch.setattr(module, name, lambda *args, name=name, values=values: (
                    did.append((name, *[args[i] for i in values])) or {}))

        monkeypatch.setattr(rppo, "collect", collect)
        monkeypatch.setattr(evaluation, "evaluate", evaluate)
        note((sft, "set_lr", 1), (rppo, "update", 2), (rppo, "summarise", 0), (sft, "append_log", 1),
             (rppo, "print_step"), (sft, "save_checkpoint", 0), (sft, "prune", 1), (rppo, "mark_best"),
             (evaluation, "refresh_report"))
        rows, held_out = list("abcdefgh"), ["x", "y"]
        try:
            policy = SimpleNamespace(proc=None)
            rppo.train(policy, [], "tiny", rows, held_out, first, cfg, rank, world_size)
        except env.UserError as error:
            did.append(str(error))
        return did, [rows[i] for i in rppo.prompts_of(first, cfg, 8)]
    return loop


def test_the_loop(loop):
    """The beats of a step in order; held-out rows are evaluated, training rows collected, by the rank's streams."""
    did, chosen = loop(first=2)
    names = [call[0] for call in did]
    assert names[:8] == ["collect", "set_lr", "update", "evaluate", "summarise", "append_log", "print_step",
                         "save_checkpoint"]
    assert did[:4] == [("collect", 2, chosen, [0, 1, 2, 3]), ("set_lr", 2), ("update", ["sample 2"]),
                       ("evaluate", ["x", "y"])]
    entry = did[5][1]
    assert (entry["step"], entry["held_out"]) == (2, {"n": 1, "accuracy": 1.0})
    assert [call[1] for call in did if call[0] == "save_checkpoint"] == [3, 4, 6, 7]    # eval_every 3, save_every 2
    assert [call[1] for call in did if call[0] == "prune"] == [3, 4, 6, 7]
    assert names.count("evaluate") == 3          # after steps 3 and 6, and the last
    did, _ = loop()
    assert did[0] == ("evaluate", ["x", "y"])    # where it starts
    assert next(call[1] for call in did if call[0] == "append_log")["cold_start"]["accuracy"] == 1
    did, chosen = loop(first=2, rank=1, world_size=2)
    assert did[0] == ("collect", 2, chosen[1::2], [1, 3])
    assert not {"append_log", "print_step", "prune"} & {call[0] for call in did}
    assert "evaluate" not in [call[0] for call in loop(first=2, eval_rows=0)[0]]


def test_an_error_saves_first(loop):
    """What ends the rollout of a step saves the steps before it; an evaluation leaves the last checkpoint."""
    for first, broken, line, steps in ((2, ("collect", 5), "cut.jpg is cut short", [3, 4, 5]),
                                       (2, ("collect", 4), "cut.jpg is cut short", [3, 4]),     # just saved
                                       (3, "evaluate", "the judge refuses", [4])):
        did, _ = loop(first=first, broken=broken)
        assert did[-1] == line
        assert [call[1] for call in did if call[0] == "save_checkpoint"] == steps
    assert loop(first=2, broken=("collect", 2))[0][1:] == ["cut.jpg is cut short"]       # nothing is new


def test_main_hands_on(scenes, tmp_path, monkeypatch):
    """Training gets the first rows, its evaluations the last ones; Adam's betas are those of RL."""
    given = {}
    monkeypatch.setattr(sft, "load_trainable", lambda cfg, start, first, device, betas: given.update(
        start=start, betas=betas) or (SimpleNamespace(proc=None), [], "tiny"))
    monkeypatch.setattr(data, "check_rows", lambda rows, *_: given.update(checked=len(rows)))
    monkeypatch.setattr(rppo, "compare", lambda *_: None)
    monkeypatch.setattr(rppo, "train", lambda policy, optimizers, preset, rows, held_out, *_: given.update(
        rows=[row["doc_id"] for row in rows], held_out=[row["doc_id"] for row in held_out]))
    rppo.main(rppo.Config(data=scenes, model=f"{scenes}/tiny", out=f"{tmp_path}/run", eval_rows=5, n_score=6))
    names = [row["doc_id"] for row in data.load_rows(f"{scenes}/train.jsonl")]
    assert given == dict(start=f"{scenes}/tiny", betas=(0.9, 0.95), checked=24 + 6, rows=names[:-5], held_out=names[-5:])


def test_hold_out_is_by_image():
    """No image of a held-out row is trained on; every other row is."""
    rows = [{"images": [image], "doc_id": i} for i, image in enumerate("abacbdced")]
    train, held_out = rppo.hold_out(rows, 3)     # c, e, d
    assert held_out == rows[6:]
    assert train == rows[:3] + rows[4:5]
    assert rppo.hold_out(rows, 0) == (rows, [])


def test_micro_batches_are_balanced():
    """Longest first. None has more tokens than 5 samples of mean length, or than the longest one."""
    lengths = np.random.default_rng(0).integers(100, 900, 37).tolist()
    samples = []
    for length in lengths:
        samples.append(rppo.Sample(env.Trajectory({}, ids=[0] * length), {}, 1.0))
    micro = rppo.micro_batches(samples, 5)
    assert len(micro) <= 12
    order = []
    for part in micro:
        order += map(rppo.length, part)
        assert len(part) * rppo.length(part[0]) <= max(5 * np.mean(lengths), max(lengths))
    assert order == sorted(lengths, reverse=True)


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
    return samples


def tokens(samples):
    return sum(sum(s.traj.mask) for s in samples)


def sgd(learner, samples, /, lr=0.0, module=rppo, **settings):
    """One update by plain gradient descent, of rppo.py or of a fork: what the log says of it."""
    optimizer = torch.optim.SGD(learner.parameters(), lr)
    return module.update(learner, [optimizer], samples, replace(CFG, **settings))


def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")


def forked(term):
    """rppo.py as a fork has it: a term, in a line or three, at the mark for one, and no sample left out."""
    code = Path(rppo.__file__).read_text()
    mark = re.search(r"\n( *)# FORK: add another term", code)
    code = code[:mark.start()] + "\n" + textwrap.indent(term, mark[1]) + code[mark.start():]
    code = code.replace("return sample.advantage != 0 and counts", "return counts")
    fork = types.ModuleType("fork")
    sys.modules["fork"] = fork                   # dataclasses look there
    exec(compile(code, "fork", "exec"), vars(fork))
    return fork


def test_update_against_plain_autograd(learner, samples):
    """-sum advantage * logp / n over every sampled token, one whole sequence after the other through the
    stock model. Those of advantage 0 count in n, but do not run through our model."""
    samples = samples[:8]
    computed, kept = [], []
    learner.register_forward_pre_hook(lambda _, args: computed.append(len(args[0]["ids"])))
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: kept.append(gradient(learner)))
    stats = rppo.update(learner, [optimizer], samples, CFG)
    model = stock(learner)
    for s in samples:
        logps = plain(model, learner, s.traj, 0.7)
        logp = logps.gather(1, torch.tensor(s.traj.ids)[1:, None])[:, 0]
        sampled = logp[torch.tensor(s.traj.mask[1:]) > 0]
        (-s.advantage * sampled.sum() / tokens(samples)).backward()
    expected = gradient(model)
    assert (kept[0] - expected).norm() < 1e-5 * expected.norm()
    assert sum(computed) == 6
    assert stats["tokens"] == tokens(samples)
    assert stats["skipped"] == 0
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)


def test_steps_that_must_not_move_the_weights(learner, samples):
    """A NaN is logged as skipped and leaves the optimizer's state alone, too. In a step of flat groups not a
    bit changes, not even by momentum."""
    samples = samples[:5]
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    start = copy.deepcopy(learner.state_dict())
    broken = replace(samples[0], advantage=math.nan)
    stats = rppo.update(learner, [optimizer], [broken, *samples[1:]], CFG)
    assert stats["skipped"] == 1
    assert not optimizer.state
    close(learner.state_dict(), start, rtol=0, atol=0)
    rppo.update(learner, [optimizer], samples, CFG)            # gives it momentum
    moved = copy.deepcopy(learner.state_dict())
    assert not torch.equal(moved["vlm.lm_head.weight"], start["vlm.lm_head.weight"])
    stats = rppo.update(learner, [optimizer], [replace(s, advantage=0.0) for s in samples], CFG)
    close(learner.state_dict(), moved, rtol=0, atol=0)
    assert stats["tokens"] == tokens(samples)


def test_clipping_over_two_updates(learner, samples, monkeypatch):
    """The old log-probabilities are those of the first pass and stay; ratios leave 1 in the second."""
    calls = []

    def recording(logp, old, *rest):
        calls.append((logp.detach(), old))
        return policy_loss(logp, old, *rest)

    monkeypatch.setattr(rppo, "policy_loss", recording)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    stats = rppo.update(learner, [optimizer], samples[:8], replace(CFG, updates=2, micro_batch=99))
    [(logp, old), (later, same)] = calls
    assert torch.equal(logp, old)
    assert torch.equal(old, same)
    ratios = (later - old).exp()
    clipped = (ratios < 0.8) | (ratios > 1.28)
    assert clipped.any()                         # none is in the first pass, which counts, too
    assert stats["clip_share"] == pytest.approx(clipped.double().mean().item() / 2)


def test_gradients_are_clipped(learner, samples):
    """To clip_norm, over all weights together; what is logged is the norm before."""
    flat = torch.nn.utils.parameters_to_vector
    before = flat(learner.parameters()).detach()
    stats = sgd(learner, samples[:6], lr=1.0, clip_norm=0.5)
    moved = flat(learner.parameters()).detach() - before
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-3)
    assert stats["grad_norm"] > 1


def test_mask_over_turns(learner, samples):
    """Trajectories without an answer leave the loss and its divisor."""
    answered = [s for s in samples[:6] if s.traj.status == "answered"]
    found = sgd(learner, samples[:6], mask_over_turns=True)
    assert found == sgd(learner, answered)
    assert found["tokens"] < tokens(samples[:6])


def test_log_ratio_is_small(learner, rows):
    """Sampling through the cache and the update agree, also with a frozen tower, which only the rollout calls;
    at another temperature they do not."""
    settings = dict(max_crops=1, turn_tokens=4, samples=2)
    learner.vlm.model.visual.requires_grad_(False)
    found = []
    for learner.reuses_features in (False, True):
        samples = rppo.collect(learner, rows[:2], [0, 1], 3, replace(CFG, **settings))
        for s in samples:
            s.advantage = 1.0
        if learner.reuses_features:
            learner.vlm.model.visual = None
        found.append(sgd(learner, samples, **settings))
        assert 0 <= found[-1]["log_ratio"] < 1e-4
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)
    assert sgd(learner, samples, temperature=1.0)["log_ratio"] > 0.05


def test_memory_is_checked_before(policy, monkeypatch):
    """What an update takes is compared with what is free; a checkpoint's moments lie on the card already."""
    need = rppo.update_bytes(policy.vlm.config, CFG, whole_fp32=True)
    assert need > rppo.update_bytes(policy.vlm.config, CFG)
    n = sum(p.numel() for p in policy.parameters())
    for first, needed in ((0, need + 12 * n), (5, need + 4 * n)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed / 0.9 + 9, 0))
        rppo.check_memory(policy, first, CFG)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (needed / 0.9 - 9, 0))
        assert "lower --max_tokens" in refusal(rppo.check_memory, policy, first, CFG)


KL = """
with torch.no_grad():
    known, _ = reference(batch, cfg.temperature)
loss = loss + 0.3 * ((known - logp).exp() - (known - logp) - 1).sum() / n_tokens
"""


def test_a_kl_term_on_two_sharded_ranks(learner, policy, samples, tmp_path):
    """Three lines at the mark give one rank and two the same gradient, though one has nothing to do in most passes."""
    def work(rank, shares):
        kept = []
        mine = [samples[i] for i in shares[rank]]
        if len(shares) > 1:
            sft.dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=2)
            sft.shard(learner, torch.device("cpu"))
            with pytest.raises(env.UserError), learner.gathered():       # whole for a rollout, also if that fails
                assert not any(map(is_sharded, learner.parameters()))
                raise env.UserError("a cut image")
            assert all(map(is_sharded, learner.parameters()))
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.0)
        optimizer.register_step_pre_hook(lambda *_: kept.append([whole(p.grad) for p in learner.parameters()]))
        fork.update(learner, [optimizer], mine, replace(CFG, micro_batch=2), policy)
        if len(shares) > 1:                      # one rank's error ends both, with its line
            assert refusal(sft.together, fail, rank) == "rank 1 has a cut image"
        torch.save(kept[0], f"{tmp_path}/{len(shares)}-{rank}")

    def fail(rank):
        if rank == 1:
            raise env.UserError("rank 1 has a cut image")

    fork = forked(KL)
    shares = [range(1), range(1, 6)]
    torch.multiprocessing.start_processes(work, (shares,), nprocs=2, start_method="fork")
    work(0, [range(6)])
    one, two, same = [torch.load(f"{tmp_path}/{name}") for name in ("1-0", "2-0", "2-1")]
    flat = torch.nn.utils.parameters_to_vector
    assert torch.equal(flat(two), flat(same))
    assert (flat(two) - flat(one)).norm() < 1e-5 * flat(one).norm()
    stats = sgd(learner, samples[:6])
    assert abs(flat(one).norm() / stats["grad_norm"] - 1) > 0.01         # the term is there


def test_an_entropy_bonus_has_a_gradient(learner, samples):
    """At the mark: a step along it alone raises the entropy, by the first order's amount."""
    fork = forked("loss = 0.0 * loss - entropy.sum() / n_tokens")
    before = sgd(learner, samples[:6], 1e-4, fork)
    after = sgd(learner, samples[:6], 1e-4, fork)
    gain = after["entropy"] - before["entropy"]
    assert gain == pytest.approx(1e-4 * before["grad_norm"] ** 2, rel=0.05)


def test_an_added_reward_part(samples):
    """It is logged under its own name, 0 where a branch has none; the reward stays the total, wherever it stands."""
    for i, s in enumerate(samples):
        s.parts["total"] = 0.1 if i < 4 else i / 10
        s.parts = {"novelty": 3.0, **s.parts, "curiosity": 7.0}
    samples[0].parts["rare"] = 6.0
    entry = rppo.summarise(samples, CFG)
    assert entry["parts"]["rare"] == pytest.approx(0.5)
    assert entry["reward"] == pytest.approx(6.4 / 12)
    assert entry["flat_groups"] == pytest.approx(1 / 3)
    assert entry["parts"]["novelty"] == 3
    assert entry["parts"]["curiosity"] == 7
