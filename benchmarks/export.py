"""What an export costs: megabytes of bfloat16 a second, peak memory, and bits a weight, for each packed layout.

    python benchmarks/export.py [--small] [--folder build/export-benchmark] [--to compressed_tensors] [--write] [--keep]

The checkpoint has the shape of Qwen2.5-1.5B, random weights, and shards of 320 MB; `--small` keeps two of its layers.
Every export is a process of its own with two threads; the first row copies as many bytes and computes nothing. MB/s are
of the clock, and of a second of processor time, which other work on the machine does not change.
`--write` puts the table into benchmarks/results/export.md.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from fp4rl.engines.checkpoints.export import export
from fp4rl.engines.checkpoints.layouts.all import LAYOUTS, layout_named
from fp4rl.engines.checkpoints.source import source_of
from fp4rl.models.quiet import quiet
from scan import make_checkpoint, peak_mb

AIM_MB_S, AIM_BITS, THREADS = 200, 4.25, 2
LAYERS, FEW_LAYERS = 28, 2
CHUNK = 1 << 24
RESULTS = Path(__file__).parent / "results" / "export.md"


def measured(layout: str, place: Path, out: Path) -> dict[str, float]:
    """Export in a process of its own."""
    command = [sys.executable, __file__, "--child", layout, str(place), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(layout: str, place: str, out: str) -> None:
    """What `measured` measures."""
    quiet()
    torch.set_num_threads(THREADS)
    source = source_of(place, Path("runs"), "w4a8", None, layout_named(layout))
    before, began, used = peak_mb(), time.perf_counter(), time.process_time()
    made = export(source, layout_named(layout), Path(out))
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    sizes = [file.stat().st_size for file in Path(out).glob("*.safetensors")]
    layers = [entry.stored.bytes for entry in made.policy.rounded]
    found = {
        "seconds": seconds,
        "cpu": cpu,
        "used_mb": peak_mb() - before,
        "bits": made.bits,
        "layer_mb": max(layers) / 1e6,
    }
    print(json.dumps(found | {"file_mb": max(sizes) / 1e6, "written": made.stored.bytes}))


def copied(place: Path, out: Path, written: int) -> float:
    """Seconds to read the checkpoint, and to write as many bytes as an export has and bring them onto the disk."""
    began = time.perf_counter()
    for file in place.glob("*.safetensors"):
        with file.open("rb", buffering=0) as handle:
            while handle.read(CHUNK):
                pass
    with out.open("wb", buffering=0) as handle:
        for _ in range(0, written, CHUNK):
            handle.write(bytes(CHUNK))
        os.fsync(handle.fileno())
    out.unlink()
    return time.perf_counter() - began


def table(place: Path, layouts: list[str]) -> list[str]:
    """Return a row for each layout, and one for the disk."""
    given = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    rows, written = [], 0
    for layout in layouts:
        out = place.parent / layout
        found = measured(layout, place, out)
        shutil.rmtree(out)
        written = max(written, int(found["written"]))
        speed, bits = given / 1e6 / found["seconds"], f"{found['bits']:.3f} (aim {AIM_BITS})"
        rows.append(
            f"| {layout} | {found['seconds']:.1f} | {speed:.0f} (aim {AIM_MB_S}) | {given / 1e6 / found['cpu']:.0f} | "
            f"{found['used_mb']:.0f} | {found['file_mb']:.0f} and {found['layer_mb']:.0f} | {bits} |"
        )
    seconds = copied(place, place.parent / "copied", written)
    return [
        f"{given / 1e9:.2f} GB of bfloat16 in {len(list(place.glob('*.safetensors')))} shards, {THREADS} threads, "
        f"{os.cpu_count()} cores.",
        "",
        "| layout | s | MB/s of bfloat16 | a processor's | memory above the start, MB | largest file and layer, MB "
        "| bits a weight |",
        "|---|---|---|---|---|---|---|",
        f"| read, and written as much | {seconds:.1f} | {given / 1e6 / seconds:.0f} | | | | |",
        *rows,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two layers")
    parser.add_argument("--folder", type=Path, default=Path("build/export-benchmark"))
    packed = [name for name in ("compressed_tensors", "ascend_v1") if name in LAYOUTS]
    parser.add_argument("--to", nargs="+", default=packed, choices=packed)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    place = given.folder / ("small" if given.small else "checkpoint-1.5b")
    if not (place / "model.safetensors.index.json").is_file():
        make_checkpoint(place, FEW_LAYERS if given.small else LAYERS)
    lines = table(place, given.to)
    print("\n".join(lines))
    if given.write:
        head = ["# Export", "", f"`python benchmarks/export.py`, torch {torch.__version__}, {platform.machine()}.", ""]
        RESULTS.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
    if not given.keep:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
