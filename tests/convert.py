"""Cold-start conversations of other projects as our rows: LLaMA-Factory (`conversations`), ms-swift
(`messages`) and Pixel-Reasoner (`message_list`); calls of DeepEyes, Mini-o3, Pixel-Reasoner and Qwen-Agent.

    python tests/convert.py cold.json --image_root=images --out=data/mine

Writes <out>/sft.jsonl. They are converted once; the stages read our own rows only.
"""
import argparse
import json
import os
import re
import sys

from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
import env  # noqa: E402

ASSISTANT = ("gpt", "assistant", "function_call", "tool_call")
# A line of a prompt that says that boxes are relative: "0 to 1000", "[0, 1000]", "0-1000".
RELATIVE = re.compile(r"(?im)^.*(box|coordinate).*(\b0( to | and | ?[-–~] ?|\.+|…)1000\b|\[0, ?1000\])")
ACTIONS = re.compile(r"<(tool_call|grounding|answer)>(.*?)</\1>|\\boxed\{(.*)\}", re.DOTALL)
INSTRUCTIONS = re.compile(r"\s*(Think first, call|Think in the mind first|Guidelines:).*", re.DOTALL)
DEEPEYES_PIXELS = 16384 * 28 ** 2   # its model saw larger images at this size, its tool cut them as they were


class Unusable(Exception):
    """Why a conversation is left out."""


def text_of(content, images):
    """The content of a message as text with <image> tags; images within it are appended to `images`."""
    if isinstance(content, str):
        return content
    text = ""
    for part in content or []:                  # parts need not have a type, and may have keys that are None
        image = part.get("image") or part.get("image_url")
        if image:
            images.append(image)
        if image or part.get("type") == "image":
            text += "<image>"
        text += part.get("text") or ""
    return text


def messages_of(row):
    """A conversation as [(is the assistant's, text)], neighbours of one side joined, its images as given,
    and what describes its tools. Calls stand in <tool_call> tags, whichever form they had."""
    images = row.get("images") or row.get("image") or []
    images = list(images) if isinstance(images, list) else [images]
    sides, tools = [], f"{row.get('system')}\n{row.get('tools')}\n"
    for message in row.get("conversations") or row.get("messages") or row.get("message_list"):
        role = message.get("role") or message.get("from")
        text = text_of(message.get("content") or message.get("value"), images)
        if role == "system":
            tools += text
            continue
        if role in ASSISTANT and message.get("loss") in (False, 0):
            raise Unusable("a turn that is not to be trained")
        calls = message.get("tool_calls") or []
        if role in ("function_call", "tool_call") and "<tool_call>" not in text:
            thought, tag, body = text.rpartition("</think>")
            text = thought + tag
            calls = json.loads(body)
        for call in calls if isinstance(calls, list) else [calls]:
            text += f"\n<tool_call>{json.dumps(call.get('function') or call)}</tool_call>"
        if sides and sides[-1][0] == (role in ASSISTANT):
            text = sides.pop()[1] + "\n" + text
        sides.append((role in ASSISTANT, text))
    return sides, images, tools


def box_of(call, size, prompts):
    """img_idx and bbox_2d of our call for a foreign one. Only tools are read whose box is defined by the
    call, the scale that the prompts name, and the size of the original, (w, h) in pixels. prompts show
    Chain-of-Focus too."""
    arguments = call.get("arguments", call)     # Mini-o3's calls are the arguments alone
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    name = call.get("name")
    box = arguments.get("bbox_2d")
    number, margin, unit = 0, 0, (1, 1)
    known = {"bbox_2d", "label"}
    if "source" in arguments:                   # Mini-o3: shares of that image
        known.add("source")
        if arguments["source"] != "original_image":
            number = int(arguments["source"].removeprefix("observation_"))
    elif name == "crop_image_normalized":       # Pixel-Reasoner: shares, and a tenth is added on each side
        known.add("target_image")
        number, margin = int(arguments["target_image"]) - 1, 0.1
        if max(box) >= 1:
            raise Unusable("Pixel-Reasoner: a box with a value of 1 or more, which its tool takes for pixels")
    elif name != "image_zoom_in_tool":
        raise Unusable(f"a call of the tool {name}")
    elif "img_idx" in arguments or RELATIVE.search(prompts):     # Qwen-Agent and ours
        known.add("img_idx")
        number, unit = arguments.get("img_idx", 0), (1000, 1000)
    elif "Think in the mind first" in prompts:
        raise Unusable("Chain-of-Focus: it shows more than the box, of a resized image")
    elif size[0] * size[1] > DEEPEYES_PIXELS:
        raise Unusable("DeepEyes: pixels of an image above 12.8 megapixels, which its model saw smaller")
    elif max(box) <= 1:
        raise Unusable("shares of the image where pixels are read")
    else:                                       # DeepEyes: pixels of the original
        unit = size
    for argument in sorted(set(arguments) - known):              # it may name another image, or turn it
        raise Unusable(f"a call with the argument {argument}")
    ours = []
    for i, value in enumerate(box):
        share = value / unit[i % 2]
        if not 0 <= share <= 1.01:
            raise Unusable("a box is not on its image")
        share += margin if i > 1 else -margin
        ours.append(round(1000 * min(max(share, 0), 1)))
    return number, ours


def translate(row, find):
    """A conversation as our row with `turns`; find(path) gives the absolute path of an image. Or Unusable."""
    sides, images, tools = messages_of(row)
    tags = [text.count("<image>") for _, text in sides]
    if not images or not sides or sides[0][0] or tags[0] > 1 or len(images) not in (1, sum(tags)):
        raise Unusable("not one original in the question and then the crops, but several images or a video")
    image = images[0]
    if isinstance(image, dict):
        image = image.get("path") or image.get("url") or ""
    image = find(image.removeprefix("file://"))
    size = env.open_image(image).size
    prompts = "\n".join([tools, *[text for mine, text in sides if not mine]])
    boxes = [(0, 0, *size)]
    turns, answer = [], None
    for i in range(1, len(sides), 2):
        before, _, text = sides[i][1].rpartition("</think>")
        actions = list(ACTIONS.finditer(text))
        if len(actions) != 1 or answer:
            raise Unusable("a turn is not one call or one answer, but none, several, or a list of calls")
        tag, body, boxed = actions[0].groups()
        if tag in ("tool_call", "grounding"):
            if i + 1 < len(sides) and tags[i + 1] != 1:
                raise Unusable("a call was followed by an error or several images, not by one crop")
            k, box = box_of(json.loads(body), size, prompts)
            if k not in range(len(boxes)):
                raise Unusable("a call names an image that is not there")
            boxes.append(env.resolve_box(box, boxes[k], size, 28))
            call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box, "img_idx": k}}
            action = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        else:
            answer = (body or boxed).strip()
            action = f"<answer>{answer}</answer>"
        thought = re.sub("</?think>", "", before + text[:actions[0].start()]).strip()
        turns.append(f"<think>{thought}</think>\n{action}")
    if not answer:
        raise Unusable("it ends without an answer: a prefix of a trajectory, as many rows of Mini-o3's are")
    problem = INSTRUCTIONS.sub("", sides[0][1].replace("<image>", "")).strip()
    return {"images": [image], "problem": problem, "solution": row.get("solution") or answer, "turns": turns}


def convert(path, image_root, out):
    """Write the conversations of a JSON list or JSON Lines file as rows to <out>/sft.jsonl.

    Prints how many are used and, for every reason to leave rows out, how many and the first. UserError when
    none can be used. Rows with more calls than max_crops are kept; sft.py counts what does not fit.
    """
    root = os.path.abspath(image_root or os.path.dirname(path))
    rows, used, left_out = data.read_lines(path), [], {}

    def find(name):
        return data.find_image(root, name, path, bool(image_root))

    for i, row in enumerate(tqdm(rows, desc=path, disable=None, leave=False)):
        try:
            used.append(translate(row, find))
            continue
        except Unusable as e:
            reason = str(e)
        except env.ToolError as e:
            reason = f"our tool refuses a box ({e})"
        except env.UserError:
            reason = "an image is not a readable file (but bytes, an address), or outside of --image_root"
        except ValueError:
            reason = "a call is not JSON, or a value in it is not of its type"
        except Exception as e:                  # foreign rows can be anything
            reason = f"its messages cannot be read ({type(e).__name__})"
        left_out.setdefault(reason, []).append(i)
    report = f"{path}: {len(used)} of {len(rows)} conversations are used"
    for reason, numbers in left_out.items():
        report += f"; {len(numbers)} left out, the first is row {numbers[0]}: {reason}"
    if not used:
        raise env.UserError(report)
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "sft.jsonl"), "w", encoding="utf-8") as f:
        for row in used:
            f.write(json.dumps(row) + "\n")
    print(report.replace("; ", "\n  ") + f"\n-> {out}/sft.jsonl")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", help="a JSON list or JSON Lines file of conversations")
    parser.add_argument("--image_root", default="", help="folder of their images; default: that of the file")
    parser.add_argument("--out", required=True, help="folder for sft.jsonl")
    args = parser.parse_args()
    convert(args.file, args.image_root, args.out)
