"""For the command line and worker processes only: make other libraries report nothing but errors."""

import logging
import os
import warnings


def quiet() -> None:
    """Switch off transformers' progress bars and notes, and warnings about deprecated names of its own.

    And torchao's, where it is installed: transformers imports it, and it reports on kernels that are not used here.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|trl|accelerate|datasets|peft|torch")
