"""What makes fake steps lighter ends with them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fp4rl.lab.preflight import lighter


@pytest.mark.parametrize(("frozen", "calls"), [(0, ["freeze", "unfreeze"]), (7, [])])
def test_imports_are_left_out_of_collections_unless_they_were(monkeypatch, frozen, calls):
    made = []
    names = {name: partial(made.append, name) for name in ("freeze", "unfreeze")}
    monkeypatch.setattr(lighter, "gc", SimpleNamespace(get_freeze_count=lambda: frozen, **names))
    with lighter.imports_kept():
        assert made == calls[:1]
    assert made == calls


@pytest.mark.parametrize(("threads", "half"), [(1, 1), (2, 1), (5, 2)])
def test_half_of_the_threads_are_left_to_another_process(threads, half):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with lighter.half_of_the_threads():
            assert torch.get_num_threads() == half
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
