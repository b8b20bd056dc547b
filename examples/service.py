"""A service that keeps a pipeline ready: a prompt a line comes in, the path of a video goes out.

    echo "two cats boxing on a stage" | python examples/service.py Wan2.2-T2V-A14B --save_dir videos

When nobody has asked for a while it sleeps: the weights' memory is free for others, and what else takes long in a start
stays done. The next prompt wakes it.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
from pathlib import Path

import wan_pipeline


def prompts() -> queue.Queue[str | None]:
    """Read lines in a thread of their own; None stands for the end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt_dir")
    parser.add_argument("--save_dir", type=Path, default=Path())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", default="832*480")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--idle", type=float, default=60.0, help="seconds until it sleeps")
    args = parser.parse_args()
    args.save_dir.mkdir(exist_ok=True)
    width, height = map(int, args.size.split("*"))
    shape = {"size": (width, height), "frame_num": args.frames}

    lines = prompts()
    with wan_pipeline.WanT2V.from_checkpoint(args.ckpt_dir, device=args.device, **shape) as pipe:
        n_made = 0
        while True:
            try:
                prompt = lines.get(timeout=args.idle)
            except queue.Empty:
                if not pipe.asleep:
                    print(f"asleep: {pipe.sleep().nbytes} bytes given back", file=sys.stderr, flush=True)
                continue
            if prompt is None:
                break
            if pipe.asleep:
                print(f"awake: {pipe.wake().nbytes} bytes fetched", file=sys.stderr, flush=True)
            path = args.save_dir / f"{n_made:04}.mp4"
            pipe(prompt, steps=args.steps, seed=n_made, **shape).save(path)
            print(path, flush=True)
            n_made += 1


if __name__ == "__main__":
    main()
