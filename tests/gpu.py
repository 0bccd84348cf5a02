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
GROUPS = dict(machine="limits attention", tiny="cpu captured rollout_and_update", stages="fsdp job resume ranks",
              decode="decode", bench="benchmark", update="update", lora="decode update", full="full_card",
              rest="photograph tower save")


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
        config, steps = rppo.imitation_config, 100 if self.cuda else 2
        with patch.object(rppo, "imitation_config", lambda cfg: replace(config(cfg), steps=steps)):
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
        self.say("killed after step", int(Path(out, "last").read_text()), 2, 6)
        last = []
        for folder in (out, whole):
            sft.main(replace(env.configure(sft.Config, sft.REAL, command[2:]), out=folder))
            last.append(sft.read_log(folder)[-1]["loss"])
        self.say("last loss, killed / not, less 1", abs(last[0] / last[1] - 1), 0, 0.01 if self.cuda else 0)

    def ranks(self):
        """Imitation sharded over two ranks, where there are two cards, and on one."""
        if self.cuda and torch.cuda.device_count() < 2:
            self.say("two ranks", "one card")
            return
        last = []
        for n in (1, 2):
            out = f"{self.folder}/ranks{n}"
            flags = f"--steps=2 --batch=4 --shard=true --data={self.folder} --model={self.folder}/tiny --out={out}"
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", sft.__file__]
            subprocess.run([*command, *flags.split()], check=True, stdout=sys.stderr, env=OUTSIDE)
            last.append(sft.read_log(out)[-1]["loss"])
        self.say("last loss, two ranks / one, less 1", abs(last[1] / last[0] - 1), 0, 0.01 if self.cuda else 1e-5)

    def true_policy(self, bf16, shape="", **changes):
        """Random weights of a shape (default: the one that is asked for), and the benchmark's settings; the buffers of the
        angles stay fp32."""
        tiny = self.cfg.size == "tiny"
        shape = shape or ("qwen3-vl-4b" if tiny else self.cfg.size)
        cfg = bench.Config(shape=shape, shrink=32 if tiny else 1)
        policy = bench.make_policy(cfg, self.rows, self.device)
        for p in policy.parameters():
            p.data = p.data.to(torch.bfloat16 if bf16 and self.cuda else torch.float32)
        return policy, replace(bench.settings(cfg), **changes)

    def trainable(self, lora):
        """Policy, optimizers and settings as a stage makes them, with LoRA of this rank (0: all weights are trained)."""
        turn = 64 if self.large else 8
        made, cfg = self.true_policy(lora > 0, max_tokens=12_288, turn_tokens=turn, max_crops=1, lora=lora)
        with patch.object(sft, "load_policy", lambda *args, **kwargs: made):
            start = f"{self.folder}/tiny"
            policy, optimizers, _ = sft.load_trainable(cfg, start, 0, self.device, (0.9, 0.95))
        return policy, optimizers, cfg

    def picture(self, side):
        """A row with an image of noise; side: in pixels at a true size."""
        side = side if self.large else max(64, side // 20)
        return {**self.rows[0], "images": [Image.effect_noise([side] * 2, 90).convert("RGB")]}

    def memory(self, name):
        """Of the allocator, in GiB: the peaks since the last call, what it holds by now, and what is left on the card."""
        if not self.cuda:
            return
        self.say(f"{name}: peak allocated, GiB", torch.cuda.max_memory_allocated() / 2 ** 30)
        self.say(f"{name}: peak reserved, GiB", torch.cuda.max_memory_reserved() / 2 ** 30)
        self.say(f"{name}: reserved, GiB", torch.cuda.memory_reserved() / 2 ** 30)
        self.say(f"{name}: free, GiB", torch.cuda.mem_get_info()[0] / 2 ** 30)
        torch.cuda.reset_peak_memory_stats()

    def full_card(self):
        """Two RL steps with LoRA whose rollouts fill the card and refill their slots, prompts of unequal length, then an
        evaluation with one sample a row."""
        policy, optimizers, cfg = self.trainable(lora=16)
        cfg = replace(cfg, in_flight=10 ** 6 if self.large else 3, samples=16 if self.large else 2)
        rows = [self.picture(2048 - 100 * i) for i in range(8 if self.large else 2)]
        if self.cuda:
            rppo.check_memory(policy, 0, cfg)
        for step in range(2):
            started = time.time()
            samples = rppo.collect(policy, rows, range(len(rows)), step, cfg)
            self.say(f"step {step}: {len(samples)} trajectories, s", time.time() - started)
            self.memory(f"step {step}, rollout")
            gap = rppo.update(policy, optimizers, samples, cfg)["log_ratio"]
            self.say(f"step {step}: mean |log-ratio|", gap, 0, 0.02, True)
            self.memory(f"step {step}, update")
            del samples
        with patch.object(evaluation, "record", lambda *args: dict(index=args[0], sample=args[1])):
            found = evaluation.evaluate(policy, rows * 4, replace(cfg, max_crops=0), 0, 1)
        self.say("evaluation with k = 1: answers", len(found), len(rows) * 4, len(rows) * 4)
        self.memory("evaluation")

    def photograph(self):
        """The host's share of an image of 3840 x 2160: opening and shrinking it, a crop, patches."""
        path = f"{self.folder}/photo.jpg"
        Image.effect_noise((3840, 2160), 60).convert("RGB").save(path)
        policy = self.tiny_policy("cpu")
        policy.reuses_features = False
        cfg = replace(EPISODE, **env.REAL_EPISODE)
        action = env.Action("crop", (100.0, 100.0, 600.0, 600.0))

        def cut():
            view = env.crop(action, traj.shown, cfg)
            view.resized(32)
        row = {**self.rows[0], "images": [path]}
        traj = env.start_episode(row, cfg)
        self.say("open an image of 4K, s", self.seconds(lambda: env.start_episode(row, cfg)), 0, 0.5, True)
        self.say("shrink it, s", self.seconds(lambda: traj.shown[0].resized(32)), 0, 0.3, True)
        self.say("crop, s", self.seconds(cut), 0, 0.1, True)
        view = np.asarray(traj.shown[0].resized(32))
        patches = partial(policy.image_processor, images=[view], return_tensors="pt", input_data_format="channels_last")
        self.say("its patches, s", self.seconds(patches), 0, 0.5, True)

    @torch.no_grad()
    def tower(self):
        """Qwen2.5-VL's, whose windows attend each by itself; of the text model a block is enough."""
        shape = "qwen2.5-vl-7b"
        sizes = list(bench.SHAPES[shape])
        sizes[2] = 1
        with patch.dict(bench.SHAPES, {shape: sizes}):
            policy, cfg = self.true_policy(True, shape)
        policy.reuses_features = False
        for name, side in (("an original", 1400), ("a crop", 700)):
            cfg = replace(cfg, max_pixels=side ** 2)
            shown = env.reset(policy.proc, self.picture(side), cfg).shown
            with policy.autocast():
                policy.see(shown)                                # loads libraries
                self.say(f"the tower of {shape}, {name}, s", self.seconds(lambda: policy.see(shown)), 0, 0.5, True)

    def save(self):
        """A checkpoint with LoRA is written and read; what comes back computes the same."""
        policy, optimizers, cfg = self.trainable(lora=16)
        for name, p in policy.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(p, std=1e-3)
        traj = env.reset(policy.proc, self.picture(1024), cfg)
        env.respond(traj, policy.proc, [policy.proc.end] * 8)
        batch = sft.collate([traj], policy.proc)

        cfg = replace(cfg, out=f"{self.folder}/saved")
        started = time.time()
        sft.save_checkpoint(1, policy, optimizers, cfg, "real")
        self.say("save, s", time.time() - started)
        size = sum(path.stat().st_size for path in Path(cfg.out).rglob("*") if path.is_file())
        self.say("size of the checkpoint, GB", size / 1e9)
        started = time.time()
        loaded = sft.load_policy(f"{cfg.out}/checkpoints/1", self.device)
        self.say("load, s", time.time() - started)

        logps = []
        for one in (policy, loaded):
            one.reuses_features = False
            with torch.no_grad(), one.autocast():
                logps.append(one.eval()(batch)[0])
        self.say("log-probabilities, saved and live", (logps[0] - logps[1]).abs().max().item(), 0, 0.05 if self.cuda else 1e-5)

    @torch.no_grad()
    def decode(self):
        """A token of B rows: uncaptured, captured, replayed; with adapters in the group lora."""
        policy, n = self.true_policy(True)[0].eval(), 4096 if self.large else 128
        if self.group == "lora":
            sft.add_lora(policy, 16, 2.0)
            policy.to(self.device)
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
        few = 4 if self.cuda and torch.cuda.get_device_properties(0).total_memory > 100e9 else 2     # the plain side's memory
        small = f"--shape={self.cfg.size} --samples={few} --turns=3 --turn_tokens=128"
        if not self.large:
            small = "--shape=main-job --samples=2 --turns=2"
        flags = f"{small} --prompts=2 --repeats=1 --scaling=false --out={out}".split()
        subprocess.run([sys.executable, bench.__file__, *flags], check=True, stdout=sys.stderr, env=OUTSIDE)
        result = env.read_json(out, {})
        for name, low in dict(rollout_ratio=3, update_ratio=1, update_memory_ratio=1).items():
            self.say(f"{name}, plain / ours", result[name] or 0.0, low, goal=True)

    def update(self):
        """Four trajectories of each length, then a step of 2 prompts x 8 samples; sharded and recomputed."""
        policy, optimizers, cfg = self.trainable(lora=16 * (self.group == "lora"))
        row = self.picture(2048)
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
            # `work` leaves out what is recomputed, a quarter of all: 0.45 of the rate is 0.6 of the card's
            self.say(f"{n} tokens: share of the matrix rate", work / spent / product, 0.27, 1, True)
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
