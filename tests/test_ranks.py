"""Several ranks are one process: the same rollouts, gradients, weights and scores, copied and sharded.

    python -m pytest -m slow tests/test_ranks.py

Run by torchrun this file is the worker: `work` on every rank. The policy is random; what it writes counts as
crops and answers by chance.
"""
import contextlib
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

from conftest import by_chance, whole    # first: under torchrun it finds the files, and env goes before torch
import pytest
import torch

import data
import env
import eval as evaluation
import rppo
import sft

pytestmark = pytest.mark.slow
parse_action, collect = env.parse_action, rppo.collect
clip = torch.nn.utils.clip_grad_norm_


def acting(text):
    """Read gibberish as an action, by its checksum."""
    n = zlib.crc32(text.encode())
    if parse_action(text).kind != "none":
        return parse_action(text)
    if n % 3 == 0:
        return env.Action("answer", answer=list(data.COLOURS)[n % 6])
    x = n % 5 * 100.0
    return env.Action("crop", bbox=(x, 200.0, x + 400, 700.0))


def work(rows, out, shard, lora, tiny):
    """Three steps of sft.py and rppo.py, eval.py, then single steps. Leaves out/RANK.pt: ids of the rollouts,
    gradients (summed over the ranks) of the first six steps, what became of the last ones."""
    rank, world_size, _ = sft.setup()
    ids, gradients = {}, []

    def recorded_clip(parameters, limit):
        weights = list(parameters)
        if len(gradients) < 6:
            found = [whole(p.grad).flatten() for p in weights if p.grad is not None]
            gradients.append(torch.cat(found).double())
        return clip(weights, limit)

    def recorded_collect(policy, rows, streams, step, cfg):
        """In the third step only prompts with odd numbers have a gradient: with two ranks rank 0 has none."""
        samples = collect(policy, rows, streams, step, cfg)
        for i, sample in enumerate(samples):
            prompt = streams[i // cfg.samples]
            ids.setdefault(f"{step}/{prompt}", []).append(sample.traj.ids)
            if step == 2 and prompt % 2 == 0:
                sample.advantage = 0.0
        return samples

    common = dict(max_crops=2, turn_tokens=6, data=rows, model=f"{rows}/{tiny}")
    training = dict(common, shard=shard, lora=lora, recompute=shard, steps=3, micro_batch=3, warmup=1,
                    lr=1e-3)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(sys.stderr):
        patch.setattr(env, "parse_action", acting)
        patch.setattr(env, "rewards", by_chance)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
        patch.setattr(rppo, "collect", recorded_collect)
        muon = 0.0 if shard else 0.03
        sft.main(sft.Config(**dict(training, turn_tokens=48), out=f"{out}/sft", muon_lr=muon, batch=8))
        cfg = rppo.Config(**training, train_vision=not shard, out=f"{out}/rppo", prompts=4, samples=4,
                          eval_rows=5, in_flight=2, n_score=0)
        policy = rppo.main(cfg)
        evaluation.main(evaluation.Config(**common, out=f"{out}/eval", limit=7, k=3))
        updates = single_steps(policy, rows, cfg, rank, world_size)
    torch.save((ids, gradients, updates), f"{out}/{rank}.pt")


def single_steps(policy, path, cfg, rank, world_size):
    """Steps of RPPO: one with a gradient, a flat one, NaN on the last rank alone. Returns of these if weights
    moved, and if the step was skipped."""
    optimizers = sft.make_optimizers(policy, cfg, (0.9, 0.95))
    rows = data.load_rows(f"{path}/test.jsonl")[rank:8:world_size]
    samples = collect(policy, rows, list(range(rank, 8, world_size)), 9, cfg)
    updates = []
    for advantage in (1.0, 0.0, math.nan):
        for sample in samples:
            sample.advantage = advantage
        if math.isnan(advantage) and rank + 1 < world_size:
            samples[0].advantage = 1.0
            samples = samples[:1]
        before = [whole(p) for p in policy.parameters()]
        stats = rppo.update(policy, optimizers, samples, cfg)
        after = [whole(p) for p in policy.parameters()]
        updates.append((not all(map(torch.equal, before, after)), stats["skipped"]))
    return updates


@pytest.fixture(scope="module", params=["copied", "sharded", "lora", "qwen3_5"])
def ranks(request, scenes, tmp_path_factory):
    """The same work by this process and by two ranks: both folders, and what the three recorded."""
    shard = request.param != "copied"
    lora = 4 if request.param == "lora" else 0
    tiny = "tiny3_5" if request.param == "qwen3_5" else "tiny"
    one, two = [str(tmp_path_factory.mktemp(f"{name}_{request.param}")) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        if shard:                        # one process has nothing to shard
            patch.setattr(sft, "shard", lambda policy, device: None)
        work(scenes, one, shard, lora, tiny)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, scenes, two, str(shard), str(lora), tiny], capture_output=True, text=True,
                          timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return (f"{scenes}/{tiny}", one, two), [torch.load(path) for path in (f"{one}/0.pt", f"{two}/0.pt", f"{two}/1.pt")]


def test_rollouts_gradients_and_skipped_steps(ranks):
    """Ranks sample the ids of one process, each its half. Gradients of first steps are the same. A flat step
    moves no weight; a NaN on one rank is skipped by all."""
    (ids, gradients, updates), first, second = ranks[1]
    assert not first[0].keys() & second[0].keys()
    for prompt in ("0/0", "0/1", "0/2", "0/3"):
        assert ids[prompt] == (first[0] | second[0])[prompt]
    for step in (0, 3):                  # the first of sft.py, of rppo.py
        one, two = gradients[step], first[1][step]
        assert torch.equal(two, second[1][step]) and (two - one).norm() <= 1e-5 * one.norm() > 1e-8
    assert updates == first[2] == second[2] == [(True, 0), (False, 0), (False, 1)]


def test_weights_logs_and_scores(ranks):
    """After three steps (in RPPO's last rank 0 has nothing to do) they are close."""
    for stage in ("sft", "rppo"):
        weights, logs = [], []
        before, *outs = ranks[0]
        for run in (before, *[f"{out}/{stage}" for out in outs]):
            policy = sft.load_policy(env.newest(run), "cpu", train=True)       # LoRA merged
            weights.append(torch.cat([p.detach().flatten().double() for p in policy.parameters()]))
            logs.append(sft.read_log(run))
        start, one, two = weights
        assert (one - two).norm() < (0.05 if stage == "sft" else 0.01) * (one - start).norm()
        for a, b in zip(logs[1], logs[2], strict=True):
            assert a["tokens"] == b["tokens"]
            assert 0 < a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.01)
    held_out = [logs[1][2]["held_out"], logs[2][2]["held_out"]]
    assert held_out[0] == pytest.approx(held_out[1]) and held_out[0]["n"] == 5
    scores = [json.loads(Path(f"{out}/eval/eval.json").read_text())["greedy"] for out in outs]
    assert scores[0] == scores[1] and scores[0]["n"] == 7


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(*sys.argv[1:3], sys.argv[3] == "True", int(sys.argv[4]), sys.argv[5])
    sft.leave()
