"""What a scan of a model looks at."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from fp4rl.spec.frozen import Spec

ScanPart = Literal["precision", "sensitivity", "depth", "dynamics"]


class Scan(Spec):
    """`precision` needs the weights alone (inputs only with texts); the other parts feed texts through the model.

    `measured` rounds one site at a time, a pass per site and batch; without it sensitivity is the estimate of one
    backward pass. `leave_one_out` also leaves one site out at a time, for as many passes again.
    """

    parts: tuple[ScanPart, ...] = Field(default=("precision", "sensitivity", "depth", "dynamics"), min_length=1)
    measured: bool = True
    leave_one_out: bool = False
    batch_size: PositiveInt = 8
    longest: PositiveInt = Field(default=256, description="tokens of a text that are used")
    probed_batches: PositiveInt = Field(default=1, description="batches whose layers are probed for faults")
    seed: NonNegativeInt = Field(default=0, description="of the probes and of the answers that the estimate draws")
