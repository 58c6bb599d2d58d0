"""What the benchmark times, and how: kernels on weights in memory, conversions, loading, commands."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

import numpy as np
from benchmark_peers import make_peers, version_of
from numpy.typing import NDArray

import hlwq_convert as h
from hlwq_convert.device import choose_device
from hlwq_convert.job import prepare
from hlwq_convert.plan import Choice
from hlwq_convert.quantize import CHUNK, ScalarCode
from hlwq_convert.survey import survey
from hlwq_convert.trellis import STATES, TrellisCode
from hlwq_formats.rans import CHUNK as RANS_CHUNK

BITS = 5  # of every conversion
TRELLIS_STEP = 0.108  # about as many bits
Bits16 = NDArray[np.uint16]


@dataclass
class Case:
    """Something to time. What `run` returns is dropped, and `before` and `after` are called, off the clock."""

    name: str
    run: Callable[[], object] | None  # None: cannot be measured, and `note` says why
    weights: int
    threads: int = 1
    note: str = ""
    takes: int = 0  # bytes of memory, page cache included, that it uses anew, roughly
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)

    def time_once(self) -> None:
        """One turn."""
        if self.run is not None:
            self.before()
            gc.collect()
            np.ones(self.takes, np.uint8)  # a virtual machine charges the first use of memory to whoever comes first
            began = time.perf_counter()
            result = self.run()
            self.seconds.append(time.perf_counter() - began)
            del result  # giving memory back is not part of it
            self.after()

    @property
    def median(self) -> float | None:
        """Seconds."""
        return median(self.seconds) if self.seconds else None

    @property
    def rate(self) -> float | None:
        """Billions of weights a second."""
        return self.weights / self.median / 1e9 if self.median else None


@dataclass(frozen=True)
class Part:
    """The first rows of one tensor that is quantized, in the chunks in which a conversion encodes it."""

    codes: dict[int, ScalarCode]  # by bits
    trellises: dict[int, TrellisCode]  # by states
    columns: int
    chunks: list[bytes]

    @property
    def weights(self) -> int:
        """Weights in all chunks."""
        return sum(map(len, self.chunks)) // 2


def take_sample(model_dir: Path, limit: int) -> list[Part]:
    """Up to `limit` weights of the bfloat16 tensors that are quantized, an eighth of them from one at most."""
    device = choose_device("cpu", 1)
    job = prepare(model_dir, BITS)
    parts: list[Part] = []
    for tensor in job.source.tensors:
        room = min(limit // 8, limit - sum(part.weights for part in parts))
        columns = tensor.shape[-1] if tensor.shape else 1
        rows = min(tensor.numel, room) // columns if tensor.numel else 0
        if job.choices[tensor.name].bits is None or tensor.dtype != "BF16" or rows == 0:
            continue
        codes, widths = {}, (4, 5)
        choices = [Choice(bits, "benchmark") for bits in widths]
        surveyed = survey(job.source.model, tensor, choices, "default", "error", device)
        for bits, found in zip(widths, surveyed, strict=True):
            assert isinstance(found.code, ScalarCode)
            codes[bits] = found.code
        trellises = {}
        for effort, states in STATES.items():
            choice = Choice(None, "benchmark", TRELLIS_STEP)
            (found,) = survey(job.source.model, tensor, [choice], effort, "error", device)
            assert isinstance(found.code, TrellisCode)
            trellises[states] = found.code
        size = 2 * rows * columns
        starts = range(0, size, 2 * CHUNK)
        chunks = [job.source.model.read(tensor, start, min(2 * CHUNK, size - start)) for start in starts]
        parts.append(Part(codes, trellises, columns, chunks))
    if not parts:
        sys.exit("no bfloat16 tensor of this model is quantized: nothing to measure on")
    return parts


def kernel_cases(parts: Sequence[Part], pool: ThreadPoolExecutor, workers: int) -> Iterator[Case]:
    """memcpy, SHA-256, the encoder and the decoder, all on the same weights in memory."""
    from hlwq_convert.kernels.decode import decoder
    from hlwq_convert.kernels.encode import encoder

    source = np.concatenate([np.frombuffer(raw, "<u2") for part in parts for raw in part.chunks])
    target = source.copy()  # touched
    n = len(source)

    def copy(target: Bits16) -> Bits16:
        list(pool.map(np.copyto, np.array_split(target, workers), np.array_split(source, workers)))
        return target

    def do(tasks: Iterable[Callable[[], object]]) -> None:
        for _ in pool.map(drop, tasks):
            pass

    def drop(task: Callable[[], object]) -> None:
        task()

    yield Case("memcpy", lambda: copy(target), n, workers, "bf16, both buffers in use before")
    new_note = "pages come with the copy"
    yield Case("memcpy to new memory", lambda: copy(np.empty_like(source)), n, workers, new_note, 2 * n)
    yield Case("SHA-256 of the source", lambda: hashlib.sha256(source).digest(), n, 1, "bytes in memory")
    for bits in (4, 5):
        for effort in ("fast", "default"):
            encoders = [(encoder(replace(part.codes[bits], effort=effort)), part.chunks) for part in parts]
            tasks = [partial(encode, raw) for encode, chunks in encoders for raw in chunks]
            yield Case(f"encode kernel {bits} bits {effort}", partial(do, tasks), n, workers, "with the measured error")
    yield from _trellis_cases(parts, target, do, workers)
    for bits in (4, 5):
        tasks, at = [], 0
        for part in parts:
            encode = encoder(replace(part.codes[bits], effort="fast"))
            decode = decoder(part.codes[bits], "BF16")
            for raw in part.chunks:
                chunk, end = encode(raw), at + len(raw) // 2
                scales = np.frombuffer(chunk.scales, "<f2")
                tasks.append(partial(decode, bytes(chunk.codes), scales, target[at:end]))
                at = end
        yield Case(f"decode kernel {bits} bits", partial(do, tasks), n, workers, "to bf16, into memory in use before")


def _trellis_cases(
    parts: Sequence[Part], target: Bits16, do: Callable[[Iterable[Callable[[], object]]], None], workers: int
) -> Iterator[Case]:
    """The encoder of a trellis by states, its decoder, and its entropy coder alone, on the weights of `parts`."""
    from hlwq_convert.kernels.rans import KernelTables
    from hlwq_convert.kernels.rans import encode as encode_indices
    from hlwq_convert.kernels.trellis import decoder, encoder, find_indices

    n = len(target)
    starts = [(part, [CHUNK * i for i in range(len(part.chunks))]) for part in parts]
    for states in STATES.values():
        tasks = [
            partial(encode, raw, start)
            for part, firsts in starts
            for encode in [encoder(part.trellises[states])]
            for raw, start in zip(part.chunks, firsts, strict=True)
        ]
        yield Case(f"encode trellis {states} states", partial(do, tasks), n, workers, "with the measured error")
    least, at = min(STATES.values()), 0  # the states change neither the decoder's work nor that of the entropy coder
    decoding, coding = [], []
    for part, firsts in starts:
        code = part.trellises[least]
        encode, decode, tables = encoder(code), decoder(code, "BF16"), KernelTables(code.pairs)
        for raw, start in zip(part.chunks, firsts, strict=True):
            end, indices = at + len(raw) // 2, find_indices(raw, start, code)
            for i, chunk in enumerate(encode(raw, start).chunks):
                place = slice(at + RANS_CHUNK * i, min(at + RANS_CHUNK * (i + 1), end))
                decoding.append(partial(decode, chunk, start + RANS_CHUNK * i, target[place]))
                coding.append(partial(encode_indices, indices[RANS_CHUNK * i : RANS_CHUNK * (i + 1)], tables))
            at = end
    yield Case("encode trellis, rANS alone", partial(do, coding), n, workers, "indices in memory", takes=4 * n)
    yield Case("decode trellis", partial(do, decoding), n, workers, "to bf16, into memory in use before")


class Conversions:
    """Conversions of a model to one place, and how long their parts took."""

    def __init__(self, model_dir: Path, folder: Path, workers: int) -> None:
        self.model_dir, self.folder, self.workers = model_dir, folder, workers
        self.parts: dict[str, list[dict[str, float]]] = {}

    def convert(self, effort: str) -> None:
        """One, with notes of when the progress of each stage was called first and last."""
        marks: dict[str, tuple[float, float]] = {}

        def progress(stage: str, _done: int, _total: int) -> None:
            now = time.perf_counter()
            marks[stage] = (marks.get(stage, (now, now))[0], now)

        began = time.perf_counter()
        h.convert(self.model_dir, self.file, BITS, effort=effort, workers=self.workers, progress=progress)
        ended = time.perf_counter()
        if "converting" in marks and "checking" in marks:
            encoded, (checking, checked) = marks["converting"][1], marks["checking"]
            parts = {"encode and write": encoded - began, "sync": checking - encoded}
            parts |= {"check": checked - checking, "publish": ended - checked}
            self.parts.setdefault(effort, []).append(parts)

    @property
    def file(self) -> Path:
        """The output."""
        return self.folder / "model.hlwq"

    def remove(self) -> None:
        """The output, before the next conversion."""
        self.file.unlink(missing_ok=True)

    def copy(self, sync: bool) -> None:
        """The shards, as cp copies them."""
        for shard in sorted(self.model_dir.glob("*.safetensors")):
            shutil.copyfile(shard, self.folder / shard.name)
            if sync:
                with (self.folder / shard.name).open("rb") as copy:
                    os.fsync(copy.fileno())

    def remove_copy(self) -> None:
        """What `copy` made."""
        for shard in self.folder.glob("*.safetensors"):
            shard.unlink()


def place_cases(here: Conversions, place: str, weights: int) -> Iterator[Case]:
    """cp and convert to one place; the source is in the page cache."""
    copies = [("cp", False, "shards, not synced")]
    if place == "disk":
        copies.append(("cp and sync", True, "shards, synced as convert does"))
    size, remove = source_bytes(here.model_dir), here.remove_copy
    for name, sync, note in copies:
        yield Case(f"{name}, {place}", partial(here.copy, sync), weights, 1, note, size, before=remove, after=remove)
    for effort in ("fast", "default"):
        name, run = f"convert {BITS} bits {effort}, {place}", partial(here.convert, effort)
        yield Case(name, run, weights, here.workers, takes=size, before=here.remove)


def load_case(file: Path, weights: int, workers: int) -> Case:
    """load_state_dict, from the page cache."""
    if version_of("torch") is None:
        return Case("load_state_dict", None, weights, note="torch is not installed")
    import_module("torch")  # not on the clock
    note = "to new memory, every byte verified"
    run = partial(h.load_state_dict, file, workers=workers)
    return Case("load_state_dict", run, weights, workers, note, takes=2 * weights)


def command_case(name: str, *arguments: str | Path) -> Case:
    """A command in a process of its own, as installed beside this Python or else by its module."""
    script = Path(sys.executable).with_name(name)
    module = f"from hlwq_convert.cli.{name.removeprefix('hlwq-')} import main; main()"
    command = [str(script)] if script.exists() else [sys.executable, "-c", module]

    def run() -> None:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{name} failed with exit status {done.returncode}: {done.stderr.strip()[-500:]}")

    return Case(f"{name} {arguments[0] if isinstance(arguments[0], str) else 'FILE'}", run, 0)


def peer_cases(parts: Sequence[Part], limit: int, folder: Path) -> Iterator[Case]:
    """Other packages, on the first tensors of the sample."""
    chosen: list[Part] = []
    for part in parts:
        # gguf-py wants rows of whole blocks of 32
        if part.columns % 32 == 0 and part.weights + sum(p.weights for p in chosen) <= limit:
            chosen.append(part)
    weights = sum(part.weights for part in chosen)
    for peer in make_peers([(b"".join(part.chunks), part.columns) for part in chosen], folder):
        missing = [package for package in peer.needs if version_of(package) is None]
        note = f"{' and '.join(missing)} not installed" if missing else peer.note
        if not chosen:
            note = "no tensor of the sample fits --peer-weights"
        yield Case(peer.name, peer.run if chosen else None, weights, peer.threads, note, takes=4 * weights)


def source_bytes(model_dir: Path) -> int:
    """Bytes of the shards."""
    return sum(shard.stat().st_size for shard in model_dir.glob("*.safetensors"))
