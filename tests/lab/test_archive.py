"""A suite in one file: `tar` and `sha256sum` read what was packed, and every damage is named."""

import gzip
import io
import json
import subprocess
import tarfile

import pytest

from fp4rl.cli.main import main


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "s" / "a-s0-0123456789ab"
    for name, text in {
        "../suite.yaml": "suite: s\n",
        "spec.yaml": "seed: 0\n",
        "evidence.jsonl": "{}\n",
        "items/3-full.parquet": "rows",
        "final/model.safetensors": "weights",
        "checkpoints/checkpoint-1/model.safetensors": "weights",
        ".lock": "",
        "heartbeat.json": "{}",
        ".result.json.17.partial": "{",
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    return run


def test_tar_and_sha256sum_read_the_archive(suite, tmp_path, capsys):
    assert main(["archive", "s"]) == 0
    assert "4 files" in capsys.readouterr().out
    subprocess.run(["tar", "-xzf", "s.tar.gz", "-C", str(tmp_path)], check=True)
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "s",
        capture_output=True,
        text=True,
        check=True,
    )
    assert checked.stdout.splitlines() == [
        f"{name}: OK"
        for name in (
            "a-s0-0123456789ab/evidence.jsonl",
            "a-s0-0123456789ab/items/3-full.parquet",
            "a-s0-0123456789ab/spec.yaml",
            "suite.yaml",
        )
    ]
    assert (tmp_path / "s" / suite.name / "spec.yaml").read_text() == "seed: 0\n"


def test_weights_are_packed_on_request_and_checkpoints_never(suite, capsys):
    assert main(["archive", "s", "--weights", "--out", "w.tar.gz", "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["files"]
    assert f"{suite.name}/final/model.safetensors" in names
    assert not any("checkpoint" in name for name in names)


def test_nothing_is_overwritten_and_an_unknown_suite_is_one_line(suite, capsys):
    assert main(["archive", "s"]) == 0
    assert main(["archive", "s"]) == 2
    assert "name another file with --out" in capsys.readouterr().err
    assert main(["archive", "t"]) == 2
    assert "holds no suite 't'" in capsys.readouterr().err


def rewritten(name, change):
    """Rewrite an archive's files by `change(name, content)`; None drops one."""
    with tarfile.open(name) as tar:
        files = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(name, "w:gz") as tar:
        for member, content in files:
            new = change(member.name, content)
            if new is not None:
                member.size = len(new)
                tar.addfile(member, io.BytesIO(new))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, c: c.replace(b"seed: 0", b"seed: 1"), "spec.yaml is changed"),
        (lambda name, c: None if name.endswith("evidence.jsonl") else c, "evidence.jsonl is missing"),
        (lambda name, c: c.replace(b"suite.yaml", b"other.yaml") if "SUMS" in name else c, "suite.yaml is not listed"),
    ],
)
def test_each_damage_is_named(suite, capsys, change, said):
    main(["archive", "s"])
    assert main(["archive", "s.tar.gz", "--check"]) == 0
    rewritten("s.tar.gz", change)
    assert main(["archive", "s.tar.gz", "--check"]) == 1
    assert said in capsys.readouterr().err


def test_what_is_no_archive_is_one_line(suite, tmp_path, capsys):
    main(["archive", "s"])
    whole = (tmp_path / "s.tar.gz").read_bytes()
    for content in (b"no archive", whole[: len(whole) // 2], gzip.compress(b"text")):
        (tmp_path / "s.tar.gz").write_bytes(content)
        assert main(["archive", "s.tar.gz", "--check"]) == 2
        assert "Traceback" not in capsys.readouterr().err
