"""Published benchmarks in their exact layouts, as our rows."""
import base64
import csv
import io
import json
import os

import pytest
from conftest import picture, refusal

import data
import env


def base64_of(image):
    out = io.BytesIO()
    image.resize((90, 70)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def write_tsv(path, lines):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(lines[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


def read(bench, path, image_root="", limit=0):
    return data.read_benches(f"{bench}:{path}", image_root, limit)


MME_OPTIONS = ["red", "blue", "a, b", 'the "sign"', "The image does not feature the text."]


@pytest.mark.parametrize("lite", [False, True])
def test_mmerealworld(tmp_path, lite):
    """The columns A to E, or in Lite one list; subtasks and l2 categories. VLMEvalKit writes NAME_local.tsv
    for a file above 1 GB: image_path in the place of image."""
    line = {"index": 0, "image": base64_of(picture()), "question": "Which?", "answer": "E",
            "category": "Perception/OCR", "l2-category": "Text/Advert"}
    options = [f"({letter}) {option}" for letter, option in zip("ABCDE", MME_OPTIONS)]
    line["multi-choice options"] = str(options)
    if not lite:
        line["multi-choice options"] = "The choices are listed below:\n" + "\n".join(options)
        line.update(zip("ABCDE", MME_OPTIONS))
    row, = read("mme", write_tsv(tmp_path / "mme.tsv", [line]))["mme"]
    assert row["choices"] == MME_OPTIONS and row["solution"] == "E"
    lines = row["problem"].split("\n")
    assert lines[:2] == ["Which?", "A. red"] and lines[5] == "E. The image does not feature the text."
    assert row["category"] == "Perception/OCR/text/advert"
    picture().save(tmp_path / "0.jpg")
    del line["image"]
    tsv = write_tsv(tmp_path / "mme_local.tsv", [{**line, "image_path": "0.jpg"}])
    assert read("mme", tsv, str(tmp_path))["mme"][0]["images"] == [str(tmp_path / "0.jpg")]


def test_hrbench(tmp_path):
    """A question in four rotations: its first line has the image, the others its index. Images are unpacked
    once and shared. What is damaged is refused in one line that names the file."""
    lines, options = [], ["red", "blue", "green", "grey"]
    for i in range(8):
        turned = options[i % 4:] + options[:i % 4]
        image = i - i % 4 if i % 4 else base64_of(picture(i))
        line = {"index": i, "image": image, "question": f"Which, {i // 4}?", "cycle_category": i % 4}
        line.update(zip("ABCD", turned))
        line.update({"answer": "ABCD"[turned.index("red")], "category": "cross" if i < 4 else "single"})
        lines.append(line)
    tsv = write_tsv(tmp_path / "hr_bench_4k.tsv", lines[::-1])    # the image after the lines that refer to it
    rows = read("hrbench4k", tsv)["hrbench4k"]
    assert len(rows) == 8 and rows[0]["images"] == rows[3]["images"] != rows[4]["images"]
    assert rows[7]["category"] == "cross" and rows[0]["cycle_category"] == "3"
    assert env.open_image(rows[3]["images"][0]).getpixel((0, 0)) == (80, 90, 160)
    before = os.stat(rows[0]["images"][0])
    assert read("hrbench4k", tsv, limit=5)["hrbench4k"] == rows[:5]
    assert os.stat(rows[0]["images"][0]) == before and len(os.listdir(tsv + ".images")) == 2
    write_tsv(tsv, [{**lines[0], "answer": "F"}])
    assert "4k.tsv: row 0: the answer 'F' is none of its 4" in refusal(read, "hrbench4k", tsv)
    (tmp_path / "x.json").write_bytes(b"PAR1\xff\x00")
    for path in (tmp_path / "x.json", tmp_path, "/nowhere"):
        assert str(path) in refusal(read, "vstar", path)


def test_visualprobe(tmp_path):
    """BASE/VisualProbe_Hard/val.json, images relative to BASE: three levels, each under its own name."""
    for level in ("Easy", "Medium", "Hard"):
        image = f"VisualProbe_{level}/images/0.jpg"
        os.makedirs((tmp_path / image).parent)
        picture().save(tmp_path / image)
        row = {"problem": "<image>\nWhat?", "images": [image], "solution": level}
        (tmp_path / f"VisualProbe_{level}/val.json").write_text(json.dumps([row, row]))
    benches = read("visualprobe", tmp_path, limit=1)
    assert set(benches) == {"visualprobe_easy", "visualprobe_medium", "visualprobe_hard"}
    [row] = benches["visualprobe_hard"]
    assert row["solution"] == "Hard" and row["problem"] == "What?"
    assert row["images"] == [str(tmp_path / image)]


def test_vstar(tmp_path):
    """The folder's questions without OCR and GPT4V-hard, with the letters and boxes."""
    options = ["The cap is (dark) grey.", "The cap is red."]
    lines = []
    for category in ("direct_attributes", "relative_position", "OCR", "GPT4V-hard"):
        os.makedirs(tmp_path / category)
        picture().save(tmp_path / category / "sa_1.jpg")
        item = {"target_object": ["cap"], "bbox": [[10, 20, 5, 6]], "options": options[::-1]}
        (tmp_path / category / "sa_1.json").write_text(json.dumps(item))
        text = f"Which?\n(A) {options[0]}\n(B) {options[1]}\nAnswer with the option's letter from the ..."
        line = {"image": f"{category}/sa_1.jpg", "text": text, "label": "B", "category": category}
        lines.append(json.dumps(line))
    (tmp_path / "test_questions.jsonl").write_text("\n".join(lines))
    rows = read("vstar", tmp_path)["vstar"]
    assert [row["category"] for row in rows] == ["direct_attributes", "relative_position"]
    assert rows[0]["choices"] == options and rows[0]["solution"] == "B"
    assert rows[0]["boxes"] == [[10, 20, 15, 26]]
    assert rows[0]["images"] == [str(tmp_path / "direct_attributes/sa_1.jpg")]
