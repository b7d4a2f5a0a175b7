"""How a search begins, or goes on: only with the space and the code that its records are of."""

from fp4rl.lab.provenance import code_digest
from fp4rl.lab.search.records import Begun, Book, Judged
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.space import Space


def begin(space: Space, book: Book) -> None:
    """Write what is searched where nothing is written yet.

    Raises InvalidValueError for records of another space, and for candidates of other code while any may still run.
    """
    content, code = space.model_dump(mode="json"), code_digest()
    own, begun = digest(content), book.last(Begun)
    if begun is None:
        book.add(Begun(digest=own, space=content, size=space.size, sampler=space.sampler, code=code))
        return
    if begun.digest != own:
        raise InvalidValueError(
            f"search {space.search} was begun with another space; what was screened there stays chosen by: "
            "give this one another name (`search`), or another place with --runs"
        )
    done = book.last(Judged)
    if begun.code not in (None, code) and not (done is not None and done.whole):
        raise InvalidValueError(
            f"search {space.search} was begun with code {begun.code}, and this is {code}: candidates of both would be "
            "ranked together; install that code again, or give this one another name (`search`)"
        )
