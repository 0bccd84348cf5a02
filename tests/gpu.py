"""The first ten minutes on a card: is the CUDA path right, how fast is it, what memory does it take?

    python tests/gpu.py                        # Qwen3-VL-4B's shape with random weights, on one large card
    python tests/gpu.py --size=tiny            # the script itself, on the CPU
    python tests/gpu.py --only=decode,update --size=qwen3-vl-8b

A line a number: value, what is expected, verdict: ok, LOOK (outside of it) or failed (with the error). A
"goal" is an expectation that nobody has measured; only a true size on CUDA is held to it. On CUDA a group of
checks has its own process, since an error there spoils what comes after it. Writes gpu.json.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import bench  # noqa: E402
import data  # noqa: E402
import env  # noqa: E402
import eval as evaluation  # noqa: E402
import rppo  # noqa: E402
import sft  # noqa: E402
from conftest import amplify  # noqa: E402

OUTSIDE = dict(os.environ)           # of a process that is not the one rank which this one becomes
EPISODE = dict(max_crops=1, turn_tokens=20)
GIB = 2 ** 30
SCREEN = sys.stdout                  # for lines; what the stages print goes to stderr
GROUPS = dict(machine="limits attention", tiny="cpu captured rollout_and_update", stages="fsdp job resume",
              decode="decode", bench="benchmark", update="update", lora="lora")


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
    entry = dict(group=group, name=name, value=value, expected=expected, verdict=verdict)
    with open(f"{folder}/numbers.jsonl", "a") as file:
        print(json.dumps(entry), file=file)


def by_chance(group, cfg):
    """Rewards for a random policy, which would have none, and so no gradient."""
    return [dict(total=sum(traj.ids) % 101 / 101) for traj in group]


class Checks:
    """The checks of a group, in this process, which is the only rank."""

    def __init__(self, cfg, group):
        self.cfg, self.group, self.folder = cfg, group, cfg.folder
        self.device = sft.setup()[2]
        self.cuda = self.device.type == "cuda"
        self.large = self.cuda and cfg.size != "tiny"
        self.rows = env.load_rows(f"{cfg.folder}/sft.jsonl")

    def say(self, name, value, low=None, high=np.inf, goal=False):
        """A number or a text, and if it lies where it should."""
        expected = verdict = ""
        if low is not None:
            expected = f"{low:.3g} .. {high:.3g}" + " goal" * goal
            held = self.large or not goal
            verdict = "LOOK" if held and not low <= value <= high else "ok"
        write(self.folder, self.group, name, value, expected, verdict)

    def seconds(self, f, repeats=1):
        """Median seconds of f."""
        return bench.by_turns(repeats, self.device, f)[0]

    def run(self):
        """All of them. What is wrong with one ends no other."""
        for name in GROUPS[self.group].split():
            try:
                with patch.object(env, "rewards", by_chance), redirect_stdout(sys.stderr):
                    getattr(self, name)()
            except (Exception, env.UserError) as e:
                traceback.print_exc()
                write(self.folder, self.group, name, f"{type(e).__name__}: {e}"[:300], "", "failed")

    # --- The machine ---
    def limits(self):
        self.say("torch, transformers", f"{torch.__version__}, {bench.transformers.__version__}")
        if self.cuda:
            self.say("card", str(torch.cuda.get_device_properties(self.device)))
            self.say("cudnn, nccl", str((torch.backends.cudnn.version(), torch.cuda.nccl.version())))
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
            self.say(f"attention, cuDNN {cudnn}: the same again, s", again)

    # --- The tiny model: 4 prompts x 2 samples ---
    def tiny_policy(self, device):
        """Enlarged weights, in fp32: logits with preferences."""
        policy = sft.load_policy(f"{self.folder}/tiny", "cpu")
        amplify(policy.vlm)
        return policy.to(device)

    def sample(self, policy, greedy=False):
        cfg = evaluation.RolloutConfig(**EPISODE)
        return evaluation.rollout(policy, self.rows[:4], cfg, 2, greedy=greedy)

    def compare(self, name, a, b, high):
        gaps = [np.abs(np.subtract(x.logp, y.logp)).max() for x, y in zip(a, b) if x.ids == y.ids]
        self.say(f"{name}: share of equal ids", len(gaps) / len(a), 1, 1)
        self.say(f"{name}: log-probabilities", max(gaps), 0, high)

    def cpu(self):
        """The device's greedy tokens are the CPU's, without autocast and with a cache in fp32."""
        def make(cache, *args):
            init(cache, *args)
            cache.kv = cache.kv.float()
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
            with patch.object(evaluation, "capture", lambda f, device: f):
                self.compare("captured and uncaptured", trajs, self.sample(policy), 0)
        self.say("memory growth over ten rollouts, MiB", held[-1] - held[0], 0, 1)

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

    # --- Stages ---
    def stage(self, name, **changes):
        """The log of three steps of rppo.py."""
        given = dict(EPISODE, data=self.folder, steps=3, prompts=2, samples=4, eval_rows=2, **changes)
        rppo.main(rppo.Config(**given, out=f"{self.folder}/{name}"))
        return sft.read_log(f"{self.folder}/{name}")

    def fsdp(self):
        """RPPO sharded over one rank (NCCL or gloo), and not."""
        norms = []
        for shard in (True, False):
            name, model = f"sharded {shard}", f"{self.folder}/tiny"
            log = self.stage(name, shard=shard, recompute=True, model=model, n_score=0)
            norms.append(log[0]["grad_norm"])
            self.say(f"{name}: steps", len(log), 3, 3)
            self.say(f"{name}: mean |log-ratio|", log[-1]["log_ratio"], 0, 0.02)
        self.say("norm of the first gradient, sharded / not", norms[0] / norms[1], 0.9, 1.1)

    def job(self):
        """The main job of the tiny task to its end, with fewer steps."""
        train, steps = sft.main, 100 if self.cuda else 2
        with patch.object(sft, "main", lambda cfg: train(replace(cfg, steps=steps))):
            log = self.stage("job/rppo", n_score=2)
        scores = sft.read_json(f"{self.folder}/job/summary.json", {})
        self.say("main job: steps of RPPO, scored answers", len(log) + scores["rppo"]["n"], 5, 5)

    def resume(self):
        """A killed run of sft.py that is started again ends as one that was left alone."""
        out, whole = f"{self.folder}/killed", f"{self.folder}/whole"
        flags = f"--data={self.folder} --model={self.folder}/tiny --out={out} --steps=6 --batch=4 --save_every=2"
        command = [sys.executable, sft.__file__, *flags.split()]
        process = subprocess.Popen(command, stdout=sys.stderr, env=OUTSIDE)
        while process.poll() is None and not Path(out, "last").exists():
            time.sleep(0.01)
        process.kill()
        process.wait()
        self.say("killed after step", int(Path(out, "last").read_text()), 2, 4)
        cfg = sft.configure(sft.Config, sft.REAL, command[2:])
        last = []
        for folder in (out, whole):
            sft.main(replace(cfg, out=folder))
            last.append(sft.read_log(folder)[-1]["loss"])
        self.say("last loss, killed / not, less 1", abs(last[0] / last[1] - 1), 0, 0.01 if self.cuda else 0)

    # --- A true size; on the CPU divided by 32 ---
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
        copied, _ = bench.limits(self.device)
        weights = sum(p.nbytes for p in policy.vlm.model.language_model.parameters())
        traj = env.Trajectory({})
        traj.extend(policy.proc, [policy.proc.end + 1] * n)
        cfg = evaluation.RolloutConfig(max_tokens=n + 256, turn_tokens=200)
        kind = ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU
        for B in (16, 64):
            cache = evaluation.Cache(policy, B, cfg.max_tokens)
            cache.end = n + 128
            hidden = torch.randn(B, policy.vlm.lm_head.in_features, device=self.device)
            u = torch.rand(B, cfg.turn_tokens, device=self.device, dtype=torch.float64)
            with policy.autocast():
                decoder = evaluation.Decoder(policy, cache, hidden, [traj] * B, u, cfg, False)
                choosing = self.seconds(decoder.choose, 3)
                eager = self.seconds(decoder.advance, 5)
                started = bench.clock(self.device)
                graph = evaluation.capture(decoder.advance, self.device)
                capturing = bench.clock(self.device) - started
                replay = self.seconds(graph, 15)
                with profile(activities=[kind]) as found:
                    decoder.advance()
                    bench.clock(self.device)
            read = weights + cache.kv[..., :cache.end, :].nbytes
            kernels = [event for event in found.events() if event.device_type.name == "CUDA"]
            self.say(f"{B} rows: uncaptured, ms", 1e3 * eager)
            self.say(f"{B} rows: capture, ms", 1e3 * capturing, 0, 100, True)
            self.say(f"{B} rows: replay, ms", 1e3 * replay, 0, 1e3 * eager, True)
            self.say(f"{B} rows: choosing, uncaptured, ms", 1e3 * choosing, 0, 300 * replay, True)
            self.say(f"{B} rows: share of the copy rate", read / replay / copied, 0.5, 1, True)
            self.say(f"{B} rows: kernels a step", len(kernels), 1, 1500, True)

    def benchmark(self):
        """bench.py at a small size; a difference between its two sides is an error."""
        out = f"{self.folder}/bench.json"
        small = f"--shape={self.cfg.size} --samples=4 --turns=3 --turn_tokens=128"
        if not self.large:
            small = "--shape=main-job --samples=2 --turns=2"
        flags = f"{small} --prompts=2 --repeats=1 --scaling=false --out={out}".split()
        subprocess.run([sys.executable, bench.__file__, *flags], check=True, stdout=sys.stderr, env=OUTSIDE)
        result = sft.read_json(out, {})
        for name, low in dict(rollout_ratio=3, update_ratio=1, update_memory_ratio=1).items():
            self.say(f"{name}, plain / ours", result[name], low, goal=True)

    def lora(self):
        if hasattr(rppo.Config(), "lora"):
            return self.update(lora=16)
        self.say("LoRA", "not in this version")

    def update(self, **changes):
        """Updates with four trajectories of each length, then a step of 2 prompts x 8 samples, as in the real
        preset: sharded, recomputed. With LoRA the weights are bf16."""
        made, cfg = self.true_policy(bool(changes))
        cfg = replace(cfg, max_tokens=12_288, turn_tokens=64 if self.large else 8, max_crops=1, **changes)
        with patch.object(sft, "load_policy", lambda *args, **kwargs: made):
            policy, _ = sft.load_trainable(cfg, f"{self.folder}/tiny", 0, self.device)
        optimizers = sft.make_optimizers(policy, cfg, (0.9, 0.95))
        side = 2048 if self.large else 96
        row = {**self.rows[0], "images": [Image.effect_noise((side, side), 90).convert("RGB")]}
        _, product = bench.limits(self.device)
        for n in (2500, 5000, 8000) if self.large else (120, 200):
            traj = env.reset(policy.proc, row, cfg)
            env.respond(traj, policy.proc, [policy.proc.end] * (n - len(traj.ids)))
            samples = []
            for advantage in (1.0, -1.0, 1.0, -1.0):
                samples.append(rppo.Sample(replace(traj.fork(), status="answered"), {}, advantage))
            rppo.update(policy, optimizers, samples[:1], cfg)    # makes states, loads libraries
            spent = self.seconds(lambda: rppo.update(policy, optimizers, samples, cfg))
            _, work = bench.counted(policy, [s.traj for s in samples], SimpleNamespace(turns=[]), 1)
            self.say(f"{n} tokens: tokens/s", 4 * n / spent)
            self.say(f"{n} tokens: share of the matrix rate", work / spent / product, 0.45, 1, True)
            self.say(f"{n} tokens: peak so far, GiB", torch.cuda.max_memory_allocated() / GIB, 0, 100, True)
        samples = rppo.collect(policy, [row] * 2, [0, 1], 0, cfg)
        gap = rppo.update(policy, optimizers, samples, cfg)["log_ratio"]
        self.say("a step: mean |log-ratio| of update and rollout", gap, 0, 0.02, True)
        self.say("a step: peak so far, GiB", torch.cuda.max_memory_allocated() / GIB, 0, 130, True)


def main(cfg):
    started, cuda = time.time(), torch.cuda.is_available()
    if not cuda and cfg.size != "tiny":
        raise env.UserError("there is no CUDA device; --size=tiny tries the script without one")
    if cfg.folder or not cuda:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if cfg.folder:
        return Checks(cfg, cfg.only).run()
    with tempfile.TemporaryDirectory() as cfg.folder:
        with redirect_stdout(sys.stderr):
            data.main(data.Config(out=cfg.folder, n_sft=10, n_train=8, n_test=4))
        os.remove(f"{cfg.folder}/config.json")   # the main job takes them for a user's own rows
        for group in cfg.only.split(",") if cfg.only else GROUPS:
            if not cuda:
                Checks(cfg, group).run()
                continue
            flags = [f"--only={group}", f"--size={cfg.size}", f"--folder={cfg.folder}"]
            try:
                left = max(1, 600 - time.time() + started)
                subprocess.run([sys.executable, __file__, *flags], check=True, timeout=left)
            except subprocess.SubprocessError as e:
                write(cfg.folder, group, "the process", str(e)[-60:], "", "failed")
        numbers = env.read_lines(f"{cfg.folder}/numbers.jsonl")
    sft.write_text(cfg.out, json.dumps(numbers, indent=1))
    verdicts = Counter(entry["verdict"] for entry in numbers)
    print(f"{verdicts['ok']} ok, {verdicts['LOOK']} LOOK, {verdicts['failed']} failed; see {cfg.out}")


if __name__ == "__main__":
    sft.cli(main, Config, {})
