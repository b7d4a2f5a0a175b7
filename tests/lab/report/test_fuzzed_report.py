"""Whatever became of a run or of the suite's own file, the report shows the others and names what it cannot read."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4rl.lab.report.collect import collect
from fp4rl.spec.errors import UserError
from planted.damage import FEW, FILES, damage, hashes, inflict, one_damage

pytestmark = pytest.mark.fuzz


def test_a_report_over_a_damaged_run(make_trial, tmp_path):
    folder = make_trial().write()
    run = next(folder.glob("w4a4-s1-*"))
    shutil.copytree(run, tmp_path / "whole")
    files = [name for name in FILES if (run / name).is_file()]

    @FEW
    @given(st.data())
    def report(data):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "whole", run)
        name = data.draw(st.sampled_from(files))
        inflict(run, name, data.draw(one_damage(run / name)))
        left = hashes(run)
        found = collect(folder)
        assert len(found.runs) - len(found.missing) >= 11
        assert all("\n" not in str(error) for error in found.damages)
        assert hashes(run) == left

    report()


def test_a_suite_file_beside_the_runs(make_trial):
    folder = make_trial().write()
    whole = (folder / "suite.yaml").read_bytes()

    @FEW
    @given(damage(whole))
    def report(content):
        (folder / "suite.yaml").write_bytes(content)
        said = []
        try:
            collect(folder)
        except UserError as error:
            said = str(error).splitlines()
        assert len(said) <= 1

    report()
