"""What a verb does before it rounds anything: heed FP4RL_BACKEND, and say on the screen what is being compiled."""

from fp4rl.cli.terminal import console
from fp4rl.engines.rounding import choose_backend


def ready_to_round() -> None:
    """Raises InvalidValueError where FP4RL_BACKEND names no backend that works here."""
    screen = console(stderr=True)
    choose_backend(lambda message: screen.print(message, style="dim", highlight=False))
