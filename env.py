"""env.py, file 1 of 5 (then data.py, sft.py, eval.py, rppo.py): what an episode is.

An episode is a conversation about one high-resolution image, which the policy is shown small. In each turn it
thinks, and then it does one of two things. It calls a tool: a crop is cut from the original pixels and shown
as a new image. Or it answers, and the episode ends. What gives a token or a number its meaning is here, once:
SFT examples, RL rollouts, evaluation and endpoints all read and write by this file.

    EpisodeConfig, RewardConfig    the numbers of the task and of the reward
    iou, redundancy, resolve_box   boxes
    TOOLS                          what can be called, and what is shown then
    call_text, parse_action        the dialect: prompt, calls, answers, observations, chat template
    open_image                     image files
    reset, respond, step, render   an episode, token by token
    match, is_right                is an answer right by the rules?
    rewards, covers                what a trajectory is worth
    read_json, newest, lock        files and folders
    configure, command             the flags of every command

Shapes: T tokens of a trajectory (in the formula of the reward, T is DRIM's number of crops); ids, mask and
logp are (T,), M-RoPE positions (3, T), a view (height, width, 3). Boxes are (x0, y0, x1, y1) in whole pixels
of the original; those in a call are 0 to 1000, relative to the image that the call names. The method is DRIM
(arXiv 2512.17306), from its description; "our choice" marks what is not published.
"""
import argparse
import fcntl
import inspect
import json
import math
import os
import re
import string
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# Before torch loads OpenMP: the tiny model gains little from a second thread, and on busy cores threads that
# wait for one another make a step ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402


def printable(text):
    """A text for a terminal: what would steer it is escaped, also half a surrogate pair."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(SystemExit):
    """A mistake of the user: one line that names the file, row or flag, and the cure.

    As a SystemExit it ends the process with that line and no traceback, and `except Exception` does not catch
    it.
    """

    def __init__(self, message):   # made printable, as it may quote a row's text
        super().__init__(printable(message))


class ToolError(Exception):
    """A mistake of the policy. Its text is a key of ERRORS, which has what the policy reads next."""


def setting(default, **metadata):
    """A config field with `least`, a smallest value of its own (else integers begin at 1, other numbers at 0;
    see `checked`), or with `free=True`: it may change when a run goes on (see `same_settings`). The comment
    behind a field is its text in --help, and the first line of a class's docstring a heading there."""
    return field(default=default, metadata=metadata)


@dataclass
class EpisodeConfig:
    """The episode. The defaults are those of the tiny built-in task."""
    max_crops: int = setting(5, least=0)  # turns before one that may only answer, bad calls count; 0: no tool
    max_pixels: int = 32 * 32        # pixel budget of the original, as the model sees it
    min_crop_pixels: int = 32 * 32   # crops are resized into [min_crop_pixels, max_crop_pixels]
    max_crop_pixels: int = 49 * 49   # a little over 48 x 48, as rows of patches are rounded
    min_crop_side: int = 16          # a smaller box (pixels of the original) is enlarged about its centre
    turn_tokens: int = 48            # most tokens that the policy may sample in one turn, its end included
    max_tokens: int = 512            # most tokens of a whole trajectory, image tokens included


# The episode of published models, the "real" preset: what differs from the defaults, the "tiny" preset.
REAL_EPISODE = dict(max_pixels=2_000_000, min_crop_pixels=65_536, max_crop_pixels=524_288, min_crop_side=28,
                    turn_tokens=1024, max_tokens=12_288)


@dataclass
class RewardConfig:
    """The reward (see `rewards`). None of its numbers is published; these are our choice."""
    lam: float = 1.0                 # weight of the redundancy penalty; 0 is GRPO (see norm_std)
    eps: float = 0.3                 # overlap (IoU) that is free: a clean 2x zoom has 0.25
    tool_bonus: float = 0.0          # DeepEyes' bonus for a right answer with at least one crop
    format_weight: float = 0.0       # subtracted once if a turn was malformed or refused, or none answered


# --- Boxes ----------------------------------------------------------------------------------------------
def is_box(value):
    """Is a value four numbers, none absurd? Also no NaN; Python compares its big integers exactly."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(type(v) in (int, float) and abs(v) <= 1e9 for v in value)


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(a, b):
    """Area that two boxes of one frame have in common."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def iou(a, b):
    """Intersection over union of two boxes in one frame; 0 when they share no area."""
    common = intersection(a, b)
    return common / (area(a) + area(b) - common) if common else 0.0


def redundancy(boxes, eps):
    """Sum over pairs t < t' of max(0, IoU(b_t, b_t') - eps), divided by T^2 (DRIM)."""
    overlap = 0.0
    for i, box in enumerate(boxes):
        for later in boxes[i + 1:]:
            overlap += max(0.0, iou(box, later) - eps)

    return overlap / max(len(boxes), 1) ** 2


def resolve_box(bbox, parent, full_size, min_side):
    """The box that a crop executes, in whole pixels of the original.

    bbox: 0..1000 relative to the parent box, corners in any order. What lies outside the parent is cut off. A
    side under min_side pixels, or under a hundredth of the other, is enlarged about its centre and moved back
    into the original, whose (width, height) is full_size. Raises ToolError("empty") or ToolError("outside").
    """
    # 1. From thousandths of the parent to pixels of the original
    spans = []
    for axis in (0, 1):
        low, high = sorted((bbox[axis], bbox[axis + 2]))
        if low == high:
            raise ToolError("empty")
        low, high = max(low, 0.0), min(high, 1000.0)
        if low >= high:
            raise ToolError("outside")

        origin = parent[axis]
        scale = (parent[axis + 2] - origin) / 1000
        # 1e-6 pixel of slack: 0.7 * 1000 = 700.0000000001 would take in one more row of pixels.
        spans.append((math.floor(origin + low * scale + 1e-6), math.ceil(origin + high * scale - 1e-6)))

    # 2. Not too small, not too thin
    longest = max(high - low for low, high in spans)
    least = max(min_side, math.ceil(longest / 100))
    for axis, (low, high) in enumerate(spans):
        if high - low < least:
            side = min(least, full_size[axis])
            low = math.floor((low + high - side) / 2)
            low = min(max(low, 0), full_size[axis] - side)
            spans[axis] = (low, low + side)

    (x0, x1), (y0, y1) = spans
    return x0, y0, x1, y1


# --- Tools. FORK: a new tool is an entry of TOOLS, the two functions that it names, its errors in ERRORS --
@dataclass(eq=False)                 # each is itself, a key of dicts: trajectories share images
class Shown:
    """One image that the policy was shown: `box` of `frame`, resized into a pixel budget."""
    frame: Image.Image               # full resolution, RGB; crops are cut from it, never from a shrunken view
    box: tuple                       # pixels of the frame; rewards count crops of the original's frame alone
    min_pixels: int
    max_pixels: int
    tool: str | None = None          # the entry of TOOLS that made it; None: an image of the row
    view: torch.Tensor | None = None # uint8 (height, width, 3), what the model saw; see Processor.look
    features: torch.Tensor | None = None         # (tokens, width or more) of a frozen tower; see Policy.see

    def size(self, factor):
        """(width, height) of the view, multiples of `factor` pixels, within the budget."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
        x0, y0, x1, y1 = self.box
        for least in (self.min_pixels, 0):       # rounded up to min_pixels, a small box can exceed max_pixels
            height, width = smart_resize(y1 - y0, x1 - x0, factor, least, self.max_pixels)
            if height * width <= self.max_pixels:
                break

        most = self.max_pixels // factor ** 2 * factor       # a thin box can be too long
        return min(max(width, factor), most), min(max(height, factor), most)

    def resized(self, factor):
        """The region as an RGB image of that size."""
        return self.frame.resize(self.size(factor), Image.BICUBIC, box=self.box, reducing_gap=3.0)


@dataclass
class Action:
    """What one assistant turn asks for."""
    kind: str                        # "answer", a key of TOOLS ("crop"), "none" (no action) or "malformed"
    bbox: tuple | None = None        # 0..1000 relative to image img_idx, as written
    img_idx: int = 0                 # 0 is the original, k the k-th image that a tool made
    answer: str | None = None
    label: str | None = None         # kept, decides nothing
    arguments: dict | None = None    # of another tool, as parsed
    error: str | None = None         # why it is malformed, for logs; the policy reads ERRORS


@dataclass
class Tool:
    schema: dict                     # JSON schema, as in the system prompt
    parse: Callable                  # arguments (dict) -> Action; ValueError says what is wrong with them
    run: Callable                    # (action, images so far, EpisodeConfig) -> Shown; ToolError refuses
    example: dict = field(default_factory=dict)  # arguments, numbers 0; the tiny tokenizer knows such calls


def parse_crop(arguments):
    """The crop that the arguments of a call ask for. Raises ValueError."""
    bbox = arguments.get("bbox_2d")
    if not is_box(bbox):
        raise ValueError("bbox_2d is not four finite numbers")

    index = arguments.get("img_idx", 0)
    if type(index) is not int:
        raise ValueError("img_idx is not an integer")

    label = arguments.get("label")
    return Action("crop", tuple(map(float, bbox)), index, label=label if isinstance(label, str) else None)


def image_of(action, shown):
    """The image that a call is about. ToolError for a number that no image has."""
    if not 0 <= action.img_idx < len(shown):
        raise ToolError("index")
    return shown[action.img_idx]


def crop(action, shown, cfg):
    """Show a box of an image, which may be a crop itself: the pixels are those of its full-resolution frame.
    Raises ToolError."""
    parent = image_of(action, shown)
    box = resolve_box(action.bbox, parent.box, parent.frame.size, cfg.min_crop_side)
    return Shown(parent.frame, box, cfg.min_crop_pixels, cfg.max_crop_pixels, tool="crop")


# Qwen-Agent's image_zoom_in_tool as Qwen3-VL knows it.
CROP_SCHEMA = {"type": "function", "function": {
    "name": "image_zoom_in_tool",
    "description": "Cut a region out of an image at full resolution and look at it.",
    "parameters": {"type": "object", "properties": {
        "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                    "description": "[x1, y1, x2, y2], 0 to 1000, relative to the image img_idx"},
        "img_idx": {"type": "integer", "description": "0 is the original image, k the k-th crop; default 0"},
        "label": {"type": "string", "description": "what is looked for (optional)"}},
        "required": ["bbox_2d"]}}}
CROP_EXAMPLE = {"bbox_2d": [0, 0, 0, 0], "img_idx": 0}
TOOLS = {"crop": Tool(CROP_SCHEMA, parse_crop, crop, CROP_EXAMPLE)}
ERRORS = {   # what the policy reads after a mistake: fixed texts, so that nothing it wrote is echoed
    "none": "Error: no action. Call the tool or answer.",
    "malformed": "Error: the call could not be read.",
    "outside": "Error: the box is outside the image.",
    "empty": "Error: the box is empty.",
    "index": "Error: there is no such image."}


# --- The dialect: how calls, thoughts, answers and observations are written and read. FORK: all here -----
INTRO = "You answer questions about an image, and you can zoom in before you answer."
# The two sentences around the schemas and the call are the ones that stock Qwen models were trained with.
TOOLS_BEFORE = ("\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n")
TOOLS_AFTER = ("\n</tools>\n\nFor each function call, return a json object with function name and arguments "
               "within <tool_call></tool_call> XML tags:\n"
               '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n'
               "Think first, between <think> and </think>. Then do exactly one thing: call one function, or "
               "give a short final answer with <answer>...</answer>.")
SCHEMAS = [json.dumps(tool.schema) for tool in TOOLS.values()]
TOOLS_PROMPT = TOOLS_BEFORE + "\n".join(SCHEMAS) + TOOLS_AFTER
SYSTEM = INTRO + TOOLS_PROMPT
SYSTEM_NO_TOOL = ("You answer questions about an image. Think first, between <think> and </think>. "
                  "Then give a short final answer with <answer>...</answer>.")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# What stands around the parts of a conversation. An observation comes as the user's, in these tags.
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
RESPONSE_BEFORE = "<tool_response>\n"
RESPONSE_AFTER = "\n</tool_response>"
BEFORE_QUESTION = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n" + IMAGE
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"
OBSERVATION = "\n<|im_start|>user\n" + RESPONSE_BEFORE + "{seen}" + RESPONSE_AFTER + AFTER_QUESTION


def call_text(arguments, tool="crop"):
    """The text of a call of a tool (a key of TOOLS), its arguments a dict."""
    call = {"name": TOOLS[tool].schema["function"]["name"], "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def without_thoughts(text):
    """Drop <think>...</think>. An unclosed <think> swallows the rest, a lone </think> what is before it."""
    before, closed, after = text.partition("</think>")
    if closed and "<think>" not in before:
        text = after
    return re.sub(r"(?s)<think>.*?(</think>|\Z)", "", text)


def calls_tool(text):
    """Does a turn try to call a tool, well or badly?"""
    return "<tool_call>" in without_thoughts(text)


def thought_of(text):
    """What a turn says before its action, without tags: for people to read."""
    said = re.split("<tool_call>|<answer>", text)[0]
    return re.sub("</?think>", "", said).strip()


def parse_action(text):
    """Read one assistant turn. Never raises; text outside the action is ignored.

    >>> call = call_text({"bbox_2d": [0, 0, 500, 500]})
    >>> parse_action(f"<think>a</think>{call}").bbox
    (0.0, 0.0, 500.0, 500.0)
    >>> parse_action("<answer> red </answer>").answer, parse_action("red").kind
    ('red', 'none')
    """
    # 1. Exactly one action is asked for.
    text = without_thoughts(text)
    tags = re.findall("<tool_call>|<answer>", text)
    if not tags:
        return Action("none", error="no action")
    if len(tags) > 1:
        return Action("malformed", error="more than one action")

    # 2. It is closed, and not empty.
    [tag] = tags
    body, closed, _ = text.partition(tag)[2].partition(tag.replace("<", "</"))
    body = body.strip()
    if not closed or not body:
        return Action("malformed", error=f"{tag} is empty or not closed")
    if tag == "<answer>":
        return Action("answer", answer=body)

    # 3. A call is JSON that one of the tools understands.
    try:
        return parse_call(json.loads(body))
    except (ValueError, TypeError, LookupError, RecursionError) as e:        # json's are ValueErrors
        return Action("malformed", error=f"{type(e).__name__}: {e}")


def parse_call(call):
    """The action of a call, {"name": ..., "arguments": {...}}. Raises ValueError."""
    name = call.get("name") if isinstance(call, dict) else None
    for kind, tool in TOOLS.items():
        if tool.schema["function"]["name"] == name and isinstance(call.get("arguments"), dict):
            return replace(tool.parse(call["arguments"]), kind=kind)

    raise ValueError("not a call of a tool")


# The chat template of a checkpoint: a server gets the tokens of `reset` and `step`. Beside our own messages
# it takes OpenAI's tool loop. With `tools` it writes our system prompt, whatever keys a server adds to them.
# A reply comes back in pieces: reasoning, content and calls. A parser leaves the line break before a call
# at the end of the content or drops it, so it is written only where it is missing.
# Every tag begins with {%- or {{-, so indentation is not part of the text.
# Servers (vLLM, SGLang) look for the loop over `m.content`: without it they put images before all text.
TEMPLATE_TEXTS = {
    "image": IMAGE,
    "response_before": RESPONSE_BEFORE,
    "response_after": RESPONSE_AFTER,
    "intro": INTRO,
    "tools_prompt": TOOLS_PROMPT,
    "known": [tool.schema["function"]["name"] for tool in TOOLS.values()]}
CHAT_TEMPLATE = ""
for name, value in TEMPLATE_TEXTS.items():   # a server has nothing but the template, so it begins with them
    CHAT_TEMPLATE += "{%- set " + name + " = " + json.dumps(value) + " %}\n"
CHAT_TEMPLATE += r"""
{%- macro parts(m) %}
  {%- if m.content is string %}
    {{- m.content }}
  {%- else %}
    {%- for c in m.content | default([], true) %}
      {{- image if c.image or c.image_url or c.type in ('image', 'image_url') else c.text }}
    {%- endfor %}
  {%- endif %}
{%- endmacro %}

{%- set first = parts(messages[0]) if messages[0].role == 'system' else '' %}
{%- set add_tools = tools and '<tools>' not in first %}
{%- for tool in tools or [] if (tool.function or tool).name not in known %}
  {{- raise_exception('this policy has only the tools ' ~ known) }}
{%- endfor %}
{%- if add_tools %}
  {{- '<|im_start|>system\n' + (first or intro) + tools_prompt + '<|im_end|>\n' }}
{%- endif %}

{%- for m in messages if not (add_tools and m.role == 'system') %}
  {%- set text = parts(m) %}
  {%- set thought = m.reasoning_content or m.reasoning %}
  {%- if m.role == 'tool' %}
    {%- set text = response_before + text + response_after %}
  {%- elif thought %}
    {%- set text = '<think>' + thought + '</think>' + ('' if text[:1] == '\n' else '\n') + text %}
  {%- endif %}
  {{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + text }}
  {%- for call in m.tool_calls or [] %}
    {%- set f = call.function %}
    {%- set arguments = f.arguments if f.arguments is string else f.arguments | tojson %}
    {{- '\n' if not loop.first or text and text[-1] != '\n' }}
    {{- '<tool_call>\n{"name": "' + f.name + '", "arguments": ' + arguments + '}\n</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


# --- Image files ----------------------------------------------------------------------------------------
# Raster formats alone: Pillow goes by content, and would start Ghostscript for a PostScript file photo.jpg.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def to_rgb(image):
    """Any Pillow image as RGB of 8 bits: upright, what is transparent on white, an animation's first frame.

    More than 8 bits are scaled by as many as the brightest pixel needs, since files do not say how many of
    their 16 bits a sensor has (often 12). In an image of floats that are at most 1, 1 is white. Raises
    ValueError.
    """
    image = ImageOps.exif_transpose(image)

    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float64)
        brightest = pixels.max()
        if not 0 <= pixels.min() <= brightest < math.inf:        # also for NaN
            raise ValueError("it has pixels below 0, or that are not finite")

        white = 1 if brightest <= 1 else 2.0 ** max(8, int(brightest).bit_length()) - 1
        image = Image.fromarray((pixels / white * 255).clip(0, 255).astype(np.uint8))

    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))

    return image.convert("RGB")


def open_image(path):
    """An image file as `to_rgb` makes it. UserError names a file that cannot be read, has a side over 100
    times the other or more than 179 megapixels (Pillow's limit for decompression bombs), or is of none of
    IMAGE_FORMATS."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > 100 * min(image.size):
                raise ValueError(f"{image.width}x{image.height} pixels: one side is over 100 times the other")
            return to_rgb(image)
    except Exception as e:                   # a damaged file can make a decoder raise anything
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{path}: not a readable image ({reason}); remove its row or mend the file")


# --- Tokens. The mask is born with the token: 1 if the policy sampled it, 0 if it was given -------------
class Processor:
    """Between text and images on one side and token ids on the other."""

    def __init__(self, tokenizer, factor, ends=()):
        """factor: pixels per side of an image token; ends: ids that end a turn, beside <|im_end|>."""
        self.tokenizer = tokenizer
        self.factor = factor
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.ends = {self.end, *ends}
        self.cache = {}                      # text of the format -> its ids (a list)

    def encode(self, text):
        """Ids of a piece of the format: special tokens are special."""
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self.cache[text]

    def encode_data(self, text, keep=()):
        """Ids of text that is data: a special token written in it stays text, unless it is listed in keep."""
        text = text.encode(errors="replace").decode()        # JSON may hold half a surrogate pair

        # Cut behind its "<", a special token is not recognised.
        added = self.tokenizer.get_added_vocab()
        special = [re.escape(token[1:]) for token in added if token[0] == "<" and token not in keep]
        ids = []
        for piece in re.split("(?<=<)(?=" + "|".join(special) + ")", text):
            ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def grid(self, view):
        """(height, width) of a view in image tokens."""
        return view.shape[0] // self.factor, view.shape[1] // self.factor

    def look(self, shown):
        """The view (height, width, 3) of a Shown: what the model sees. It is made once and kept there, and
        the G samples of a prompt share the original's. UserError for a budget below one image token."""
        if shown.max_pixels < self.factor ** 2:
            raise UserError(f"--max_pixels or --max_crop_pixels: {shown.max_pixels} pixels are less than one "
                            f"image token, {self.factor} x {self.factor}; raise it")
        if shown.view is None:
            shown.view = torch.from_numpy(np.array(shown.resized(self.factor)))
        return shown.view

    def observation(self, seen):
        """Ids of a tool's response, seen: a Shown or an error text. Encoded as one text, as a server does."""
        if isinstance(seen, str):
            return self.encode(OBSERVATION.format(seen=seen))

        return self.expand(self.encode(OBSERVATION.format(seen=IMAGE)), self.look(seen))

    def expand(self, ids, view):
        """Repeat the one image token among ids as often as the view needs it."""
        at = ids.index(self.image)
        return ids[:at] + [self.image] * math.prod(self.grid(view)) + ids[at + 1:]


def mrope(ids, image_id, grid, start):
    """M-RoPE positions (t, h, w) of a run of tokens from position `start` on: int64 (3, len(ids)).

    Text advances the three together. An image of grid = (H, W) tokens at s has t = s, h = s..s+H-1, w =
    s..s+W-1, and the text after it goes on at s + max(H, W) (Qwen2-VL, arXiv 2409.12191). grid None: there is
    no image among ids.
    """
    pos = np.tile(np.arange(start, start + len(ids)), (3, 1))
    if grid is not None:
        at = ids.index(image_id)
        h, w = grid
        y, x = np.divmod(np.arange(h * w), w)
        pos[:, at:at + h * w] = start + at + np.stack([0 * y, y, x])
        pos[:, at + h * w:] += max(h, w) - h * w
    return pos


@dataclass
class Turn:
    """What the assistant wrote in one turn, and what came of it."""
    text: str
    action: Action
    error: str | None = None         # key of ERRORS, if it was malformed or refused
    shown: Shown | None = None       # what its tool showed


@dataclass
class Trajectory:
    """An episode so far. Over HTTP (data.converse) there are no tokens: ids, mask, logp and pos stay
    empty."""
    row: dict
    shown: list = field(default_factory=list)    # Shown: the row's image, then what the tools made
    turns: list = field(default_factory=list)    # Turn
    ids: list = field(default_factory=list)      # (T,) all tokens, image tokens expanded
    mask: list = field(default_factory=list)     # (T,) 1 sampled (the sampled <|im_end|> too), 0 given
    logp: list = field(default_factory=list)     # (T,) as recorded while sampling; 0 where mask is 0
    pos: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.int64))   # (3, T) M-RoPE positions
    answer: str | None = None
    verdict: str | None = None                   # of the judge, where it was asked: right, wrong, failed
    status: str = "open"                         # open, answered, over_turns, over_tokens

    @property
    def crops(self):
        """Boxes of the executed crops of the original, in order. Those of another frame, as a new tool may
        make one, are not comparable: rewards and metrics do not see them."""
        return [s.box for s in self.shown if s.tool == "crop" and s.frame is self.shown[0].frame]

    def place(self, shown):
        """What a record keeps of an image: its box, and the number of the image whose pixels it shows."""
        frames = [other.frame is shown.frame for other in self.shown]
        return {"box": shown.box, "frame": frames.index(True)}

    def fork(self):
        """A copy that goes on by itself: one prompt becomes G samples. Images are shared, lists are not."""
        own = {name: list(value) for name, value in vars(self).items() if isinstance(value, list)}
        return replace(self, **own)

    def extend(self, proc, ids, sampled=False, logp=None, view=None):
        """Append tokens (ids, a list) with their mask, logp (default: zeros) and positions. `view` is the
        image whose tokens are among them, if there is one."""
        start = int(self.pos[0, -1]) + 1 if self.ids else 0       # the last token is always text
        grid = None if view is None else proc.grid(view)
        self.pos = np.concatenate([self.pos, mrope(ids, proc.image, grid, start)], 1)
        self.ids += ids
        self.mask += [int(sampled)] * len(ids)
        self.logp += logp or [0.0] * len(ids)


def start_episode(row, cfg):
    """A new episode without tokens: its image (a path, or a Pillow image) is the first that is shown."""
    image = row["images"][0]                     # FORK: rows with several images begin here
    image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
    box = (0, 0, image.width, image.height)
    # A small original is enlarged as a crop is, unless max_pixels forbids it.
    return Trajectory(row, [Shown(image, box, min(cfg.min_crop_pixels, cfg.max_pixels), cfg.max_pixels)])


def prompt(proc, row, cfg):
    """Ids of system prompt, image (as one token), question, and the header of the first turn."""
    before = BEFORE_QUESTION.format(system=SYSTEM if cfg.max_crops else SYSTEM_NO_TOOL)
    return proc.encode(before) + proc.encode_data(row["problem"]) + proc.encode(AFTER_QUESTION)


def reset(proc, row, cfg):
    """A new episode that has its prompt. UserError for an image that cannot be read, and if the prompt leaves
    no room for an answer."""
    traj = start_episode(row, cfg)
    view = proc.look(traj.shown[0])
    ids = proc.expand(prompt(proc, row, cfg), view)
    if len(ids) + 2 > cfg.max_tokens:            # 2: a token and <|im_end|>
        raise UserError(f"row {row.get('doc_id')}: its prompt of {len(ids)} tokens does not fit; raise "
                        f"--max_tokens={cfg.max_tokens}, lower --max_pixels, or remake tiny/ for new TOOLS")
    traj.extend(proc, ids, view=view)
    return traj


def respond(traj, proc, ids, logp=None):
    """Append the sampled tokens of a turn; returns its text. A turn that does not end with <|im_end|>, as it
    was cut off or ended by another id, gets it as a given token (mask 0)."""
    traj.extend(proc, list(ids), sampled=True, logp=logp)
    if not ids or ids[-1] != proc.end:
        traj.extend(proc, [proc.end])
    return proc.decode([i for i in ids if i not in proc.ends])


def step(traj, text, cfg, proc=None):
    """Act on one assistant turn: end the episode, or run the tool and enter what it shows. With a processor
    the observation is entered as tokens too. One that does not fit into max_tokens is not entered at all,
    neither ids nor image, and the episode ends unanswered."""
    action = parse_action(text)
    turn = Turn(text, action)
    traj.turns.append(turn)

    # 1. An answer ends the episode; the turn after the last tool turn may only answer.
    if action.kind == "answer":
        traj.answer = action.answer
        traj.status = "answered"
        return
    if len(traj.turns) > cfg.max_crops:
        traj.status = "over_turns"
        return

    # 2. The tool runs, or the mistake is what the policy reads.
    seen = None
    try:
        if action.kind not in TOOLS:
            raise ToolError(action.kind)
        seen = TOOLS[action.kind].run(action, traj.shown, cfg)
    except ToolError as e:
        turn.error = str(e)

    # 3. The observation is entered.
    if proc:
        ids = proc.observation(seen or ERRORS[turn.error])
        if len(traj.ids) + len(ids) + 2 > cfg.max_tokens:
            traj.status = "over_tokens"
            return

        traj.extend(proc, ids, view=seen and seen.view)
    if seen:
        turn.shown = seen
        traj.shown.append(seen)


def render(proc, row, turns, cfg):
    """Replay the assistant's turns (texts) through the tools: an SFT example, by the code of a rollout."""
    traj = reset(proc, row, cfg)
    for text in turns:
        if traj.status != "open":
            break
        ids = proc.encode_data(text, keep=TAGS) + [proc.end]
        if len(ids) > cfg.turn_tokens or len(traj.ids) + len(ids) > cfg.max_tokens:
            traj.status = "over_tokens"          # a rollout could not sample it
            break

        respond(traj, proc, ids)
        step(traj, text, cfg, proc)
    return traj


# --- Is an answer right by the rules? They know a letter, the words, a number; the rest is the judge's ---
# LaTeX's box, and what people say before an answer: "So, the correct answer is:", "it's", "故选", "答案是"
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore),? )?"
    r"(?:(?:(?:it is|it's|(?:the )?(?:correct |best |right |final )?"
    r"(?:answer|(?:option|choice)(?= is\b|:| \W*[A-Z]\b))(?: is)?)\b"
    r"|故?选[择项]?|(?:正确)?答案[是为]?):? ?)+(?=.)", re.IGNORECASE)
UNITS = "$€£%"
OUTER = " .,;:!?\"'`*()[]。"
# Full-width letters, digits and signs are the ASCII ones, at a fixed distance.
PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
PLAIN.update(str.maketrans("‐‑‒–—−‘’“”", "------''\"\""))
# No leading zero or exponent: those are codes. At most 15 digits: a float would round more.
NUMBER = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,4}|[1-9][0-9]{0,14})(?:\.[0-9]{1,15})?)"
                    r"(?:/([1-9][0-9]{0,14}))?")
NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                "fifteen sixteen seventeen eighteen nineteen").split()       # a word's place is its value
for tens in "twenty thirty forty fifty sixty seventy eighty ninety".split():
    NUMBER_WORDS += [tens] + [f"{tens} {ones}" for ones in NUMBER_WORDS[1:10]]
# "B. dark green": the letter, its mark, the rest. A minus or a point of a number is no mark: B. -3, B: .5
LETTERED = re.compile(r"([A-Za-z])(?![\w/'])((?:[ ):,(]|(?<! )\.|[.-](?!\.?[0-9]))*)(.*)")
DENIAL = re.compile(r"\b(not?|wrong|incorrect|false)\b|n't")
OPTION_LINE = re.compile(r"^ *[(（]?([A-Z])[.):）：] *(\S.*)$", re.MULTILINE)       # such a line of a question


def plain(text):
    """The last LaTeX box of a text, or all of it, with plain letters, spaces and quotes."""
    text = str(text).translate(PLAIN).replace("**", "")
    boxed = BOXED.findall(text)
    if boxed:
        text = boxed[-1]
    return " ".join(text.split())


def unwrap(text):
    """A plain text without its lead-in."""
    return LEAD_IN.sub("", plain(text))


def normalise(text):
    """The words of an answer: lower case, no outer punctuation or article, 0.5 for .5, 3-5 for 3 - 5, upper
    left for upper-left. Punctuation alone stays."""
    words = plain(text).lower()
    words = re.sub(r"(?<![\w.])\.(?=[0-9])", "0.", words)
    words = re.sub(r"(?<=[0-9]) ?([/-]) ?(?=[0-9])", r"\1", words)
    words = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", " ", words)
    words = words.replace(" percent", "%").strip(OUTER)
    return re.sub(r"^(the|a|an) ", "", words) or str(text).strip()


def number(words):
    """Value of a number as people write it, or None: 3,000.5, 1/2, twelve; $5 and 12 % without the unit."""
    words = words.strip(UNITS + OUTER)
    if words in NUMBER_WORDS:
        return NUMBER_WORDS.index(words)

    found = NUMBER.fullmatch(words)
    if not found:
        return None
    return float(found[1].replace(",", "")) / int(found[2] or 1)


def same_answer(answer, solution):
    """The same words, or the same number; one of the two may lack the unit. The answer may have a lead-in. A
    number that is given twice, "3 (three)", has to be right twice."""
    solution = normalise(solution)
    right = number(solution)
    for said in (normalise(answer), normalise(unwrap(answer))):
        if said == solution:
            return True

        units = set(UNITS) & set(said + solution)
        if right is not None and len(units) <= 1 and all(number(part) == right for part in said.split(" (")):
            return True
    return False


def worded(text, options):
    """Index of the one option whose words, or whose number, a text is, or None."""
    words = normalise(text)
    found = [i for i, option in enumerate(options) if normalise(option) == words]
    found = found or [i for i, option in enumerate(options) if same_answer(text, option)]
    return found[0] if len(found) == 1 else None


def contradicts(text, options, index):
    """Does what follows a letter deny something, or name an option other than its own, the one at index, or
    another number than that one's?"""
    words = normalise(text)
    said, own = number(words), number(normalise(options[index]))
    if said is not None and own is not None and said != own:
        return True

    for i, (letter, option) in enumerate(zip(string.ascii_uppercase, options)):
        named = re.escape(normalise(option))     # 5 is not in 15, 3.5 or 5.1
        named = re.search(rf"(?<![\d.]){named}(?!\.?\d)", words) or re.search(rf"\b{letter}\b", text)
        if i != index and (named or same_answer(text, option)):
            return True

    return bool(DENIAL.search(words))


def choice(text, options):
    """Index of the option that an answer names, or None: by its letter, by its words, or by both if they
    agree. A letter alone is the letter, even if it is also the text of another option."""
    by_words = worded(text, options)
    text = unwrap(text)
    letters = string.ascii_uppercase[:len(options)]
    lettered = LETTERED.fullmatch(text.strip(OUTER))
    if not lettered or lettered[1].upper() not in letters:
        return by_words

    # 1. A letter alone; or words that begin with a letter, "a big car"
    letter, mark, rest = lettered.groups()
    index = letters.index(letter.upper())
    if not rest:
        return index
    if by_words is not None:
        return by_words

    # 2. A letter and its words, "B dark green"; or, after a mark, what does not contradict it: "B. Green."
    if same_answer(rest, options[index]):
        return index
    marked = mark.startswith((". ", ") ", ": "))
    return index if marked and not contradicts(rest, options, index) else None


def options_of(row):
    """The options of a row: its `choices`, or the lines "A. red", "(B) blue" of its question, or none."""
    if row.get("choices"):
        return row["choices"]

    lines = OPTION_LINE.findall(row.get("problem", ""))
    options = dict(lines)
    in_order = list(options) == list(string.ascii_uppercase[:len(lines)])       # each letter once, from A on
    return list(options.values()) if in_order and len(options) > 1 else []


def solutions_of(row):
    """The accepted answers of a row."""
    solutions = row["solution"]
    return solutions if isinstance(solutions, list) else [solutions]


def match(answer, row):
    """Is the answer right by the rules? Options by letter or words, numbers by value, anything else as
    normalised text. A solution that is a list accepts each of its entries."""
    # A key that names an option is matched as one; any other is open.
    options = options_of(row)
    keys = {choice(solution, options) for solution in solutions_of(row)} - {None}
    if keys:
        return choice(answer, options) in keys
    return any(same_answer(answer, solution) for solution in solutions_of(row))


def is_right(traj):
    """Is the answer right, by the rules or by the judge's verdict? Rewards and metrics ask here."""
    return traj.answer is not None and (match(traj.answer, traj.row) or traj.verdict == "right")


# --- What a trajectory is worth -------------------------------------------------------------------------
def rewards(group, cfg):
    """FORK: the reward. The G trajectories of one prompt -> for each its named parts and their `total`. cfg:
    a RewardConfig, in training all of rppo.Config.

    R = R_acc + 1{R_acc = 0 and T > 1} * Gamma,   Gamma = -lam / T^2 * sum_{t<t'} max(0, IoU(b_t, b_t') - eps)
    (DRIM) T counts executed crops; b_t are the boxes as executed, in the frame of the original. Two parts are
    not DRIM's and 0 by default: `tool` and `format`, see RewardConfig. The mean of each part is logged; one
    that a trajectory does not have counts as 0.
    """
    scored = []
    for traj in group:
        parts = dict(accuracy=0.0, redundancy=0.0, tool=0.0, format=0.0)
        if is_right(traj):
            parts["accuracy"] = 1.0
            parts["tool"] = cfg.tool_bonus if traj.crops else 0.0
        else:                                    # with T < 2 there is no pair, so it is 0
            parts["redundancy"] = -cfg.lam * redundancy(traj.crops, cfg.eps)

        if traj.status != "answered" or any(turn.error for turn in traj.turns):
            parts["format"] = -cfg.format_weight

        scored.append({**parts, "total": sum(parts.values())})
    return scored


def covers(traj):
    """Was the evidence seen: is there for each evidence box of the row (row["boxes"]) a crop of at most a
    quarter of the image that holds 90 % of it? For several boxes it may be several crops."""
    fine = [c for c in traj.crops if area(c) <= area(traj.shown[0].box) / 4]
    for evidence in traj.row["boxes"]:
        if not any(intersection(c, evidence) >= 0.9 * area(evidence) for c in fine):
            return False

    return True


# --- Files: JSON in and out, and folders that a command works in ----------------------------------------
locks = {}      # path -> locked file, open until the process ends


def read_json(path, default):
    """The JSON object in a file, or `default` without one. Raises UserError."""
    if not os.path.exists(path):
        return default
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: not a JSON object ({e}); mend or remove the file")


def write_text(path, text):
    """Replace a file: whatever happens, it holds the old text or the new one."""
    with open(path + ".tmp", "w", encoding="utf-8", errors="replace") as f:    # for halves of surrogate pairs
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def newest(folder):
    """A run folder stands for its newest checkpoint; anything else (a checkpoint, a hub id) for itself.
    UserError if `last` is damaged."""
    last = Path(folder, "last")
    if not last.is_file():
        return folder

    step = last.read_text(errors="replace").strip()
    there = [path.name for path in Path(folder, "checkpoints").glob("*") if path.name.isdecimal()]
    if step not in there:
        raise UserError(f"{last} names no checkpoint ({step!r:.40}); write one into it, or remove the run: "
                        + ", ".join(sorted(there)))
    return f"{folder}/checkpoints/{step}"


def find_model(path):
    """A --model as `newest` gives it. UserError for what is neither a folder nor can be a name of the hub:
    OWNER/NAME, its owner no folder of ours."""
    path = path.rstrip("/") or path
    owner = path.partition("/")[0]
    hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and owner != "runs" and not os.path.isdir(owner)
    if not hub_id and not os.path.exists(path):
        raise UserError(f"{path}: there is no such folder, and it is no hub id; check --model")
    return newest(path)


def lock(folder, cure="give another --out"):
    """Keep other processes out of a run folder until this one ends. UserError names the one that has it."""
    os.makedirs(folder, exist_ok=True)
    path = f"{os.path.realpath(folder)}/lock"
    if path in locks:
        return

    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is in use by {Path(path).read_text()[:-1]}; end it, or {cure}")
    except OSError as e:                         # as of network file systems
        print(f"{folder} cannot be locked ({e.strerror}); start no second process there")

    file.truncate(0)
    print(f"process {os.getpid()} on {os.uname().nodename} since {time.ctime()}", file=file, flush=True)
    locks[path] = file


def same_settings(folder, cfg, cure="give another folder"):
    """UserError if a folder has other settings. A key that config.json lacks is at its default."""
    saved = read_json(f"{folder}/config.json", asdict(cfg))
    changes = []
    for f in fields(cfg):
        old = saved.get(f.name, f.default)
        new = getattr(cfg, f.name)
        if old != new and not f.metadata.get("free"):
            changes.append(f"{f.name}: {old} -> {new}")

    if changes:
        raise UserError(f"{folder} was made with other settings ({'; '.join(changes)}); {cure}")


# --- The command line: argparse over the dataclasses ----------------------------------------------------
# A field as it stands in a config class, with its comment. It is looked for in the source of the class, so
# no other line there, be it of the docstring, may begin with four spaces, a word and a colon.
FIELD = re.compile(r"^    (\w+): [^#\n]*(?:# *(.*))?$", re.MULTILINE)


def true_or_false(text):
    return json.loads(text.lower())


def make_parser(cls, real):
    """A flag for each field. --help has its comment, default and, in brackets, default with a real model."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--FLAG=VALUE ...]",
                                     description=inspect.getmodule(cls).__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    # 1. A flag stands under the class that first has its field. A later class may give another comment.
    flags = {}
    for base in reversed(cls.__mro__[:-1]):
        group = parser.add_argument_group(inspect.getdoc(base).split("\n")[0])
        for name, comment in FIELD.findall(inspect.getsource(base)):
            if name not in flags:
                flags[name] = group.add_argument(f"--{name}")
            flags[name].help = comment or flags[name].help or ""

    # 2. Types and defaults are those of the last class.
    for f in fields(cls):
        flag = flags[f.name]
        flag.type = true_or_false if f.type is bool else f.type
        text = f"{flag.help} (default: {f.default})"
        if real.get(f.name, f.default) != f.default:
            text += f" [{real[f.name]}]"
        flag.help = text.replace("%", "%%")
    return parser


def checked(values, cls, where):
    """The values that cls has a field for. UserError unless each has the field's type and range."""
    known = {}
    for f in fields(cls):
        if f.name not in values:
            continue

        value = known[f.name] = values[f.name]
        least = f.metadata.get("least", int(f.type is int))
        if type(value) is not f.type and (type(value), f.type) != (int, float):
            raise UserError(f"{where}: {f.name} takes a value of type {f.type.__name__}, not {value!r:.40}")
        if f.type in (int, float) and not least <= value < 2 ** 63:
            raise UserError(f"{where}: {f.name} is {value!r:.40}; it has to be finite and at least {least}")
    return known


def load_episode(path):
    """Preset ("tiny" or "real") and EpisodeConfig fields of a checkpoint; no address or key is read. A model
    of somebody else has none and takes the real preset; UserError if one of ours has lost it."""
    where = f"{path}/episode.json"
    if os.path.isdir(f"{path}/training") and not os.path.exists(where):
        raise UserError(f"{where} is missing, so how the policy was trained to be asked; copy another step's")
    saved = read_json(where, {})
    return saved.get("preset", "real"), checked(saved, EpisodeConfig, where)


def configure(cls, real, argv=None):
    """The config (of class cls) of the flags in argv (default: this process's). Raises UserError.

    The defaults of cls are the tiny preset. With --model those of the episode are the checkpoint's, and all
    others those of `real`, unless the checkpoint's own preset is tiny.
    """
    # Flags go before what the checkpoint says, and that before the preset.
    values = vars(make_parser(cls, real).parse_args(argv))
    seed = str(values.get("seed", cls.seed))
    for name in ("model", "data", "image_root", "out"):      # "{seed}" is the seed, "runs/a/" is "runs/a"
        if hasattr(cls, name):
            path = values.get(name, getattr(cls, name)).replace("{seed}", seed)
            values[name] = path.rstrip("/") or path
    if values.get("model"):
        values["model"] = find_model(values["model"])
        preset, episode = load_episode(values["model"])
        values = {**(real if preset == "real" else {}), **episode, **values}
    cfg = cls(**checked(values, cls, "flags"))

    if isinstance(cfg, EpisodeConfig) and cfg.max_crop_pixels < cfg.min_crop_pixels:
        raise UserError(f"--max_crop_pixels={cfg.max_crop_pixels} is below --min_crop_pixels")
    return cfg


def command(main, cls, real):
    """Run main(cfg) by this process's flags. A file that cannot be read or written is a UserError."""
    try:
        main(configure(cls, real))
    except Exception as e:
        of_a_file = getattr(e, "filename", None) is not None
        if not of_a_file and "No space left" not in str(e):      # also an error of safetensors
            raise
        raise UserError(f"cannot read or write ({e}); make room, or give another --out")


def shared(cfg, cls):
    """The fields of cfg that another config class has too, as a dict."""
    return {f.name: getattr(cfg, f.name) for f in fields(cls) if hasattr(cfg, f.name)}
