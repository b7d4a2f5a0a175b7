"""A package that is changed on disk during a run does not break its end: nothing of it is imported then."""

import subprocess
import sys

END = """
import sys
from pathlib import Path
import fp4rl.cli.run as run
from fp4rl.cli.main import main

class Changed:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("fp4rl."):
            print("imported late:", name)

def started(*_):
    sys.meta_path.insert(0, Changed())
    print("started")
    return run.SuiteOutcome()

run.run_all = started
main(["quickstart", "--runs", sys.argv[1]])
"""


def test_nothing_of_the_package_is_imported_after_the_first_run_starts(tmp_path):
    ended = subprocess.run([sys.executable, "-c", END, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "started" in ended.stdout, ended.stderr
    assert "imported late" not in ended.stdout
