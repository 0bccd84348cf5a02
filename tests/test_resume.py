"""A run that is interrupted goes on exactly: kills, signals, dead ranks, steps that are not finite.

    python -m pytest tests/test_resume.py                                   # signals and skipped steps
    KILLS=4 python -m pytest -m slow tests/test_resume.py                   # real runs, killed

Bits are compared: logs without their times, weights, the optimizers' state. The slow tests start the real
command lines with two threads, the default of a machine with two cores.
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
    found = {}
    for file in ("model", "training/optimizer"):
        for name, value in load_file(f"{folder}/{file}.safetensors").items():
            found[f"{file} {name}"] = value.numpy().tobytes()
    return found


def assert_same(a, b):
    """Two runs ended alike, bit by bit."""
    first, second = tensors_of(a), tensors_of(b)
    assert log_of(a) == log_of(b) and first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name]]
    for file in ("last", "best.json"):
        contents = [path.read_text() for path in (Path(a, file), Path(b, file)) if path.exists()]
        assert len(contents) != 1 and len(set(contents)) <= 1


# --- In this process ------------------------------------------------------------------------------------

def by_chance(group, cfg):
    """Rewards that differ from sample to sample, as those of a random policy do not."""
    return [dict(total=zlib.crc32(str(traj.ids).encode()) % 101 / 101) for traj in group]


@pytest.fixture
def config(scenes, tmp_path, monkeypatch):
    """config(stage, folder, **fields): a small run of the random policy."""
    monkeypatch.setattr(env, "rewards", by_chance)

    def make(name, folder, **more):
        small = dict(FLAGS[name], max_crops=1, turn_tokens=5, steps=3, keep=4)
        small.update(data=scenes, model=f"{scenes}/tiny", out=f"{tmp_path}/{folder}")
        return STAGES[name].Config(**{**small, **more})
    return make


def before_call(patch, module, name, number, act):
    """Make the call with this number (0 is the first) of module.name call `act` before."""
    works, calls = getattr(module, name), itertools.count()

    def wrapper(*args, **kwargs):
        if next(calls) == number:
            act()
        return works(*args, **kwargs)
    patch.setattr(module, name, wrapper)


def die():
    raise KeyboardInterrupt


@pytest.mark.parametrize("name, number", [("sft", signal.SIGINT), ("rppo", signal.SIGTERM)])
def test_a_signal_saves_and_leaves(name, number, config, monkeypatch, capsys):
    """In step 1 of 3: the step is finished and saved, exit code 0, a line how to go on; then the run ends as
    one that was left alone. Handlers are as before."""
    stage, before = STAGES[name], signal.getsignal(number)
    whole, cfg = config(name, "whole", save_every=9), config(name, "run", save_every=9)
    stage.main(whole)
    assert log_of(whole.out)[-1]["grad_norm"] > 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        before_call(patch, sft, "optimizer_step", 1, partial(signal.raise_signal, number))
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
    """From nothing; interrupted while it draws, imitates, reinforces and scores; started again each time."""
    monkeypatch.setattr(data, "Config", partial(data.Config, n_sft=10, n_train=9, n_test=4))
    monkeypatch.setattr(sft, "Config", partial(sft.Config, **{**FLAGS["sft"], "steps": 3}))
    whole, cfg = (config("rppo", f"{name}/runs/rppo", model="", data=f"{tmp_path}/{name}/rows", n_score=4)
                  for name in "ab")
    rppo.main(whole)
    interrupt = partial(signal.raise_signal, signal.SIGTERM)
    for module, name, number, act in ((data, "write_rows", 2, die), (data, "save_tiny", 0, die),
                                      (sft, "train_step", 1, interrupt), (rppo, "update", 1, interrupt),
                                      (evaluation, "score", 1, die)):
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as error:
            before_call(patch, module, name, number, act)
            rppo.main(cfg)
        assert getattr(error.value, "code", 0) == 0, name
        assert not Path(tmp_path, "b/runs/summary.json").exists()
    rppo.main(cfg)
    assert_same(whole.out, cfg.out)
    assert_same(f"{tmp_path}/a/runs/sft", f"{tmp_path}/b/runs/sft")
    paths = [Path(tmp_path, name, "runs/eval/rppo/results-sampled-tool_on.jsonl") for name in "ab"]
    answers = [[entry["answer"] for entry in evaluation.read_records(path).values()] for path in paths]
    assert answers[0] == answers[1]


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
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=open(f"{out}.txt", "a"), stderr=subprocess.STDOUT, env=environment)


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
    assert ok is None or (code == 0) == ok, printed[-3000:]
    return printed


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
    expected, rng = whole(name, ranks), random.Random(i)
    lines, delay = rng.randrange(6), rng.uniform(0, 0.2)
    out = f"{tmp_path}/run"
    process = start(name, ranks, scenes, model, out)
    wait_for_lines(process, out, lines)
    time.sleep(delay)
    kill(process)
    assert process.returncode == -signal.SIGKILL, Path(f"{out}.txt").read_text()[-3000:]
    finish(start(name, ranks, scenes, model, out), out)
    assert_same(out, expected)


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
@pytest.mark.parametrize("name, number, to", [
    ("rppo", signal.SIGINT, "launcher"), ("sft", signal.SIGTERM, "rank")])
def test_a_signal_to_two_ranks(name, number, to, whole, scenes, model, tmp_path):
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
    os.kill(process.pid if to == "launcher" else ranks[1], number)
    printed = finish(process, out, ok=None if to == "launcher" else True)
    steps = len(log_of(out))
    assert 1 <= steps < 8 and f"the same command goes on from step {steps}" in printed
    finish(start(name, 2, scenes, model, out), out)
    assert_same(out, whole(name, 2))


@SLOW
@pytest.mark.parametrize("name, first, then", [("sft", 2, 1), ("rppo", 1, 2)])
def test_another_number_of_ranks(name, first, then, whole, scenes, model, tmp_path):
    """A killed run goes on with other ranks: every step is made once, the weights are close to one rank's."""
    out = f"{tmp_path}/run"
    process = start(name, first, scenes, model, out)
    wait_for_lines(process, out, 3)
    kill(process)
    finish(start(name, then, scenes, model, out), out)
    assert [entry["step"] for entry in log_of(out)] == list(range(8))
    weights = []
    for folder in (model, whole(name, 1), out):
        tensors = load_file(f"{sft.newest(folder)}/model.safetensors")
        weights.append(np.concatenate([tensors[key].flatten().numpy() for key in sorted(tensors)]))
    begin, one, mixed = weights
    assert np.linalg.norm(mixed - one) < 0.05 * np.linalg.norm(one - begin)
