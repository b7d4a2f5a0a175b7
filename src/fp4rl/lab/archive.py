"""A suite in one file: what its runs were told, what they did and what they measured, with a checksum of every file."""

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

from fp4rl.lab.files import whole
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.words import counted

SUMS = "SHA256SUMS"  # as `sha256sum --check` reads it
_WEIGHTS = ("checkpoints", "final", "on-the-way")
_PASSING = (".lock", "heartbeat.json")
_BLOCK = 2**20


def files_of(suite: Path, *, weights: bool = False) -> list[Path]:
    """List the files of a suite's folder that an archive holds, in order; with `weights` the final policies too.

    Left out: checkpoints to go on from, locks, and what a killed process left half written.
    """
    kept = []
    for path in sorted(suite.rglob("*")):
        parts = path.relative_to(suite).parts
        inside = parts[1] if len(parts) > 2 else ""
        left_out = inside in _WEIGHTS and not (weights and inside == "final")
        if path.is_file() and not left_out and path.name not in _PASSING and not path.name.endswith(".partial"):
            kept.append(path)
    return kept


def pack(
    suite: Path, target: Path, *, weights: bool = False, on_file: Callable[[int, int], None] = lambda _done, _all: None
) -> dict[str, str]:
    """Pack a suite's folder into the gzipped tar file `target`, whole or not at all; return file -> SHA-256.

    Raises NotFoundError for a folder that is no suite's, InvalidValueError where `target` exists.
    """
    if not (suite / "suite.yaml").is_file():
        raise NotFoundError(f"{suite}: no suite.yaml, so this is no suite's folder; name one below --runs")
    if target.exists():
        raise InvalidValueError(f"{target} is there already; name another file with --out")
    files = files_of(suite, weights=weights)
    sums: dict[str, str] = {}
    with whole(target) as unfinished, tarfile.open(unfinished, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for number, path in enumerate(files, 1):
            name = path.relative_to(suite).as_posix()
            content = path.read_bytes()  # at once: the checksum is of what is packed, also of a file that grows
            sums[name] = hashlib.sha256(content).hexdigest()
            info = tar.gettarinfo(path, f"{suite.name}/{name}")
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
            on_file(number, len(files))
        listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
        info = tarfile.TarInfo(f"{suite.name}/{SUMS}")
        info.size = len(listed)
        tar.addfile(info, BytesIO(listed))
    return sums


def damages_of(archive: Path) -> tuple[int, list[str]]:
    """Compare every file of an archive with its checksum; return how many there are, and a line for each difference.

    Raises InvalidValueError for a file that is no archive of a suite.
    """
    present, listed = dict[str, str](), None
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name, content in _contents(tar):
                if name == SUMS:
                    rows = (line.partition("  ") for line in content.decode().splitlines())
                    listed = {listed_name: digest for digest, _, listed_name in rows}
                else:
                    present[name] = hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        raise NotFoundError(f"{archive}: no such file; `fp4rl archive SUITE` makes one") from None
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise InvalidValueError(
            f"{archive} cannot be read as an archive of a suite ({error}); fetch it again"
        ) from None
    if listed is None:
        raise InvalidValueError(f"{archive} holds no {SUMS}, so it is no archive of a suite, or was cut off")
    missing = [f"{name} is missing" for name in listed if name not in present]
    more = [f"{name} is not listed" for name in present if name not in listed]
    changed = [f"{name} is changed" for name, digest in present.items() if listed.get(name, digest) != digest]
    return len(listed), sorted(missing + more + changed)


def size_in_words(archive: Path, count: int) -> str:
    """Describe an archive: how many files, and how large it is."""
    return f"{counted(count, 'file')}, {archive.stat().st_size / 2**20:.1f} MiB"


def _contents(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Yield the name within the suite and the content of each file."""
    for member in tar:
        opened = tar.extractfile(member)
        if opened is not None:
            yield member.name.partition("/")[2], b"".join(iter(partial(opened.read, _BLOCK), b""))
