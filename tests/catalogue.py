"""What the tests of the catalogue of hostile inputs share: the contract that holds for all of its rows, the rows that
other tests cover, and those that do not apply.

A case's id begins with the number of its row; test_catalogue_process.py counts that none of the 137 is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

import hlwq_convert as h
from hlwq_formats import errors
from hlwq_formats.errors import HlwqError

SECONDS = 2.0
MEMORY = 256 << 20
METADATA_MEMORY = 384 << 20  # what DESIGN section 4 allows for decoding the metadata

CONVERT = "from hlwq_convert.cli.convert import main; main()"

STATUS = {
    "NotHlwq": 65, "Incomplete": 65, "WrongSize": 65, "BadHeader": 65, "BadLayout": 65, "BadMetadata": 65,
    "BadTensor": 65, "BadDigest": 65, "BadFrames": 65, "BadValues": 65, "UnsupportedVersion": 69,
    "UnsupportedFeature": 69, "MissingInput": 66, "BadSafetensors": 65, "BadModelDir": 65, "UnsafePath": 65,
    "NonFinite": 65, "UnsupportedDtype": 69, "AlreadyQuantized": 69, "SourceChanged": 75, "CannotCreate": 73,
    "IoFailure": 74, "Locked": 75, "SelfCheckFailed": 70, "Usage": 2,
    "Internal": 70, "NotThisModel": 65, "UnknownArchitecture": 69, "TooLittleMemory": 74, "NotAvailable": 69,
}  # fmt: skip
"""Error class -> exit status, from the catalogue and DESIGN, not from the classes."""

_CONTAINER, _SOURCE, _CRASH = "tests/test_container.py::", "tests/test_safetensors_dir.py::", "tests/test_crash.py::"
_CONVERT, _VERIFY, _CLI = "tests/test_convert.py::", "tests/test_verification.py::", "tests/test_cli.py::"
_LOAD, _QUANTIZE, _SCALAR = "tests/test_load.py::", "tests/test_quantize.py::", "tests/test_scalar.py::"
_PUSH = "tests/test_hub_push.py::"

COVERED: dict[int, tuple[str, ...]] = {
    14: (_CONTAINER + "test_every_truncation_is_noticed",
         _LOAD + "test_every_truncation_and_an_appended_byte_are_caught_by_the_loader"),
    15: (_CONTAINER + "test_every_flipped_bit_is_noticed",
         _LOAD + "test_a_flipped_bit_in_every_byte_is_caught_by_the_loader"),
    66: (_SOURCE + "test_bad_file", _SOURCE + "test_bad_tensor"),
    67: (_SOURCE + "test_bad_file",),
    68: (_SOURCE + "test_bad_file", _SOURCE + "test_bad_tensor"),
    69: (_SOURCE + "test_unknown_dtype", _SOURCE + "test_bad_tensor"),
    70: (_SOURCE + "test_bad_tensor",),
    72: (_VERIFY + "test_verify_source", _VERIFY + "test_tensors_of_zeros_are_mentioned"),
    75: (_SOURCE + "test_shard_names_that_lead_elsewhere",),
    79: (_SOURCE + "test_missing_shard", _SOURCE + "test_many_missing_shards_are_not_all_listed",
         _SOURCE + "test_tensor_missing_in_its_shard", _SOURCE + "test_tensors_in_each_others_shards"),
    84: (_SOURCE + "test_both_a_single_file_and_an_index", _SOURCE + "test_shards_without_an_index",
         _SOURCE + "test_one_shard_of_two_without_an_index", _SOURCE + "test_shards_that_count_themselves_wrong"),
    85: (_SOURCE + "test_shard_names_that_differ_in_case_only", _SOURCE + "test_shard_names_that_lead_elsewhere"),
    90: (_CONVERT + "test_weights_that_are_not_finite",),
    91: (_CONVERT + "test_zeros_are_quantized_exactly_and_have_no_error",
         _QUANTIZE + "test_a_block_of_zeros_among_others_decodes_to_exact_zeros"),
    98: (_LOAD + "test_every_dtype_that_torch_has_comes_back", _LOAD + "test_a_dtype_that_torch_lacks_is_named"),
    100: (_CONVERT + "test_shapes_come_back",),
    102: (_CONVERT + "test_untied_weights_under_a_tied_config_are_both_kept_with_a_warning",
          _CONVERT + "test_equal_tensors_become_an_alias_at_the_larger_bits",
          "tests/test_plan.py::test_a_head_that_is_omitted_needs_no_warning_and_stays_omitted"),
    105: (_CONVERT + "test_shapes_come_back", _CONVERT + "test_the_report_is_the_error_of_what_is_loaded"),
    106: (_SCALAR + "test_a_value_passes_to_the_next_level_just_above_the_float32_midpoint",
          _SCALAR + "test_levels_are_their_own_nearest_and_the_ends_are_open",
          "tests/test_vectors.py::test_stages"),
    111: (_CRASH + "test_a_full_disk", _CRASH + "test_a_limit_on_the_size_of_files",
          _CRASH + "test_a_failed_sync_is_final",
          _CONTAINER + "test_a_full_disk_is_an_io_failure_with_figures"),
    113: (_CRASH + "test_a_folder_that_cannot_be_synced_is_said",),
    117: (_CRASH + "test_every_operation_may_fail", _CRASH + "test_real_kills"),
    118: (_CRASH + "test_every_operation_may_fail",),
    119: (_CRASH + "test_a_run_that_follows_a_death_may_fail_too",),
    122: (_CRASH + "test_what_was_stored_is_not_encoded_again", _CRASH + "test_every_operation_may_fail"),
    123: (_CRASH + "test_other_options_begin_anew_and_say_so", _CRASH + "test_another_version_begins_anew",
          _CRASH + "test_a_tensor_whose_source_changed_is_encoded_again"),
    124: (_CRASH + "test_any_damage_to_the_journal_is_harmless",),
    125: (_CRASH + "test_damage_to_the_part_is_found",),
    53: ("tests/test_vectors.py::test_a_faulty_set_is_refused", "tests/test_split.py::test_a_missing_part_is_named",
         "tests/test_split.py::test_parts_that_are_no_set"),
    127: (_SOURCE + "test_a_changed_shard_is_noticed_when_read",
          _SOURCE + "test_a_changed_shard_is_noticed_at_the_end", _CONVERT + "test_a_source_that_changes_is_noticed"),
    130: (_CONVERT + "test_a_planted_encoder_bug_is_not_published",),
    131: ("tests/test_workflows.py::test_permissions", "tests/test_workflows.py::test_zizmor"),
    132: ("tests/test_hub_requantize.py::test_what_was_swapped_is_not_published",),
    133: (_PUSH + "test_someone_else_commits_meanwhile", _PUSH + "test_an_interrupted_push"),
    134: (_PUSH + "test_what_arrives_is_compared", _PUSH + "test_what_does_not_arrive_is_noticed"),
    135: (_PUSH + "test_no_output_holds_the_token", "tests/test_hub_requantize.py::test_summaries_are_harmless"),
}  # fmt: skip
"""Row -> the tests elsewhere that cover all of it."""

NOT_APPLICABLE: dict[int, str] = {
    16: "there is one header and one copy of the metadata (DESIGN 4)",
    17: "the alignment is a constant, not a field (DESIGN 4)",
    46: "cannot occur: a block of 128 codes ends on a byte at every width (DESIGN 4)",
}


def case(row: int, name: str, *values: object, xfail: str | None = None) -> Any:
    """A parameter set of one row; `xfail` says in what the project differs so far."""
    raises = (AssertionError, HlwqError, pytest.fail.Exception)  # no mistake of the test itself
    marks = [] if xfail is None else [pytest.mark.xfail(strict=True, raises=raises, reason=xfail)]
    return pytest.param(*values, id=f"{row:03d}-{name}", marks=marks)


def rows_of(module: ModuleType) -> set[int]:
    """Rows that the ids of a test module's parametrised cases begin with."""
    ids = [
        values.id
        for name, test in vars(module).items()
        if name.startswith("test_")
        for mark in getattr(test, "pytestmark", [])
        if mark.name == "parametrize"
        for values in mark.args[1]
        if hasattr(values, "id")
    ]
    assert all(len(i) > 4 and i[:3].isdigit() and i[3] == "-" for i in ids), ids
    return {int(i[:3]) for i in ids}


# --- the contract -----------------------------------------------------------------------------------


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def late(*_: object) -> NoReturn:
        raise AssertionError(f"blocked for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_message(message: str, parts: tuple[str, ...]) -> None:
    """One printable line of at most 500 characters, with all its parts."""
    assert message.isprintable(), repr(message)
    assert len(message) <= 500
    assert [part for part in parts if part not in message] == [], message


@contextlib.contextmanager
def refused(error: str, *parts: str, seconds: float = SECONDS) -> Iterator[None]:
    """The body raises exactly this class, with its status and a good message, in bounded time of the CPU."""
    began = time.process_time()
    with alarm(60), pytest.raises(HlwqError) as caught:
        yield
    spent = time.process_time() - began
    assert type(caught.value) is getattr(errors, error), repr(caught.value)
    assert caught.value.exit_status == STATUS[error]
    check_message(str(caught.value), parts)
    assert spent <= seconds


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies in a folder and below: name -> inode, size, time of change."""
    found = folder.rglob("*")
    return {str(p): (s.st_ino, s.st_size, s.st_mtime_ns) for p in found if not p.is_dir() for s in [p.lstat()]}


def refuse_to_convert(source: Path, out: Path, error: str, *parts: str, **options: Any) -> None:
    """Converting raises this error and touches nothing in the source or beside the output."""
    before = tree(source), tree(out.parent)
    with refused(error, *parts):
        h.convert(source, out, **options)
    assert (tree(source), tree(out.parent)) == before


def check_line(result: subprocess.CompletedProcess[str], error: str, *parts: str) -> None:
    """A command ended with the status of `error` and nothing but its line on stderr."""
    code = getattr(errors, error).code
    assert result.returncode == STATUS[error], result.stderr
    assert result.stderr.startswith(f"hlwq: error[HLWQ-{code}]: ")
    assert result.stderr.endswith("\n")
    check_message(result.stderr[:-1], parts)


def left(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(os.listdir(folder))


def child(code: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without the rights of root, which may read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- time and memory of a process of its own --------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a child did with one path: its error, if any, and what that took beyond the imports."""

    error: str | None
    message: str
    seconds: float
    memory: int


_CHILD = """
import json, re, resource, sys, time
import msgspec, numpy, zstandard
import hlwq_convert as h, hlwq_convert.decode, hlwq_convert.inspection, hlwq_convert.source
from hlwq_formats.errors import HlwqError
from hlwq_formats.reader import Reader

def memory(key):
    with open("/proc/self/status") as file:
        return int(re.search(key + r":\\s+(\\d+)", file.read())[1]) << 10

def verify(path):
    with Reader(path) as reader:
        reader.verify()

def limit(more):
    size = memory("VmSize") + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))

def measure(action, path):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before, began, error, message = memory("VmRSS"), time.process_time(), None, ""
    try:
        action(path)
    except HlwqError as caught:
        error, message = type(caught).__name__, str(caught)
    return error, message, time.process_time() - began, memory("VmHWM") - before

action = eval("lambda path: " + sys.argv[1])
print(json.dumps([measure(action, path) for path in sys.argv[2:]]))
"""


def measure(action: str, *paths: Path) -> list[Measured]:
    """Evaluate `action`, an expression of `path`, for each path in a process of its own."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process cannot be measured here")
    done = child(_CHILD, action, *paths)
    assert done.returncode == 0, done.stderr
    return [Measured(*values) for values in json.loads(done.stdout)]


def check_measured(measured: Measured, error: str | None, *parts: str, memory: int = MEMORY) -> None:
    """It ended with this error (None: none) within its bounds."""
    assert measured.error == error, measured
    check_message(measured.message, parts)
    assert measured.seconds <= SECONDS
    assert measured.memory <= memory, f"{measured.memory >> 20} MiB"


def write_sparse(path: Path, size: int, *pieces: tuple[int, bytes]) -> Path:
    """A file of `size` bytes, zeros but for (offset, bytes), that takes no more disk than those."""
    with path.open("wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path
