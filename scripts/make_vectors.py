"""Write spec/vectors and the worked example of the specification, from code alone.

    python scripts/make_vectors.py            write them
    python scripts/make_vectors.py --check    exit with 1 unless they are what this script would write

The files are put together in vector_parts.py, and listed in vectors_good.py, vectors_bad.py and vectors_sets.py; what a
reader must find in the good ones is decoded here by the reference. A better encoder changes stages.json alone.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vector_parts import FIELDS, Fault, Object, sha256
from vectors_bad import bad, unsupported
from vectors_good import drawn, good, smallest
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
from hlwq_formats.dtypes import narrow, widen
from hlwq_formats.file_set import open_set, part_name
from hlwq_formats.layout import BLOCK, count_blocks, numel
from hlwq_formats.reader import Reader

SPEC = Path(__file__).resolve().parent.parent / "spec"
EXAMPLE = "hlwq-v1.md"
BEGIN, END = "<!-- example:begin -->\n", "<!-- example:end -->\n"


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
