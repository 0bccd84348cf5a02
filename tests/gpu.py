"""The first ten minutes on a card: is the CUDA path right, how fast is it, what memory does it take?

    python tests/gpu.py                        # Qwen3-VL-4B's shape with random weights, on one large card
    python tests/gpu.py --size=tiny            # the script itself, on the CPU

A line a number: value, what is expected, verdict: ok, LOOK (outside of it) or failed (with the error). A
"goal" is an expectation that nobody has measured, as yet all of them on CUDA; speed and memory are held to it
at a true size alone. On CUDA a group of checks has its own process: an error there spoils what comes after.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import env  # noqa: E402, before torch: see there
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import bench  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import rppo  # noqa: E402
import sft  # noqa: E402
from conftest import amplify  # noqa: E402

OUTSIDE = dict(os.environ)           # of a process that is not the one rank which this one becomes
EPISODE = evaluation.RolloutConfig(max_crops=1, turn_tokens=12)
SCREEN = sys.stdout                  # for lines; what the stages print goes to stderr
GROUPS = dict(machine="limits attention", tiny="cpu captured rollout_and_update", stages="fsdp job resume",
              decode="decode", bench="benchmark", update="update", lora="update")


@dataclass
class Config:
    """The checks."""
    size: str = "qwen3-vl-4b"        # a shape of bench.py; tiny: a shrunk one
    only: str = ""                   # GROUP,GROUP
    out: str = "gpu.json"
    folder: str = ""                 # of a group's own process: what all groups share
    seed: int = 0


def write(folder, group, name, value, expected, verdict):
    """A line on the screen, and one in the file from which gpu.json is made."""
    text = f"{value:.5g}" if isinstance(value, (int, float)) else str(value)
    print(f"{group:8} {name:52} {text:>12}   {expected:16} {verdict}", file=SCREEN, flush=True)
    with open(f"{folder}/numbers.jsonl", "a") as file:
        entry = dict(group=group, name=name, value=value, expected=expected, verdict=verdict)
        print(json.dumps(entry), file=file)


class Checks:
    """The checks of a group, in this process, which is the only rank."""
    def __init__(self, cfg, group):
        self.cfg, self.group, self.folder = cfg, group, cfg.folder
        self.device = sft.setup()[2]
        self.cuda = self.device.type == "cuda"
        self.large = self.cuda and cfg.size != "tiny"
        self.rows = data.load_rows(f"{cfg.folder}/sft.jsonl")

    def say(self, name, value, low=None, high=np.inf, goal=False):
        """A number or a text, and if it lies where it should."""
        expected = verdict = ""
        if low is not None:
            expected = f"{low:.3g} .. {high:.3g}" + " goal" * (goal or self.cuda)
            verdict = "ok" if low <= value <= high or goal and not self.large else "LOOK"
        write(self.folder, self.group, name, value, expected, verdict)

    def seconds(self, f, repeats=1):
        return bench.by_turns(repeats, self.device, f)[0]

    def run(self):
        """Each in a try. Rewards are by chance: a random policy would have none, and no gradient."""
        def rewards(group, cfg):
            return [dict(total=sum(traj.ids) % 101 / 101) for traj in group]
        for name in GROUPS[self.group].split():
            try:
                with patch.object(env, "rewards", rewards), redirect_stdout(sys.stderr):
                    getattr(self, name)()
            except (Exception, env.UserError) as e:
                traceback.print_exc()
                write(self.folder, self.group, name, f"{type(e).__name__}: {e}"[:300], "", "failed")

    def limits(self):
        self.say("torch, transformers", f"{torch.__version__}, {bench.transformers.__version__}")
        if self.cuda:
            card = torch.cuda.get_device_properties(self.device)
            versions = torch.backends.cudnn.version(), torch.cuda.nccl.version()
            self.say("card, cudnn, nccl", f"{card} {versions}")
        copied, product = bench.limits(self.device)
        self.say("copy, read and written, TB/s", copied / 1e12, 1.3, goal=True)
        self.say("matrix product, TFLOP/s", product / 1e12, 250, goal=True)

    def attention(self):
        """Forward and backward at a new length and again; with cuDNN (sft.setup turns it off) to compare."""
        def once():
            q = torch.randn(1, 32, n, 128, device=self.device, dtype=torch.bfloat16, requires_grad=True)
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        for cudnn, most in ((True, np.inf), (False, 0.02)):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for n in (2501, 2603, 2707) if self.large else (61, 63):    # the first loads libraries
                new, again = self.seconds(once), self.seconds(once)
            self.say(f"attention, cuDNN {cudnn}: a new length costs, s", new - again, -1, most, True)

    def tiny_policy(self, device):
        """Enlarged weights, in fp32: logits with preferences."""
        policy = sft.load_policy(f"{self.folder}/tiny", "cpu")
        amplify(policy.vlm)
        return policy.to(device)

    def sample(self, policy, greedy=False):
        return evaluation.rollout(policy, self.rows[:4], EPISODE, 2, greedy=greedy)

    def compare(self, name, a, b, high):
        gaps = [np.abs(np.subtract(x.logp, y.logp)).max() for x, y in zip(a, b) if x.ids == y.ids]
        self.say(f"{name}: share of equal ids", len(gaps) / len(a), 1, 1)
        self.say(f"{name}: log-probabilities", max(gaps), 0, high)

    def cpu(self):
        """The device's greedy tokens are the CPU's, without autocast and with a cache in fp32."""
        def make(cache, *args):
            init(cache, *args)
            cache.layers = [(first.float(), second.float()) for first, second in cache.layers]
        init = evaluation.Cache.__init__
        with patch.object(evaluation.Cache, "__init__", make), \
             patch.object(sft.Policy, "autocast", lambda policy: nullcontext()):
            there = self.sample(self.tiny_policy(self.device), True)
            here = self.sample(self.tiny_policy("cpu"), True)
        self.compare("this device and the CPU, fp32", there, here, 1e-3)

    def captured(self):
        """Captured steps, in several graphs a turn, are the uncaptured ones, bit by bit."""
        policy, held = self.tiny_policy(self.device), []
        with patch.dict(evaluation.STRIDE, cuda=8):
            for _ in range(11 if self.cuda else 2):
                trajs = self.sample(policy)
                held.append(torch.cuda.memory_allocated() / 2 ** 20)
            def uncaptured(f, pool):
                return SimpleNamespace(replay=f, pool=lambda: None)
            with patch.object(evaluation, "capture", uncaptured):
                self.compare("captured and uncaptured", trajs, self.sample(policy), 0)
        self.say("memory growth over ten rollouts, MiB", held[-1] - held[0], -np.inf, 1)

    @contextmanager
    def waits(self, name, high):
        """Where the host waits for the card: how often, and in which lines."""
        mode = torch.cuda.set_sync_debug_mode if self.cuda else str
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mode("warn")
            yield
            mode("default")
        waits = [w for w in caught if "called a synchronizing" in str(w.message)]
        lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)
        self.say(f"waits of {name}", len(waits), 0, high, True)
        self.say(f"waits of {name}, by line", lines.most_common(8))

    def rollout_and_update(self):
        policy = self.tiny_policy(self.device)
        cfg = rppo.Config(max_crops=0, turn_tokens=20, samples=4, micro_batch=4)
        optimizers = [torch.optim.AdamW(policy.parameters(), 0.0)]
        samples = rppo.collect(policy, self.rows[:4], range(4), 0, cfg)    # loads libraries
        with self.waits("a turn", 50):
            samples = rppo.collect(policy, self.rows[:4], range(4), 0, cfg)
        with self.waits("an update in 4 micro-batches", 100):
            gap = rppo.update(policy, optimizers, samples, cfg)["log_ratio"]
        self.say("mean |log-ratio| of update and rollout", gap, 1e-12, 0.02 if self.cuda else 1e-4)

    def stage(self, name, **changes):
        """The log of three steps of rppo.py."""
        given = dict(vars(EPISODE), data=self.folder, steps=3, prompts=2, samples=4, eval_rows=2, **changes)
        rppo.main(rppo.Config(**given, out=f"{self.folder}/{name}"))
        return sft.read_log(f"{self.folder}/{name}")

    def fsdp(self):
        """RPPO sharded over one rank (NCCL or gloo), and not."""
        norms = []
        for shard in (True, False):
            name, model = f"sharded {shard}", f"{self.folder}/tiny"
            log = self.stage(name, shard=shard, recompute=True, model=model, n_score=0)
            norms.append(log[0]["grad_norm"])
            self.say(f"{name}: mean |log-ratio| of the third step", log[2]["log_ratio"], 0, 0.02)
        self.say("norm of the first gradient, sharded / not", norms[0] / norms[1], 0.9, 1.1)

    def job(self):
        """The main job of the tiny task to its end, with fewer steps."""
        train, steps = sft.main, 100 if self.cuda else 2
        with patch.object(sft, "main", lambda cfg: train(replace(cfg, steps=steps))):
            log = self.stage("job/rppo", n_score=2)
        scores = env.read_json(f"{self.folder}/job/summary.json", {})
        self.say("main job: steps of RPPO, scored answers", len(log) + scores["rppo"]["n"], 5, 5)

    def resume(self):
        """A killed run of sft.py that is started again ends as one that was left alone."""
        model, out, whole = [f"{self.folder}/{name}" for name in ("tiny", "killed", "whole")]
        flags = f"--steps=6 --batch=4 --save_every=2 --data={self.folder} --model={model} --out={out}"
        command = [sys.executable, sft.__file__, *flags.split()]
        one_thread = {**OUTSIDE, "OMP_NUM_THREADS": "1"}         # like this process, by conftest.py
        process = subprocess.Popen(command, stdout=sys.stderr, env=one_thread)
        while process.poll() is None and not Path(out, "last").exists():
            time.sleep(0.01)
        process.kill()
        process.wait()
        self.say("killed after step", int(Path(out, "last").read_text()), 2, 4)
        last = []
        for folder in (out, whole):
            sft.main(replace(env.configure(sft.Config, sft.REAL, command[2:]), out=folder))
            last.append(sft.read_log(folder)[-1]["loss"])
        self.say("last loss, killed / not, less 1", abs(last[0] / last[1] - 1), 0, 0.01 if self.cuda else 0)

    def true_policy(self, bf16):
        """Random weights, and the benchmark's settings; the buffers of the angles stay fp32."""
        tiny = self.cfg.size == "tiny"
        cfg = bench.Config(shape="qwen3-vl-4b" if tiny else self.cfg.size, shrink=32 if tiny else 1)
        policy = bench.make_policy(cfg, self.rows, self.device)
        for p in policy.parameters():
            p.data = p.data.to(torch.bfloat16 if bf16 and self.cuda else torch.float32)
        return policy, bench.settings(cfg)

    @torch.no_grad()
    def decode(self):
        """A token of B rows: uncaptured, captured, replayed."""
        policy, n = self.true_policy(True)[0].eval(), 4096 if self.large else 128
        weights = sum(p.nbytes for p in policy.vlm.model.language_model.parameters())
        cfg = evaluation.RolloutConfig(max_tokens=n + 256, turn_tokens=200)
        for B in (16, 64):
            engine = evaluation.Engine(policy, cfg, B, False)
            engine.place += n                                             # a turn begins at place n
            engine.pos += n - 1
            engine.left += 200
            with policy.autocast():
                step = partial(engine.step, B, n + 128)
                eager = self.seconds(step, 5)
                capturing = -bench.clock(self.device)
                replay = evaluation.capture(step, None).replay if self.cuda else step
                capturing += bench.clock(self.device)
                replay = self.seconds(replay, 15)
            cached = sum(store[..., :n + 128, :].nbytes for layer in engine.cache.layers for store in layer)
            read = (weights + cached) / replay / bench.limits(self.device)[0]
            self.say(f"{B} rows: uncaptured, ms", 1e3 * eager)
            self.say(f"{B} rows: capture, ms", 1e3 * capturing, 0, 100, True)
            self.say(f"{B} rows: replay, ms", 1e3 * replay, 0, 1e3 * eager, True)
            self.say(f"{B} rows: share of the copy rate", read, 0.5, 1, True)
        with policy.autocast(), torch.profiler.profile() as found:
            step()
            bench.clock(self.device)
        kernels = [event for event in found.events() if event.device_type.name == "CUDA"]
        self.say("kernels a step", len(kernels), 1, 1500, True)

    def benchmark(self):
        """bench.py at a small size; a difference between its two sides is an error."""
        out = f"{self.folder}/bench.json"
        small = f"--shape={self.cfg.size} --samples=4 --turns=3 --turn_tokens=128"
        if not self.large:
            small = "--shape=main-job --samples=2 --turns=2"
        flags = f"{small} --prompts=2 --repeats=1 --scaling=false --out={out}".split()
        subprocess.run([sys.executable, bench.__file__, *flags], check=True, stdout=sys.stderr, env=OUTSIDE)
        result = env.read_json(out, {})
        for name, low in dict(rollout_ratio=3, update_ratio=1, update_memory_ratio=1).items():
            self.say(f"{name}, plain / ours", result[name] or 0.0, low, goal=True)

    def update(self):
        """Four trajectories of each length, then a step of 2 prompts x 8 samples; sharded and recomputed."""
        made, cfg = self.true_policy(self.group == "lora")
        cfg = replace(cfg, max_tokens=12_288, turn_tokens=64 if self.large else 8, max_crops=1)
        if self.group == "lora":
            cfg.lora = 16
        with patch.object(sft, "load_policy", lambda *args, **kwargs: made):
            start = f"{self.folder}/tiny"
            policy, optimizers, _ = sft.load_trainable(cfg, start, 0, self.device, (0.9, 0.95))
        image = Image.effect_noise([2048 if self.large else 96] * 2, 90).convert("RGB")
        row = {**self.rows[0], "images": [image]}
        product = bench.limits(self.device)[1]
        for n in (2500, 5000, 8000) if self.large else (120, 200):
            traj = env.reset(policy.proc, row, cfg)
            env.respond(traj, policy.proc, [policy.proc.end] * (n - len(traj.ids)))
            with torch.no_grad(), policy.gathered(), policy.autocast():
                policy.see(traj.shown)                           # as a rollout does: the tower is frozen
            samples = [rppo.Sample(traj, {}, advantage) for advantage in (1.0, -1.0, 1.0, -1.0)]
            rppo.update(policy, optimizers, samples[:1], cfg)    # makes states, loads libraries
            spent = self.seconds(lambda: rppo.update(policy, optimizers, samples, cfg))
            _, work = bench.counted(policy, [replace(traj, shown=[])] * 4, SimpleNamespace(turns=[]), 1)
            if self.group == "lora":
                work *= 4 / 6                                    # no gradients of frozen weights
            self.say(f"{n} tokens: share of the matrix rate", work / spent / product, 0.45, 1, True)
            self.say(f"{n} tokens: peak, GiB", torch.cuda.max_memory_allocated() / 2 ** 30, 0, 100, True)
        samples = rppo.collect(policy, [row] * 2, [0, 1], 0, cfg)
        gap = rppo.update(policy, optimizers, samples, cfg)["log_ratio"]
        self.say("a step: mean |log-ratio| of update and rollout", gap, 0, 0.02, True)
        self.say("a step: peak, GiB", torch.cuda.max_memory_allocated() / 2 ** 30, 0, 130, True)


def main(cfg):
    deadline, cuda = time.time() + 600, torch.cuda.is_available()
    if not cuda and cfg.size != "tiny":
        raise env.UserError("there is no CUDA device; --size=tiny tries the script without one")
    if cfg.folder or not cuda:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if cfg.folder:
        return Checks(cfg, cfg.only).run()
    with tempfile.TemporaryDirectory() as cfg.folder:
        with redirect_stdout(sys.stderr):
            data.main(data.Config(out=cfg.folder, n_sft=10, n_train=8, n_test=4))
            sft.save_tiny(cfg.folder, cfg.seed)
        os.remove(f"{cfg.folder}/config.json")   # the main job takes them for a user's own rows
        for group in cfg.only.split(",") if cfg.only else GROUPS:
            if not cuda:
                Checks(cfg, group).run()
                continue
            flags = f"--only={group} --size={cfg.size} --folder={cfg.folder}".split()
            try:
                subprocess.run([sys.executable, __file__, *flags], check=True, timeout=deadline - time.time())
            except subprocess.SubprocessError as e:
                write(cfg.folder, group, "the process", str(e)[-60:], "", "failed")
        numbers = data.read_lines(f"{cfg.folder}/numbers.jsonl")
    env.write_text(cfg.out, json.dumps(numbers, indent=1))
    verdicts = Counter(entry["verdict"] for entry in numbers)
    print(f"{verdicts['ok']} ok, {verdicts['LOOK']} LOOK, {verdicts['failed']} failed; see {cfg.out}")
    if verdicts["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    sft.cli(main, Config, {})
