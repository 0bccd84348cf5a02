"""Do the README's commands for real models fit? Their allocations, replayed by the rules of torch's CUDA allocator
(allocator.py): weights, two RL steps with prompts of unequal length, an evaluation with one sample a row.

The sizes are those of the published configurations; what is alive together follows sft.py, eval.py and rppo.py.
"""
import functools
from contextlib import contextmanager
from types import SimpleNamespace

import bench
import numpy as np
import pytest
import torch
from allocator import MB, Allocator, OutOfMemory
from transformers import AutoModelForImageTextToText

import env
import eval as evaluation
import rppo

CONTEXT = 0.6e9                          # bytes of a card that CUDA and NCCL take themselves
REPEATS = 2                              # blocks whose passing tensors are replayed; others take the same places
CARDS = {"80 GB": 84.7e9, "24 GB": 24.4e9}


@functools.cache
def config_of(shape):
    """The transformers configuration of a published model."""
    ids = SimpleNamespace(convert_tokens_to_ids=lambda token: 1)
    return bench.make_config(bench.Config(shape=shape), ids)


@functools.cache
def parameters(shape):
    """Numbers of parameters: of each matrix of each text block, of embeddings and head, of the tower; and the sums of the two
    sides of the matrices, to which LoRA's adapters are proportional. The model is made on the meta device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(shape))
    blocks, sides = [], []
    for block in model.model.language_model.layers:
        matrices = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        blocks.append([m.weight.numel() for m in matrices])
        sides += [sum(m.weight.shape) for m in matrices]
    ends = [model.get_input_embeddings().weight.numel()] * (1 if model.config.tie_word_embeddings else 2)
    return blocks, ends, sum(p.numel() for p in model.model.visual.parameters()), sides


class Job:
    """A rank of a run: what it holds on its card, and what comes and goes."""

    def __init__(self, shape, card, lora=0, ranks=1, **settings):
        self.config = config_of(shape)
        self.cfg = rppo.Config(**{**rppo.REAL, **settings})
        self.card = Allocator(card - CONTEXT)
        self.lora = lora
        self.ranks = ranks
        self.layers = self.config.text_config.num_hidden_layers
        self.rng = np.random.default_rng(0)
        self.moments = None              # AdamW's, from the first step on

        # Weights: with LoRA all of them in bf16 and fp32 adapters; else this rank's part of all in fp32.
        blocks, ends, tower, sides = parameters(shape)
        matrices = sum(blocks, []) + ends
        for size in [*matrices, tower]:
            self.card.malloc(2 * size if lora else 4 * size / ranks)
        if lora:
            self.trained = [lora * side for side in sides]
            for size in self.trained:
                self.card.malloc(4 * size)
        else:
            self.trained = [size / ranks for size in matrices]

        # What fp32 weights have copies of in bf16: a block, and all the rest.
        self.block = 0 if lora else max(map(sum, blocks))
        self.rest = 0 if lora else sum(ends) + tower
        self.whole_fp32 = not lora and ranks == 1        # python, not torchrun: so is what goes from block to block

        # Bytes of a token in each of the fp32 tensors of Qwen3.5's linear layers, (heads, 128)
        self.linear = 4 * 128 * getattr(self.config.text_config, "linear_num_value_heads", 0)

    @contextmanager
    def held(self, *sizes):
        """Tensors of so many bytes, while the `with` lasts."""
        blocks = [self.card.malloc(size) for size in sizes]
        yield
        for block in blocks:
            self.card.release(block)

    def pass_by(self, *sizes):
        """Tensors that are alive together for a moment."""
        with self.held(*sizes):
            pass

    def check(self):
        """As rppo.check_memory."""
        needed = rppo.update_bytes(self.config, self.cfg, self.whole_fp32) + 12 * sum(self.trained)
        self.card.empty_cache()
        if needed > 0.9 * self.card.free:
            raise env.UserError("too little memory for an update")

    def prefill(self, rows, n, end):
        """`rows` rows of n tokens over `end` places of the cache: tower, then text."""
        text = self.config.text_config
        vision = self.config.vision_config
        tokens = rows * n
        patches = 4 * tokens
        side = 2 * patches * vision.hidden_size
        with self.held(4 * 1536 * patches, 2 * side):        # pixels, states
            for _ in range(REPEATS):
                self.pass_by(*[side] * 8, *[2 * patches * vision.intermediate_size] * 2)

        width = 4 * tokens * text.hidden_size
        heads = 2 * tokens * text.num_attention_heads * evaluation.head_dim(text)
        mlp = 2 * tokens * text.intermediate_size
        mask = rows * n * end
        with self.held(mask, width, width):
            for _ in range(REPEATS):
                self.pass_by(2 * mask, *[heads] * 5, width, width)
                self.pass_by(*[tokens * self.linear] * 17, width, width)
                self.pass_by(*[mlp] * 4, width, width)

    def rollout(self, wanted):
        """As eval.rollout. Returns the slots; UserError for none."""
        with self.held(*[2 * self.block] * self.layers, 2 * self.rest):
            self.card.empty_cache()
            most = evaluation.slots_in(self.card.free, self.config, self.cfg)
            slots = min(wanted, self.cfg.in_flight, most)
            if not slots:
                raise env.UserError("too little memory for a rollout")

            logits = slots * self.config.text_config.vocab_size
            stores = 2 * self.layers             # of the cache, here of one size
            with self.held(*[slots * evaluation.slot_bytes(self.config, self.cfg) / stores] * stores):
                for _ in range(4):
                    n = int(self.rng.integers(2350, 2450))             # prompts, then observations
                    self.prefill(max(1, min(evaluation.PREFILL // n, slots)), n, n)
                    self.prefill(max(1, min(evaluation.PREFILL // 8000, slots)), 560, 8000)
                    self.pass_by(*[4 * logits] * 5, *[8 * logits] * 2)
        self.card.empty_cache()
        return slots

    def update(self):
        """As rppo.update: trajectories one by one, then AdamW's step."""
        text = self.config.text_config
        with self.held(*[4 * size for size in self.trained]):          # gradients
            for _ in range(3):
                n = int(self.rng.integers(4000, self.cfg.max_tokens))
                width = (4 if self.whole_fp32 else 2) * n * text.hidden_size
                heads = 2 * n * text.num_attention_heads * evaluation.head_dim(text)
                mlp = 2 * n * text.intermediate_size
                with self.held(2 * self.rest, *[width] * (self.layers + 2)):     # inputs of the blocks
                    self.pass_by(*[4 * 2 ** 26] * 8)                   # logits of a part, and their gradients
                    for _ in range(REPEATS):
                        weights = [4 * self.block, 2 * self.block, 4 * self.block]
                        self.pass_by(*weights, *[heads] * 8, *[mlp] * 7, *[width] * 8)
                        self.pass_by(*weights, *[n * self.linear] * 34, *[mlp] * 7, *[width] * 4)

            if not self.moments:
                self.moments = [self.card.malloc(4 * size) for size in 2 * self.trained]
            for size in self.trained:
                self.pass_by(4 * size, 4 * size)

    def run(self, samples):
        """Two steps and an evaluation: the slots of each rollout."""
        self.check()
        slots = []
        for _ in range(2):
            slots.append(self.rollout(samples))
            self.update()
        return [*slots, self.rollout(64)]


@pytest.mark.parametrize("shape, card, lora, ranks", [
    ("qwen3-vl-8b", "80 GB", 16, 1),
    ("qwen3-vl-4b", "24 GB", 16, 1),
    ("qwen3-vl-8b", "80 GB", 0, 8),
    ("qwen3.5-9b", "80 GB", 16, 1),
    ("qwen3.5-9b", "80 GB", 0, 8),
    ("qwen3-vl-4b", "80 GB", 0, 1)])
def test_training_fits(shape, card, lora, ranks):
    """Two RL steps and an evaluation, with several trajectories at a time."""
    slots = Job(shape, CARDS[card], lora=lora, ranks=ranks).run(256 // ranks)
    assert min(slots) >= 4


@pytest.mark.parametrize("shape, card, lora", [
    ("qwen3-vl-8b", "24 GB", 16),
    ("qwen2.5-vl-7b", "24 GB", 16),
    ("qwen3.5-9b", "24 GB", 16),
    ("qwen3.5-4b", "80 GB", 0)])
def test_a_small_card_is_refused(shape, card, lora):
    """One line before the first step, never out of memory midway."""
    with pytest.raises(env.UserError, match="memory for an update"):
        Job(shape, CARDS[card], lora=lora).run(256)


@pytest.mark.parametrize("shape", ["qwen3-vl-2b", "qwen3-vl-8b", "qwen2.5-vl-7b"])
def test_long_trajectories_fit(shape):
    """eval.py --k=32 --max_tokens=32768 on one card: a group is cut."""
    job = Job(shape, CARDS["80 GB"], lora=1, max_tokens=32768)
    assert min(job.rollout(64 * 32) for _ in range(3)) >= 2


@pytest.mark.parametrize("shape", ["qwen3-vl-2b", "qwen2.5-vl-3b", "qwen3.5-0.8b", "qwen3.5-9b"])
def test_the_estimate_of_an_update(shape):
    """What is replayed for a trajectory of max_tokens is a little less than the estimate that refuses a run."""
    job = Job(shape, CARDS["80 GB"], lora=16)
    job.rng = SimpleNamespace(integers=lambda low, high: high - 1)
    held = job.card.allocated + 12 * sum(job.trained)            # with gradients and moments
    job.update()
    estimate = rppo.update_bytes(job.config, job.cfg)
    assert 0.9 * estimate < job.card.peak - held < estimate


def test_allocator_rules():
    """Best fit, splitting, and a segment that is partly in use is not given back."""
    card = Allocator(100 * MB)
    first = card.malloc(30 * MB)
    card.release(first)
    part = card.malloc(20 * MB)                      # of the same segment
    assert card.reserved == 30 * MB
    with pytest.raises(OutOfMemory):
        card.malloc(80 * MB)
    card.release(part)
    card.malloc(80 * MB)                             # the whole segment went back
    assert card.reserved == 80 * MB
