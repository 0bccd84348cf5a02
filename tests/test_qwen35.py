"""Qwen3.5: its recurrence in the cache, and what is its own; the rest is tested with the other families.

    python -m pytest tests/test_qwen35.py
"""
import torch
from conftest import stock

import env
import eval as evaluation

close = torch.testing.assert_close


@torch.no_grad()
def test_a_linear_layer_over_the_cache(policy35):
    """Conversations that are fed in ragged pieces, beside padding, copied and begun anew, are computed as whole ones
    are by transformers' own layer: the states hold still when nothing of theirs is fed."""
    layer = policy35.vlm.model.language_model.layers[0].linear_attn
    torch.manual_seed(0)
    x = torch.randn(4, 90, 96)
    x[1, :27] = x[2, :27]                        # until slot 1 is copied from slot 2
    want = type(layer).forward(layer, x)
    cache = evaluation.Cache(policy35, 4, 99)
    done = [0] * 4

    def feed(slots, counts):
        places = torch.full((len(counts), max(counts)), cache.bin)
        new = 9 * torch.randn(len(counts), max(counts), 96)              # padding must not matter
        for i, (slot, n) in enumerate(zip(slots, counts)):
            places[i, :n] = torch.arange(done[slot], done[slot] + n)
            new[i, :n] = x[slot, done[slot]:done[slot] + n]
        in_order = slots == list(range(len(slots)))
        cache.expect(places, 99, slice(len(slots)) if in_order else torch.tensor(slots))
        out = layer(new, cache_params=cache)
        for i, (slot, n) in enumerate(zip(slots, counts)):
            close(out[i, :n], want[slot, done[slot]:done[slot] + n], atol=2e-5, rtol=1e-5)
            done[slot] += n

    feed([2, 0, 3], [20, 7, 1])
    feed([3, 2], [2, 7])
    for store in sum(cache.layers, ()):
        store[1] = store[2]                      # the second sample of a group
    done[1] = 27
    for counts in ([1, 1, 0, 1], [0, 1, 0, 1], [1, 1, 0, 0]):            # decoding: some wait
        feed([0, 1, 2, 3], counts)
    feed([1, 2, 0], [40, 1, 70])                 # observations
    feed([0, 1, 2, 3], [1, 1, 1, 1])
    done[0] = 0                                  # another conversation takes the slot
    feed([0, 3], [5, 3])
    feed([0, 1], [1, 1])


@torch.no_grad()
def test_greedy_turns_are_those_of_generate(policy35, rows):
    """Every turn of a greedy rollout is what transformers' generate adds to the conversation before it."""
    model, proc = stock(policy35), policy35.proc
    cfg = evaluation.RolloutConfig(max_crops=2, turn_tokens=8)
    banned = policy35.banned.nonzero()[:, 0].tolist()
    for traj in evaluation.rollout(policy35, rows[:2], cfg, greedy=True):
        ids = torch.tensor([traj.ids])
        mask = torch.tensor([0, *traj.mask, 0])
        starts, ends = (mask.diff() == 1).nonzero()[:, 0], (mask.diff() == -1).nonzero()[:, 0]
        assert len(starts) == len(traj.turns)
        pixels = policy35.image_processor([shown.view.numpy() for shown in traj.shown], return_tensors="pt",
                                          input_data_format="channels_last")
        for start, end in zip(starts, ends):
            prompt = ids[:, :start]
            kinds = (prompt == proc.image).int()
            n = int(kinds[0].diff().eq(1).sum())                         # images so far
            grid = pixels["image_grid_thw"][:n]
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), mm_token_type_ids=kinds, image_grid_thw=grid,
                pixel_values=pixels["pixel_values"][:grid.prod(1).sum()], do_sample=False,
                max_new_tokens=int(end - start), suppress_tokens=banned, eos_token_id=sorted(proc.ends))
            assert out[0, start:].tolist() == ids[0, start:end].tolist()


def test_the_tokenizer_file_is_read_as_it_is(policy, policy35, rows):
    """The two tiny models cut texts alike. AutoTokenizer of transformers 5.23 takes Qwen3.5's own pre-tokenizer for
    any of its folders, and turns of the tiny tasks would not fit into their budget."""
    for text in [env.SYSTEM, *rows[0]["turns"]]:
        assert policy35.proc.encode(text) == policy.proc.encode(text)
