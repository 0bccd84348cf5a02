"""Qwen3.5: its recurrence in the cache, and what is its own; the rest is tested with the other families.

    python -m pytest tests/test_qwen35.py
"""
import torch
from transformers import AutoTokenizer

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


def test_the_tokenizer_file_is_read_as_it_is(scenes, policy, policy35, rows):
    """The two tiny models cut texts alike. AutoTokenizer would take Qwen3.5's own pre-tokenizer for any of its
    folders, and turns of the tiny tasks would not fit into their budget."""
    auto = AutoTokenizer.from_pretrained(f"{scenes}/tiny3_5")
    longer = 0
    for text in [env.SYSTEM, *rows[0]["turns"]]:
        ids = policy35.proc.encode(text)
        assert ids == policy.proc.encode(text)
        longer += len(auto(text)["input_ids"]) - len(ids)
    assert longer > 0
