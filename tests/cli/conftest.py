"""An embedded model that is not warmed up: enough for everything that only needs a model folder."""

import pytest


@pytest.fixture(scope="session")
def embedded_model(tmp_path_factory):
    from fp4rl.rl.inputs import warmed_up
    from fp4rl.spec.model import Embedded
    from fp4rl.tasks.arithmetic import Arithmetic

    return warmed_up(Embedded(warm_up_steps=2), Arithmetic(), tmp_path_factory.mktemp("models"))


@pytest.fixture
def in_process(monkeypatch):
    """Runs without worker processes: their start costs seconds and is tested elsewhere."""
    from fp4rl.lab import work
    from fp4rl.lab.runner import Outcome
    from fp4rl.spec.errors import UserError

    def pool(_jobs, report_to, stall_s):
        def execute_run(runs, root, _on_event):
            for run in runs:
                try:
                    work.execute_run(run, root)
                except UserError as error:
                    yield Outcome(run, str(error), mistake=True)
                else:
                    yield Outcome(run)

        return execute_run

    monkeypatch.setattr("fp4rl.cli.executor.LocalPool", pool)
