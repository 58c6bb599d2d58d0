"""Write spec/vectors and the worked example of the specification, from code alone.

    python scripts/make_vectors.py            write them
    python scripts/make_vectors.py --check    exit with 1 unless they are what this script would write

Codes and scales are drawn from SHAKE-256 and not chosen by the encoder, so that a better encoder changes no
vector but stages.json. Compressed assets use hand-made frames, so that no version of libzstd does either.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vectors_bad import FIELDS, Fault, Object, Parts, bad, empty, sha256, unsupported, zstd_frame
from vectors_sets import Case, sets

from hlwq_convert import trellis
from hlwq_convert.decode import trellis_code
from hlwq_convert.normal_levels import normal_levels
from hlwq_convert.quantize import ScalarCode, dequantize, power_of_two, quantize
from hlwq_convert.rotate import fwht, sign_vector, to_blocks
from hlwq_convert.scalar import encode
from hlwq_formats import metadata as md
from hlwq_formats import rans
from hlwq_formats.bitpack import pack, unpack
from hlwq_formats.dtypes import ITEM_BITS, WEIGHT_DTYPES, narrow, widen
from hlwq_formats.file_set import open_set, part_name
from hlwq_formats.layout import BLOCK, count_blocks, numel
from hlwq_formats.reader import Reader

SPEC = Path(__file__).resolve().parent.parent / "spec"
EXAMPLE = "hlwq-v1.md"
BEGIN, END = "<!-- example:begin -->\n", "<!-- example:end -->\n"
SIZES: tuple[list[int], ...] = ([1], [7], [64], [127], [129], [1, 576], [3, 256], [5, 100, 2])


def drawn(seed: str, length: int) -> bytes:
    """`length` bytes that follow from `seed`."""
    return hashlib.shake_256(seed.encode()).digest(length)


# --- good files ---------------------------------------------------------------------------------------


def add_scalar(parts: Parts, name: str, dtype: str, shape: list[int], bits: int, **options: Any) -> None:
    """A scalar tensor with drawn codes; `levels`, `scales` (fp16 bits) and `exponent` are options."""
    n_blocks = count_blocks(numel(shape))
    levels = np.asarray(options.get("levels", normal_levels(bits)), "<f4")
    scales = options.get("scales")
    if scales is None:  # 2**-9 to 2**-5
        scales = 0x1800 + np.frombuffer(drawn(name + " scales", 2 * n_blocks), "<u2") % 0x1000
    codes = drawn(f"{name} {bits} codes", n_blocks * BLOCK * bits // 8)
    stored = np.resize(np.asarray(scales, "<u2"), n_blocks).tobytes()
    parts.scalar(name, dtype, shape, options.get("exponent", 0), codes, levels.tobytes(), stored)


def widths(bits: int) -> Parts:
    """One width at every size, the dtypes in turn."""
    parts = empty(signs=True)
    for i, shape in enumerate(SIZES):
        add_scalar(parts, f"w{i}", WEIGHT_DTYPES[(i + bits) % 3], shape, bits)
    return parts


def add_trellis(
    parts: Parts, name: str, dtype: str, shape: list[int], row: int, states: int, pairs: list[int], **options: Any
) -> None:
    """A trellis tensor whose numbers k are drawn: `spread` bounds them, `far` of them are up to 40,000 larger;
    `scales` (bytes) and `exponent` are options."""
    count = count_blocks(numel(shape)) * BLOCK
    spread, far = options.get("spread", 2), options.get("far", 0)
    drawn_k = (
        np.frombuffer(drawn(f"{name} {states} symbols", count), np.uint8).astype(np.int32) % (2 * spread + 1) - spread
    )
    k = np.zeros(-(-count // rans.SEGMENT) * rans.SEGMENT, np.int32)
    k[:count] = drawn_k
    k[: far * 97 : 97] += np.linspace(-40_000, 40_000, far).astype(np.int32)
    segments, state = k.reshape(-1, rans.SEGMENT), np.zeros(-(-count // rans.SEGMENT), np.uint32)
    indices = np.empty_like(segments)
    for t in range(rans.SEGMENT):
        indices[:, t] = 2 * segments[:, t] + (state & 1).astype(np.int32)
        state = rans.next_state(state, segments[:, t].astype(np.uint32), states)
    flat, tables = indices.ravel()[:count], rans.make_tables(np.array(pairs, np.uint16))
    chunks = [rans.encode(flat[at : at + rans.CHUNK], tables) for at in range(0, count, rans.CHUNK)]
    n_rows = numel(shape) // row
    scales = options.get("scales") or bytes(64 + b % 64 for b in drawn(f"{name} scales", n_rows))
    stored = np.resize(np.frombuffer(scales, np.uint8), n_rows).tobytes()
    exponent = options.get("exponent", -30)
    parts.trellis(name, dtype, shape, row, states, exponent, stored, np.array(pairs, "<u2").tobytes(), chunks)


PAIRS = [5000, 3000, 1800, 1200, 800, 900]


def trellis_sizes(states: int) -> Parts:
    """One trellis at every size, the dtypes in turn, and a little more than one group of 32 segments."""
    parts = empty(signs=True)
    for i, shape in enumerate([*SIZES, [33, 1024], [35, 960]]):
        add_trellis(parts, f"w{i}", WEIGHT_DTYPES[i % 3], shape, shape[-1], states, PAIRS)
    return parts


def trellis_rows() -> Parts:
    """Rows of any length, one row for all, scales of 0, subnormal, largest and compressed; no signs."""
    parts = empty()
    scales = bytes([0, 1, 7, 8, 64, 247])
    for i, row in enumerate((1, 50, 120, 300, 3600)):
        add_trellis(parts, f"w{i}", WEIGHT_DTYPES[i % 3], [12, 300], row, 8, PAIRS, scales=scales)
    add_trellis(parts, "w5", "BF16", [300, 12], 12, 8, PAIRS, scales=b"a")
    parts.compress_scales(zstd_frame(300), b"a" * 300)
    return parts


def trellis_symbols() -> Parts:
    """Escapes, far ones among them, frequencies of one kind alone, and two chunks."""
    parts = empty(signs=True)
    add_trellis(parts, "escapes", "BF16", [4, 512], 512, 32, [9000, 4000], spread=6, far=9)
    add_trellis(parts, "few", "F16", [3, 384], 384, 8, [1, 1])
    add_trellis(parts, "many", "F32", [3, 384], 384, 8, [16] * 500, spread=250)
    add_trellis(parts, "two-chunks", "BF16", [261, 1024], 1024, 8, [16000, 8191], spread=0, far=2000)
    return parts


def trellis_extremes() -> Parts:
    """Both ends of the exponent in every dtype: overflow, underflow and -0."""
    parts = empty(signs=True)
    scales = bytes([0, 1, 7, 8, 120, 247])
    for dtype in WEIGHT_DTYPES:
        for exponent in (-149, -60, -23, 88):
            add_trellis(parts, f"{dtype}.{exponent + 149:03}", dtype, [6, 128], 128, 8, PAIRS, scales=scales,
                        exponent=exponent)  # fmt: skip
    return parts


def coded() -> Parts:
    """Every width with compressed codes, whatever that takes, and one tensor of two frames."""
    parts = empty(signs=True)

    def compress(name: str, dtype: str, shape: list[int], bits: int) -> None:
        count = count_blocks(numel(shape)) * BLOCK
        add_scalar(parts, name, dtype, shape, bits, exponent=-8)
        codes = unpack(parts.blobs[-3], bits, count).copy()
        codes[4096:] = 1
        parts.blobs[-3] = pack(codes, bits)
        starts = range(0, count, md.FRAME)
        sizes = [min(md.FRAME, count - start) for start in starts]
        texts = [codes[start : start + size][:4096].tobytes() for start, size in zip(starts, sizes, strict=True)]
        pairs = zip(sizes, texts, strict=True)
        parts.compress_codes([zstd_frame(size, text, letter=b"\1") for size, text in pairs])

    for bits in range(2, 9):
        compress(f"w{bits}", WEIGHT_DTYPES[bits % 3], [3, 123], bits)
    compress("w9.two-frames", "BF16", [1025, 1024], 3)
    return parts


def no_signs() -> Parts:
    """Every width without signs."""
    parts = empty()
    for bits in range(2, 9):
        add_scalar(parts, f"w{bits}", WEIGHT_DTYPES[bits % 3], [2, 65], bits)
    return parts


def extremes() -> Parts:
    """Both ends of the exponent, each kind of scale, the largest levels: overflow, underflow and -0."""
    parts = empty(signs=True)
    scales = [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF]
    wide = [-65504.0, -1.0, 0.0, 65504.0]
    for dtype in WEIGHT_DTYPES:
        for exponent in (-126, -16, 0, 112):
            add_scalar(parts, f"{dtype}.{exponent + 126:03}", dtype, [6 * BLOCK], 2, scales=scales, exponent=exponent)
        add_scalar(parts, f"{dtype}.wide", dtype, [6 * BLOCK], 2, scales=scales, levels=wide)
        add_scalar(parts, f"{dtype}.wide.112", dtype, [6 * BLOCK], 2, scales=scales, levels=wide, exponent=112)
    return parts


def rounding() -> Parts:
    """Whole numbers with one bit more than the dtype holds: each odd one is a tie."""
    parts = empty()
    add_scalar(parts, "bf16", "BF16", [1024], 2, levels=[-40, -9, 22, 33], scales=[0x3C00])
    add_scalar(parts, "f16", "F16", [1024], 2, levels=[-400, -91, 222, 333], scales=[0x3C00])
    add_scalar(parts, "f16.subnormal", "F16", [1024], 2, levels=[-4, -1, 2, 3], scales=[0x3C00], exponent=-25)
    add_scalar(parts, "f32", "F32", [1024], 2, levels=[-1 / 3, -1e-3, 0.7, 65504], scales=[0x3555, 0x2E66])
    return parts


def shapes() -> Parts:
    """Aliases, tensors of no dimension and of no element; the last section is empty and ends the data."""
    parts = empty(signs=True)
    add_scalar(parts, "a", "BF16", [9, 16], 4)
    parts.alias("a.tied", "BF16", [9, 16], "a")
    parts.raw("b", "F32", [], struct.pack("<f", -0.0))
    parts.alias("b.tied", "F32", [], "b")
    add_scalar(parts, "c", "F32", [], 3)
    parts.raw("d", "F16", [0], b"")
    parts.alias("d.tied", "F16", [0], "d")
    parts.raw("e", "I64", [1, 1, 1, 1, 1, 1, 1, 1], struct.pack("<q", -1))
    parts.raw("f", "BF16", [3, 0, 2], b"")
    return parts


def raw_dtypes() -> Parts:
    """A raw tensor of each dtype; floats hold whatever bits they hold, NaN included."""
    parts = empty()
    for dtype, bits in sorted(ITEM_BITS.items()):
        data = drawn(dtype, bits)  # 8 elements
        parts.raw(dtype, dtype, [2, 4], bytes(b & 1 for b in data) if dtype == "BOOL" else data)
    return parts


def assets() -> Parts:
    """Plain, empty and compressed assets, one of two frames, report.json after what sorts behind it."""
    parts = empty()
    parts.asset("1_Pooling/config.json", b"{}\n")
    parts.asset("LICENSE", b"")
    size, text = (1 << 20) + 200_000, b"The second block of this frame is one letter many times.\n"
    frames = [zstd_frame(1 << 20, text), zstd_frame(size - (1 << 20))]
    parts.asset("tokenizer.json", text + b"a" * (size - len(text)), frames)
    parts.asset("vocab-\U0001d54a.txt", "\U0001d54a\n".encode())
    parts.asset("report.json", b'{"opaque":"to readers of the format"}\n')
    return parts


def names() -> Parts:
    """Names that need an escape, or that sort otherwise by UTF-16 than by UTF-8."""
    parts = empty()
    plain = ['quote"back\\slash', "a/b<>&", "A", "a", "é", "e\u0301", "\u2028", "ｗ", "\U0001f600", "\x80", "x" * 512]
    for name in sorted(plain, key=str.encode):
        parts.raw(name, "U8", [1], drawn(name, 1))
    return parts


def smallest() -> Parts:
    """The example of the specification: one raw tensor of two elements."""
    parts = empty()
    parts.raw("w", "BF16", [2], struct.pack("<2H", 0x3F80, 0xC000))
    return parts


def good() -> Iterator[tuple[str, bytes]]:
    """All of spec/vectors/good: (name, file)."""
    cases: list[Callable[[], Parts]] = [smallest, no_signs, extremes, rounding, shapes, raw_dtypes, assets, names]
    for case in cases:
        yield case.__name__.replace("_", "-"), case().build()
    for bits in range(2, 9):
        yield f"bits-{bits}", widths(bits).build()
    yield "nothing", empty().build()
    yield "compat-bit", smallest().build(compat=1 << 63 | 1)
    yield "minor-2", smallest().build(minor=2)
    yield "minor-3", smallest().build(minor=3)
    yield "coded", coded().build()
    for states in rans.TRELLISES:
        yield f"trellis-{states}", trellis_sizes(states).build()
    yield "trellis-rows", trellis_rows().build()
    yield "trellis-symbols", trellis_symbols().build()
    yield "trellis-extremes", trellis_extremes().build()


# --- what a reader must find in them ------------------------------------------------------------------


def decode_tensor(reader: Reader, name: str) -> bytes:
    """The bytes of a tensor in its own dtype."""
    tensor = reader.stored_tensor(name)
    if isinstance(tensor, md.RawTensor):
        return b"".join(reader.raw_chunks(tensor))
    if isinstance(tensor, md.TrellisTensor):
        return narrow(decode_trellis(reader, tensor), tensor.dtype).tobytes()
    code = ScalarCode(tensor.dtype, tensor.bits, tensor.exponent, reader.levels(tensor), reader.signs())
    codes = reader.read_section("tensor", tensor.name, "codes")
    scales = np.concatenate(list(reader.scale_chunks(tensor, 1 << 20)))
    values = dequantize(codes, scales, code, numel(tensor.shape))
    return narrow(values, tensor.dtype).tobytes()


def decode_trellis(reader: Reader, tensor: md.TrellisTensor) -> NDArray[np.float32]:
    """The weights of a trellis tensor by the reference."""
    code, left = trellis_code(reader, tensor), count_blocks(numel(tensor.shape)) * BLOCK
    tables, parts = rans.make_tables(code.pairs), []
    for (chunk,) in reader.symbol_chunks(tensor):
        parts.append(rans.decode(chunk, min(left, rans.CHUNK), tables, tensor.states))
        left -= rans.CHUNK
    return trellis.dequantize(np.concatenate(parts), 0, code, numel(tensor.shape))


def describe(data: bytes) -> Object:
    """The expected content of a good file."""
    with tempfile.NamedTemporaryFile(suffix=".hlwq") as file:
        file.write(data)
        file.flush()
        with Reader(file.name) as reader:
            return content(reader)


def describe_set(case: Case) -> Object:
    """The expected content of a good set; `file_id` is its identifier."""
    with tempfile.TemporaryDirectory() as folder:
        for index, data in enumerate(case.files):
            Path(folder, part_name("m", index, len(case.files))).write_bytes(data)
        with open_set(folder) as reader:
            return content(reader)


def content(reader: Reader) -> Object:
    """What a verified file or set holds."""
    reader.verify()
    tensors = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "sha256": sha256(decode_tensor(reader, t.name))}
        for t in reader.metadata.tensors
    }
    carried = {name: sha256(reader.read_asset(name)) for name in reader.assets}
    return {"tensors": tensors, "file_id": reader.file_id, "content_id": reader.content_id, "assets": carried}


# --- stages -------------------------------------------------------------------------------------------


def bits_of(values: NDArray[Any]) -> str:
    """Numbers as the hexadecimal of their bits, in order, one space between them."""
    values = np.ascontiguousarray(values)
    digits = 2 * values.itemsize
    return " ".join(f"{int(v):0{digits}x}" for v in values.view(f"<u{values.itemsize}").ravel())


def stage(name: str, dtype: str, count: int, bits: int, exponent: int, signs: NDArray[np.float32]) -> Object:
    """Every value between the source and the decoded weights of a tiny tensor."""
    noise = np.frombuffer(drawn(name, 4 * count), np.uint8).reshape(count, 4).sum(axis=1, dtype=np.int32) - 510
    source = narrow(noise.astype(np.float32) * power_of_two(exponent), dtype)
    weights = widen(source.tobytes(), dtype)
    levels = normal_levels(bits)
    blocks = to_blocks(weights * power_of_two(-exponent))
    rotated = fwht(blocks * signs)
    codes, scales = encode(rotated, levels, "fast")
    packed = pack(np.ascontiguousarray(codes).ravel(), bits)

    chosen = levels[unpack(packed, bits, codes.size)].reshape(-1, BLOCK)
    transformed = fwht(chosen)
    scale = scales.astype(np.float32) * power_of_two(exponent)
    scaled = scale[:, None] * transformed
    code = ScalarCode(dtype, bits, exponent, levels, signs, "fast")
    decoded = dequantize(packed, scales, code, count)
    assert np.array_equal((signs * scaled).ravel()[:count].view(np.uint32), decoded.view(np.uint32))
    assert quantize(source.tobytes(), code).codes == packed
    return {
        "name": name, "dtype": dtype, "count": count, "bits": bits, "exponent": exponent,
        "source": bits_of(source), "source_float32": bits_of(weights), "signs": bits_of(signs),
        "block": [bits_of(b) for b in blocks], "signed": [bits_of(b) for b in blocks * signs],
        "rotated": [bits_of(b) for b in rotated], "levels": bits_of(levels), "codes": codes.tolist(),
        "scales": bits_of(scales), "packed": packed.hex(),
        "levels_of_codes": [bits_of(b) for b in chosen], "transformed": [bits_of(b) for b in transformed],
        "scale_float32": bits_of(scale), "scaled": [bits_of(b) for b in scaled],
        "decoded_float32": bits_of(decoded), "decoded": bits_of(narrow(decoded, dtype)),
    }  # fmt: skip


def stages() -> list[Object]:
    """All of spec/vectors/stages.json."""
    plain = np.ones(BLOCK, np.float32)
    return [
        stage("f32, 3 elements, 2 bits", "F32", 3, 2, -20, sign_vector()),
        stage("bf16, 130 elements, 3 bits", "BF16", 130, 3, -17, sign_vector()),
        stage("f16, 128 elements, 4 bits, no signs", "F16", 128, 4, -14, plain),
        stage("bf16, 128 elements, 5 bits", "BF16", 128, 5, 100, sign_vector()),
    ]


# --- the worked example -------------------------------------------------------------------------------


def example(data: bytes) -> str:
    """The smallest file as a hex dump and a list of its regions."""
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{start:08x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  |{text}|")
    rows = ["| Offset | Bytes | Region | Value |", "|---|---|---|---|"]
    for (name, (code, offset)), shown in zip(FIELDS.items(), field_values(data), strict=True):
        rows.append(f"| {offset} | {struct.calcsize(code)} | header: {name} | {shown} |")
    meta_off, meta_len, _, data_len = struct.unpack_from("<4Q", data, 32)
    rows.append(f"| 128 | {data_len} | tensor `w`, section raw | BF16 1.0 and -2.0 |")
    rows.append(f"| {128 + data_len} | {meta_off - 128 - data_len} | padding | zero |")
    rows.append(f"| {meta_off} | {meta_len} | metadata | canonical JSON, ends the file |")
    found = describe(data)
    # What is hashed for the content_id (section 7), spelled out once by hand.
    stored = data[128 : 128 + data_len]
    listed = f'[[],["w","BF16",[2],"raw",null,null,null,[["raw",{data_len},"{sha256(stored)}"]]]]'
    assert sha256(listed.encode()) == found["content_id"]
    dump, table = "\n".join(lines), "\n".join(rows)
    return (
        f"```text\n{dump}\n```\n\n{table}\n\nIts `file_id` is the SHA-256 of its first 128 bytes:\n\n"
        f"```text\n{found['file_id']}\n```\n\nIts `content_id` is the SHA-256 of this line, without a line end:\n\n"
        f"```text\n{listed}\n{found['content_id']}\n```\n"
    )


def field_values(data: bytes) -> Iterator[str]:
    """Each field of the header as text."""
    for code, offset in FIELDS.values():
        (value,) = struct.unpack_from(code, data, offset)
        if isinstance(value, int):
            yield f"{value:#010x}" if offset == 124 else str(value)
        else:
            yield f"`{value.hex()}`" if any(value) else "zero"


# --- files --------------------------------------------------------------------------------------------


def as_json(value: Any) -> bytes:
    """JSON for people and version control: one key a line, ASCII, sorted."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def faults(folder: str, listed: list[Fault]) -> dict[str, bytes]:
    """The files of a folder of faults with their index."""
    index = {f"{f.name}.hlwq": {"error": f.error, "fault": f.fault} for f in listed}
    assert len(index) == len(listed), "two faults share a name"
    return {f"{folder}/{f.name}.hlwq": f.data for f in listed} | {f"{folder}/index.json": as_json(index)}


def all_files() -> dict[str, bytes]:
    """Every file of spec/vectors by its path there."""
    files = {"stages.json": as_json(stages()), **faults("bad", bad()), **faults("unsupported", unsupported())}
    sets_index = {}
    for case in sets():
        count = len(case.files)
        for index, data in enumerate(case.files):
            files[f"sets/{case.name}/{part_name('m', index, count)}"] = data
        sets_index[case.name] = describe_set(case) if case.error is None else {"error": case.error, "fault": case.fault}
    files["sets/index.json"] = as_json(sets_index)
    for name, data in good():
        files[f"good/{name}.hlwq"] = data
        files[f"good/{name}.json"] = as_json(describe(data))
    return files


def with_example(spec: str) -> str:
    """The specification with the example between its markers made anew."""
    before, rest = spec.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{example(smallest().build())}\n{END}{after}"


def main() -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    wanted = {SPEC / "vectors" / path: data for path, data in all_files().items()}
    wanted[SPEC / EXAMPLE] = with_example((SPEC / EXAMPLE).read_text("utf-8")).encode()
    present = {path for path in (SPEC / "vectors").rglob("*") if path.suffix in (".hlwq", ".json")}
    stale = sorted(present - wanted.keys())
    changed = [path for path, data in wanted.items() if not path.is_file() or path.read_bytes() != data]
    if check:
        for path in stale:
            print(f"{path.relative_to(SPEC.parent)}: no vector of that name is made", file=sys.stderr)
        for path in changed:
            print(f"{path.relative_to(SPEC.parent)}: not current, run scripts/make_vectors.py", file=sys.stderr)
        return 1 if stale or changed else 0
    for path in stale:
        path.unlink()
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wanted[path])
    size = sum(len(data) for path, data in wanted.items() if path.suffix in (".hlwq", ".json"))
    print(f"{len(wanted)} files, {size} bytes of vectors; {len(changed)} written, {len(stale)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
