"""Watching runs by their folders: the picture at both sizes, what it is made of, and that nothing is written."""

import http.client
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from rich.cells import cell_len

from fp4rl.cli.main import main
from fp4rl.cli.watch import located
from fp4rl.cli.watch_frame import duration, frame, plot
from fp4rl.cli.watch_page import live, server
from fp4rl.lab import heartbeat
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.guards import locked
from fp4rl.lab.heartbeat import Beat, beating
from fp4rl.lab.suites import read_suite
from fp4rl.lab.watching import Watcher
from fp4rl.rl.events import Progress, StepDone
from planted.records import line

SIZES = [(80, 24), (120, 40)]
LONG = "w4a16-with-a-name-that-says-everything-about-the-recipe"


def suite(root, arms=("bf16", "w4a16", "w4a8", "w4a4"), seeds=(0, 1), steps=20):
    folder = root / "trial"
    folder.mkdir(parents=True)
    content = {"suite": "trial", "seeds": list(seeds), "base": {"training": {"steps": steps}}}
    content["arms"] = {arm: {"training": {"lr": 1e-4 * (n + 1)}} for n, arm in enumerate(arms)}
    (folder / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def run_of(folder, arm, seed=0):
    (found,) = (r.folder for r in read_suite(folder).runs if (r.planned.arm, r.planned.seed) == (arm, seed))
    return found


def steps_of(run, count, first=1, seconds=2.0, **own):
    for step in range(first, first + count):
        numbers = {"reward/mean": step / 100, "accuracy/rollout": step / 50, "entropy": 1 / step, "grad_norm": 0.5}
        run.add_metrics(step, numbers | {"response_length/mean": 20.0 + step, "time/step_s": seconds} | own)


def ended(run, word, why="", steps=3):
    run.path.mkdir(exist_ok=True)
    steps_of(run, steps)
    now = time.time()
    beat = Beat("another-machine", 1, now, now - 900, now - 900, "training", steps, 20, word, why)
    heartbeat._write(run.path / "heartbeat.json", beat)


@pytest.fixture
def recorded(tmp_path):
    """A suite of eight runs: one runs, one failed, one was killed, one was interrupted, four are planned."""
    folder = suite(tmp_path / "runs")
    with ExitStack() as stack:
        run = run_of(folder, "w4a8")
        stack.enter_context(locked(run))
        heart = stack.enter_context(beating(run.path, 20))
        heart.note(Progress("training", 12, 20))
        heart.note(StepDone(12, {}))
        heartbeat._write(run.path / "heartbeat.json", heart._beat)
        steps_of(run, 12)
        run.add_evidence(line("warning", line="step 10: 3 of 16 groups have spread"))
        ended(run_of(folder, "bf16"), "failed", "the loss is not finite at step 3, which no later step can mend; " * 3)
        ended(run_of(folder, "w4a16"), "lost", "its process died (SIGKILL)")
        ended(run_of(folder, "w4a4"), "interrupted", "after step 3")
        yield folder


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_picture_fits_and_says_what_matters_first(recorded, width, height):
    lines = [text.plain for text in frame(Watcher(recorded).look(), width, height)]
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    shown = "\n".join(lines)
    counts, left = "8 runs: 1 running, 1 failed, 1 lost, 1 interrupted, 4 planned", "about 2 min 5[4-6] s left"
    head = [f"trial  {counts}  {left}"] if width > 90 else [f"trial  {left}", counts]
    assert re.fullmatch("\n".join(head), "\n".join(lines[: len(head)]))
    assert re.search(r"^w4a8-s0 +running +12/20 +1[456] s +24.0% +0.12 +32 +0.083 +ok$", shown, re.MULTILINE)
    assert re.search(r"^w4a16-s0 +lost +3/20 ", shown, re.MULTILINE)
    assert "bf16-s0 failed: the loss is not finite at step 3" in shown
    assert "w4a16-s0 lost: its process died (SIGKILL)" in shown
    assert re.search("w4a8-s0  at step 12 of 20 of training, 2 s a step, about 1[456] s left", shown)
    assert "warning w4a8-s0: step 10: 3 of 16 groups have spread" in shown
    assert [name for name in ("reward", "accuracy", "entropy", "length", "grad_norm") if f"\n  {name} " in shown] == [
        "reward",
        "accuracy",
        "entropy",
        "length",
        "grad_norm",
    ]


@pytest.mark.parametrize(("width", "height"), [*SIZES, (60, 12), (40, 10), (200, 60)])
def test_no_name_is_cut_or_goes_on_below(tmp_path, width, height):
    folder = suite(tmp_path / "runs", arms=[LONG[:length] for length in (4, 14, 26, width - 16)], seeds=range(5))
    for number in range(4):
        ended(run_of(folder, LONG[: (4, 14, 26, width - 16)[number]]), "failed", "a reason " * 40)
    view = Watcher(folder).look()
    lines = [text.plain for text in frame(view, width, height)]
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    rows = [text for text in lines[1:] if text.startswith(LONG[:4]) and re.search("failed$|planned|failed ", text)]
    assert len(rows) >= (2 if height > 20 else 1)
    assert {row.split()[0].rstrip(":") for row in rows} <= {run.name for run in view.runs}


def test_what_is_left_is_what_the_steps_took(recorded):
    view = Watcher(recorded).look()
    runs = {run.name: run for run in view.runs}
    assert runs["w4a8-s0"].pace_s == 2.0
    assert runs["w4a8-s0"].left_s == pytest.approx(8 * 2.0, abs=2.0)  # less what the present step has taken
    assert runs["bf16-s0"].left_s is None
    assert view.left_s == pytest.approx(runs["w4a8-s0"].left_s + 4 * 20 * 2.0)  # four are planned, one runs at a time
    assert view.counts == {"running": 1, "failed": 1, "lost": 1, "interrupted": 1, "planned": 4}


def test_looking_writes_nothing_and_holds_no_lock(recorded, tmp_path):
    def everything():
        return {
            path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if "heartbeat" not in path.name
        }

    before, watch = everything(), Watcher(recorded)
    for _ in range(3):
        frame(watch.look(), 80, 24)
    assert main(["watch", "trial", "--once", "--runs", str(tmp_path / "runs")]) == 0
    assert everything() == before
    began = time.monotonic()
    with locked(run_of(recorded, "bf16")):  # at once, although it was looked at
        assert time.monotonic() - began < 1


def test_a_run_is_followed_from_before_its_folder_to_its_end(tmp_path):
    watch = Watcher(tmp_path / "runs" / "trial")
    assert watch.look().missing == f"{tmp_path / 'runs' / 'trial'} is not there yet"
    folder = suite(tmp_path / "runs", arms=["bf16"], seeds=[0])
    (seen,) = watch.look().runs
    assert (seen.status.word, seen.step, seen.steps, seen.curves) == ("planned", 0, 20, {})
    run = run_of(folder, "bf16")
    with locked(run), beating(run.path, 20) as heart:
        heart.note(Progress("warm-up", 3, 60))
        heartbeat._write(run.path / "heartbeat.json", heart._beat)
        (seen,) = watch.look().runs
        assert (seen.status.word, seen.where) == ("running", "3 of 60 of warm-up")
        steps_of(run, 6)
        (seen,) = watch.look().runs
        assert seen.curves["reward"] == (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)
        with (run.path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "reward/me')  # a line that is being written
        assert watch.look().runs[0].step == 6
        run.drop_metrics_after(2)  # it goes on from an earlier checkpoint
        steps_of(run, 1, first=3, **{"reward/mean": 9.0})
        assert watch.look().runs[0].curves["reward"] == (0.01, 0.02, 9.0)
    assert watch.look().runs[0].status.word == "lost"  # it ended without a result
    for file in sorted(run.path.rglob("*"), reverse=True):
        file.unlink()
    run.path.rmdir()
    assert watch.look().runs[0].status.word == "planned"


def test_what_goes_on_is_judged_as_the_whole_log_is(tmp_path):
    from fp4rl.rl.health.monitor import replay

    folder = suite(tmp_path / "runs", arms=["bf16"], seeds=[0])
    run, watch = run_of(folder, "bf16"), Watcher(folder)
    for step in range(1, 16):
        steps_of(run, 1, first=step, entropy=math.nan if step > 8 else 0.5)
        seen = watch.look().runs[0]
    monitor, _ = replay(run.metrics().items())
    assert seen.health == monitor.state == "alarm"
    assert list(seen.findings) == [finding for finding in monitor.findings() if finding.state in ("watch", "alarm")]
    shown = "\n".join(text.plain for text in frame(watch.look(), 80, 24))
    assert f"health    alarm {seen.findings[0].check}: " in shown
    assert "×" in shown  # values that are not finite


def test_words_from_outside_cannot_steer_the_terminal(recorded):
    run_of(recorded, "w4a8").add_evidence(line("warning", line="\x1b[2J\x07[bold]gone"))
    shown = "\n".join(text.plain for text in frame(Watcher(recorded).look(), 120, 40))
    assert "[bold]gone" in shown
    assert "\x1b" not in shown


def test_runs_are_found_by_folder_by_suite_and_by_the_beginning_of_their_id(recorded, tmp_path, monkeypatch):
    run, runs = run_of(recorded, "w4a16").path, tmp_path / "runs"
    monkeypatch.chdir(tmp_path)
    for given, beginning in {
        "trial": "",
        "trial/w4a16-s0": "w4a16-s0",
        "w4a16-s0": "w4a16-s0",
        str(run): run.name,
        "runs/trial": "",
        f"runs/trial/{run.name}": run.name,
    }.items():
        folder, found = located(given, Path("runs"))
        assert (folder.resolve(), found) == (recorded, beginning)
        names = [seen.name for seen in Watcher(folder, found).look().runs]
        assert names == (["w4a16-s0"] if beginning else names)
    assert located("not/there", runs) == (runs / "not", "there")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("trail", "trail is not there yet; did you mean 'trial'?"),
        ("trial/w4a16-s7", "begins with 'w4a16-s7'; did you mean 'w4a16-s0' or 'w4a16-s1'?"),
    ],
)
def test_a_pipe_cannot_wait_for_what_is_not_there(recorded, tmp_path, capsys, given, why):
    assert main(["watch", given, "--runs", str(tmp_path / "runs")]) == 2
    assert why in capsys.readouterr().err


def test_the_same_as_data(recorded, tmp_path, capsys):
    assert main(["watch", "trial", "--json", "--runs", str(tmp_path / "runs")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["counts"] == {"running": 1, "failed": 1, "lost": 1, "interrupted": 1, "planned": 4}
    (running,) = (run for run in data["runs"] if run["status"] == "running")
    assert (running["name"], running["step"], running["pace_s"]) == ("w4a8-s0", 12, 2.0)
    assert running["curves"]["accuracy"] == [step / 50 for step in range(1, 13)]


def test_curves_are_drawn_from_lowest_to_highest():
    assert plot([0, 1, 2, 3, 4, 5, 6, 7], 8) == ["▁▂▃▄▅▆▇█"]
    assert plot([0, 15], 2, height=2) == [" █", "▁█"]
    assert plot([5, 5], 2) == ["▄▄"]
    assert plot([0, 0, 7, 7], 2) == ["▁█"]  # means of neighbours
    assert plot([1, math.nan, 2], 3, height=2) == ["  █", "▁×█"]
    assert plot([], 8) == [""]


def test_durations_have_their_two_largest_units():
    told = {45: "45 s", 60: "1 min", 200: "3 min 20 s", 7500: "2 h 5 min", 3600: "1 h", 273_600: "3 d 4 h"}
    assert {seconds: duration(seconds) for seconds in told} == told


WATCH = "import sys; from fp4rl.cli.main import entry; sys.argv = ['fp4rl', 'watch', *sys.argv[1:]]; entry()"


def on_a_terminal(*arguments, rows=24, columns=80):
    """Start `fp4rl watch` on a terminal of its own; return the process, and the end of the terminal to read from."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "LINES": str(rows), "COLUMNS": str(columns)}
    command = [sys.executable, "-c", WATCH, *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    return process, ours


def read_until(terminal, words, seconds=60.0):
    seen, until = "", time.monotonic() + seconds
    while words not in seen and time.monotonic() < until:
        try:
            seen += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the other end has ended
            break
        seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    return seen


def test_ctrl_c_ends_the_live_picture_with_0(recorded, tmp_path):
    process, terminal = on_a_terminal("trial", "--runs", str(tmp_path / "runs"))
    try:
        assert "at step 12 of 20 of training" in read_until(terminal, "Ctrl-C ends the watching")
        process.send_signal(signal.SIGINT)
        assert "w4a8-s0" in read_until(terminal, "Ctrl-C ends the watching")
        read_until(terminal, "nothing of the kind: to the end")  # one that writes to a full terminal waits for a reader
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.fixture
def served(recorded):
    with server(recorded) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving.server_address
        serving.shutdown()


def asked(address, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection(*address)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"{address[0]}:{address[1]}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_report_is_served_to_this_machine_and_nothing_else_is(served):
    assert served[0] == "127.0.0.1"
    status, page = asked(served)
    assert (status, "trial" in page, page.rstrip().endswith("</html>")) == (200, True, True)
    assert "default-src 'none'; connect-src 'self'; script-src" in page
    status, state = asked(served, "/state")
    assert status == 200
    assert f'const own = "{state}"' in page
    for path in ("/report.html", "/../ledger.db", "//etc/passwd", "/%2e%2e/", "/suite.yaml", "/?", "/state/"):
        assert asked(served, path)[0] == 404, path
    for host in ("evil.example", f"evil.example:{served[1]}", "127.0.0.1", f"127.0.0.1.evil.example:{served[1]}"):
        assert asked(served, host=host)[0] == 403, host
        assert asked(served, "/state", host=host)[0] == 403, host
    assert asked(served, method="POST")[0] == 501
    assert asked(served, host=f"localhost:{served[1]}")[0] == 200


def test_the_served_page_changes_with_the_suite(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("fp4rl.cli.watch_page._EVERY_S", 0.0)
    monkeypatch.setattr("fp4rl.cli.watch_page._REST", 0.0)
    from fp4rl.cli.watch_page import LivePage

    page = LivePage(tmp_path / "runs" / "later")
    first, state = page.newest()
    assert "no suite.yaml" in first
    assert b"location.reload()" in live(first, state)
    assert page.newest() == (first, state)
    recorded.rename(tmp_path / "runs" / "later")
    second, newer = page.newest()
    assert "partial: 0 of 8 runs" in second
    assert newer != state


@pytest.mark.slow
def test_a_real_run_is_watched_until_it_is_killed(tmp_path):
    runs = tmp_path / "runs"
    process, terminal = on_a_terminal("quickstart", "--runs", str(runs), rows=40, columns=120)
    command = [sys.executable, "-m", "fp4rl", "run", "catalogue/quickstart", "training.steps=50", "seeds=[0]"]
    options = ["model.embedded.warm_up_steps=5", "evaluation.count=8", "--jobs", "1", "--runs", str(runs)]
    try:
        assert "is not there yet" in read_until(terminal, "waiting for it")
        with (tmp_path / "log").open("w") as log:
            training = subprocess.Popen([*command, *options], stdout=log, stderr=log, start_new_session=True)
        try:
            shown = read_until(terminal, "at step 3 of 50 of training", seconds=400)
            assert "at step 3 of 50 of training" in shown, shown[-3000:] + (tmp_path / "log").read_text()
        finally:
            os.killpg(training.pid, signal.SIGKILL)
            training.wait()
        assert "1 lost" in read_until(terminal, "1 lost", seconds=60)
        (seen,) = (run for run in Watcher(runs / "quickstart").look().runs if run.status.word != "planned")
        assert seen.status.word == "lost"
        assert (seen.step, len(seen.curves["reward"])) == (
            len(RunFolder(runs / "quickstart" / seen.run_id).metrics()),
        ) * 2
        process.send_signal(signal.SIGINT)
        read_until(terminal, "never said", seconds=5)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
