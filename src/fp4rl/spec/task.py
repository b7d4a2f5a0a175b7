"""Which problems a run trains on and is judged by."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from fp4rl.spec.frozen import Place, Spec


class Arithmetic(Spec):
    """Generated word problems of additions and subtractions; splits are disjoint by operation sequence."""

    name: Literal["arithmetic"] = "arithmetic"
    seed: int = Field(default=0, ge=0)
    difficulty: int = Field(default=2, ge=1, le=5, description="1 to 5: more and longer steps")
    train_count: PositiveInt | None = Field(default=None, description="4096, or all there are, where none is named")

    @property
    def stop(self) -> tuple[str, ...]:
        """Nothing but the end token ends an answer."""
        return ()


class Gsm8k(Spec):
    """GSM8K from a local JSONL or Parquet file with the columns `question` and `answer`."""

    name: Literal["gsm8k"] = "gsm8k"
    path: Place = Field(
        description="the training file; the held-out split is cut from it when `test_path` is not given"
    )
    test_path: Place | None = Field(default=None, description="file of the held-out problems")
    prompt: str = Field(default="Question: {question}\nAnswer:", description="what the model sees of a problem")

    @property
    def stop(self) -> tuple[str, ...]:
        """What stands before the question on its line: a model that writes it asks itself another one."""
        before = self.prompt.partition("{question}")[0].rpartition("\n")[2].strip()
        return (before,) if before else ()


Task = Annotated[Arithmetic | Gsm8k, Field(discriminator="name")]
