"""Which slow tests a change owes, as options of pytest: the turn of its number of commits, and the rooms it touches.

A change is what lies between a base and HEAD: the base given, or where HEAD left origin/main, or the last commit that
is a day older than HEAD. Without any of them every file counts as changed.
"""

import re
import subprocess
import sys

TURNS = 16
EVERYWHERE = {"constraints.txt", "setup.sh", "pyproject.toml", "tests/conftest.py"}
DAY = 24 * 60 * 60


def git(*arguments: str) -> str:
    """What git answers; nothing where it has no answer."""
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def turn() -> int:
    """The number of commits up to HEAD; in a shallow clone, which cannot count them, a number out of HEAD's name."""
    if git("rev-parse", "--is-shallow-repository") == "true":
        git("fetch", "--quiet", "--unshallow")
    if git("rev-parse", "--is-shallow-repository") == "true":
        return int(git("rev-parse", "HEAD"), 16) % TURNS
    return int(git("rev-list", "--count", "HEAD") or 0) % TURNS


def base_of(given: str) -> str:
    """The commit that the change starts from; nothing where none is known."""
    if given:
        found = git("rev-parse", "--verify", "--quiet", f"{given}^{{commit}}")
        return found or sys.exit(f"{given} is no commit of this clone; name another base, or none")
    head, left = git("rev-parse", "HEAD"), git("merge-base", "HEAD", "origin/main")
    if left and left != head:
        return left
    ended = int(git("log", "-1", "--format=%ct") or 0)
    lines = (line.split() for line in git("log", "--format=%ct %H").splitlines())
    return next((name for when, name in lines if int(when) <= ended - DAY), "")


def rooms(base: str) -> set[str]:
    """The rooms whose files differ between base and HEAD; `all` where something that every room stands on does."""
    changed = set(git("diff", "--name-only", base, "HEAD").splitlines()) if base else EVERYWHERE
    if changed & EVERYWHERE:
        return {"all"}
    found = (re.match(r"(?:src/fp4rl|tests)/(\w+)/", name) for name in changed)
    return {match[1] for match in found if match}


if __name__ == "__main__":
    base = base_of(sys.argv[1] if len(sys.argv) > 1 else "")
    touched = rooms(base)
    print(f"slow tests: turn {turn()} of {TURNS}; change since {base[:12] or 'the beginning'}", file=sys.stderr)
    print(f"--turn {turn()}/{TURNS} --rooms {','.join(sorted(touched)) or 'none'}")
