"""For the doors alone (command line, worker processes): the libraries below say only what is wrong."""

import os
import warnings


def quiet() -> None:
    """No progress bars and no notes of transformers, and no warnings that speak of its own deprecated names."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|trl|accelerate|datasets|peft|torch")
