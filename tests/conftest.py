"""Fixtures of all tests: a few built-in scenes, and tiny random policies, one of each model family."""
import copy
import http.server
import json
import os
import re
import sys
import threading
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import env  # noqa: E402, before torch: see there
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import data  # noqa: E402
import sft  # noqa: E402

torch.set_num_threads(1)   # the models are tiny: on busy cores a second thread makes the tests several times slower


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: left out unless -m names it; all run with -m "slow or not slow"')
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder as data.py leaves it: {sft,train,test}.jsonl with images, and the random model tiny/."""
    folder = str(tmp_path_factory.mktemp("scenes"))
    data.main(data.Config(seed=0, out=folder, n_sft=40, n_train=24, n_test=8))
    sft.save_tiny(folder, 0)
    sft.save_tiny(folder, 0, "tiny3_5")
    return folder


@pytest.fixture(scope="session")
def rows(scenes):
    """The cold-start rows of the scenes."""
    return data.load_rows(f"{scenes}/sft.jsonl")


@pytest.fixture(scope="session")
def policy(scenes):
    """The tiny Qwen3-VL, untrained. Shared: a test that trains loads its own."""
    return sft.load_policy(f"{scenes}/tiny", "cpu").eval()


@pytest.fixture(scope="session")
def policy35(scenes):
    """The tiny Qwen3.5, amplified: two linear layers, whose keys have fewer heads than their values, and two full ones.
    Shared, as `policy` is."""
    policy = sft.load_policy(f"{scenes}/tiny3_5", "cpu").eval()
    amplify(policy.vlm, factor=4.0)
    return policy


@pytest.fixture(scope="session")
def policy25(policy):
    """A tiny random Qwen2.5-VL: patches of 14, window attention, grouped queries, a head of its own, and more rows in
    the head than the tokenizer has ids (as the real ones have). Same tokenizer as `policy`. Shared, as that is."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    tokenizer = policy.proc.tokenizer
    ids = {}
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}|>" if "vision" in name else f"<|{name}_pad|>"
        ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(token)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    text = dict(vocab_size=len(tokenizer) + 8, hidden_size=96, intermediate_size=192, num_hidden_layers=3,
                num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=False,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, rope_parameters=rope)
    vision = dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=14, spatial_merge_size=2,
                  temporal_patch_size=2, out_hidden_size=96, window_size=56, fullatt_block_indexes=[1])
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return sft.make_policy(amplify(Qwen2_5_VLForConditionalGeneration(config)), tokenizer).eval()


@torch.no_grad()
def amplify(vlm, factor=8.0):
    """Enlarge the initial weights, and make those of norms differ: logits of order 1 to 10, on which a wrong position,
    mask or image shows."""
    for p in vlm.parameters():     # tied weights are listed once
        if p.ndim > 1:
            p.mul_(factor)
        else:
            p.add_(torch.linspace(-0.3, 0.3, len(p)))
    return vlm


@contextmanager
def serving(script):
    """Yields the address of an endpoint that says script(body): a text, a choice (dict), an HTTP status, or status,
    headers and pieces of text."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            reply = script(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if isinstance(reply, str):
                reply = {"message": {"role": "assistant", "content": reply}}
            if isinstance(reply, dict):
                reply = 200, {}, [json.dumps({"choices": [reply]})]
            if self.headers["Authorization"] != "Bearer " + os.environ.get("OPENAI_API_KEY", "none"):
                reply = 401
            status, headers, pieces = (reply, {}, "") if isinstance(reply, int) else reply
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            with suppress(OSError):           # when nobody listens any more
                for piece in pieces:
                    self.wfile.write(piece.encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture(scope="session", params=["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def any_policy(request, policy, policy25, policy35):
    """A policy of each family, amplified. Shared."""
    if request.param == "qwen2_5_vl":
        return policy25
    if request.param == "qwen3_5":
        return policy35
    amplified = copy.deepcopy(policy)
    amplify(amplified.vlm)
    return amplified


@pytest.fixture
def family(any_policy):
    """A policy of each family that a test may change."""
    return copy.deepcopy(any_policy)


def stock(policy):
    """transformers' own model with the policy's weights."""
    model = type(policy.vlm)(policy.vlm.config)
    model.load_state_dict(policy.vlm.state_dict())
    return model.eval()


def plain(model, policy, traj, temperature=1.0):
    """Log-probabilities (T-1, V) of one whole trajectory, without banned ids."""
    vision = model.config.vision_config
    row = sft.FAMILIES[model.config.model_type]
    patches = Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size,
                                       image_mean=row.mean, image_std=row.std, do_resize=False)
    views = [Image.fromarray(shown.view.numpy()) for shown in traj.shown]
    pixels = patches(views, return_tensors="pt")
    ids = torch.tensor([traj.ids])
    kinds = (ids == policy.proc.image).int()
    out = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **pixels)
    logits = out.logits[0, :-1] / temperature
    return logits.masked_fill(policy.banned, -torch.inf).log_softmax(-1)


def by_chance(group, cfg):
    """Rewards that differ from sample to sample, as those of gibberish do not."""
    return [dict(total=zlib.crc32(str(traj.ids).encode()) % 101 / 101) for traj in group]


def whole(tensor):
    """A copy of a tensor, gathered if it is sharded. All ranks must reach this."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def crop(*bbox, img_idx=0):
    """The text of a crop call."""
    arguments = {"bbox_2d": bbox, "img_idx": img_idx}
    return f"<tool_call>\n{json.dumps({'name': 'image_zoom_in_tool', 'arguments': arguments})}\n</tool_call>"


def traj_of(answer, crops, boxes=((10, 10, 20, 20),), errors=(), size=(100, 100)):
    """A finished trajectory on a black image. errors: (text, key of ERRORS) of its refused turns."""
    image = Image.new("RGB", size)
    shown = [env.Shown(image, (0, 0, *size), 1024, 4096)]
    for box in crops:
        shown.append(env.Shown(image, box, 1024, 4096, tool="crop"))
    turns = [env.Turn(text, None, error) for text, error in errors]
    row = {"solution": "red", "boxes": list(boxes)}
    return env.Trajectory(row, shown, turns, answer=answer, status="answered" if answer else "over_turns")


def picture(seed=0, size=(40, 30)):
    return Image.new("RGB", size, (20 * seed, 90, 160))


def refusal(function, *args, **settings):
    """The message of the UserError that a call ends with: one line."""
    with pytest.raises(env.UserError) as e:
        function(*args, **settings)
    assert "\n" not in str(e.value)
    return str(e.value)


def refused(words, function, *args, **settings):
    """The call ends with a UserError in whose line `words` are found."""
    said = refusal(function, *args, **settings)
    assert re.search(words, said), said
