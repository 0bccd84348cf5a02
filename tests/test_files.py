"""What env.py reads: images, image paths, rows. And what no file of the project runs."""
import ast
import io
import json
import math
import os
import random
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

import env
from conftest import ROOT

def png(width, height, body, depth=8):
    """A PNG file by hand: its header may promise anything."""
    file = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        file += struct.pack(">I", len(content)) + name + content + checksum
    return file


def test_readable_images(tmp_path):
    """RGB of 8 bits, upright, an animation's first frame, what is transparent on white."""
    red, blue = Image.new("RGB", (60, 40), (200, 0, 0)), Image.new("RGB", (60, 40), "blue")
    clear = red.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 30, 40))
    palette = clear.quantize(8)
    exif = Image.Exif()
    exif[274] = 6                                      # stored lying on its side
    red.save(tmp_path / "plain.png")
    red.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    for name in ("animated.gif", "animated.webp"):
        red.save(tmp_path / name, save_all=True, append_images=[blue] * 3, lossless=True)
    clear.save(tmp_path / "white.png")
    palette.save(tmp_path / "white.gif", transparency=palette.getpixel((0, 0)))
    Image.fromarray(np.full((40, 60), 51200, np.uint16)).save(tmp_path / "grey.png")      # 200 of 255
    line = b"\0" + struct.pack(">HHH", 51200, 0, 0) * 60
    (tmp_path / "rgb16.png").write_bytes(png(60, 40, line * 40, depth=16))
    for path in tmp_path.iterdir():
        assert env.open_image(path, header_only=True) is None
        image = env.open_image(path)
        size = (40, 60) if path.stem == "turned" else (60, 40)
        colour = dict(white=(255, 255, 255), grey=(200, 200, 200)).get(path.stem, (200, 0, 0))
        assert (image.mode, image.size) == ("RGB", size), path
        assert np.abs(np.subtract(image.getpixel((3, 3)), colour)).max() <= 6, path


@pytest.mark.parametrize("name", ["bomb", "thin", "empty", "half", "text", "header", "missing"])
def test_unreadable_images(name, tmp_path):
    """One line that names the file. All but a file that is cut short are refused by their header alone."""
    Image.effect_noise((60, 40), 90).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    files = dict(bomb=png(30_000, 30_000, b"\0"), thin=png(1, 20_000, bytes(80_000)), empty=b"",
                 half=whole[:len(whole) // 2], text=b"not an image", header=whole[:24])
    path = str(tmp_path / name)
    if name in files:
        (tmp_path / name).write_bytes(files[name])
    if name == "half":
        env.check_images([{"images": [path]}], 0, 1)
    else:
        with pytest.raises(env.UserError, match=name):
            env.check_images([{"images": [str(tmp_path / "whole.png")]}, {"images": [path]}], 0, 1)
    with pytest.raises(env.UserError, match=f"{name}: not a readable image.*remove its row") as e:
        env.open_image(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "dds"])
def test_damaged_images(kind, tmp_path):
    """Bytes changed, cut out or cut off: an image or a UserError, whatever a decoder makes of them."""
    rng = random.Random(0)
    warnings.simplefilter("ignore")
    buffer = io.BytesIO()
    Image.effect_noise((60, 40), 90).convert("RGB").save(buffer, kind)
    for _ in range(60):
        body = bytearray(buffer.getvalue())
        for at in (rng.randrange(len(body)), rng.randrange(60)):
            body[at:at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        (tmp_path / "x").write_bytes(body[:rng.choice([None, rng.randrange(len(body))])])
        try:
            assert env.open_image(tmp_path / "x").mode == "RGB"
        except env.UserError as e:
            assert "not a readable image" in str(e)


def test_image_root(tmp_path):
    """With a root a path cannot leave it: not by .., not absolutely, not by a link, not into a like name."""
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    for name in ("root/a/x.png", "root2/x.png", "x.png"):
        (tmp_path / name).write_text("")
    (root / "out.png").symlink_to(tmp_path / "x.png")
    (root / "folder").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(root)
    inside = str(root / "a/x.png")
    for path in ("a/x.png", "a/../a/x.png", inside, "folder/root/a/x.png"):
        assert env.find_image(str(root), path, "row 5", True) == inside
        assert env.find_image(str(tmp_path / "link"), path, "row 5", True) == inside
    for path in ("../x.png", str(tmp_path / "x.png"), "out.png", "folder/x.png", "../root2/x.png",
                 "/etc/passwd", "..", "a\0/../../x.png"):
        with pytest.raises(env.UserError, match="row 5: .*outside"):
            env.find_image(str(root), path, "row 5", True)
    assert env.find_image(str(root), "../x.png", "row 5", False)


# --- Rows -----------------------------------------------------------------------------------------------

ROW = {"images": ["a.png"], "problem": "<image>Which?", "solution": "red", "extra": "é"}


@pytest.fixture
def load(tmp_path):
    """load(text) reads it as the rows of a file beside a.png."""
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")

    def load(text, image_root=""):
        (tmp_path / "x.json").write_text(text, encoding="utf-8")
        return env.load_rows(str(tmp_path / "x.json"), image_root)
    return load


def test_rows(load, tmp_path):
    """A JSON list and JSON Lines give the same rows: absolute paths, unknown fields, no <image>."""
    line = json.dumps({**ROW, "problem": "<image>a\u2028b"}, ensure_ascii=False)
    expected = [{**ROW, "images": [str(tmp_path / "a.png")], "problem": "a\u2028b"}] * 2
    assert load(f"[{line},\n{line}]") == load(f"\ufeff{line}\n\n{line}\n") == expected
    assert load(f"[{line}, {line}]", image_root=str(tmp_path)) == expected
    assert load(json.dumps({**ROW, "solution": 0, "choices": None}))[0]["solution"] == 0
    assert load(json.dumps({**ROW, "solution": "B", "choices": ["blue", "red"]}))


@pytest.mark.parametrize("change, message", [
    ({"images": None}, "row 1 has no `images`"), ({"images": []}, "row 1 has no `images`"),
    ({"problem": ""}, "row 1 has no `problem`"), ({"solution": None}, "row 1 has no `solution`"),
    ({"images": "a.png"}, "row 1: `images` is not a list"), ({"images": ["b.png"]}, "row 1: no image"),
    ({"images": ["a.png", "a.png"]}, "row 1: .*several images are not supported"),
    ({"choices": ["blue", "green"]}, "row 1: its solution 'red' is none of its choices"),
    ({"solution": "C", "choices": ["red", "blue"]}, "row 1: its solution 'C' is none of its choices")])
def test_bad_rows(load, change, message):
    """What is wrong is one line that names file and row."""
    with pytest.raises(env.UserError, match=f"x.json: {message}") as e:
        load(json.dumps([ROW, {**ROW, **change}]))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, message", [
    ("{", "not JSON"), ("[1, 2", "not JSON"), ("", "no rows"), ("[]", "no rows"), ("[" * 100_000, "not JSON"),
    ("5\n", "row 0 has no `images`"), ('["a.png"]', "row 0 has no `images`")])
def test_files_without_rows(load, text, message, tmp_path):
    with pytest.raises(env.UserError, match=f"x.json: {message}"):
        load(text)
    for name, message in (("x.parquet", "Parquet is not read.*JSON Lines"), ("x.jsonl", ".*python data.py")):
        with pytest.raises(env.UserError, match=f"{name}: {message}"):
            env.load_rows(str(tmp_path / name))


HOSTILE = [5, True, math.nan, "\x1b[2J\n", "\ud800", "../" * 9, "a\0b", [None], ["\ud800"], [[]], {"a": 1}]


@pytest.mark.parametrize("key", [*ROW, "choices", "doc_id"])
def test_hostile_rows(key, load, tmp_path):
    """Any value in any field is a row or one printable line."""
    for value in HOSTILE:
        for root in ("", str(tmp_path)):
            try:
                load(json.dumps({**ROW, key: value}), image_root=root)
            except env.UserError as e:
                assert str(e).isprintable() and "x.json: row 0" in str(e)


# --- Sources --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["env", "sft", "eval", "data", "rppo"])
def test_nothing_evaluates_or_unpickles(name):
    """No file runs or unpickles what it reads."""
    with open(os.path.join(ROOT, f"{name}.py")) as f:
        source = f.read()
    assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|subprocess|dill|joblib)\b", source, re.M)
    assert "trust_remote_code=True" not in source
    for node in ast.walk(ast.parse(source)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else None
        assert called not in ("eval", "exec", "compile", "__import__", "os.system", "torch.load", "np.load")
