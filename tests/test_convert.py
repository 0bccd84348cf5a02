"""Conversations of other projects in their exact forms, as our rows (tests/convert.py)."""
import json
import re

import convert
import pytest
from conftest import picture, refusal

import data
import env

SIZE = (900, 700)


def converted(folder, rows, image_root=""):
    """The rows that convert.py writes."""
    picture(0, SIZE).save(folder / "0.jpg")
    (folder / "cold.json").write_text(json.dumps(rows))
    convert.convert(str(folder / "cold.json"), image_root, str(folder / "out"))
    return data.load_rows(str(folder / "out" / "sft.jsonl"))


def chat(*calls, image="0.jpg"):
    """A conversation: question, calls that are each shown a crop, answer."""
    messages = [{"role": "user", "content": "<image>\nWhich colour?"}]
    for i, call in enumerate(calls):
        messages.append({"role": "assistant", "content": f"<think>Step {i}.</think>\n{call}"})
        messages.append({"role": "user", "content": "<image>"})
    messages.append({"role": "assistant", "content": "<think>So.</think>\n<answer>red</answer>"})
    return {"messages": messages, "images": [image]}


def zoom(name="image_zoom_in_tool", **arguments):
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


def check_boxes(row, *expected):
    """What our own tool cuts for a row's turns, to 2 pixels."""
    boxes = [(0, 0, *SIZE)]
    for text, box in zip(row["turns"][:-1], expected, strict=True):
        action = env.parse_action(text)
        boxes.append(env.resolve_box(action.bbox, boxes[action.img_idx], SIZE, 28))
        assert boxes[-1] == pytest.approx(box, abs=2)


FIRST, SECOND = (90, 70, 450, 420), (180, 140, 270, 245)    # the second lies in the first
CALLS = {
    "DeepEyes": [zoom(bbox_2d=FIRST, label="cap"), zoom(bbox_2d=SECOND)],
    "Mini-o3": ['<grounding>{"bbox_2d": [0.1, 0.1, 0.5, 0.6], "source": "original_image"}</grounding>',
                '<grounding>{"bbox_2d": [0.25, 0.2, 0.5, 0.5], "source": "observation_1"}</grounding>'],
    "Qwen-Agent": [zoom(bbox_2d=[100, 100, 500, 600], img_idx=0),
                   zoom(bbox_2d=[250, 200, 500, 500], img_idx=1)]}


@pytest.mark.parametrize("dialect", CALLS)
def test_dialects(tmp_path, dialect):
    """Calls cut what they cut in their own project."""
    row, = converted(tmp_path, [chat(*CALLS[dialect])])
    check_boxes(row, FIRST, SECOND)
    assert row["images"] == [str(tmp_path / "0.jpg")] and row["problem"] == "Which colour?"
    assert row["turns"][0].startswith("<think>Step 0.</think>\n<tool_call>\n{")
    assert row["turns"][-1] == "<think>So.</think>\n<answer>red</answer>"


@pytest.mark.parametrize("where", ["system", "tools", "messages", "question"])
def test_the_scale_of_the_prompt(tmp_path, where):
    """Boxes without an image's number are pixels, unless the prompt says that they are relative."""
    row = chat(zoom(bbox_2d=[100, 100, 500, 600]))
    text = "bbox_2d: [x1, y1, x2, y2], relative coordinates from 0 to 1000"
    if where == "messages":
        row["messages"].insert(0, {"role": "system", "content": text})
    elif where == "question":
        row["messages"][0]["content"] += "\nIs it from 0 to 1000 dollars?\nSee the box [10, 0, 1000, 300]."
    else:
        row[where] = text
    converted_row, = converted(tmp_path, [row])
    check_boxes(converted_row, (100, 100, 500, 600) if where == "question" else FIRST)


# Its tool adds a tenth of the image on each side.
PIXEL_REASONER = r"""{"message_list": [
{"role": "system", "content": [{"text": "Tools.", "image": null, "video": null}]},
{"role": "user", "content": [{"image": "0.jpg"}, {"text": "Which?\n\nGuidelines: Understand the given"}]},
{"role": "assistant", "content": [{"text": "Let me look. <tool_call>{\"name\": \"crop_image_normalized\",
 \"arguments\": {\"bbox_2d\": [0.1, 0.1, 0.5, 0.6], \"target_image\": 1}}</tool_call>"}]},
{"role": "user", "content": [{"text": "Here is the cropped image:"}, {"image": "1.jpg"}]},
{"role": "assistant", "content": [{"text": "It says so: \\boxed{STOP}"}]}]}"""
LLAMA_FACTORY = r"""{"images": [{"path": "0.jpg"}, {"path": "1.jpg"}], "conversations": [
{"from": "human", "value": "<image>Which?"}, {"from": "function_call", "value": "<think>Hm.</think>
 [{\"name\": \"image_zoom_in_tool\", \"arguments\": {\"bbox_2d\": [90, 70, 450, 420]}}]"},
{"from": "observation", "value": "<image>"}, {"from": "gpt", "value": "<answer>STOP</answer>"}]}"""
MS_SWIFT = r"""{"image": "0.jpg", "messages": [{"role": "user", "content": "<image>Which?"},
{"role": "tool_call", "content": "{\"name\": \"image_zoom_in_tool\",
 \"arguments\": \"{\\\"bbox_2d\\\": [90, 70, 450, 420]}\"}"}, {"role": "tool_response", "content": "<image>"},
{"role": "assistant", "content": "<answer>STOP</answer>"}]}"""
OPENAI = r"""{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "0.jpg"}},
{"type": "text", "text": "Which?"}]}, {"role": "assistant", "content": "Hm.", "tool_calls": [{"function":
{"name": "image_zoom_in_tool", "arguments": "{\"bbox_2d\": [90, 70, 450, 420]}"}}]},
{"role": "tool", "content": [{"type": "image_url", "image_url": "1.jpg"}]},
{"role": "assistant", "content": "<answer>STOP</answer>"}]}"""


@pytest.mark.parametrize("text, box", [(PIXEL_REASONER, (0, 0, 540, 490)), (LLAMA_FACTORY, FIRST),
                                       (MS_SWIFT, FIRST), (OPENAI, FIRST)])
def test_other_layouts(tmp_path, text, box):
    """Calls of their own, answers in a box, images as dicts; instructions are cut off."""
    row, = converted(tmp_path, [json.loads(text.replace("\n", ""))])
    check_boxes(row, box)
    assert row["problem"] == "Which?" and row["images"] == [str(tmp_path / "0.jpg")]
    assert row["turns"][1].endswith("\n<answer>STOP</answer>")


def test_what_is_left_out_is_counted(tmp_path, capsys):
    """Every reason with its number and first row; a row with many calls is used."""
    one = CALLS["DeepEyes"][0]
    prefix = chat(*CALLS["Mini-o3"])
    del prefix["messages"][4:]
    error = chat(one)
    error["messages"][2]["content"] = "Error: ZOOM IN ARGUMENTS ARE INVALID"
    masked = chat(one)
    masked["messages"][1]["loss"] = False
    video = {"message_list": [{"role": "user", "content": [{"video": ["1.jpg"]}, {"text": "Which?"}]}]}
    expected = [(chat(*[one] * 9), None), (prefix, "a prefix of a trajectory"), (error, "an error"),
                (video, "not one original"), (chat(zoom(bbox_2d=[5, 5, 5, 5])), "our tool refuses"),
                (chat(zoom("select_frames", frames=[1])), "select_frames"),
                (chat(zoom(bbox_2d=[0, 0, 9000, 90])), "not on its image"), (3, "cannot be read"),
                (chat(one, image={"bytes": "x", "path": None}), "not a readable file"),
                (masked, "not to be trained"), (chat(zoom(bbox_2d=[0, 0, 0.5, 0.5])), "shares")]
    for argument in ("target_image", "image_index", "image_id", "angle"):
        call = zoom(bbox_2d=FIRST, **{argument: 1})
        expected.append((chat(call), f"the argument {argument}"))
    rows, reasons = zip(*expected)
    used = converted(tmp_path, rows)
    assert len(used) == 1 and len(used[0]["turns"]) == 10
    report = capsys.readouterr().out
    for i, reason in enumerate(reasons[1:], 1):
        assert re.search(f"1 left out, the first is row {i}: .*{reason}", report)
    outside = [chat(one, image="../0.jpg")]
    assert "outside of --image_root" in refusal(converted, tmp_path, outside, str(tmp_path))
