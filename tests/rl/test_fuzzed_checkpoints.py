"""Whatever became of a checkpoint's files, it is taken as it was written or left out in one line, and never changed."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4rl.rl.checkpoints import STATE, all_of, complete, newest
from planted.damage import damage, damaged_json, hashes

pytestmark = pytest.mark.fuzz

FILES = {"model.safetensors": b"weights" * 9, "trainer_state.json": b'{"a": [1, 2]}', "rng/0.pth": b"\x80\x02."}
STATES = {
    step: {"positions": [[step, 1]], "phases": {str(step): 0.1 * step}, "rollbacks": 0, "inputs": {"a": "b"}}
    for step in (2, 4)
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step, state in STATES.items():
        for name, content in FILES.items():
            file = folder / f"checkpoint-{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        complete(folder / f"checkpoint-{step}", step, "code", state)
    return folder


@given(st.data())
def test_a_checkpoint_is_as_it_was_written_or_left_out(whole, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for step in data.draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2, unique=True)):
        file = folder / f"checkpoint-{step}" / data.draw(st.sampled_from([STATE, STATE, *FILES]))
        content = file.read_bytes()
        kinds = [damage(content), *([damaged_json(content)] if file.suffix == ".json" else [])]
        file.write_bytes(data.draw(st.one_of(*kinds)))
    left, said = hashes(folder), list[str]()
    found = newest(folder, "code", said.append)
    assert all("\n" not in line for line in said)
    all_of(folder)
    if found is not None:
        assert found.state == STATES[found.step]
        assert {name: (found.path / name).read_bytes() for name in FILES} == FILES
    assert len(said) == (2 if found is None else found.step == 2)
    assert hashes(folder) == left
