"""Conversations of other projects in their exact forms, as our rows (tests/convert.py)."""
import json
import re

import convert
import pytest
from PIL import Image
from test_formats import picture, refusal

import env

SIZE = (900, 700)


def converted(folder, rows, image_root=""):
    """The rows that convert.py writes."""
    (folder / "cold.json").write_text(json.dumps(rows))
    convert.convert(str(folder / "cold.json"), image_root, str(folder / "out"))
    return env.load_rows(str(folder / "out" / "sft.jsonl"))


def chat(folder, calls):
    """A conversation: question, calls that are each shown a crop, answer."""
    picture(0, SIZE).save(folder / "0.jpg")
    messages = [{"role": "user", "content": "<image>\nWhich colour?"}]
    for i, call in enumerate(calls):
        messages.append({"role": "assistant", "content": f"<think>Step {i}.</think>\n{call}"})
        messages.append({"role": "user", "content": "<image>"})
    messages.append({"role": "assistant", "content": "<think>So.</think>\n<answer>red</answer>"})
    return messages


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
    "Pixel-Reasoner": [zoom("crop_image_normalized", bbox_2d=[0.1, 0.1, 0.5, 0.6], target_image=1),
                       zoom("crop_image_normalized",
                            bbox_2d=[0.25, 0.2, 0.5, 0.5], target_image=2)],
    "Qwen-Agent": [zoom(bbox_2d=[100, 100, 500, 600], img_idx=0),
                   zoom(bbox_2d=[250, 200, 500, 500], img_idx=1)]}
PADDED = (0, 0, 540, 490)             # a tenth of the image on each side of FIRST
CUT = {"Pixel-Reasoner": (PADDED,
                          (81, 49, 324, 294))}    # and a tenth of that crop on each side


@pytest.mark.parametrize("dialect", CALLS)
def test_dialects(tmp_path, dialect):
    """Calls cut what they cut in their own project."""
    messages = chat(tmp_path, CALLS[dialect])
    row, = converted(tmp_path, [{"messages": messages, "images": ["0.jpg", "1.jpg", "2.jpg"]}])
    check_boxes(row, *CUT.get(dialect, (FIRST, SECOND)))
    assert row["images"] == [str(tmp_path / "0.jpg")]
    assert row["turns"][0].startswith("<think>Step 0.</think>\n<tool_call>\n{")
    assert row["turns"][-1] == "<think>So.</think>\n<answer>red</answer>"


def test_pixel_reasoner(tmp_path):
    """message_list: parts without a type, keys that are None, an answer in a box, instructions cut off."""
    picture(0, SIZE).save(tmp_path / "0.jpg")
    question = "Which colour?\n\nGuidelines: Understand the given visual information and the user query."
    messages = [{"role": "system", "content": [{"text": "Tools.", "image": None, "video": None}]},
                {"role": "user",
                 "content": [{"image": "0.jpg", "text": None}, {"text": question}]},
                {"role": "assistant",
                 "content": [{"text": "Let me look. " + CALLS["Pixel-Reasoner"][0]}]},
                {"role": "user",
                 "content": [{"text": "Here is the cropped image:"}, {"image": "1.jpg"}]},
                {"role": "assistant", "content": [{"text": "It says so: \\boxed{STOP}"}]}]
    row, = converted(tmp_path, [{"message_list": messages}])
    check_boxes(row, PADDED)
    assert row["problem"] == "Which colour?" and row["solution"] == "STOP"
    assert row["turns"][0].startswith("<think>Let me look.</think>")
    assert row["turns"][1] == "<think>It says so:</think>\n<answer>STOP</answer>"


def test_forms_of_calls(tmp_path):
    """function_call (with a thought, a list of one), tool_call, tool_calls with arguments as a string,
    image_url parts, the key image, images as dicts: one and the same row."""
    call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": list(FIRST)}}
    question, *_, answer = chat(tmp_path, [])
    thought, text = "<think>Step 0.</think>\n", json.dumps(call)
    files = [{"path": "0.jpg", "bytes": None}, {"path": "1.jpg", "bytes": None}]
    rows = []
    for value in (text, thought + json.dumps([call]), f"{thought}<tool_call>{text}</tool_call>"):
        messages = [{"from": "human", "value": "<image>Which colour?"},
                    {"from": "function_call", "value": value},
                    {"from": "observation", "value": "<image>"},
                    {"from": "gpt", "value": "<answer>red</answer>"}]
        rows.append({"conversations": messages, "images": files})
    messages = [question, {"role": "assistant", "content": thought},
                {"role": "tool_call", "content": text},
                {"role": "tool_response", "content": '{"images": "<image>"}'}, answer]
    rows.append({"messages": messages, "images": ["0.jpg", "1.jpg"]})
    asked = [{"type": "image_url", "image_url": {"url": "0.jpg"}},
             {"type": "text", "text": "Which colour?"}]
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
    messages = [{"role": "user", "content": asked},
                {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
                {"role": "tool",
                 "content": [{"type": "image_url", "image_url": "1.jpg"}]}, answer]
    rows.append({"messages": messages})
    rows.append({"messages": chat(tmp_path, [f"<tool_call>{text}</tool_call>"]),
                 "image": "0.jpg"})
    found = converted(tmp_path, rows)
    for row in found:
        check_boxes(row, FIRST)
        assert row["problem"] == "Which colour?" and row["images"] == [str(tmp_path / "0.jpg")]
    assert found[1]["turns"][0] == found[2]["turns"][0] == found[3]["turns"][0] and len(found) == 6


def test_what_is_left_out_is_counted(tmp_path, capsys):
    """Every reason with its number and first row; a row with many calls is used."""
    Image.new("RGB", (4200, 3200)).save(tmp_path / "large.png")

    def row(*calls, image="0.jpg"):
        return {"messages": chat(tmp_path, calls), "images": [image]}

    one = CALLS["DeepEyes"][0]
    prefix = row(*CALLS["Mini-o3"])
    prefix["messages"] = prefix["messages"][:4]
    focus = row(one)
    focus["messages"][0]["content"] += "\nThink in the mind first, and then decide whether to call tools."
    error = row(one)
    error["messages"][2]["content"] = "Error: ZOOM IN ARGUMENTS ARE INVALID"
    video = {"message_list": [{"role": "user",
                               "content": [{"video": ["1.jpg"]}, {"text": "Which?"}]}]}
    two = row(one)
    two["messages"][1] = {"role": "function_call", "content": json.dumps([{"name": "a"}] * 2)}
    broken = row(one)
    broken["messages"][1] = {"role": "function_call", "content": "I zoom in. {"}
    edge = row(zoom("crop_image_normalized", bbox_2d=[0.1, 0.1, 1.0, 0.5], target_image=1))
    expected = [(row(*[one] * 9), None), (prefix, "a prefix of a trajectory"),
                (focus, "Chain-of-Focus"),
                (error, "an error"), (row(one, image="large.png"), "DeepEyes: pixels"),
                (video, "not one original"), (two, "not one call"), (edge, "Pixel-Reasoner"),
                (row(zoom("select_frames", target_frames=[1])),
                 "select_frames"), (broken, "not JSON"),
                (row(zoom(bbox_2d=[0, 0, 9000, 90])), "not on its image"),
                (row(zoom(bbox_2d=[0, 0, 90, 90], img_idx=1)), "not there"),
                (row(zoom(bbox_2d=[5, 5, 5, 5])), "our tool refuses"), (3, "cannot be read"),
                (row(one, image={"bytes": "x", "path": None}), "not a readable file")]
    rows, reasons = zip(*expected)
    used = converted(tmp_path, rows)
    assert len(used) == 1 and len(used[0]["turns"]) == 10
    report = capsys.readouterr().out
    assert f"1 of {len(rows)} conversations are used" in report
    for i, reason in enumerate(reasons[1:], 1):
        assert re.search(f"1 left out, the first is row {i}: .*{reason}", report)
    assert "0 of 1" in refusal(converted, tmp_path, [prefix])
    outside = [row(one, image="../0.jpg")]
    assert "outside of --image_root" in refusal(converted, tmp_path, outside, str(tmp_path))
