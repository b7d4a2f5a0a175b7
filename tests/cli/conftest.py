"""An embedded model that is not warmed up: enough for everything that only needs a model folder."""

import pytest


@pytest.fixture(scope="session")
def embedded_model(tmp_path_factory):
    from fp4rl.rl.inputs import warmed_up
    from fp4rl.spec.model import Embedded
    from fp4rl.tasks.arithmetic import Arithmetic

    return warmed_up(Embedded(warm_up_steps=2), Arithmetic(), tmp_path_factory.mktemp("models"))
