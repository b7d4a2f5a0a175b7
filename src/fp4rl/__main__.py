"""`python -m fp4rl`: the command line, for launchers that start modules (torchrun)."""

from fp4rl.cli.main import entry

entry()
