"""The start of a run in the weights that another run trained."""

from collections.abc import Iterator

from fp4rl.spec.frozen import LocalPath, Spec, later_key

OF_THE_ARM = "of that arm's description without its seed; filled in where the suite is planned"


class Start(Spec):
    """The run whose trained weights this one starts from, in place of those of `model`: exactly one of `arm` and `run`.

    `arm`: the run of that arm of the same suite with the same seed, which is run first. `model` stays what both are
    built from.
    """

    arm: str | None = later_key(None, description="an arm of the same suite: its run with the same seed")
    run: LocalPath | None = later_key(None, description="a finished run: its folder, or suite/run-id below --runs")
    digest: str | None = later_key(None, description=OF_THE_ARM)

    def _conflicts(self) -> Iterator[str]:
        if (self.arm is None) == (self.run is None):
            yield "name exactly one of `arm` and `run`; the weights of any other folder are `model.path`"
