"""Deployments: who packs the weights times which kernel rounds the inputs, and what a checkpoint is really served as.

A packer fixes the rule and the rounding of weights, a kernel those of matmul inputs. `mxfp4` without a deployment means
`ocp`. Adding one is one entry of `_ALL`, with a packer and a kernel that are there already or new ones.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType

from fp4rl.spec import kernels, packers
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.formats import FORMATS, MXFP8, Format


@dataclass(frozen=True)
class Deployment:
    """A packer and a kernel. It fixes the rules of MX formats; other formats, and stochastic ones, pass unchanged."""

    name: str
    packer: packers.Packer
    kernel: kernels.Kernel
    beside_experts: Format | None = None  # what else is rounded than routed experts, which have the mode's formats
    note: str = ""

    def at(self, point: str, fmt: Format) -> Format:
        """Return the format as this deployment rounds at `point`.

        Raises InvalidValueError where the format sets another rule, or the kernel leaves `point` as it is.
        """
        if why := self.left_alone(point):
            raise InvalidValueError(why)
        if fmt.fallback is not None:
            raise InvalidValueError(
                f"{fmt.name} with a fallback: deployment {self.name!r} rounds no block twice, nor does any other; "
                "leave fallback out, or leave deployment out to measure it"
            )
        rounds = self._rounds(point, fmt)
        if rounds is None or fmt.scale != "e8m0" or fmt.rounding == "stochastic":
            return fmt
        known, fixed = FORMATS.get(fmt.name, fmt), rounds.settings(fmt)
        for key, value in fixed.items():
            own = getattr(fmt, key)
            if own not in (getattr(known, key), value):
                raise InvalidValueError(
                    f"{fmt.name} sets {key} {own!r}, but deployment {self.name!r} fixes {value!r}; drop one of them"
                )
        return replace(fmt, **fixed)

    def _rounds(self, point: str, fmt: Format) -> packers.Rounds | None:
        """Return how `point` is rounded; no cache and no output has FP32 scales over columns."""
        rounds = (self.packer if point == "weight" else self.kernel).rounds(fmt)
        return rounds if rounds is None or point in ("weight", "input") else replace(rounds, columns=None)

    def left_alone(self, point: str) -> str | None:
        """Return why nothing is rounded at `point`, and the cure; None where it may be."""
        if self.kernel.inputs is not None or point not in ("input", "output"):
            return None
        return (
            f"deployment {self.name!r} rounds no {point}s: its kernel decodes the weights and computes in 16 bits; "
            "take mode w4a16, or nvfp4_w4a16"
        )

    def without_rules(self, point: str, fmt: Format) -> Format:
        """Return the format as it was described: a rule that this deployment put there is taken out again."""
        rounds = self._rounds(point, fmt)
        if rounds is None:
            return fmt
        known = FORMATS.get(fmt.name, fmt)
        plain = replace(fmt, **{key: getattr(known, key) for key in rounds.settings(known)})
        with suppress(InvalidValueError):
            return plain if self.at(point, plain) == fmt else fmt
        return fmt

    def sentence(self, mode: str) -> str:
        """Return what a checkpoint of a mode is computed as, on what, and under which condition."""
        served, checkpoint = self.served(mode), f"{'an' if mode[0] == 'n' else 'a'} {mode.upper()} checkpoint"
        if mode not in kernels.SERVED_MODES:
            return f"no checkpoint has mode {mode}: it is for measuring alone"
        if served is None:
            return f"what {checkpoint} is computed as on {self.kernel.hardware} has not been looked up"
        if served.mode is None:
            return f"nothing serves {checkpoint} on {self.kernel.hardware}: {served.note}"
        as_what = "as it is" if served.mode == mode else f"as {served.mode.upper()}"
        note = f": {served.note}" if served.note else ""
        return f"{checkpoint} is computed {as_what} on {self.kernel.hardware}{note}"

    def changes(self, mode: str) -> bool:
        """Return whether a checkpoint of a mode is computed as another one, or not at all."""
        served = self.served(mode)
        return served is not None and served.mode != mode

    def served(self, mode: str) -> kernels.Served | None:
        """Return what a checkpoint of a mode is computed as; None where that is not known."""
        return self.kernel.serves.get(mode)


_ALL = (
    Deployment("ocp", packers.OCP, kernels.OCP_EMULATION),
    Deployment("compressed_tensors", packers.COMPRESSED_TENSORS, kernels.COMPRESSED_TENSORS_EMULATION),
    Deployment("vllm_blackwell", packers.COMPRESSED_TENSORS, kernels.VLLM_BLACKWELL),
    Deployment("vllm_hopper", packers.COMPRESSED_TENSORS, kernels.VLLM_HOPPER),
    Deployment("vllm_ascend", packers.MSMODELSLIM, kernels.VLLM_ASCEND),
    Deployment("vllm_ascend_ceil_x", packers.MSMODELSLIM_CEIL_X, kernels.VLLM_ASCEND),
    Deployment("vllm_ascend_fouroversix", packers.MSMODELSLIM_FOUROVERSIX, kernels.VLLM_ASCEND),
    Deployment("vllm_ascend_dualscale", packers.MSMODELSLIM_DUALSCALE, kernels.ASCEND_DUAL),
    Deployment("vllm_ascend_dualscale_64", packers.MSMODELSLIM_DUALSCALE_64, kernels.ASCEND_DUAL_64),
    Deployment(
        "modelopt",
        packers.MODELOPT,
        kernels.VLLM_BLACKWELL,
        note="ModelOpt's own checkpoint format has no MXFP4 for dense layers: the weights need another container",
    ),
    Deployment(
        "amct",
        packers.AMCT,
        kernels.CANN,
        note="while it trains with rounded inputs, AMCT rounds them as weights; the NPU does not",
    ),
    Deployment("vllm_blackwell_rceil", packers.TORCHAO_RCEIL, kernels.VLLM_BLACKWELL),
    Deployment("vllm_ascend_floor", packers.CANN, kernels.ASCEND_ROUND, note="only to repeat older results"),
    Deployment("ascend950", packers.CANN, kernels.CANN),
    Deployment("ascend950_uos", packers.CANN_UOS, kernels.CANN_UOS),
    Deployment(
        "ascend950_moe",
        packers.CANN,
        kernels.CANN,
        beside_experts=MXFP8,
        note="as msModelSlim's recipes for GLM and LongCat: the mode's formats on routed experts, MXFP8 on every other "
        "linear layer",
    ),
)

DEPLOYMENTS: Mapping[str, Deployment] = MappingProxyType({deployment.name: deployment for deployment in _ALL})


def deployment_named(name: str) -> Deployment:
    """Return the deployment of that name in `DEPLOYMENTS`; raises NotFoundError, naming the nearest."""
    if name not in DEPLOYMENTS:
        raise NotFoundError(f"no deployment is called {name!r}{nearest(name, DEPLOYMENTS)}")
    return DEPLOYMENTS[name]


def accepted(weight: Format, deployment: str | None) -> bool:
    """Return whether the deployment, or any one where none is named, rounds weights as the format says."""
    for target in DEPLOYMENTS.values() if deployment is None else (deployment_named(deployment),):
        with suppress(InvalidValueError):  # a rule of its own that the target does not have
            if target.at("weight", weight) == weight:
                return True
    return False
