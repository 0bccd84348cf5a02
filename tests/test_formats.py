"""Published benchmarks in their exact layouts, as our rows."""
import base64
import csv
import io
import json
import os

import pytest
from PIL import Image

import data
import env


def picture(seed=0, size=(40, 30)):
    return Image.new("RGB", size, (20 * seed, 90, 160))


def base64_of(image):
    out = io.BytesIO()
    image.resize((90, 70)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def refusal(function, *args):
    """The message of the UserError that a call ends with: one line."""
    with pytest.raises(env.UserError) as e:
        function(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def write_tsv(path, lines):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(lines[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


def read(bench, path, image_root="", limit=0):
    return data.read_benches(f"{bench}:{path}", image_root, limit)


MME_OPTIONS = ["red", "blue", "a, b", 'the "sign"', "The image does not feature the text."]


def mme_line(i, lite, **changes):
    """A line of MME-RealWorld, or of its Lite split: the options are one list and A to E do not exist."""
    options = [f"({letter}) {option}" for letter, option in zip("ABCDE", MME_OPTIONS)]
    line = {"index": i, "image": base64_of(picture(i)), "question": f"Which, {i}?"}
    line["multi-choice options"] = str(options)
    if not lite:
        line["multi-choice options"] = "The choices are listed below:\n" + "\n".join(options)
        line.update(zip("ABCDE", MME_OPTIONS))
    line.update({"answer": "E", "category": "Perception/OCR", "l2-category": "Text/Advert"})
    return {**line, **changes}


@pytest.mark.parametrize("lite", [False, True])
def test_mmerealworld(tmp_path, lite):
    """Both TSVs give the same rows, with tasks, subtasks and l2 categories."""
    more = {"answer": "A", "category": "Reasoning/Monitoring", "l2-category": "Intention"}
    tsv = write_tsv(tmp_path / "mme.tsv", [mme_line(0, lite), mme_line(1, lite, **more)])
    rows = read("mmerealworld_lite" if lite else "mmerealworld", tsv).popitem()[1]
    assert rows[0]["choices"] == MME_OPTIONS and rows[0]["solution"] == "E"
    lines = rows[0]["problem"].split("\n")
    assert lines[:2] == ["Which, 0?", "A. red"] and lines[5] == "E. The image does not feature the text."
    assert rows[0]["category"] == "Perception/OCR/text/advert"
    assert rows[1]["category"] == "Reasoning/Monitoring/intention"


def test_a_local_tsv(tmp_path):
    """VLMEvalKit writes NAME_local.tsv for a file above 1 GB: image_path in the place of image."""
    folder = tmp_path / "images" / "mme"
    os.makedirs(folder)
    picture().save(folder / "0.jpg")
    line = mme_line(0, False, image_path="0.jpg")
    del line["image"]
    tsv = write_tsv(tmp_path / "mme_local.tsv", [{**line, "image_path": str(folder / "0.jpg")}, line])
    rows = read("mmerealworld", tsv, str(folder))["mmerealworld"]
    assert rows[0]["images"] == rows[1]["images"] == [str(folder / "0.jpg")]
    assert "row 1: no image" in refusal(read, "mmerealworld", tsv)


def hrbench_lines():
    """Three questions in four rotations; the first line of a question has the image, the others its index."""
    lines, options = [], ["red", "blue", "green", "grey"]
    for i in range(12):
        turned = options[i % 4:] + options[:i % 4]
        image = i - i % 4 if i % 4 else base64_of(picture(i))
        line = {"index": i, "image": image, "question": f"Which, {i // 4}?", "cycle_category": i % 4}
        line.update(zip("ABCD", turned))
        line.update({"answer": "ABCD"[turned.index("red")], "category": "cross" if i < 4 else "single"})
        lines.append(line)
    return lines


def test_hrbench(tmp_path):
    """Images are unpacked once and shared by the rotations; the average is over the rotations."""
    lines = hrbench_lines()[::-1]           # so the image comes after the lines that refer to it
    tsv = write_tsv(tmp_path / "hr_bench_4k.tsv", lines)
    rows = read("hrbench4k", tsv)["hrbench4k"]
    assert len(rows) == 12 and rows[0]["images"] == rows[3]["images"] != rows[4]["images"]
    assert rows[11]["category"] == "cross" and rows[0]["category"] == "single"
    assert rows[0]["cycle_category"] == "3"
    assert env.open_image(rows[7]["images"][0]).getpixel((0, 0)) == (80, 90, 160)
    before = os.stat(rows[0]["images"][0])
    assert len(os.listdir(tsv + ".images")) == 3 and oct(before.st_mode)[-3:] == "644"
    assert read("hrbench4k", tsv, limit=5)["hrbench4k"] == rows[:5]
    assert os.stat(rows[0]["images"][0]) == before


def test_visualprobe(tmp_path):
    """BASE/VisualProbe_Hard/val.json, images relative to BASE: a file of rows with --image_root=BASE."""
    os.makedirs(tmp_path / "VisualProbe_Hard/images")
    picture().save(tmp_path / "VisualProbe_Hard/images/0.jpg")
    row = {"problem": "<image>\nWhat?", "images": ["VisualProbe_Hard/images/0.jpg"], "solution": "7"}
    (tmp_path / "VisualProbe_Hard/val.json").write_text(json.dumps([row, row]))
    row, = read("hard", tmp_path / "VisualProbe_Hard/val.json", str(tmp_path), limit=1)["hard"]
    assert row["solution"] == "7" and row["problem"] == "What?"
    assert row["images"] == [str(tmp_path / "VisualProbe_Hard/images/0.jpg")]


def test_vstar(tmp_path):
    """The folder's questions without OCR and GPT4V-hard, with the letters and boxes; the TSV alike."""
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
    line = {"index": 0, "image": base64_of(picture()), "question": "Which?"}
    line.update(zip("ABCD", options + ["", ""]))
    line.update({"answer": "B", "category": "direct_attributes"})
    tsv = write_tsv(tmp_path / "V.tsv", [line])
    row, = read("vstar", tsv)["vstar"]
    assert row["problem"] == rows[0]["problem"] and row["choices"] == rows[0]["choices"]


def test_bad_benchmarks(tmp_path):
    """One line that names the file, and what is wrong."""
    line = hrbench_lines()[0]
    tsv = write_tsv(tmp_path / "x.tsv", [{**line, "answer": "F"}])
    assert "x.tsv: row 0: the answer 'F' is none of its 4" in refusal(read, "hrbench4k", tsv)
    del line["category"]
    assert "category" in refusal(read, "hrbench4k", write_tsv(tsv, [line]))
    (tmp_path / "x.tsv").write_bytes(b"PAR1\xff\x00")
    (tmp_path / "x.json").write_bytes(b"PAR1\xff\x00")
    for path in (tsv, tmp_path / "x.json", tmp_path):
        assert str(path) in refusal(read, "vstar", path)
    for spec in ("vstar:/nowhere", "vstar"):
        assert "NAME:PATH" in refusal(data.read_benches, spec, "", 0)
