"""Load on the server of `samlight app`: clients that open images, click, undo, keep and download, all at once.

The server runs in a process of its own on this machine, and only loopback addresses are used. The JSON has the calls
and errors of each kind, their times, and the memory of the server's process over time.

    python benchmarks/app.py --clients 16 --seconds 120 --json benchmarks/results/app_cpu.json
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image, ImageEnhance


ROOT = Path(__file__).parents[1]
WARM_UP = 0.25  # of the time: memory is compared after it
ROUNDS_OF_A_TAB = 4  # images that a client opens before it leaves and comes back as another


class Log:
    """Times and errors of calls, from many threads."""

    def __init__(self):
        self.lock = threading.Lock()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self.tabs = 0

    def call(self, client, name: str, *arguments):
        start = time.perf_counter()
        try:
            return client.predict(*arguments, api_name=f"/{name}")
        except Exception as error:  # each is counted, and none may stop the others
            with self.lock:
                self.errors[f"{name}: {type(error).__name__}: {str(error)[:120]}"] += 1
            raise
        finally:
            with self.lock:
                self.times[name].append(time.perf_counter() - start)


def use(url: str, number: int, stop: threading.Event, log: Log, folder: Path):
    """Be one user after another until the time is over."""
    from gradio_client import Client, handle_file

    chance = random.Random(number)
    images = sorted((ROOT / "examples" / "images").glob("*.jpg"))
    while not stop.is_set():
        with contextlib.suppress(Exception), contextlib.closing(Client(url, verbose=False)) as client:
            with log.lock:
                log.tabs += 1
            for _ in range(ROUNDS_OF_A_TAB):
                # An image that nobody else has: equal ones would share gradio's upload.
                image = ImageEnhance.Brightness(Image.open(chance.choice(images))).enhance(chance.uniform(0.7, 1.3))
                image.save(folder / f"{number}.jpg", quality=chance.randint(80, 95))
                opened = log.call(client, "open_image", handle_file(str(folder / f"{number}.jpg")))
                width, height = opened["width"], opened["height"]
                for _ in range(3):
                    points = [
                        [chance.uniform(0, width), chance.uniform(0, height)] for _ in range(chance.randint(1, 3))
                    ]
                    log.call(client, "prompt", points, [1] + [chance.randint(0, 1) for _ in points[1:]], None)
                    log.call(client, "choose", chance.randrange(3))
                    log.call(client, "undo")
                    log.call(client, "keep", "object")
                log.call(client, "download", chance.choice(["png", "labels", "coco", "yolo", "labelme", "cutout"]))
                if chance.random() < 0.25:
                    log.call(client, "everything", 2, 0.3, 0.5)
                if stop.is_set():
                    return


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process in MB of 2**20 bytes (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def start_server(model: str | None) -> tuple[subprocess.Popen, str]:
    """Start `samlight app` on a free port, and return its process and address."""
    command = [sys.executable, "-m", "samlight_hf.commands.cli", "app", "--port", "0"]
    process = subprocess.Popen(
        command + (["--model", model] if model else []), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for line in process.stdout:
        if line.startswith("Open "):
            return process, line.split()[1]
    raise RuntimeError("the server did not start.")


def summarize(times: list[float]) -> dict:
    ordered = sorted(times)
    return {
        "calls": len(ordered),
        "median_ms": round(1000 * statistics.median(ordered), 1),
        "p95_ms": round(1000 * ordered[int(0.95 * (len(ordered) - 1))], 1),
        "max_ms": round(1000 * ordered[-1], 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--model", help="folder or Hub name (the bundled checkpoint)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()

    process, url = start_server(args.model)
    log, stop, memory = Log(), threading.Event(), []
    try:
        with tempfile.TemporaryDirectory() as place:
            threads = [
                threading.Thread(target=use, args=(url, number, stop, log, Path(place)))
                for number in range(args.clients)
            ]
            start = time.monotonic()
            for thread in threads:
                thread.start()
            while time.monotonic() - start < args.seconds:
                time.sleep(1)
                memory.append((time.monotonic() - start, resident_mb(process.pid)))
            stop.set()
            for thread in threads:
                thread.join()
        is_up = process.poll() is None
    finally:
        process.terminate()
        process.wait()

    import gradio
    import torch

    late = [value for second, value in memory if second >= WARM_UP * args.seconds]
    third = max(1, len(late) // 3)
    result = {
        "command": shlex.join(["python", "benchmarks/app.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gradio": gradio.__version__},
        "clients": args.clients, "seconds": args.seconds, "tabs": log.tabs,
        "calls": sum(map(len, log.times.values())), "errors": dict(log.errors), "server_is_up": is_up,
        "times": {name: summarize(times) for name, times in sorted(log.times.items())},
        "memory_mb": {
            "first_third_after_warm_up": round(statistics.median(late[:third]), 1),
            "last_third": round(statistics.median(late[-third:]), 1),
            "max": round(max(value for _, value in memory), 1),
            "every_10_s": [round(value) for _, value in memory[::10]],
        },
    }  # fmt: skip
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
