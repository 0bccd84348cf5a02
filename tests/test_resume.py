"""A run that is interrupted goes on exactly: kills, signals, dead ranks, steps that are not finite.

    python -m pytest tests/test_resume.py                      # signals and skipped steps
    KILLS=4 python -m pytest -m slow tests/test_resume.py      # real runs, killed

Bits are compared: logs (without times), weights, optimizers. The slow tests start the real command lines with
the threads that two cores get by default: two for one process, one for each of torchrun's ranks.
"""
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector

import data
import env
import eval as evaluation
import rppo
import sft

SLOW = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 20))
ROOT = Path(__file__).parent.parent
STAGES = {"sft": sft, "rppo": rppo}
SHORT = dict(max_crops=2, turn_tokens=40)
FLAGS = {"sft": dict(steps=8, batch=8, micro_batch=8, warmup=1, save_every=2),
         "rppo": dict(steps=8, prompts=2, samples=8, warmup=1, save_every=2, eval_every=4, eval_rows=4,
                      n_score=0)}


def log_of(out):
    """The log of a run without times. NaN and Infinity are not JSON."""
    entries = []
    for line in Path(out, "log.jsonl").read_text().splitlines():
        entry = json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} in {out}/log.jsonl"))
        for name in ("seconds", "rollout_s", "update_s"):
            entry.pop(name, None)
        entries.append(entry)
    return entries


def tensors_of(out, step=None):
    """Every tensor of a checkpoint, the newest one by default, as bytes."""
    folder = f"{out}/checkpoints/{step}" if step else sft.newest(str(out))
    tensors = load_file(f"{folder}/model.safetensors") | load_file(f"{folder}/training/optimizer.safetensors")
    return {name: value.numpy().tobytes() for name, value in tensors.items()}


def assert_same(a, b):
    """Two runs ended alike, bit by bit."""
    first, second = tensors_of(a), tensors_of(b)
    assert log_of(a) == log_of(b) and first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name]]
    assert Path(a, "last").read_text() == Path(b, "last").read_text()


@pytest.fixture
def config(scenes, tmp_path, monkeypatch):
    """config(stage, folder, **fields): a small run of the random policy, rewarded by chance."""
    def rewards(group, cfg):
        return [dict(total=zlib.crc32(str(traj.ids).encode()) % 101 / 101) for traj in group]
    monkeypatch.setattr(env, "rewards", rewards)

    def make(name, folder, **more):
        small = dict(FLAGS[name], max_crops=1, turn_tokens=5, steps=3, keep=4)
        small.update(data=scenes, model=f"{scenes}/tiny", out=f"{tmp_path}/{folder}")
        return STAGES[name].Config(**{**small, **more})
    return make


def before_call(patch, module, name, number, signal_number):
    """Raise the signal before the call with this number (0 is the first) of module.name."""
    works, calls = getattr(module, name), itertools.count()

    def wrapper(*args, **kwargs):
        if next(calls) == number:
            signal.raise_signal(signal_number)
        return works(*args, **kwargs)
    patch.setattr(module, name, wrapper)


@pytest.mark.parametrize("name, number", [("sft", signal.SIGINT), ("rppo", signal.SIGTERM)])
def test_a_signal_saves_and_leaves(name, number, config, monkeypatch, capsys):
    """In step 1 of 3: it is finished and saved, exit code 0; gone on with, it ends as if left alone."""
    stage, before = STAGES[name], signal.getsignal(number)
    whole, cfg = config(name, "whole", save_every=9), config(name, "run", save_every=9)
    stage.main(whole)
    assert log_of(whole.out)[-1]["grad_norm"] > 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        before_call(patch, sft, "optimizer_step", 1, number)
        stage.main(cfg)
    assert error.value.code == 0 and signal.getsignal(number) is before
    assert "the same command goes on from step 2" in capsys.readouterr().out
    assert Path(cfg.out, "last").read_text() == "2"
    stage.main(cfg)
    assert_same(whole.out, cfg.out)


@pytest.mark.parametrize("name", ["sft", pytest.param("rppo", marks=SLOW)])
def test_a_step_that_is_not_finite(name, config, monkeypatch):
    """It is counted; neither weights nor optimizers' state change. (On all ranks alike: test_ranks.py.)"""
    cfg, sync, numbers = config(name, "run", save_every=1), sft.sync_gradients, itertools.count()

    def poisoned(policy):
        sync(policy)
        if next(numbers) == 1:
            next(policy.parameters()).grad.fill_(math.inf)
    monkeypatch.setattr(sft, "sync_gradients", poisoned)
    STAGES[name].main(cfg)
    first, second, third = [tensors_of(cfg.out, number) for number in (1, 2, 3)]
    assert first == second != third and [entry["skipped"] for entry in log_of(cfg.out)] == [0, 1, 0]


@SLOW
def test_the_main_job_interrupted_in_every_stage(tmp_path, monkeypatch, config):
    """While it draws, imitates, reinforces and scores; each time the same command goes on."""
    monkeypatch.setattr(data, "Config", partial(data.Config, n_sft=10, n_train=9, n_test=4))
    monkeypatch.setattr(sft, "Config", partial(sft.Config, **{**FLAGS["sft"], "steps": 3}))
    whole, cfg = (config("rppo", f"{name}/runs/rppo", model="", data=f"{tmp_path}/{name}/rows", n_score=4)
                  for name in "ab")
    rppo.main(whole)
    for module, name, number in ((data, "write_rows", 2), (data, "save_tiny", 0), (sft, "train_step", 1),
                                 (rppo, "update", 1), (evaluation, "score", 1)):
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as error:
            before_call(patch, module, name, number, signal.SIGINT)
            rppo.main(cfg)
        assert error.type is (SystemExit if module in (sft, rppo) else KeyboardInterrupt)
    rppo.main(cfg)
    for name in ("sft", "rppo"):
        assert_same(f"{tmp_path}/a/runs/{name}", f"{tmp_path}/b/runs/{name}")
    scores = [json.loads(Path(tmp_path, name, "runs/summary.json").read_text()) for name in "ab"]
    assert scores[0]["rppo"]["greedy"] == scores[1]["rppo"]["greedy"]


# --- The real command lines -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(scenes, tmp_path_factory):
    """A policy that crops, errs and answers: it was taught to look anywhere and to guess."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    lines = []
    for row in env.load_rows(f"{scenes}/sft.jsonl"):
        turns = [f"<answer>{rng.choice(list(data.COLOURS))}</answer>"]
        for _ in range(rng.integers(3)):
            x, y = data.corner_of(rng.integers(16), 250)
            turns.insert(0, f"<think>Look.</think>\n{data.look(np.array([x, y, x + 250, y + 250]))}")
        lines.append(json.dumps({**row, "turns": turns}) + "\n")
    (folder / "sft.jsonl").write_text("".join(lines))
    sft.main(sft.Config(**SHORT, data=str(folder), model=f"{scenes}/tiny", out=f"{folder}/run", steps=40,
                        batch=4, warmup=3))
    return f"{folder}/run"


def start(name, ranks, scenes, model, out, *options):
    """Start a stage, several ranks by torchrun. Its output goes to OUT.txt."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    command += [f"{ROOT}/{name}.py", f"--data={scenes}", f"--model={model}", f"--out={out}"]
    command += [f"--{flag}={value}" for flag, value in FLAGS[name].items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // ranks), "OMP_WAIT_POLICY": "passive"}
    printed = open(f"{out}.txt", "a")
    return subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment)


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
    assert ok in (None, code == 0), Path(f"{out}.txt").read_text()[-3000:]
    return Path(f"{out}.txt").read_text()


def wait_for_lines(process, out, n):
    """Until the log of a run has n lines, or the run has ended."""
    log = Path(out, "log.jsonl")
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= n):
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(scenes, model, tmp_path_factory):
    """whole(stage, ranks): the folder of a run that nobody interrupts, made once."""
    done, top = {}, tmp_path_factory.mktemp("whole")

    def make(name, ranks):
        if (name, ranks) not in done:
            done[name, ranks] = out = f"{top}/{name}{ranks}"
            finish(start(name, ranks, scenes, model, out), out)
            assert len(log_of(out)) == 8 and log_of(out)[-1]["grad_norm"] > 0
        return done[name, ranks]
    return make


@SLOW
@pytest.mark.parametrize("name, ranks", [("sft", 1), ("rppo", 1)])
def test_two_threads_are_exact(name, ranks, whole, scenes, model, tmp_path):
    """Two runs that nobody interrupts, with two threads each, end with the same bits."""
    out = f"{tmp_path}/run"
    finish(start(name, ranks, scenes, model, out), out)
    assert_same(out, whole(name, ranks))


@SLOW
@pytest.mark.parametrize("i", range(KILLS))
def test_killed_at_any_moment(i, whole, scenes, model, tmp_path):
    """SIGKILL to all processes at a random moment of steps and saves, then the same command again."""
    name, ranks = (("sft", 1), ("rppo", 2), ("rppo", 1), ("sft", 2))[i % 4]
    out = f"{tmp_path}/run"
    process = start(name, ranks, scenes, model, out)
    wait_for_lines(process, out, random.Random(i).randrange(6))
    time.sleep(random.Random(i).uniform(0, 0.2))
    kill(process)
    assert process.returncode == -signal.SIGKILL, Path(f"{out}.txt").read_text()[-3000:]
    finish(start(name, ranks, scenes, model, out), out)
    assert_same(out, whole(name, ranks))


@SLOW
def test_a_rank_that_dies(whole, scenes, model, tmp_path):
    """The job ends and says why; with --max-restarts it comes back by itself, to the same bits."""
    for options, ok in (((), False), (("--max-restarts=1",), True)):
        out = f"{tmp_path}/run{len(options)}"
        process = start("rppo", 2, scenes, model, out, *options)
        wait_for_lines(process, out, 3)
        os.kill(workers(process)[1], signal.SIGKILL)
        printed = finish(process, out, ok)
        assert ok or "Signal 9 (SIGKILL)" in printed
    assert "going on from step" in printed
    assert_same(out, whole("rppo", 2))


@SLOW
@pytest.mark.parametrize("name, number", [("rppo", signal.SIGINT), ("sft", signal.SIGTERM)])
def test_a_signal_to_two_ranks(name, number, whole, scenes, model, tmp_path):
    """Ctrl-C on torchrun, or SIGTERM to one rank: both ranks save and leave. A second start is refused."""
    out = f"{tmp_path}/run"
    process = start(name, 2, scenes, model, out)
    wait_for_lines(process, out, 1)
    ranks = workers(process)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    printed = finish(start(name, 1, scenes, model, out), out, ok=False)
    assert re.search(r"run is in use by process \d+ on .*--out", printed) and "Traceback" not in printed
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    os.kill(process.pid if name == "rppo" else ranks[1], number)       # torchrun passes it on
    printed = finish(process, out, ok=None if name == "rppo" else True)
    steps = len(log_of(out))
    assert 1 <= steps < 8 and f"the same command goes on from step {steps}" in printed
    finish(start(name, 2, scenes, model, out), out)
    assert_same(out, whole(name, 2))


@SLOW
@pytest.mark.parametrize("name, first, then", [("sft", 2, 1), ("rppo", 1, 2)])
def test_another_number_of_ranks(name, first, then, whole, scenes, model, tmp_path):
    """Every step is made once, and the weights are close to those of one rank throughout."""
    out = f"{tmp_path}/run"
    process = start(name, first, scenes, model, out)
    wait_for_lines(process, out, 3)
    kill(process)
    finish(start(name, then, scenes, model, out), out)
    assert [entry["step"] for entry in log_of(out)] == list(range(8))
    runs = [sft.load_policy(sft.newest(run), "cpu") for run in (model, whole(name, 1), out)]
    begin, one, mixed = [parameters_to_vector(policy.parameters()).detach() for policy in runs]
    assert (mixed - one).norm() < 0.05 * (one - begin).norm()
