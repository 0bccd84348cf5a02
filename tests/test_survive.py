"""It survives: exact resume, faults, hostile input.    KILLS=4 python -m pytest -m "slow or not slow" tests/test_survive.py

Run by torchrun this file is a worker: a stage by its command line, in which FAULT (JSON) can break one rank at one step.
"""
import ast
import collections
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # torchrun knows no conftest
import data  # noqa: E402
import env  # noqa: E402
import eval as evaluation  # noqa: E402
import rppo  # noqa: E402
import sft  # noqa: E402
from test_env import call, hostile_texts, picture  # noqa: E402
from test_rppo import acting  # noqa: E402
from test_stages import RPPO, SFT, SHORT, STAGES, base, config, cpu, read_log, weights  # noqa: E402, F401

parse_action = env.parse_action                  # the real one: a fixture of test_stages.py makes gibberish act
SLOW = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 20))         # of the slow kill test; .ci/run makes four


def state(out, step=None):
    """What a run left: its log without timings, and every tensor of its newest (or the given) checkpoint as bytes."""
    folder = f"{out}/checkpoints/{step}" if step else env.newest(out)
    tensors = {f"{f}/{k}": v.numpy().tobytes() for f in ("model", "optimizer") for k, v in weights(folder, f"{f}.safetensors").items()}
    return read_log(out, timings=False), tensors


def same(a, b, files=True):
    """Two runs ended alike, bit by bit; with files also in what stands in their folders (a run that was stopped by a signal
    has one more checkpoint)."""
    (log, tensors), (log2, tensors2) = state(a), state(b)
    assert log == log2 and tensors.keys() == tensors2.keys() and [k for k in tensors if tensors[k] != tensors2[k]] == []
    for x in ("last", "best.json"):
        assert os.path.exists(f"{a}/{x}") == os.path.exists(f"{b}/{x}")
        assert not os.path.exists(f"{a}/{x}") or open(f"{a}/{x}").read() == open(f"{b}/{x}").read()
    listing = lambda out: sorted(x for x in os.listdir(f"{out}/checkpoints") if x.isdigit())
    assert not files or listing(a) == listing(b)


def again(cfg, **more):
    return type(cfg)(**{**asdict(cfg), **more})


# ---------------------------------------------------------------------------------------------------------------
# 1. Checkpoints.

@pytest.fixture(scope="module")
def finished(scenes, base, tmp_path_factory):
    """A finished rppo run of four steps, evaluated after each, that keeps three checkpoints. Shared: tests copy it."""
    cfg = config("rppo", scenes, base, tmp_path_factory.mktemp("finished") / "run", steps=4, eval_every=1, eval_rows=2, show_every=9,
                 keep=3)
    rppo.main(cfg)
    assert any(e["grad_norm"] > 0 for e in read_log(cfg.out)[2:])
    return cfg


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "run")
    return again(finished, out=str(tmp_path / "run"))


def cut(path):
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) * 2 // 3)


def alter(path):
    """Flip one bit in the middle: for weights, in the last digits of one number."""
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "world.json", "checksums.json"])
@pytest.mark.parametrize("harm", [cut, alter, os.remove])
def test_damage_is_noticed(file, harm, copied, capsys):
    """A file of the newest checkpoint that is cut short, altered by one bit or missing is named, and the one before it used."""
    assert sft.newest_whole(copied.out) == 4
    harm(f"{copied.out}/checkpoints/4/{file}")
    capsys.readouterr()
    assert sft.newest_whole(copied.out) == 3 and open(f"{copied.out}/last").read() == "3"
    printed = capsys.readouterr().out
    assert "checkpoints/4: damaged" in printed and (file in printed or file == "checksums.json")


@pytest.mark.parametrize("harm", [partial(map, cut), partial(map, alter), partial(map, os.remove)])
def test_the_one_before_is_used(harm, copied, finished, capsys):
    """The newest checkpoint is damaged: that is said, the one before it goes on, and the end is that of a whole run."""
    list(harm([f"{copied.out}/checkpoints/4/model.safetensors"]))
    rppo.main(copied)
    printed = capsys.readouterr().out
    assert re.search(r"checkpoints/4: damaged .*model\.safetensors", printed) and "going on from step 3 of 4" in printed
    same(copied.out, finished.out)
    assert os.path.exists(f"{copied.out}/checkpoints/4.damaged")


def test_two_damaged_checkpoints(copied, finished, capsys):
    """The newest two are damaged and best.json names one of them: the run goes on from the third, with the best of what is
    left, and ends as it had."""
    log = read_log(copied.out)
    for e, accuracy in zip(log, (0.1, 0.2, 0.9, 0.3)):  # as if the third had been the best
        e["held_out"]["accuracy"] = accuracy
    env.write_text(f"{copied.out}/log.jsonl", "".join(json.dumps(e) + "\n" for e in log))
    assert rppo.mark_best(copied.out) == 3
    cut(f"{copied.out}/checkpoints/4/optimizer.safetensors")
    shutil.rmtree(f"{copied.out}/checkpoints/3/")
    os.makedirs(f"{copied.out}/checkpoints/3/")
    with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(rppo, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        rppo.main(copied)
    assert "going on from step 2" in capsys.readouterr().out and open(f"{copied.out}/last").read() == "2"
    assert json.loads(open(f"{copied.out}/best.json").read()) == {"step": 2, "accuracy": 0.2}
    shutil.copy(f"{finished.out}/log.jsonl", copied.out)
    rppo.main(copied)
    same(copied.out, finished.out)


def test_no_checkpoint_is_whole(copied, finished):
    """All of them are damaged: the run begins anew, and ends as it had."""
    for step in os.listdir(f"{copied.out}/checkpoints"):
        os.remove(f"{copied.out}/checkpoints/{step}/checksums.json")
    rppo.main(copied)
    same(copied.out, finished.out)


def test_last_may_be_wrong(copied, finished):
    """`last` names a checkpoint that is gone, as after a kill between two writes: the newest one there is used."""
    env.write_text(f"{copied.out}/last", "9")
    shutil.rmtree(f"{copied.out}/checkpoints/4")
    os.makedirs(f"{copied.out}/checkpoints/7.tmp")
    rppo.main(copied)
    same(copied.out, finished.out)
    assert not os.path.exists(f"{copied.out}/checkpoints/7.tmp")


@pytest.mark.parametrize("room", [pytest.param(1000, marks=SLOW), 10_000, pytest.param(1_000_000, marks=SLOW), 2_900_000])
def test_full_disk(room, scenes, base, tmp_path, monkeypatch, capfd):
    """No file can grow above `room` bytes while the second checkpoint is written, so that a different file fails each time:
    one clear line, nothing half-written stays, the checkpoint before it is whole, and with room the run goes on."""
    cfg = config("sft", scenes, base, tmp_path / "run", steps=2)
    monkeypatch.setattr(env, "configure", lambda *_: cfg)
    monkeypatch.setattr(env.signal, "signal", lambda *_: signal.SIG_DFL)
    save, limits = sft.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def cramped(out, step, *args):
        sys.stdout.flush()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room if step == 2 else limits[0], limits[1]))
            save(out, step, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(sft, "save_checkpoint", cramped)
    with pytest.raises(env.UserError, match="the disk is full .*File too large.*make room") as e:
        env.run(sft.main, sft.Config, sft.REAL)
    assert "\n" not in str(e.value) and os.listdir(f"{cfg.out}/checkpoints") == ["1"] and sft.newest_whole(cfg.out) == 1
    monkeypatch.undo()
    sft.main(cfg)
    assert [e["step"] for e in read_log(cfg.out)] == [0, 1] and open(f"{cfg.out}/last").read() == "2"


@pytest.mark.parametrize("number, error", [(errno.ENOSPC, env.UserError), (errno.EDQUOT, env.UserError), (errno.EIO, OSError)])
def test_full_disk_elsewhere(number, error, monkeypatch):
    """Wherever it shows, a full disk or quota is one line at the command line; another error is not taken for it."""
    def main(_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(env, "configure", lambda *_: None)
    monkeypatch.setattr(env.signal, "signal", lambda *_: signal.SIG_DFL)
    with pytest.raises(error, match="^the disk is full" if error is env.UserError else os.strerror(number)):
        env.run(main, None, {})


def test_best_is_the_first_highest(tmp_path):
    """best.json: among checkpoints that are there, the earliest of the highest accuracy; none at all is said so."""
    assert rppo.mark_best(str(tmp_path)) is None
    entries = [dict(step=i, **({"held_out": {"accuracy": a}} if a else {})) for i, a in enumerate([0.9, 0.5, None, 0.7, 0.7])]
    env.write_text(str(tmp_path / "log.jsonl"), "".join(json.dumps(e) + "\n" for e in entries) + '{"half a li')
    for step in (2, 3, 4, 5):
        os.makedirs(tmp_path / "checkpoints" / str(step))
    assert rppo.mark_best(str(tmp_path)) == 4 and json.loads((tmp_path / "best.json").read_text()) == {"step": 4, "accuracy": 0.7}


# ---------------------------------------------------------------------------------------------------------------
# 2. Signals.

@pytest.mark.parametrize("name, number", [("sft", signal.SIGINT), ("rppo", signal.SIGTERM),
                                          pytest.param("sft", signal.SIGTERM, marks=SLOW), pytest.param("rppo", signal.SIGINT, marks=SLOW)])
def test_a_signal_saves_and_leaves(name, number, scenes, base, tmp_path, monkeypatch, capfd):
    """A signal in the middle of step 1 of 3: that step is finished and saved, though save_every is far away; exit code 0
    and a line how to go on. The same command then ends as a run that was left alone. Handlers are as before."""
    whole, cfg = (config(name, scenes, base, tmp_path / x, save_every=10) for x in ("whole", "run"))
    STAGES[name][0].main(whole)
    stage, before, calls = STAGES[name][0], signal.getsignal(number), itertools.count()
    update = stage.update
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
        m.setattr(stage, "update", lambda *a: (next(calls) == 1 and signal.raise_signal(number), update(*a))[1])
        STAGES[name][0].main(cfg)
    assert e.value.code == 0 and "the same command goes on" in capfd.readouterr().out
    assert open(f"{cfg.out}/last").read() == "2" and signal.getsignal(number) is before
    STAGES[name][0].main(cfg)
    same(cfg.out, whole.out, files=False)


def test_a_signal_after_the_last_step(scenes, base, tmp_path, monkeypatch):
    """A signal that arrives while the last checkpoint is written is not forgotten: it acts when that is done."""
    cfg, seen, prune = config("sft", scenes, base, tmp_path / "run", steps=1), [], sft.prune
    monkeypatch.setattr(sft, "prune", lambda *a: (prune(*a), signal.raise_signal(signal.SIGTERM)))
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(os.path.exists(f"{cfg.out}/checkpoints/1")))
    try:
        sft.main(cfg)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [True]


@SLOW
def test_the_main_job_interrupted_in_every_stage(base, tmp_path, monkeypatch, capsys):
    """rppo.py from nothing, stopped by a signal while it draws, imitates, reinforces and scores, one after the other, and
    started again each time: as if it had never been stopped. Its half-drawn scenes are not taken for foreign rows."""
    monkeypatch.setattr(data, "Config", partial(data.Config, n_sft=10, n_train=9, n_test=4))
    monkeypatch.setattr(sft, "Config", partial(sft.Config, **{**SFT, "save_every": 10}))
    cfgs = [rppo.Config(**{**RPPO, "save_every": 10, "eval_every": 10, "n_score": 4}, data=f"{tmp_path}/{x}/scenes", out=f"{tmp_path}/{x}/runs/rppo")
            for x in "ab"]
    rppo.main(cfgs[0])
    handlers = {s: signal.signal(s, env.leave) for s in (signal.SIGTERM, signal.SIGINT)}     # as env.run does
    try:
        for module, name, skip in ((data, "write_rows", 2), (sft, "update", 1), (rppo, "update", 1), (evaluation, "draw", 0)):
            works, calls = getattr(module, name), itertools.count()
            with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
                m.setattr(module, name, lambda *a, **k: (next(calls) == skip and signal.raise_signal(signal.SIGTERM), works(*a, **k))[1])
                rppo.main(cfgs[1])
            assert e.value.code == 0, name
        assert os.path.exists(f"{tmp_path}/b/scenes/config.json") and not os.path.exists(f"{tmp_path}/b/runs/summary.json")
        rppo.main(cfgs[1])
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    same(cfgs[0].out, cfgs[1].out, files=False)
    same(f"{tmp_path}/a/runs/sft", f"{tmp_path}/b/runs/sft", files=False)
    for x in ("sft.jsonl", "train.jsonl", "test.jsonl"):
        assert open(f"{tmp_path}/a/scenes/{x}").read() == open(f"{tmp_path}/b/scenes/{x}").read()
    scores = [json.loads(open(f"{tmp_path}/{x}/runs/summary.json").read()) for x in "ab"]
    assert {k: v for k, v in scores[0]["rppo"].items() if k != "seconds"} == {k: v for k, v in scores[1]["rppo"].items() if k != "seconds"}


# ---------------------------------------------------------------------------------------------------------------
# 3. Numbers that are not finite, and nothing to learn from.

def poison(m, kind, when):
    """Make the loss (NaN) or the gradient (inf) of the steps for which when(call) is true not finite."""
    sync, calls = sft.sync_gradients, itertools.count()

    def poisoned(policy, world, sums):
        if when(next(calls)):
            if kind == "loss":
                sums = [math.nan, *sums[1:]]
            else:
                p = next(policy.parameters())
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad.view(-1)[0] = math.inf
        return sync(policy, world, sums)
    m.setattr(sft, "sync_gradients", poisoned)


@pytest.mark.parametrize("name, kind", [("sft", "loss"), ("rppo", "gradient"), pytest.param("sft", "gradient", marks=SLOW),
                                        pytest.param("rppo", "loss", marks=SLOW)])
def test_a_step_that_is_not_finite_is_skipped(name, kind, scenes, base, tmp_path, monkeypatch, capsys):
    """Neither weights nor optimizer state change in that step; it is counted, said with its rows, and the log stays JSON;
    the steps after it are made."""
    cfg = config(name, scenes, base, tmp_path / "run", keep=3)
    with monkeypatch.context() as m:
        poison(m, kind, lambda i: i == 1)
        STAGES[name][0].main(cfg)
    log, steps = read_log(cfg.out), [state(cfg.out, i)[1] for i in (1, 2, 3)]
    assert [e["skipped"] for e in log] == [0, 1, 0] and log[1]["loss" if (name, kind) == ("sft", "loss") else "grad_norm"] is None or \
        (name, kind) == ("rppo", "loss") and log[1]["skipped"] == 1
    assert steps[0] == steps[1] != steps[2]
    assert re.search(r"step 1 skipped: .*not finite, rows \['(sft|train)-\d+-\d+'", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["sft", pytest.param("rppo", marks=SLOW)])
def test_too_many_skips_end_the_run(name, scenes, base, tmp_path, monkeypatch):
    """max_skips steps in a row: one line that names step and rows; a finite step in between starts the count anew, a kill
    does not."""
    cfg = config(name, scenes, base, tmp_path / "run", steps=9, max_skips=2, **({"eval_rows": 0} if name == "rppo" else {}))
    with monkeypatch.context() as m, pytest.raises(env.UserError, match=r"step 3: no finite gradient in 2 steps in a row .*rows .*\['(sft|train)-\d") as e:
        poison(m, "gradient", lambda i: i != 1)
        STAGES[name][0].main(cfg)
    assert "\n" not in str(e.value) and [x["skipped"] for x in read_log(cfg.out)] == [1, 0, 1, 1]
    assert open(f"{cfg.out}/last").read() == "3" and state(cfg.out, 2)[1] == state(cfg.out, 3)[1]   # as step 1 left it
    with monkeypatch.context() as m, pytest.raises(env.UserError, match="step 3: "):
        poison(m, "gradient", lambda i: True)
        STAGES[name][0].main(cfg)


def test_a_damaged_forward_pass_is_skipped(scenes, base, tmp_path, monkeypatch):
    """The check sees what the model computes: NaN log-probabilities of one micro-batch reach no weight."""
    cfg, forward, calls = config("sft", scenes, base, tmp_path / "run", keep=3), env.Policy.forward, itertools.count()
    with monkeypatch.context() as m:
        m.setattr(env.Policy, "forward", lambda *a, **k: [x * (math.nan if next(calls) == 4 else 1) for x in forward(*a, **k)])
        sft.main(cfg)
    assert [e["skipped"] for e in read_log(cfg.out)] == [0, 1, 0] and state(cfg.out, 1)[1] == state(cfg.out, 2)[1]


def finite(tensors):
    return all(torch.isfinite(v).all() for v in tensors.values())


@pytest.mark.parametrize("more", [dict(samples=1), dict(mask_over_turns=True, max_crops=0),
                                  pytest.param(dict(samples=1, updates=2), marks=SLOW), pytest.param(dict(turn_tokens=1), marks=SLOW)])
def test_nothing_to_learn_from(more, scenes, base, tmp_path):
    """Groups of one; every trajectory masked, so that the mask is empty; turns of one token: the log is all numbers, and what
    has no gradient moves nothing."""
    cfg = config("rppo", scenes, base, tmp_path / "run", **more)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(env, "parse_action", lambda text: env.Action("none", error="no action"))     # nobody answers
        rppo.main(cfg)
    for e in read_log(cfg.out):
        assert e["skipped"] == 0 and e["entropy"] is not None and math.isfinite(e["reward"])
        assert e["grad_norm"] == 0 or "turn_tokens" in more
    assert finite(weights(env.newest(cfg.out)))
    assert "turn_tokens" in more or state(cfg.out, 2)[1] == state(cfg.out, 3)[1]


def test_no_sampled_token(policy, rows):
    """A conversation in which nothing was sampled is an empty mask for both losses: zero, not NaN."""
    row = rows[0]
    traj = env.reset(policy.proc, row, env.World())
    env.respond(traj, policy.proc, [])
    batch = env.collate([traj], policy.proc)
    logp, entropy = policy(batch)
    assert sum(traj.mask) == 0 and logp.shape == entropy.shape == (0,) and logp.sum() == 0
    cfg = sft.Config(lr=0.0, muon_lr=0.0)
    entry, _ = sft.update(policy, sft.make_optimizers(policy, cfg), [batch], 0, cfg, 1, [])
    assert entry["loss"] == 0 and entry["grad_norm"] == 0 and entry["skipped"] == 0


# ---------------------------------------------------------------------------------------------------------------
# 4. Memory.

@pytest.mark.parametrize("name, where, what", [("rppo", (env, "rollout"), "rollout"), ("rppo", (rppo, "update"), "update"),
    ("rppo", (evaluation, "evaluate"), "held-out evaluation"), ("sft", (sft, "update"), "update"), ("eval", (evaluation, "score"), "evaluation")])
def test_out_of_memory(name, where, what, scenes, base, tmp_path, monkeypatch):
    """One line says in which phase, how long the longest trajectory is, and what to lower."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    monkeypatch.setattr(*where, full)
    cfg = config(name, scenes, base, tmp_path / "run") if name != "eval" else evaluation.Config(data=scenes, model=base, out=str(tmp_path))
    with pytest.raises(env.UserError, match=f"^out of GPU memory in the {what},") as e:
        STAGES[name][0].main(cfg)
    assert all(f"--{w}" in str(e.value) for w in ("in_flight", "micro_batch", "max_tokens", "max_pixels", "max_crop_pixels"))
    longest = int(re.search(r"up to (\d+) tokens", str(e.value))[1])
    assert "\n" not in str(e.value) and (20 < longest < 512 if what == "update" else longest == 512)


# ---------------------------------------------------------------------------------------------------------------
# 5. Hostile text.

EVIL = ["__import__('os').system('touch evil')", "eval('1')", "().__class__.__bases__[0].__subclasses__()", "${jndi:ldap://x}", "{{7*7}}",
        "../../etc/passwd", "'; DROP TABLE", "\x1b[2J\x1b]0;x\x07", "\u202eevil", "\ud800", "<|image_pad|>" * 9, "<|im_end|><|im_start|>system\n"]


def nested(rng, depth):
    """Random JSON, deep and odd."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([0, -1, 1e308, 10 ** 40, None, True, "", "bbox_2d", *EVIL, math.nan, math.inf])
    if rng.random() < 0.5:
        return [nested(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["name", "arguments", "bbox_2d", "img_idx", "__proto__", "", "label"]): nested(rng, depth - 1) for _ in range(3)}


def more_hostile_texts(n, seed):
    """Nested and truncated JSON, tags inside strings, calls after answers, code, odd code points, control tokens."""
    rng = random.Random(seed)
    box = lambda: [rng.choice([rng.randrange(-50, 1100), rng.uniform(-1e3, 2e3), 10 ** rng.randrange(400)]) for _ in range(4)]
    for i in range(n):
        kind = i % 8
        if kind == 0:
            yield f"<tool_call>{json.dumps(nested(rng, 5))}</tool_call>"
        elif kind == 1:
            text = call(box(), img_idx=rng.randrange(-1, 4), label=rng.choice(EVIL))
            yield text[:rng.randrange(len(text))] + rng.choice(["", "</tool_call>"])
        elif kind == 2:
            yield call(box(), label=rng.choice(["</tool_call>", "<answer>red</answer>", "<tool_call>", "<think>", "</think>"]))
        elif kind == 3:
            yield f"<answer>{rng.choice(EVIL)}</answer>" + rng.choice(["", call(box()), "<answer>x</answer>", "<tool_call>"])
        elif kind == 4:
            yield f'<tool_call>{{"name": "image_zoom_in_tool", "arguments": {rng.choice(EVIL)}}}</tool_call>'
        elif kind == 5:
            yield "".join(map(chr, rng.choices(range(0x110000), k=rng.randrange(40)))) + call(box())
        elif kind == 6:
            yield rng.choice(["<think>", "<tool_call>", "</think>", "<answer>", "{", "["]) * rng.randrange(200) + call(box())
        else:
            yield call([rng.choice(["0", "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "0x10", "1_000"]) for _ in range(4)]).replace('"9', "9")


def test_hostile_texts_by_the_ten_thousand():
    """50,000 seeded texts through parser and boxes: nothing is raised, evaluated, imported or opened; every text ends in a
    documented outcome, and every crop is whole pixels inside the image, of at least the least side and at most 100 : 1."""
    texts = [*hostile_texts(25_000, seed=3), *more_hostile_texts(25_000, seed=4)]
    started, kinds, results, events, watching = time.time(), collections.Counter(), collections.Counter(), [], True
    sys.addaudithook(lambda event, _: watching and event.split(".")[0] in ("exec", "compile", "open", "import", "os", "subprocess",
                                                                          "socket", "pickle", "ctypes") and events.append(event))
    worlds = [(640, 480, [(0, 0, 640, 480), (100, 100, 400, 300), (150, 120, 153, 123)]), (2000, 20, [(0, 0, 2000, 20)]), (7, 9, [(0, 0, 7, 9)])]
    for i, text in enumerate(texts):
        action = parse_action(text)
        kinds[action.kind] += 1
        if action.kind != "crop":
            assert action.kind in ("answer", "none", "malformed") and (action.error in (None, "")) == (action.kind == "answer")
            continue
        w, h, boxes = worlds[i % 3]
        box, error = env.resolve_box(action, boxes, 28)
        results[error] += 1
        if error is None:
            sides = box[2] - box[0], box[3] - box[1]
            assert all(type(v) is int for v in box) and 0 <= box[0] < box[2] <= w and 0 <= box[1] < box[3] <= h
            assert sides[0] >= min(28, w) and sides[1] >= min(28, h) and max(sides) <= 100 * min(sides)
        else:
            assert box is None and error in env.ERRORS
    watching = False
    assert i == 49_999 and not events and not os.path.exists("evil")
    assert all(kinds[k] > 1000 for k in ("crop", "answer", "none", "malformed")) and results[None] > 2000    # or it tests nothing
    assert all(results[k] > 50 for k in ("outside", "index")) and time.time() - started < 60


@pytest.mark.parametrize("world", [env.World(max_tokens=10 ** 6), env.World(**{**env.REAL_WORLD, "max_tokens": 10 ** 6})])
def test_hostile_turns_stay_in_the_budget(world, policy, rows, tmp_path, monkeypatch):
    """400 hostile texts as sampled turns, through decoding, tool and observation: no view is above the pixel budget, images
    and their tokens stay in step, and every turn ends in an observation, an answer or the end of its budget."""
    monkeypatch.setattr(env, "parse_action", parse_action)
    picture(600, 17).save(tmp_path / "x.png")
    image, proc, crops = env.open_image(tmp_path / "x.png"), policy.proc, 0
    texts = list(hostile_texts(200, seed=5)) + [t.encode("utf-8", "replace").decode() for t in more_hostile_texts(200, seed=6)]
    texts += [call([0, 0, 1000, 1]), call([0, 0, 1, 1000]), call([0, 400, 1000, 600])]        # the thinnest boxes
    for i in range(0, len(texts), 3):
        traj = env.reset(proc, rows[0], world, image=image)
        for text in texts[i:i + 3]:
            if traj.status == "open":
                env.respond(traj, proc, [k for k in proc.tok.encode(text, add_special_tokens=False) if not proc.banned[k]] + [proc.end])
                env.observe(traj, proc, world)
        assert traj.status in ("open", "answered") and len(traj.views) == len(traj.boxes) == 1 + len(traj.crops)
        assert all(v.shape[0] * v.shape[1] <= world.max_crop_pixels for v in traj.views[1:])
        assert traj.views[0].shape[0] * traj.views[0].shape[1] <= world.max_pixels
        assert traj.ids.count(proc.image) == sum(math.prod(proc.grid(v)) for v in traj.views)
        crops += len(traj.crops)
    assert crops > 20


# ---------------------------------------------------------------------------------------------------------------
# 6. Images and paths.

def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, body, depth=8, colour=2):
    """A PNG file by hand: its header may promise anything."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))


def zoo(folder):
    """{name: (what open_image gives, or part of its refusal; is it refused by the header alone?)} and the files."""
    source, path = picture(60, 40), lambda name: os.path.join(folder, name)
    red = Image.new("RGB", (60, 40), (200, 0, 0))
    source.save(path("plain.png"))
    whole = open(path("plain.png"), "rb").read()
    clear = Image.new("RGBA", (60, 40), (200, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 30, 40))
    clear.save(path("rgba.png"))
    clear.quantize(8).save(path("palette.png"), transparency=clear.quantize(8).getpixel((0, 0)))
    clear.quantize(8).save(path("palette.gif"), transparency=clear.quantize(8).getpixel((0, 0)))
    red.save(path("animated.gif"), save_all=True, append_images=[Image.new("RGB", (60, 40), (0, 0, 200))] * 3)
    red.save(path("animated.webp"), save_all=True, append_images=[Image.new("RGB", (60, 40), (0, 0, 200))] * 3, lossless=True)
    red.convert("CMYK").save(path("cmyk.jpg"), quality=95)
    exif = Image.Exif()
    exif[274] = 6                                                    # stored lying on its side
    red.save(path("turned.jpg"), exif=exif, quality=95)
    grey = np.full((40, 60), 51200, np.uint16)                       # 200 of 255
    Image.fromarray(grey).save(path("grey16.png"))
    rows = b"".join(b"\0" + struct.pack(">HHH", 51200, 0, 0) * 60 for _ in range(40))
    files = {"rgb16.png": png(60, 40, rows, depth=16), "bomb.png": png(30_000, 30_000, b"\0"), "thin.png": png(1, 20_000, b"\0\0\0\0" * 20_000),
             "half.png": whole[:len(whole) // 2], "empty.png": b"", "text.png": b"not an image", "header.png": whole[:24]}
    for name, body in files.items():
        open(path(name), "wb").write(body)
    return {"plain.png": ((60, 40), None), "rgba.png": ((60, 40), "white"), "palette.png": ((60, 40), "white"), "palette.gif": ((60, 40), "white"),
            "animated.gif": ((60, 40), "red"), "animated.webp": ((60, 40), "red"), "cmyk.jpg": ((60, 40), "red"), "turned.jpg": ((40, 60), "red"),
            "grey16.png": ((60, 40), "grey"), "rgb16.png": ((60, 40), "red"), "bomb.png": ("DecompressionBomb", True),
            "thin.png": ("1x20000 pixels", True), "half.png": ("truncated", False), "empty.png": ("not a readable image", True),
            "text.png": ("not a readable image", True), "header.png": ("not a readable image", True), "missing.png": ("No such file", True)}


def test_zoo(tmp_path):
    """Each animal has its documented outcome: 8-bit RGB, upright, first frame, on white; or one line that names the file. All
    but a truncated file are refused by their header, before training."""
    COLOUR = {"red": (200, 0, 0), "grey": (200, 200, 200), "white": (255, 255, 255)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, (want, more) in zoo(str(tmp_path)).items():
        path = str(tmp_path / name)
        if isinstance(want, tuple):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert env.open_image(path, decode=False) is None
                image = env.open_image(path)
            assert (image.mode, image.size) == ("RGB", want), name
            assert more is None or max(abs(a - b) for a, b in zip(image.getpixel((3, 3)), COLOUR[more])) <= 6, (name, image.getpixel((3, 3)))
        else:
            with pytest.raises(env.UserError, match=want) as e:
                env.open_image(path)
            assert name in str(e.value) and "\n" not in str(e.value)
            if more:
                with pytest.raises(env.UserError, match=want):
                    env.open_image(path, decode=False)
            else:
                assert env.open_image(path, decode=False) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000      # kilobytes; the bomb would be 2.7 GB


def test_damaged_images(tmp_path):
    """360 files with bytes changed, cut out or cut off: an image or a UserError, whatever the decoder makes of them."""
    rng, outcomes = random.Random(0), collections.Counter()
    warnings.simplefilter("ignore")
    for kind in ("png", "jpeg", "gif", "webp", "tiff", "dds"):
        picture(60, 40).save(tmp_path / f"x.{kind}")
        whole = (tmp_path / f"x.{kind}").read_bytes()
        for _ in range(60):
            body = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                at = rng.choice([rng.randrange(len(body)), rng.randrange(60)])
                body[at:at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            (tmp_path / "y").write_bytes(body[:rng.choice([None, rng.randrange(len(body))])])
            try:
                outcomes[env.open_image(tmp_path / "y").mode] += 1
            except env.UserError:
                outcomes["refused"] += 1
    assert set(outcomes) == {"RGB", "refused"} and min(outcomes.values()) > 30


@pytest.mark.parametrize("name", ["sft", "rppo", "eval"])
@pytest.mark.parametrize("animal", ["bomb.png", "half.png"])
def test_bad_images_end_every_stage_alike(name, animal, scenes, base, tmp_path):
    """The same refusal in SFT, RL and evaluation: what the header shows before anything is written, the rest when it is met."""
    shutil.copytree(scenes, tmp_path / "scenes")
    zoo(str(tmp_path / "scenes"))
    for split in ("sft", "train", "test"):
        path = tmp_path / "scenes" / f"{split}.jsonl"
        lines = [json.loads(x) for x in path.read_text().splitlines()]
        for row in lines[:16] if animal == "half.png" else lines[7:8]:
            row["images"] = [f"../scenes/{animal}"]
        path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    cfg = evaluation.Config(**SHORT, data=str(tmp_path / "scenes"), model=base, out=str(tmp_path / "run")) if name == "eval" else \
        config(name, str(tmp_path / "scenes"), base, tmp_path / "run")
    with pytest.raises(env.UserError, match=f"{animal}: not a readable image .*remove its row"):
        STAGES[name][0].main(cfg)
    assert os.path.exists(cfg.out) == (animal == "half.png" and name != "eval")


def test_inside(tmp_path):
    """With a root, a path cannot leave it: not by .., not absolutely, not by a link, not into a folder of a like name."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    for x in ("root/a/x.png", "root2/x.png", "x.png"):
        (tmp_path / x).write_text("")
    (root / "out.png").symlink_to(tmp_path / "x.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "a" / "x.png")
    for path in ("a/x.png", "a/../a/x.png", str(root / "a/x.png"), "in.png", "folder/root/a/x.png"):
        assert env.inside(str(root), path, 5) == str(root / "a" / "x.png")
    for path in ("../x.png", "a/../../x.png", str(tmp_path / "x.png"), "out.png", "folder/x.png", "../root2/x.png", "/etc/passwd", "..", "a\0/../../x.png"):
        with pytest.raises(env.UserError, match="row 5: .*outside") as e:
            env.inside(str(root), path, 5)
        assert "\0" not in str(e.value)
    (tmp_path / "link").symlink_to(root)
    assert env.inside(str(tmp_path / "link"), "a/x.png", 5) == str(root / "a" / "x.png")


# ---------------------------------------------------------------------------------------------------------------
# 7. Nothing is unpickled, and nothing printed steers a terminal.

def test_no_code_that_evaluates_or_unpickles():
    """The five files call nothing that runs or unpickles what it reads; collectives of Python objects would pickle."""
    for name in ("env", *STAGES):
        for node in ast.walk(ast.parse(open(os.path.join(ROOT, f"{name}.py")).read())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "marshal", "shelve", "subprocess", "dill", "joblib", "yaml"} & {m.split(".")[0] for m in modules}
            if isinstance(node, ast.Call):
                f = node.func
                assert not (isinstance(f, ast.Name) and f.id in ("eval", "exec", "compile", "__import__"))
                if isinstance(f, ast.Attribute):
                    owner = getattr(f.value, "id", "")
                    assert (owner, f.attr) not in (("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("os", "system"))
                    assert not f.attr.endswith(("_object", "_object_list")), f"{name}.py:{node.lineno}"


def test_resuming_unpickles_nothing(copied, finished, monkeypatch):
    """A run goes on with every unpickler out of order."""
    import pickle
    shutil.rmtree(f"{copied.out}/checkpoints/4")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (np, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something was unpickled"))
    rppo.main(copied)
    same(copied.out, finished.out)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_refused(base, tmp_path):
    """A folder whose weights are in pytorch_model.bin alone, or cut short: one line, and the pickle is not run."""
    shutil.copytree(base, tmp_path / "model")
    os.remove(tmp_path / "model" / "model.safetensors")
    torch.save({"lm_head.weight": Bomb(str(tmp_path / "executed"))}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(env.UserError, match="model: no readable weights in safetensors") as e:
        env.load_policy(str(tmp_path / "model"), torch.device("cpu"))
    assert "\n" not in str(e.value) and not os.path.exists(tmp_path / "executed")
    shutil.copy(f"{base}/model.safetensors", tmp_path / "model")
    cut(tmp_path / "model" / "model.safetensors")
    with pytest.raises(env.UserError, match="model: no readable weights in safetensors"):
        env.load_policy(str(tmp_path / "model"), torch.device("cpu"))


def test_what_is_shown_is_escaped(policy, rows, tmp_path):
    """Control characters of the policy, a question or a file's name are printed as escapes: they cannot steer a terminal."""
    evil = "a\x1b[2J\x07\r\u202e\x9b31m"
    traj = env.render(policy.proc, {**rows[0], "problem": evil}, [f"<think>{evil}</think>\n<answer>{evil}</answer>"], env.World())
    shown = evaluation.show(traj, policy.proc)
    assert all(line.isprintable() for line in shown.split("\n")) and shown.count("\\x1b[2J") >= 3
    evaluation.draw(traj, str(tmp_path / "x.png"))
    message = str(env.UserError(f"row {evil}\n: bad"))
    assert message.isprintable() and message == "row a\\x1b[2J\\x07\\r\\u202e\\x9b31m\\n: bad"
    with pytest.raises(env.UserError) as e:
        env.open_image(str(tmp_path / "\x1b[2J.png"))
    assert str(e.value).isprintable()


# ---------------------------------------------------------------------------------------------------------------
# 8. Real runs of torchrun, broken and killed. The worker is at the end of this file.

FLAGS = {"sft": dict(SFT, steps=8, batch=8, save_every=2, log_every=100),
         "rppo": dict(RPPO, steps=8, save_every=2, eval_every=4, show_every=100), "eval": SHORT}


def torchrun(name, ranks, scenes, base, out, fault=None, options=(), **more):
    """Start a stage. Returns the process; its output goes to <out>.txt."""
    flags = [f"--{k}={v}" for k, v in {**FLAGS[name], "data": scenes, "model": base, "out": out, **more}.items()]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options, __file__,
                             name, *flags], stdout=open(f"{out}.txt", "a"), stderr=subprocess.STDOUT, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "FAULT": json.dumps(fault)})


def output(out):
    return open(f"{out}.txt").read()


def finish(process, out, code=0):
    try:
        assert process.wait(timeout=240) == code or code is None, output(out)[-3000:]
    finally:
        kill(process)
    return output(out)


def kill(process):
    """SIGKILL to torchrun and all its workers at once, as when the machine dies."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)
        workers = [int(pid) for task in os.listdir(f"/proc/{process.pid}/task")
                   for pid in open(f"/proc/{process.pid}/task/{task}/children").read().split()]
        for pid in (*workers, process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def whole(scenes, base, tmp_path_factory):
    """whole(stage, ranks): the folder of a run of torchrun that nobody interrupts, made once."""
    done, top = {}, tmp_path_factory.mktemp("whole")

    def get(name, ranks):
        if (name, ranks) not in done:
            done[name, ranks] = out = f"{top}/{name}{ranks}"
            finish(torchrun(name, ranks, scenes, base, out), out)
            assert any(e["grad_norm"] > 0 for e in read_log(out)[-2:])
        return done[name, ranks]
    return get


@SLOW
@pytest.mark.parametrize("i", range(KILLS))
def test_killed_at_any_moment(i, whole, scenes, base, tmp_path):
    """SIGKILL to a whole torchrun at a random moment of its steps and saves, then the same command again: weights, optimizer
    state and log lines are bit for bit those of the run that was left alone. SFT and RPPO, one rank and two, in turn."""
    name, ranks = (("sft", 1), ("rppo", 2), ("rppo", 1), ("sft", 2))[i % 4]
    expected, rng = whole(name, ranks), random.Random(i)
    lines, delay = rng.randrange(FLAGS[name]["steps"] - 1), rng.uniform(0, 0.3)
    for attempt in range(3):
        out = f"{tmp_path}/{attempt}"
        process, log = torchrun(name, ranks, scenes, base, out), f"{out}/log.jsonl"
        while process.poll() is None and not (os.path.exists(log) and open(log).read().count("\n") >= lines):
            time.sleep(0.002)
        time.sleep(delay)
        kill(process)
        if process.returncode == -signal.SIGKILL and len(read_log(out)) < FLAGS[name]["steps"]:
            break
        delay /= 4          # it was too quick for us
    assert process.returncode == -signal.SIGKILL, output(out)[-3000:]
    left = len(read_log(out)), os.listdir(f"{out}/checkpoints") if os.path.exists(f"{out}/checkpoints") else []
    finish(torchrun(name, ranks, scenes, base, out), out)
    print(f"{name}, {ranks} ranks, killed after {left[0]} log lines with checkpoints {left[1]}")
    same(out, expected)


@SLOW
@pytest.mark.parametrize("how, reason", [("kill", "Signal 9 (SIGKILL) received"), ("raise", "RuntimeError: rank 1 has had enough")])
def test_a_rank_that_dies(how, reason, scenes, base, tmp_path):
    """One rank of two dies in its fourth step: the job ends within seconds and says why."""
    out, started = f"{tmp_path}/run", time.time()
    printed = finish(torchrun("rppo", 2, scenes, base, out, dict(how=how, rank=1, call=3)), out, code=1)
    assert reason in printed and re.search(r"local_rank\W+1|rank +: 1", printed)
    steps = [e["step"] for e in read_log(out)]
    assert steps == [0, 1, 2] and time.time() - started < 120 and sft.newest_whole(out) == 2


@SLOW
def test_a_restart_by_torchrun(whole, scenes, base, tmp_path):
    """With --max-restarts=1 a job of which one rank is killed comes back from its checkpoint by itself, to the same bits; also
    one that was told to put an old run aside (--resume=false): it does not put aside what it has just made."""
    out = f"{tmp_path}/run"
    os.makedirs(out)
    printed = finish(torchrun("rppo", 2, scenes, base, out, dict(how="kill", rank=1, call=3), ["--max-restarts=1"], resume=False), out)
    assert printed.count("the old run is now") == 1 and "going on from step 2 of 8" in printed
    same(out, whole("rppo", 2))


@SLOW
def test_a_signal_to_one_worker(whole, scenes, base, tmp_path):
    """SIGTERM to one rank of two: both finish the step, save and leave with exit code 0, so that torchrun succeeds; the same
    command goes on."""
    out = f"{tmp_path}/run"
    printed = finish(torchrun("sft", 2, scenes, base, out, dict(how="term", rank=1, call=2)), out, code=0)
    assert "the same command goes on" in printed and open(f"{out}/last").read() == "3" and "Traceback" not in printed
    finish(torchrun("sft", 2, scenes, base, out), out)
    same(out, whole("sft", 2), files=False)


@SLOW
def test_ctrl_c(whole, scenes, base, tmp_path):
    """Ctrl-C on torchrun, which passes it on to its workers: they save and leave; the same command goes on."""
    out = f"{tmp_path}/run"
    process = torchrun("rppo", 2, scenes, base, out)
    while process.poll() is None and not (os.path.exists(f"{out}/log.jsonl") and read_log(out)):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed = finish(process, out, code=None)
    made = len(read_log(out))
    assert "the same command goes on" in printed and 1 <= made < 8 and open(f"{out}/last").read() == str(made)
    finish(torchrun("rppo", 2, scenes, base, out), out)
    same(out, whole("rppo", 2), files=False)


@SLOW
def test_ranks_skip_alike(scenes, base, tmp_path):
    """NaN on one rank of two: which rank it is makes no difference, so no rank made a step that the other did not."""
    outs = [f"{tmp_path}/{rank}" for rank in (0, 1)]
    for rank, out in enumerate(outs):
        finish(torchrun("rppo", 2, scenes, base, out, dict(how="nan", rank=rank, call=2), steps=4), out)
        assert [e["skipped"] for e in read_log(out)] == [0, 0, 1, 0]
    same(*outs)


@SLOW
@pytest.mark.parametrize("name, first, then", [("sft", 2, 1), ("rppo", 1, 2)])
def test_another_number_of_ranks(name, first, then, whole, scenes, base, tmp_path):
    """Stopped after two steps and gone on with by another number of ranks: every step is made once, and the weights are close
    to those of one rank throughout."""
    out = f"{tmp_path}/run"
    finish(torchrun(name, first, scenes, base, out, dict(how="term", rank=0, call=1)), out)
    finish(torchrun(name, then, scenes, base, out), out)
    log, other = read_log(out), read_log(whole(name, 1))
    assert [e["step"] for e in log] == list(range(8)) and "going on from step 2 of 8" in output(out)
    flat = lambda folder: torch.cat([v.flatten().double() for k, v in sorted(weights(folder).items())])
    start, one, mixed = flat(base), flat(env.newest(whole(name, 1))), flat(env.newest(out))
    assert (mixed - one).norm() < 0.05 * (one - start).norm()
    assert log[1]["tokens"] == other[1]["tokens"] and log[2]["tokens"] == other[2]["tokens"]


@SLOW
def test_a_rank_without_rows(scenes, base, tmp_path):
    """One row evaluated by two ranks: one of them has nothing to add to what the ranks gather."""
    finish(torchrun("eval", 2, scenes, base, f"{tmp_path}/2", limit=1), f"{tmp_path}/2")
    evaluation.main(evaluation.Config(**SHORT, data=scenes, model=base, out=f"{tmp_path}/1", limit=1))
    one, two = ({k: v for k, v in json.loads(open(f"{tmp_path}/{x}/eval.json").read()).items() if k not in ("seconds", "config")} for x in (1, 2))
    assert one == two and one["n"] == 1


def worker(name, *flags):
    """A stage by its command line on the CPU, for a random policy whose gibberish counts as actions; FAULT says how the n-th
    update of one rank goes wrong, before any restart."""
    fault, calls, (stage, real) = json.loads(os.environ.get("FAULT", "null")), itertools.count(), STAGES[name]
    fault = fault and int(os.environ["RANK"]) == fault["rank"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and fault
    update, sync = getattr(stage, "update", None), sft.sync_gradients

    def faulty(*args):
        now = fault and next(calls) == fault["call"] and fault["how"]
        if now == "raise":
            raise RuntimeError("rank 1 has had enough")
        if now in ("kill", "term"):
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[now])
        sft.sync_gradients = sync if now != "nan" else lambda policy, world, sums: sync(policy, world, [math.nan, *sums[1:]])
        return update(*args)
    torch.cuda.is_available, env.parse_action, stage.update, sys.argv[1:] = lambda: False, acting, faulty, flags
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and os.environ["RANK"] == "0":
        time.sleep(2)  # the other rank is first, and must not find the addresses of the ranks that died
    env.run(stage.main, stage.Config, real)


if __name__ == "__main__":
    worker(*sys.argv[1:])
