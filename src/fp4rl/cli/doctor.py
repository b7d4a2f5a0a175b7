"""`fp4rl doctor`: what this machine can do, what a missing extra would enable, and a self-test in seconds."""

from dataclasses import asdict
from typing import Any

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_indented, print_json, progress, ready_to_round, styled, table
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import CheckFailed


def command(as_json: AsJson = False) -> None:
    """Show devices, dtypes and packages, and test numbers and gradients on every device; exit code 1 where one fails.

    Example: `fp4rl doctor`
    """
    quiet()
    import torch

    from fp4rl.engines.doctor import machine
    from fp4rl.engines.doctor.checks import PER_DEVICE, checks

    ready_to_round()
    devices = list(machine.devices())
    results = []
    with progress() as advance:
        kinds = dict.fromkeys(device.kind for device in devices)
        for check in (check for kind in kinds for check in checks(torch.device(kind))):
            results.append(check)
            advance("self-test", len(results), PER_DEVICE * len(kinds))
    facts: dict[str, Any] = {
        "machine": machine.system(),
        "devices": [asdict(device) for device in devices],
        "packages": machine.core(),
        "engines": list(machine.engines()),
        "extras": [asdict(extra) for extra in machine.extras()],
        "checks": [asdict(check) for check in results],
    }
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    broken = [check.name for check in results if not check.passed]
    if broken:
        raise CheckFailed(f"{len(broken)} of {len(results)} checks failed: {', '.join(broken)}")


def _show(facts: dict[str, Any]) -> None:
    screen = console()
    for part in ("machine", "packages"):
        print_indented(", ".join(f"{name} {value}" for name, value in facts[part].items()), by=0)
    for device in facts["devices"]:
        size = f", {device['gib']:.0f} GiB" if device["gib"] else ""
        screen.print(styled(("\n" + device["kind"], "bold"), f": {device['name']}{size}"))
        print_indented(f"multiplies {', '.join(device['dtypes'])}; large tensors are rounded by {device['backend']}")
    rows = [(e["name"], e["version"] or "not installed", e["where"]) for e in facts["engines"]]
    screen.print("")
    screen.print(table("engine=", "version=", "where it answers", rows=rows))
    rows = []
    for extra in facts["extras"]:
        state = f"without {', '.join(extra['missing'])}" if extra["missing"] else "here"
        rows.append((extra["name"], state, extra["enables"]))
    screen.print("")
    screen.print(table("extra=", "installed", "what it enables", rows=rows))
    screen.print("")
    for check in facts["checks"]:
        mark = ("passed", "green") if check["passed"] else ("FAILED", "red")
        screen.print(styled(mark, f" {check['name']}: {check['seen']}"), soft_wrap=True)
