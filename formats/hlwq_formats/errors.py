"""Everything that can go wrong, one class for each way, with a code and an exit status.

The message of an error is one line: where (file, tensor, section and byte), what was expected and
found, and what to do. Texts that come from a file are escaped before they enter the line, because
the line ends up in terminals and CI logs.

Exit statuses follow BSD sysexits where it has a name for the case:
2 usage, 65 bad data, 66 missing input, 69 unsupported, 70 internal, 73 cannot create output,
74 I/O error, 75 try again.
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE = 475  # the line that a command prints has its code before it, and at most 500


def escape(text: str, limit: int = 200) -> str:
    """Return `text` printable on one line: control, bidi and other unprintable characters become
    backslash escapes; a text over `limit` characters loses its middle."""
    half = (limit - 3) // 2
    if len(text) > limit:  # cut before escaping too: a hostile text may be as long as a file
        text = f"{text[:half]}...{text[-half:]}"
    shown = "".join(
        char if char.isprintable() and char != "\\" else char.encode("unicode_escape").decode("ascii") for char in text
    )
    if shown.lstrip().startswith("::"):  # a line that begins so is a command to some CI systems
        shown = shown.replace("::", "\\x3a:", 1)
    if len(shown) <= limit:
        return shown
    return f"{shown[:half]}...{shown[-half:]}"


class HlwqError(Exception):
    """Base of all errors of this project. `problem` is ours and printed as it is, so whoever builds
    it from a text of a file must `escape` that text; file, tensor and hint are escaped here."""

    code: ClassVar[int] = 400
    exit_status: ClassVar[int] = 70

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        tensor: str | None = None,
        section: str | None = None,
        offset: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.file = file
        self.tensor = tensor
        self.section = section
        self.offset = offset
        self.hint = hint

    def __str__(self) -> str:
        where = []
        if self.file is not None:
            where.append(escape(self.file))
        if self.tensor is not None:
            where.append(f'tensor "{escape(self.tensor, 120)}"')
        if self.section is not None:
            where.append(self.section if self.offset is None else f"{self.section}@{self.offset:#x}")
        line = ": ".join([*where, self.problem])
        if self.hint is not None:
            line = f"{line}; {escape(self.hint)}"
        return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


# --- a .hlwq file that is wrong -------------------------------------------------------------------


class BadData(HlwqError):
    """A file whose bytes break the rules of its format."""

    exit_status = 65


class NotHlwq(BadData):
    """The first bytes are those of something else."""

    code = 101


class Incomplete(BadData):
    """A conversion that never finished: the header was not written."""

    code = 102


class WrongSize(BadData):
    """The file is shorter or longer than its header says."""

    code = 103


class BadHeader(BadData):
    """The header is damaged: its checksum or a reserved byte is wrong."""

    code = 104


class BadLayout(BadData):
    """Offsets or lengths that are not where the rules put them, or padding that is not zero."""

    code = 105


class BadMetadata(BadData):
    """The metadata is not the one canonical document of its content."""

    code = 106


class BadTensor(BadData):
    """An entry of the metadata contradicts itself or another entry."""

    code = 107


class BadDigest(BadData):
    """Bytes do not have the SHA-256 that was recorded for them."""

    code = 108


class BadFrames(BadData):
    """A compressed section does not decompress to what it promises."""

    code = 109


class BadValues(BadData):
    """Levels, scales or booleans that no writer may write."""

    code = 110


class BadSet(BadData):
    """Files that are parts of split sets, each good, and do not make one set."""

    code = 111


class UnsupportedVersion(HlwqError):
    """A major version that this reader does not know."""

    code = 120
    exit_status = 69


class UnsupportedFeature(HlwqError):
    """An incompatible feature, an encoding or a key that a later version added."""

    code = 121
    exit_status = 69


# --- a source model that is wrong -----------------------------------------------------------------


class MissingInput(HlwqError):
    """An input that is not there, not readable or not a regular file."""

    code = 201
    exit_status = 66


class BadSafetensors(BadData):
    """A safetensors file that breaks the rules."""

    code = 202


class BadModelDir(BadData):
    """An index, a config or a set of shards that contradicts itself."""

    code = 203


class UnsafePath(BadData):
    """A name in a model directory that leads out of it."""

    code = 204


class NonFinite(BadData):
    """A weight that is NaN or infinite."""

    code = 205


class UnsupportedDtype(HlwqError):
    """A dtype that this tool cannot carry or the caller cannot hold."""

    code = 206
    exit_status = 69


class AlreadyQuantized(HlwqError):
    """A checkpoint that was quantized before."""

    code = 207
    exit_status = 69


class SourceChanged(HlwqError):
    """The source is not the one that the conversion started with."""

    code = 208
    exit_status = 75


# --- output ---------------------------------------------------------------------------------------


class CannotCreate(HlwqError):
    """The output exists, or its place does not take a new file."""

    code = 301
    exit_status = 73


class IoFailure(HlwqError):
    """Reading or writing failed, or the disk is full."""

    code = 302
    exit_status = 74


class Locked(HlwqError):
    """Another process is writing the same output."""

    code = 303
    exit_status = 75


class SelfCheckFailed(HlwqError):
    """What was written does not read back as what was meant; nothing was published."""

    code = 304
    exit_status = 70


class NotFromSource(BadData):
    """A good file that was not made from the model it is compared with, or whose report is wrong."""

    code = 305


# --- a good file that does not run here -----------------------------------------------------------


class NotThisModel(BadData):
    """Tensors or a config that are not those of the architecture that the file names."""

    code = 501


class UnknownArchitecture(HlwqError):
    """A model whose code is neither in transformers nor in a folder that was given."""

    code = 502
    exit_status = 69


class TooLittleMemory(HlwqError):
    """The model does not fit into the memory that is free."""

    code = 503
    exit_status = 74


class NotAvailable(HlwqError):
    """A package, a kernel or a device that is needed and not here."""

    code = 504
    exit_status = 69


# --- a model hub ----------------------------------------------------------------------------------


class HubUnreadable(HlwqError):
    """A repository or revision that is not there, or that this token may not read."""

    code = 601
    exit_status = 66


class HubRefused(HlwqError):
    """The Hub does not let us write: no token, no right to, or a request it rejects."""

    code = 602
    exit_status = 73


class HubMoved(HlwqError):
    """A branch got a commit between our look at it and our use of what we saw."""

    code = 603
    exit_status = 75


class HubBusy(HlwqError):
    """The Hub asks for patience."""

    code = 604
    exit_status = 75


class HubFailed(HlwqError):
    """The Hub failed, or the connection to it."""

    code = 605
    exit_status = 74


class HubMismatch(HlwqError):
    """What the Hub holds after a push is not what was pushed."""

    code = 606
    exit_status = 70


class ForeignRepo(HlwqError):
    """A target that holds what this tool did not write."""

    code = 607
    exit_status = 73


class BadEvaluation(BadData):
    """A document of measurements that cannot be read, or that is of another file."""

    code = 608


# --- the caller -----------------------------------------------------------------------------------


class Usage(HlwqError):
    """Options or arguments that make no sense together, or on this model."""

    code = 401
    exit_status = 2


class NoDevice(HlwqError):
    """The device that was asked for is not there, or cannot run the kernels."""

    code = 403
    exit_status = 69


class Internal(HlwqError):
    """A bug of ours."""

    code = 402
    exit_status = 70
