"""`fp4rl report`: the table, the path, JSON, and one line for what cannot be."""

import json

import pytest

from fp4rl.cli.main import main


def test_it_prints_the_table_and_writes_the_page(make_trial, capsys):
    folder = make_trial().write()
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "12 of 12 runs" in printed
    assert f"HTML report: {folder / 'report.html'}" in printed
    assert (folder / "report.html").stat().st_size > 2_000_000


def test_a_suite_is_found_by_its_name(make_trial, capsys, tmp_path):
    make_trial().write()
    assert main(["report", "trial", "--runs", str(tmp_path)]) == 0
    assert "12 of 12 runs" in capsys.readouterr().out


def test_json_is_one_document(make_trial, capsys):
    folder = make_trial().write()
    assert main(["report", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["questions"][0]["word"] == "better"
    assert document["html"] == str(folder / "report.html")


@pytest.mark.parametrize("name, cure", [("trail", "did you mean 'trial'"), ("..", "no suite.yaml")])
def test_what_is_no_suite_is_one_line_and_exit_code_2(make_trial, capsys, tmp_path, name, cure):
    make_trial().write()
    assert main(["report", name, "--runs", str(tmp_path / "trial" / "..")]) == 2
    message = capsys.readouterr().err
    assert cure in message
    assert message.count("\n") == 1


def test_a_suite_that_cannot_be_written_is_shown_and_its_page_stays_as_it_was(make_trial, capsys, monkeypatch):
    folder = make_trial().write()
    (folder / "report.html").write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "12 of 12 runs" in printed.out
    assert "no HTML report" in printed.err
    assert "Read-only file system" in printed.err
    assert (folder / "report.html").read_text() == "old"
