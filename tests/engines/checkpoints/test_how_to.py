"""docs/how-to/export.md, command by command, on the run that it speaks of: it prints what the page shows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp4rl.lab import catalogue

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "export.md"
FP4RL = f"{sys.executable} -W ignore -m fp4rl"


def shown(page):
    """Each command with what stands below it."""
    pairs = []
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for piece in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = piece.partition("\n")
            pairs.append((command, output))
    return pairs


def plain(text):
    """Without what differs between machines: numbers, and the line breaks and plurals that follow from them."""
    text = re.sub(r"\b(?=\w*\d)[0-9a-f]{12}\b", "DIGEST", text)
    text = re.sub(r"-?\d[\d,.]*\d|-?\d", "N", text)
    text = re.sub(r"\b(value|tensor|file|problem|differ)s\b", r"\1", text)
    return " ".join(text.split())


def run(command, place):
    words = command.replace("fp4rl", FP4RL, 1) if command.startswith("fp4rl") else command
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        words, shell=True, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print_and_the_export_has_the_recorded_accuracy(tmp_path):
    suite = yaml.safe_load((Path(catalogue.__file__).parent / "quickstart.yaml").read_text())
    one = suite | {"arms": {"w4a8": suite["arms"]["w4a8"]}, "seeds": [0], "comparisons": []}
    (tmp_path / "quickstart.yaml").write_text(yaml.safe_dump(one))
    assert "1 of 1 run" in run("fp4rl run quickstart.yaml", tmp_path)
    pairs = [(command, output) for command, output in shown(PAGE.read_text()) if not command.startswith("vllm")]
    assert len(pairs) == 8
    for command, output in pairs:
        assert plain(run(command, tmp_path)) == plain(output), command
    verified = json.loads(run("fp4rl verify policy --engine transformers --json 2>/dev/null", tmp_path))
    assert verified["equal"]
    loaded = verified["checks"][-1]
    assert (loaded["check"], loaded["compared"]["problems"], loaded["differing"]["problems"]) == (
        "transformers",
        500,
        0,
    )
    [result] = (tmp_path / "runs" / "quickstart").glob("w4a8-s0-*/result.json")
    recorded = json.loads(result.read_text())["evaluations"]
    [last] = [e for e in recorded if e["last"] and e["profile"]["name"] == "deployment"]
    [stored] = json.loads(run("fp4rl eval policy -p stored --json 2>/dev/null", tmp_path))
    assert stored["answers_digest"] == last["answers_digest"]
    assert stored["strict"] == last["strict"] > 0.5
