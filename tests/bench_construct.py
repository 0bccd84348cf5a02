"""How much CPU and memory data.py --images itself needs: N generated photographs of 4 megapixels, and an annotator and a
policy that answer at once and let every question through, so that nothing is saved by dropping any.

    python tests/bench_construct.py [N, default 200] [workers, default 4]

Prints CPU seconds per photograph of the whole process (reading, decoding, hashing, cropping, encoding for the endpoint,
recording, writing; no HTTP, and imports and the drawing of the photographs left out), the same for a second run from the
records, and the resident memory along the way, which must not grow.
"""
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import data  # noqa: E402
import env  # noqa: E402

SIZE = (2464, 1632)
ZOOMS = [([400, 400, 800, 800], 0), ([250, 250, 750, 750], 1), ([300, 300, 700, 700], 2)]
requests, tries = 0, 0


def photograph(path):
    """Smooth hills and some noise: about as large as a camera's JPEG of this size."""
    rng = np.random.default_rng([7, *path.name.encode()])
    hills = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).resize(SIZE, Image.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 40, (SIZE[1], SIZE[0], 3), np.uint8))
    Image.blend(hills, noise, 0.3).save(path, quality=92)


def chat(url, name, messages, temperature):
    """Every vote right where it should be and wrong elsewhere, every second trajectory right, all by three crops."""
    global requests, tries
    requests += 1
    user, turns = messages[1]["content"], sum(m["role"] == "assistant" for m in messages)
    if "eyesight" in user[-1]["text"]:
        question = '{"question": "What is on the sign?", "answer": "green"}'
        return data.look(*ZOOMS[turns]) if turns < 3 else f"<answer>{question}</answer>"
    if messages[0]["content"] == env.SYSTEM:
        if turns == 0:
            tries += 1
            return f"<think>try {tries % 2}</think>" + data.look(*ZOOMS[0])
        good = name == "teacher" or "try 0" in messages[2]["content"]
        return data.look(*ZOOMS[turns]) if turns < 3 else f"<answer>{'green' if good else 'red'}</answer>"
    whole = len(user) == 1 or len(user[0]["image_url"]["url"]) > 500_000
    return f"<answer>{'red' if whole else 'green'}</answer>"


def resident():
    """Megabytes of memory that this process holds (Linux)."""
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def main(n=200, workers=4):
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder, "photos"), Path(folder, "out")
        photos.mkdir()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(photograph, [photos / f"{i:04}.jpg" for i in range(n)]))
        size = sum(p.stat().st_size for p in photos.iterdir()) / n / 2 ** 20
        env.chat, build, memory = chat, data.build, []

        def watched(job, name):
            result = build(job, name)
            memory.append(resident())
            return result

        data.build = watched
        cfg = data.Config(images=str(photos), annotator="http://localhost", annotator_name="teacher", policy="http://localhost",
                          policy_name="policy", out=str(out), parallel=workers)
        env.Processor.view(data.SimpleNamespace(patch=16, merge=2), Image.new("RGB", SIZE), (0, 0, 64, 64), 4096, 4096)  # imports
        for run in ("first run", "from the records"):
            asked, cpu, wall = requests, time.process_time(), time.time()
            data.main(cfg)
            cpu, wall = time.process_time() - cpu, time.time() - wall
            print(f"{run}: {n} photographs of {SIZE[0] * SIZE[1] / 1e6:.1f} megapixels ({size:.1f} MB each), {(requests - asked) / n:.1f} "
                  f"requests each: {cpu / n:.3f} s of CPU and {wall / n:.3f} s per photograph")
        parts = [memory[i * n // 4:(i + 1) * n // 4] for i in range(4)]
        print("resident memory, MB, highest in each quarter of the first run: " + " ".join(f"{max(p):.0f}" for p in parts))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
