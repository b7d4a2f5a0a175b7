"""What CI runs of the slow tests: a turn by the number of commits, and the rooms of the change, within a time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOON = 1_700_000_000


def git(place, *arguments, at=NOON):
    names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    dates = {"GIT_AUTHOR_DATE": f"{at} +0000", "GIT_COMMITTER_DATE": f"{at} +0000", "PATH": "/usr/bin:/bin"}
    subprocess.run(["git", *names, *arguments], cwd=place, env=dates, check=True, capture_output=True)


def commit(place, file, at=NOON):
    path = place / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{at}")
    git(place, "add", ".", at=at)
    git(place, "commit", "--quiet", "--allow-empty", "-m", file, at=at)


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    commit(tmp_path, "constraints.txt", NOON - 90_000)
    commit(tmp_path, "src/fp4rl/spec/load.py", NOON - 87_000)
    return tmp_path


def owed(place, *base):
    found = subprocess.run(
        [sys.executable, ROOT / ".ci" / "turn.py", *base], cwd=place, capture_output=True, text=True, check=False
    )
    matched = re.fullmatch(r"--turn (\d+)/16 --rooms (\S+)\n", found.stdout)
    return (int(matched[1]), matched[2]) if matched else found.stderr.strip()


def test_commits_of_one_day_have_different_turns(repository):
    """The kind: a rotation that stands still while the code moves (it went by the day of the year)."""
    turns = []
    for _ in range(16):
        commit(repository, "README.md")
        turns.append(owed(repository)[0])
    assert turns == [*range(3, 16), 0, 1, 2]  # two commits were there


def test_the_change_is_what_the_last_day_touched(repository):
    commit(repository, "src/fp4rl/rl/trainer.py")
    commit(repository, "tests/lab/test_runner.py", NOON + 60)
    assert owed(repository)[1] == "lab,rl"  # spec is 24.2 hours old
    assert owed(repository, "HEAD~1")[1] == "lab"
    assert owed(repository, "HEAD~3")[1] == "lab,rl,spec"


def test_what_every_room_stands_on_is_a_change_of_all(repository):
    commit(repository, "constraints.txt")
    assert owed(repository)[1] == "all"


def test_a_branch_is_held_against_where_it_left_main(repository):
    commit(repository, "src/fp4rl/rl/trainer.py")
    git(repository, "update-ref", "refs/remotes/origin/main", "HEAD")
    commit(repository, "src/fp4rl/cli/scan.py", NOON + 60)
    assert owed(repository)[1] == "cli"


def test_a_shallow_clone_that_cannot_be_deepened_still_rotates_and_takes_all_as_changed(repository, tmp_path):
    turns = set()
    for number in range(6):
        commit(repository, "src/fp4rl/rl/trainer.py", NOON + number)
        copy = tmp_path / f"copy{number}"
        git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", str(copy))
        git(copy, "remote", "set-url", "origin", "file:///nowhere")
        turn, rooms = owed(copy)
        turns.add(turn)
        assert rooms == "all"
    assert len(turns) > 1


def test_a_base_that_is_not_there_is_a_mistake(repository):
    assert owed(repository, "v9") == "v9 is no commit of this clone; name another base, or none"


@pytest.fixture
def suite(tmp_path):
    """Two rooms of 20 slow tests and one fast one each, and a room whose tests lie elsewhere."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\naddopts = --import-mode=importlib\n")
    for room, text in (("rl", ""), ("lab", "# from fp4rl.engines import processes\n")):
        (tmp_path / room).mkdir()
        slow = "".join(f"@pytest.mark.slow\ndef test_{n}():\n    pass\n\n\n" for n in range(20))
        (tmp_path / room / f"test_{room}.py").write_text(f"{text}import pytest\n\n\n{slow}def test_fast():\n    pass\n")
    return tmp_path


def run_in(place, *options):
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", *options],
        cwd=place,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout


def collected(place, *options):
    return [line for line in run_in(place, "-m", "slow", "--collect-only", *options).splitlines() if "::" in line]


@pytest.mark.slow
def test_a_round_of_turns_holds_every_slow_test_once(suite):
    found = [name for k in (0, 1, 2) for name in collected(suite, "--turn", f"{k}/3")]
    assert len(found) == len(set(found)) == 40


@pytest.mark.slow
def test_the_rooms_of_the_change_come_whole_after_the_turn(suite):
    """`engines` has no folder of tests: those that name it stand for it; `spec` has none here that do."""
    turn = collected(suite, "--turn", "3/16")
    found = collected(suite, "--turn", "3/16", "--rooms", "engines,spec")
    assert 0 < len(turn) < 10
    assert found[: len(turn)] == turn
    assert {name for name in found if name not in turn} == {f"lab/test_lab.py::test_{n}" for n in range(20)} - {*turn}
    assert len(collected(suite, "--turn", "3/16", "--rooms", "all")) == 40


@pytest.mark.slow
def test_what_the_time_does_not_hold_is_skipped_and_said(suite):
    found = run_in(suite, "--minutes", "0", "rl")
    assert "1 passed, 20 skipped" in found
    assert "0 minutes of slow tests are over; `make slow` runs them all" in found
