"""What can be wrong with a CT: a code that programs can rely on, a line for people, and whether it can be repaired."""

from dataclasses import dataclass

from drrgen.errors import InputError

# What is done about a series with defects: it is refused, or repaired where every one of them can be.
POLICIES = ("reject", "repair")


@dataclass(frozen=True)
class Defect:
    """One thing wrong with one series. `code` is one of docs/how-to/defects.md.

    repair: what `--on-defect repair` does about it, in the past tense as shards record it; None where nothing can.
    file: the name of a file that shows it. The message has no names in it: shards keep it, and names may be private.
    """

    code: str
    message: str
    repair: str | None = None
    file: str = ""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.file})" if self.file else "")


class SeriesRejected(InputError):
    """A CT that cannot be trusted. `code` is that of the first of its defects."""

    def __init__(self, *defects: Defect) -> None:
        super().__init__("; ".join(map(str, defects)))
        self.defects = defects

    @property
    def code(self) -> str:
        return self.defects[0].code

    def __reduce__(self) -> tuple[type, tuple[Defect, ...]]:
        return type(self), self.defects  # it crosses from the decoding process as it is


def printable(text: object) -> str:
    """A text from outside (a tag, a path) as far as it can be shown on one line."""
    line = str(text)
    return line if line.isprintable() else "".join(letter for letter in line if letter.isprintable())
