"""Modules that a command needs after its last run: imported before the first, since files may change meanwhile."""

from importlib import import_module

_AT_THE_END = (
    "fp4rl.cli.report",
    "fp4rl.cli.show",
    "fp4rl.lab.ledger.query",
    "fp4rl.lab.ledger.record",
    "fp4rl.lab.ledger.store",
    "fp4rl.lab.report.collect",
    "fp4rl.lab.report.exports",
    "fp4rl.lab.report.html",
    "fp4rl.lab.report.terminal",
    "fp4rl.lab.statistics.proportions",
    "fp4rl.lab.statistics.seeds",
)


def import_the_end() -> None:
    """Import what the end of a run needs: a package that is upgraded while runs go on would not fit those in memory."""
    for module in _AT_THE_END:
        import_module(module)
