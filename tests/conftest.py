"""Fixtures of all tests: a very small set of built-in scenes and two tiny random policies, one of each model family."""
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
import env  # noqa: E402
import sft  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: on busy cores a second thread makes the tests several times slower


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: left out unless -m names it; everything runs with -m "slow or not slow"')
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder as data.py leaves it: {sft,train,test}.jsonl and images of 40, 24 and 8 level-0 scenes."""
    folder = str(tmp_path_factory.mktemp("scenes"))
    data.main(data.Config(seed=0, out=folder, n_sft=40, n_train=24, n_test=8))
    return folder


@pytest.fixture(scope="session")
def rows(scenes):
    """The cold-start rows of the scenes."""
    return data.load_rows(os.path.join(scenes, "sft.jsonl"))


@pytest.fixture(scope="session")
def policy(rows):
    """The tiny Qwen3-VL as sft.py makes it, untrained. Shared: a test that trains makes its own."""
    return sft.make_tiny(rows, seed=0).eval()


@pytest.fixture(scope="session")
def policy25(policy):
    """A tiny random Qwen2.5-VL: patches of 14, window attention, grouped queries, a head of its own, more rows in the
    head than the tokenizer has ids (as the real ones have). Same tokenizer as `policy`. Shared, as that is."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    tok = policy.proc.tok
    ids = {f"{k}_token_id": tok.convert_tokens_to_ids(f"<|{n}|>") for k, n in dict(
        image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end").items()}
    vocab = len(tok) + 8
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=vocab, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3,
                         num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=None,
                         eos_token_id=tok.eos_token_id,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])),
        vision_config=dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=14, spatial_merge_size=2,
                           temporal_patch_size=2, out_hidden_size=96, window_size=56, fullatt_block_indexes=[1]),
        tie_word_embeddings=False, **ids)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    vlm = amplify(Qwen2_5_VLForConditionalGeneration(config))
    return env.Policy(vlm, env.Processor(tok, 14, 2, mean, std, vocab)).eval()


@torch.no_grad()
def amplify(vlm, factor=8.0):
    """Enlarge the initial weights: logits of order 1 to 10, on which a wrong position, mask or image shows."""
    seen = set()
    for p in vlm.parameters():  # tied weights are listed once
        if p.ndim > 1 and p.data_ptr() not in seen:
            seen.add(p.data_ptr())
            p.mul_(factor)
    return vlm
