"""A run that is interrupted goes on exactly: signals, kills, dead ranks.

    KILLS=5 python -m pytest -m "slow or not slow" tests/test_resume.py

Logs, weights and optimizers are compared bit by bit. The slow tests use two threads: both of one process, or
one for each of torchrun's ranks.
"""
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import by_chance
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector

import data
import env
import rppo
import sft

SLOW = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 20))
FLAGS = {"sft": dict(steps=8, batch=8, micro_batch=8, warmup=1, save_every=2),
         "rppo": dict(steps=8, prompts=2, samples=8, warmup=1, save_every=2, eval_every=4, eval_rows=4,
                      n_score=0)}
FLAGS["lora"] = dict(FLAGS["rppo"], lora=4, lora_lr=1e-3, shard="true")


def log_of(out):
    """The log of a run without times. NaN and Infinity are not JSON."""
    entries = []
    for line in Path(out, "log.jsonl").read_text().splitlines():
        entry = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} in {out}/log.jsonl"))
        entry.update(seconds=0, rollout_s=0, update_s=0)
        entries.append(entry)
    return entries


def tensors_of(out):
    """Every tensor of the newest checkpoint, as bytes."""
    folder = env.newest(str(out))
    tensors = {}
    for path in Path(folder).rglob("*.safetensors"):
        tensors |= load_file(path)
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


def assert_same(a, b):
    """Two runs ended alike, bit by bit."""
    first, second = tensors_of(a), tensors_of(b)
    assert log_of(a) == log_of(b) and first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name]]


@pytest.mark.parametrize("stage, number, tiny, settings", [
    (sft, signal.SIGINT, "tiny3_5", dict(batch=6, turn_tokens=48)),
    (rppo, signal.SIGTERM, "tiny", dict(lora=2, samples=4, eval_rows=2, turn_tokens=4))])
def test_a_signal_saves_and_leaves(stage, number, tiny, settings, scenes, tmp_path, monkeypatch, capsys):
    """In the first step, then in the last: it is finished and saved, exit code 0; the run ends as if left alone."""
    def interrupted(*args, **kwargs):
        if next(calls) in (0, 1):
            signal.raise_signal(number)
        return works(*args, **kwargs)
    monkeypatch.setattr(env, "rewards", by_chance)
    small = dict(FLAGS[stage.__name__] | settings, max_crops=1, steps=2, save_every=9, data=scenes,
                 model=f"{scenes}/{tiny}")
    stage.main(stage.Config(**small, out=f"{tmp_path}/whole"))
    before, works, calls = signal.getsignal(number), sft.optimizer_step, itertools.count()
    monkeypatch.setattr(sft, "optimizer_step", interrupted)
    cfg = stage.Config(**small, out=f"{tmp_path}/run")
    for step in (1, 2):
        with pytest.raises(SystemExit) as error:
            stage.main(cfg)
        assert error.value.code == 0 and signal.getsignal(number) is before
        assert f"the same command goes on from step {step}" in capsys.readouterr().out
        assert Path(cfg.out, "last").read_text() == str(step)
    stage.main(cfg)
    assert log_of(cfg.out)[-1]["grad_norm"] > 0
    assert_same(f"{tmp_path}/whole", cfg.out)


@pytest.fixture(scope="module")
def model(scenes, tmp_path_factory):
    """A policy that crops, errs and answers: it was taught to look anywhere and to guess."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    with open(folder / "sft.jsonl", "w") as file:
        for row in data.load_rows(f"{scenes}/sft.jsonl"):
            turns = [f"<answer>{rng.choice(list(data.COLOURS))}</answer>"]
            for _ in range(rng.integers(3)):
                x, y = data.corner_of(rng.integers(16), 250)
                turns.insert(0, f"<think>Look.</think>\n{data.crop_call(np.array([x, y, x + 250, y + 250]))}")
            print(json.dumps({**row, "turns": turns}), file=file)
    sft.main(sft.Config(data=str(folder), model=f"{scenes}/tiny", out=f"{folder}/run", max_crops=2,
                        turn_tokens=40, steps=40, batch=4, warmup=3))
    return f"{folder}/run"


@pytest.fixture(scope="module")
def start(scenes, model):
    """start(stage, ranks, out): a stage's process, several ranks by torchrun. It prints to OUT.txt."""
    def start(name, ranks, out, *options):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
        command.append(Path(__file__).parents[1] / f"{name.replace('lora', 'rppo')}.py")
        flags = dict(FLAGS[name], data=scenes, model=model, out=out)
        command += [f"--{flag}={value}" for flag, value in flags.items()]
        environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks), "OMP_WAIT_POLICY": "passive"}
        printed = open(f"{out}.txt", "a")
        return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment)
    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """whole(stage, ranks): the folder of a run that nobody interrupts, made once."""
    @functools.cache
    def make(name, ranks):
        out = f"{tmp_path_factory.mktemp('whole')}/run"
        finish(start(name, ranks, out), out)
        assert len(log_of(out)) == 8 and log_of(out)[-1]["grad_norm"] > 0
        return out
    return make


def workers(process):
    """The ids of the ranks that a torchrun started, in the order of the ranks."""
    found = []
    for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
        found += map(int, children.read_text().split())
    return sorted(found)


def kill(process):
    """SIGKILL to it and its ranks at once, as when the machine dies."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        for pid in (*workers(process), process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def finish(process, out, ok=True):
    """Wait for its end. Returns all that was printed for this folder."""
    try:
        code = process.wait(timeout=300)
    finally:
        kill(process)
    printed = Path(f"{out}.txt").read_text()
    assert ok == (code == 0), printed[-3000:]
    return printed


def wait_for_lines(process, out, n):
    """Until the log of a run has n lines, or the run has ended."""
    while process.poll() is None and len(sft.read_log(out)) < n:
        time.sleep(0.002)


@SLOW
@pytest.mark.parametrize("i", range(KILLS))
def test_killed_at_any_moment(i, whole, start, tmp_path):
    """SIGKILL to all processes at a random moment of steps and saves, then the same command again."""
    name, ranks = (("rppo", 1), ("lora", 2), ("sft", 1), ("rppo", 2), ("sft", 2))[i % 5]
    out = f"{tmp_path}/run"
    process = start(name, ranks, out)
    wait_for_lines(process, out, random.Random(i).randrange(6))
    time.sleep(random.Random(i).uniform(0, 0.2))
    kill(process)
    assert process.returncode == -signal.SIGKILL, Path(f"{out}.txt").read_text()[-3000:]
    finish(start(name, ranks, out), out)
    assert_same(out, whole(name, ranks))


@SLOW
@pytest.mark.parametrize("number, options, ok, words", [
    (signal.SIGKILL, (), False, "Signal 9 (SIGKILL)"),
    (signal.SIGKILL, ("--max-restarts=1",), True, "going on from step"),
    (signal.SIGTERM, (), True, "the same command goes on from step")])
def test_one_rank_is_hit(number, options, ok, words, whole, start, tmp_path):
    """Its death ends the job, or restarts it; on SIGTERM all ranks save and leave. The bits are the same."""
    out = f"{tmp_path}/run"
    process = start("rppo", 2, out, *options)
    wait_for_lines(process, out, 3)
    os.kill(workers(process)[1], number)
    assert words in finish(process, out, ok)
    if not options:
        finish(start("rppo", 2, out), out)
    assert_same(out, whole("rppo", 2))


@SLOW
@pytest.mark.parametrize("name, first, then", [("sft", 2, 1), ("rppo", 1, 2)])
def test_another_number_of_ranks(name, first, then, whole, start, model, tmp_path):
    """Every step is made once, and the weights are close to those of one rank throughout."""
    out = f"{tmp_path}/run"
    process = start(name, first, out)
    wait_for_lines(process, out, 3)
    kill(process)
    finish(start(name, then, out), out)
    assert [entry["step"] for entry in log_of(out)] == list(range(8))
    weights = []
    for run in (model, whole(name, 1), out):
        policy = sft.load_policy(env.newest(run), "cpu")
        weights.append(parameters_to_vector(policy.parameters()).detach())
    begin, one, mixed = weights
    assert (mixed - one).norm() < 0.05 * (one - begin).norm()
