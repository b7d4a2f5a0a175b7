"""What comes from outside (answers, paths, errors, questions) is printed as it is: brackets are no markup, `:a:` is no
picture. Kind: text that reaches rich as markup."""

import io

import pytest
from rich.table import Table

from fp4rl.cli.display import Display
from fp4rl.cli.main import main
from fp4rl.cli.terminal import console, styled
from fp4rl.lab.matrix import single
from fp4rl.lab.runner import Event, Outcome
from fp4rl.spec.experiment import Experiment

NASTY = ["[/think]", "/data/[v1]/x", "[bold]", ":smile:", "[link=file:///x]", "a\\", "[[", "[/]"]


def printed(*things):
    screen = console()
    screen.file = io.StringIO()
    for thing in things:
        screen.print(thing, soft_wrap=isinstance(thing, str))
    return screen.file.getvalue()


@pytest.mark.parametrize("word", NASTY)
def test_a_string_is_data_alone_in_a_table_and_beside_a_style(word):
    table = Table(word, title=word)
    table.add_row(word)
    assert printed(word, styled(("bold", "bold"), f" {word}"), table).count(word) == 5


@pytest.mark.parametrize("word", NASTY)
def test_the_error_of_a_run_does_not_end_the_picture_of_the_others(word):
    run = single(Experiment(), "s")
    screen = console(stderr=True)
    screen.file = io.StringIO()
    display = Display([run], screen)
    with display.shown():
        display.on_event(Event(run.run_id, word, 1, 3))
        display.on_outcome(Outcome(run, f"ValueError: {word} is no number"))
        screen.print(display._picture())
    assert f"ValueError: {word} is no number" in screen.file.getvalue()


def test_a_path_with_brackets_is_named_whole_in_a_plan(tmp_path, capsys):
    file = tmp_path / "s.yaml"
    file.write_text("model: {path: '/data/[v1]/x'}\ntask: {name: gsm8k, path: '/data/[/b]/:a:.jsonl'}\n")
    assert main(["plan", str(file)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "model.path: /data/[v1]/x does not exist" in out
    assert "task.path: /data/[/b]/:a:.jsonl does not exist" in out


def test_a_message_stays_one_line_whatever_the_name_in_it(tmp_path, capsys):
    assert main(["plan", str(tmp_path / "a\nb.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
