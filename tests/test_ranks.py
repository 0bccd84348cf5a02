"""Several ranks are one process: the same rollouts, gradients, weights and scores, copied and sharded.

    python -m pytest -m slow tests/test_ranks.py

Run by torchrun this file is the worker: `work` on every rank. The policy is random; what it writes counts as
crops and answers by chance.
"""
import contextlib
import copy
import json
import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))        # torchrun knows no conftest
import data  # noqa: E402
import env  # noqa: E402
import eval as evaluation  # noqa: E402
import rppo  # noqa: E402
import sft  # noqa: E402
from conftest import amplify  # noqa: E402

pytestmark = pytest.mark.slow
SHORT = dict(max_crops=2, turn_tokens=6)
parse_action = env.parse_action
sync_gradients = sft.sync_gradients
collect = rppo.collect


# --- What is done by one process, and by each of two ranks ----------------------------------------------

def acting(text):
    """Read gibberish as an action, by its checksum."""
    n = zlib.crc32(text.encode())
    if parse_action(text).kind != "none":
        return parse_action(text)
    if n % 3 == 0:
        return env.Action("answer", answer=list(data.COLOURS)[n % 6])
    x = n % 5 * 100.0
    return env.Action("crop", bbox=(x, 200.0, x + 400, 700.0))


def by_chance(group, cfg):
    """Rewards that differ from sample to sample."""
    return [dict(total=zlib.crc32(str(traj.ids).encode()) % 101 / 101) for traj in group]


def whole(tensor):
    """A copy of a tensor, gathered if it is sharded. All ranks must reach this."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Record:
    """What this rank did: ids of the rollouts, each stage's first gradient (summed over the ranks), updates."""

    def __init__(self):
        self.stage = "sft"
        self.ids, self.gradients, self.updates = {}, {}, []

    def collect(self, policy, rows, prompt_ids, step, cfg):
        """In the third step only prompts with odd numbers have a gradient: with two ranks rank 0 has none."""
        samples = collect(policy, rows, prompt_ids, step, cfg)
        for i, sample in enumerate(samples):
            prompt = prompt_ids[i // cfg.samples]
            self.ids.setdefault(f"{step}/{prompt}", []).append(sample.traj.ids)
            if step == 2 and prompt % 2 == 0:
                sample.advantage = 0.0
        return samples

    def sync(self, policy):
        sync_gradients(policy)
        gradients = [whole(p.grad).flatten() for p in policy.parameters() if p.grad is not None]
        if self.stage not in self.gradients and gradients:
            self.gradients[self.stage] = torch.cat(gradients)


def work(rows, model, out, shard):
    """Three steps of sft.py and rppo.py, eval.py, then single batches. Leaves out/RANK.*."""
    rank, world_size, _ = sft.setup()
    record = Record()
    common = dict(SHORT, data=rows, model=model)
    training = dict(common, shard=shard, recompute=shard, train_vision=not shard, steps=3, micro_batch=3,
                    warmup=1, lr=1e-3)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(sys.stderr):
        patch.setattr(env, "parse_action", acting)
        patch.setattr(env, "rewards", by_chance)
        patch.setattr(sft, "sync_gradients", record.sync)
        patch.setattr(rppo, "collect", record.collect)
        muon = 0.0 if shard else 0.03
        sft.main(sft.Config(**training, out=f"{out}/sft", muon_lr=muon, batch=8))
        record.stage = "rppo"
        cfg = rppo.Config(**training, out=f"{out}/rppo", prompts=4, samples=4, eval_rows=5, in_flight=2,
                          n_score=0)
        policy = rppo.main(cfg)
        evaluation.main(evaluation.Config(**common, out=f"{out}/eval", limit=7, k=3))
        record.stage = "single"
        single_batches(record, policy, rows, cfg, rank, world_size)
    save_file(record.gradients, f"{out}/{rank}.safetensors")
    Path(f"{out}/{rank}.json").write_text(json.dumps([record.ids, record.updates]))


def single_batches(record, policy, path, cfg, rank, world_size):
    """A batch of which the second rank's part has no image; a flat step after one with a gradient; NaN on the
    last rank alone."""
    row = env.load_rows(f"{path}/sft.jsonl")[0]
    blind = env.Trajectory(row)
    blind.extend(policy.proc, policy.proc.encode("what is it?"))
    blind.extend(policy.proc, policy.proc.encode("nothing"), sampled=True)
    seen = env.render(policy.proc, row, row["turns"], env.EpisodeConfig())
    policy.train()
    for traj in [seen, blind][rank::world_size]:
        logp, _ = policy(sft.collate([traj], policy.proc))
        (-logp.sum() / 50).backward()
    optimizers = sft.make_optimizers(policy, cfg, (0.9, 0.95))
    sft.optimizer_step(policy, optimizers, 0.0, cfg)
    rows = env.load_rows(f"{path}/test.jsonl")[rank:8:world_size]
    samples = collect(policy, rows, list(range(rank, 8, world_size)), 9, cfg)
    for advantage in (1.0, 0.0, math.nan):
        on_all = advantage == advantage or rank + 1 == world_size
        for sample in samples:
            sample.advantage = advantage if on_all else 1.0
        before = [whole(p) for p in policy.parameters()]
        stats = rppo.update(policy, optimizers, samples, cfg)
        moved = not all(map(torch.equal, before, [whole(p) for p in policy.parameters()]))
        record.updates.append([moved, stats["skipped"]])


@pytest.fixture(scope="module")
def model(policy, tmp_path_factory):
    """A checkpoint of the tiny policy, with weights large enough that its choices differ."""
    out = str(tmp_path_factory.mktemp("model"))
    large = copy.deepcopy(policy)
    amplify(large.vlm, 3.0)
    sft.save_model(out, large, large.vlm.state_dict(), env.EpisodeConfig(**SHORT), "tiny")
    return out


@pytest.fixture(scope="module", params=["copied", "sharded"])
def ranks(request, scenes, model, tmp_path_factory):
    """The folders of the same work, by this process and by two ranks of torchrun."""
    shard = request.param == "sharded"
    one, two = [str(tmp_path_factory.mktemp(f"{name}_{request.param}")) for name in ("one", "two")]
    with pytest.MonkeyPatch.context() as patch:
        if shard:                        # one process has nothing to shard
            patch.setattr(sft, "shard", lambda policy, device: None)
        work(scenes, model, one, shard)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, scenes, model, two, str(shard)], capture_output=True, text=True,
                          timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


def read(out, rank):
    return json.loads(Path(f"{out}/{rank}.json").read_text())


def weights_of(run):
    """All parameters in one vector, as transformers reads them."""
    policy = sft.load_policy(sft.newest(run), "cpu")
    return torch.cat([p.flatten().double() for p in policy.parameters()])


def test_rollouts_and_scores(ranks):
    """Two ranks together sample exactly the ids of one process, each its own half; scores are the same."""
    one, first, second = read(ranks[0], 0)[0], read(ranks[1], 0)[0], read(ranks[1], 1)[0]
    assert set(first) & set(one) and not first.keys() & second.keys()
    for prompt in ("0/0", "0/1", "0/2", "0/3"):
        assert one[prompt] == {**first, **second}[prompt]
        assert len(set(map(str, one[prompt]))) == 4
    scores, held_out = [], []
    for out in ranks:
        scores.append(json.loads(Path(f"{out}/eval/eval.json").read_text()))
        del scores[-1]["seconds"], scores[-1]["config"]
        held_out.append(sft.read_log(f"{out}/rppo")[2]["held_out"])
    assert scores[0] == scores[1] and scores[0]["greedy"]["n"] == 7
    assert held_out[0] == pytest.approx(held_out[1]) and held_out[0]["n"] == 5


@pytest.mark.parametrize("stage", ["sft", "rppo", "single"])
def test_gradients(ranks, stage):
    """The first step's, and that of a batch of which one rank's part has no image."""
    one = load_file(f"{ranks[0]}/0.safetensors")[stage].double()
    first, second = (load_file(f"{ranks[1]}/{rank}.safetensors")[stage].double() for rank in (0, 1))
    assert torch.equal(first, second) and (first - one).norm() <= 1e-5 * one.norm() > 1e-8


@pytest.mark.parametrize("stage", ["sft", "rppo"])
def test_weights_and_logs(ranks, model, stage):
    """After three steps (in RPPO's last rank 0 has nothing to do) they are close; Muon computes in bf16."""
    start, one, two = map(weights_of, (model, f"{ranks[0]}/{stage}", f"{ranks[1]}/{stage}"))
    tolerance = 0.05 if "copied" in ranks[0] and stage == "sft" else 0.01
    assert (one - two).norm() < tolerance * (one - start).norm()
    logs = [sft.read_log(f"{out}/{stage}") for out in ranks]
    assert len(logs[0]) == 3
    for a, b in zip(*logs, strict=True):
        assert a["tokens"] == b["tokens"] and 0 < a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_steps_without_an_update(ranks):
    """A flat step moves no weight though there is momentum; a loss of NaN on one rank is skipped by all."""
    for out, rank in ((ranks[0], 0), (ranks[1], 0), (ranks[1], 1)):
        assert read(out, rank)[1] == [[True, 0], [False, 0], [False, 1]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(*sys.argv[1:4], sys.argv[4] == "True")
    sft.leave()
