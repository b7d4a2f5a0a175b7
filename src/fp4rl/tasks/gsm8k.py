"""GSM8K from a local file with the columns `question` and `answer`; nothing is ever downloaded."""

from typing import Literal

from fp4rl.spec.frozen import later_key
from fp4rl.tasks.table import TableTask


class Gsm8k(TableTask):
    """GSM8K: a table whose golds are the numbers after `####`, with plain prompts where nothing else is said."""

    name: Literal["gsm8k"] = "gsm8k"
    chat: bool | Literal["auto"] = later_key(False, description="whether the tokenizer's chat template is applied")
