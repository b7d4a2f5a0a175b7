"""For the doors alone (command line, worker processes): the libraries below say only what is wrong."""

import logging
import os
import warnings


def quiet() -> None:
    """No progress bars and no notes of transformers, and no warnings that speak of its own deprecated names.

    Nor torchao's, where it is installed: transformers imports it, and it tells of kernels that nobody here calls.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|trl|accelerate|datasets|peft|torch")
