"""Takes the pictures of the report in the docs from a finished suite, in headless Chromium.

python tools/screenshots.py [runs/quickstart]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from chromium import seen

from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.html import render

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TO = "document.querySelector('{}').closest('section, h2, h3, figure, div').scrollIntoView(), null"
# name, width and height of the window, whether dark, what is at its top
SHOTS = (
    ("report", 1200, 1300, False, "body"),
    ("report-flips", 1200, 760, False, ".flip"),
    ("report-rollouts", 1200, 620, True, "#rollout-arm"),
)


def main() -> int:
    """Take every picture; return 1 where the page has a fault."""
    suite = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    with TemporaryDirectory() as place:
        page = Path(place) / "report.html"
        page.write_text(render(collect(suite)), encoding="utf-8")
        for name, width, height, dark, top in SHOTS:
            shot = seen(page, width, height=height, dark=dark, ask=TO.format(top) if top != "body" else "null")
            if shot.faults or shot.requests or shot.spill:
                print(f"{name}: {shot.faults} {shot.requests} {shot.spill} pixels too wide", file=sys.stderr)
                return 1
            (IMAGES / f"{name}.png").write_bytes(shot.png)
            print(IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
