"""A second reader of .hlwq 1.2, written from spec/hlwq-v1.md alone; numbers in comments are its sections."""

import hashlib
import json
import math
import re
import struct
import zlib
from bisect import bisect
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import zstandard

TAGS = {4: "F4", 6: "F6_E2M3 F6_E3M2", 8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ"}  # 5.4
TAGS |= {16: "I16 U16 F16 BF16", 32: "I32 U32 F32", 64: "C64 F64 I64 U64"}
DTYPES = {tag: bits for bits, tags in TAGS.items() for tag in tags.split()}
BAD_PART = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f-\x9f]|[. ]\Z|\A\Z')  # 5.6; "." and ".." end in a dot
DEVICE = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|(COM|LPT)[0-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)
REFUSALS = (AssertionError, ValueError, IndexError, KeyError, RecursionError, struct.error, zstandard.ZstdError)
KEYS = ("name", "dtype", "shape", "encoding", "bits", "block", "exponent")
JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True)
# 5.2, 5.3: a range is an integer, a pattern a string, a tuple one of these, [rule, lengths] an array, a dict an object
COUNT, POSITIVE, BITS, DIGEST = range(2**53), range(1, 2**53), range(2, 9), re.compile("[0-9a-f]{64}")
TEXT, NAME = re.compile(r"[^\x00-\x1f\x7f]{0,4096}"), re.compile(r"[^\x00-\x1f\x7f]{1,512}")
KINDS = ("signs", "codes", "levels", "scales", "raw", "frequencies", "symbols", "asset")
PLAIN = {"kind": KINDS, "length": COUNT, "sha256": DIGEST}
ZSTD = {"frames": [POSITIVE, COUNT], "raw_length": POSITIVE, "raw_sha256": DIGEST}
SYMBOLS, CODES = {"kind": "symbols", "chunks": [POSITIVE, COUNT]}, {"kind": "codes", "zstd_codes": ZSTD}
SECTION = (PLAIN, PLAIN | {"zstd": ZSTD}, PLAIN | SYMBOLS, PLAIN | CODES)
TENSOR = {"name": NAME, "dtype": tuple(DTYPES), "shape": [COUNT, range(9)]}
RAW = TENSOR | {"encoding": "raw", "reason": TEXT, "sections": [SECTION, range(4)]}
SCALAR = RAW | {"encoding": "scalar", "bits": BITS, "block": 128, "exponent": range(-126, 113), "source_sha256": DIGEST}
TRELLIS = RAW | {"encoding": "trellis", "block": 128, "row": POSITIVE, "exponent": range(-149, 89)}
TRELLIS |= {"states": (8, 32, 64, 256), "step": range(2**23, 2**24), "source_sha256": DIGEST}
POLYNOMIALS = {8: ("1011", "0100"), 32: ("100101", "001000"), 64: ("1000011", "0010100")}  # 6.7
POLYNOMIALS |= {256: ("101001101", "011110010")}
RULES = [{"bits": (BITS, None), "match": TEXT}, range(10001)]
ASSETS = [{"name": NAME, "sections": [SECTION, range(1, 2)]}, range(10001)]
RECIPE_1_0 = {"bits": (BITS, None), "effort": TEXT, "name": (TEXT, None), "rules": RULES}
RECIPE = (RECIPE_1_0, RECIPE_1_0 | {"target": TEXT})
SOURCE = {"files": [{"length": COUNT, "name": NAME}, range(10001)], "repo": (TEXT, None), "revision": (TEXT, None)}
DOCUMENT = {"assets": ASSETS, "recipe": RECIPE, "signs": (None, PLAIN), "source": SOURCE}
DOCUMENT |= {"tensors": [(RAW, SCALAR, TRELLIS, TENSOR | {"encoding": "alias", "of": NAME}), range(200001)]}
DOCUMENT |= {"split": (None, {"count": range(2, 257), "index": range(256), "set": DIGEST, "size": POSITIVE})}
DOCUMENT |= {"tool": {"name": TEXT, "version": TEXT, "zstd": TEXT}}


def fits(value: Any, rule: Any) -> bool:
    """Whether a parsed value has the type, keys and range of a rule."""
    if isinstance(rule, range):
        return type(value) is int and value in rule
    if isinstance(rule, re.Pattern):
        return isinstance(value, str) and rule.fullmatch(value) is not None
    if isinstance(rule, list):
        return isinstance(value, list) and len(value) in rule[1] and all(fits(one, rule[0]) for one in value)
    if isinstance(rule, dict):
        return isinstance(value, dict) and value.keys() == rule.keys() and all(fits(value[k], rule[k]) for k in rule)
    if isinstance(rule, tuple):
        return any(fits(value, one) for one in rule)
    return type(value) is type(rule) and value == rule


def raw_length(s: dict[str, Any]) -> int:
    """Bytes of a section after decompression, whose frames must be as many and as long as that takes (6.4)."""
    z = s.get("zstd", {"raw_length": s["length"], "frames": None})
    if z["frames"]:
        assert len(z["frames"]) == -(-z["raw_length"] // 2**20) and sum(z["frames"]) == s["length"]
    return z["raw_length"]


def check_entries(tensors: list[dict[str, Any]], assets: list[dict[str, Any]]) -> None:
    """5.5 and 5.6: what entries say of each other, lengths as shape and bits demand, names that are plain paths."""
    names, seen, total = [t["name"].encode() for t in tensors], {}, 0
    assert all(a < b for a, b in pairwise(names)) and all(len(name) <= 512 for name in names)
    for t in tensors:
        n, bits = math.prod(t["shape"]), DTYPES[t["dtype"]]
        assert math.prod(max(d, 1) for d in t["shape"]) < 2**53
        if t["encoding"] == "alias":
            assert seen.get(t["of"]) == (t["dtype"], t["shape"])
            continue
        want = [("raw", n * bits / 8)]
        if t["encoding"] == "scalar":
            assert t["dtype"] in ("BF16", "F16", "F32") and n
            want = [("codes", -(-n // 128) * 16 * t["bits"]), ("levels", 4 << t["bits"]), ("scales", -(-n // 128) * 2)]
            if z := t["sections"][0].get("zstd_codes"):
                stored, z["bits"] = t["sections"][0]["length"], t["bits"]  # for `unpack`
                assert z["raw_length"] == want[0][1] and max(z["frames"]) <= 1052672
                assert len(z["frames"]) == -(-n // 128 * 128 // 2**20) and sum(z["frames"]) == stored
                want[0] = ("codes", stored)
        if t["encoding"] == "trellis":
            small, lengths = t["sections"][:2], t["sections"][2]["chunks"]
            rows, table = (raw_length(s) for s in small)
            symbols = t["sections"][2]["length"]
            want = [("scales", small[0]["length"]), ("frequencies", small[1]["length"]), ("symbols", symbols)]
            assert rows == n / t["row"] and not any("zstd" in s for s in t["sections"][2:])
            assert t["dtype"] in ("BF16", "F16", "F32") and n and table in range(4, 32769, 2)
            assert sum(lengths) == symbols and len(lengths) == -(-n // 2**18)
            assert all(length % 2 == 0 and length <= 1048704 for length in lengths)
        assert [(s["kind"], s["length"]) for s in t["sections"]] == want
        assert t["encoding"] == "trellis" or not any("zstd" in s for s in t["sections"])
        seen[t["name"]] = (t["dtype"], t["shape"])
    assert all(a < b for a, b in pairwise((a["name"] == "report.json", a["name"].encode()) for a in assets))
    lower = {a["name"].encode().lower() for a in assets}  # of bytes: A to Z alone
    folders = {name[: slash.start()] for name in lower for slash in re.finditer(b"/", name)}
    assert len(lower) == len(assets) and not lower & folders
    for a in assets:
        (s,), parts = a["sections"], a["name"].split("/")
        total += (size := raw_length(s))
        assert s["kind"] == "asset" and len(a["name"].encode()) <= 512
        assert size <= 2**26 and total <= 2**30
        assert all(len(p.encode()) <= 255 and not BAD_PART.search(p) and not DEVICE.fullmatch(p) for p in parts)


def unpack(s: dict[str, Any], padding: bytes, stored: bytes) -> bytes:
    """The raw bytes of a section, verified with the padding before it (4, 6.4)."""
    assert not any(padding) and hashlib.sha256(stored).hexdigest() == s["sha256"]
    if not (z := s.get("zstd", s.get("zstd_codes"))):
        return stored
    raw, bits = b"", z.get("bits", 8)
    for start, end in pairwise(accumulate(z["frames"], initial=0)):
        frame, size = stored[start:end], min(2**20, z["raw_length"] * 8 // bits - len(raw))
        head = zstandard.get_frame_parameters(frame)
        assert frame[:4] == b"(\xb5/\xfd" and head.window_size <= 2**23
        assert (head.content_size, head.dict_id) == (size, 0)
        raw += zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    if bits < 8:  # a code a byte
        assert max(raw) < 2**bits
        each = np.unpackbits(np.frombuffer(raw, np.uint8)[:, None], axis=1, bitorder="little")
        raw = np.packbits(each[:, :bits], bitorder="little").tobytes()
    assert hashlib.sha256(raw).hexdigest() == z["raw_sha256"]
    return raw


def fwht(y: Any) -> Any:
    """The transform of every 128 numbers (6.2)."""
    for h in (1, 2, 4, 8, 16, 32, 64):
        a, b = y.reshape(-1, 2, h).swapaxes(0, 1)
        y = np.stack((a + b, a - b), axis=1)
    return y


@np.errstate(all="ignore")
def decode(t: dict[str, Any], sign: Any, codes: bytes, levels: bytes, scales: bytes) -> bytes:
    """A scalar tensor in its dtype (6.1 to 6.3)."""
    table, halves = np.frombuffer(levels, "<f4"), np.frombuffer(scales, "<u2")
    assert (np.abs(table) <= 65504).all() and (table[1:] > table[:-1]).all() and (halves < 0x7C00).all()
    stream = np.unpackbits(np.frombuffer(codes, np.uint8), bitorder="little").reshape(-1, t["bits"])
    y = fwht(table[np.packbits(stream, axis=1, bitorder="little")[:, 0]])
    s = halves.view("<f2").astype(np.float32) * np.float32(2.0 ** t["exponent"])
    return narrow(t, sign * (s[:, None] * y.reshape(-1, 128)))


def narrow(t: dict[str, Any], blocks: Any) -> bytes:
    """Weights in the tensor's dtype (6.3)."""
    w = blocks.ravel()[: math.prod(t["shape"])]
    if t["dtype"] == "BF16":
        return (((u := w.view(np.uint32)) + np.uint32(0x7FFF) + ((u >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return w.astype("<f2" if t["dtype"] == "F16" else "<f4").tobytes()


def integers(words: list[int], count: int, states: int, q: list[int]) -> list[int]:
    """The integers m of a chunk (6.7)."""
    g0, g1 = (sum(1 << i for i, bit in enumerate(h[1:]) if bit == "1") for h in POLYNOMIALS[states])
    ends: tuple[list[int], ...] = ([], [])
    for p in (0, 1):
        ends[p].extend(accumulate(q[a] for a in range(p, len(q), 2) for _ in range(2 if a else 1)))
        assert min(q) > 0 and ends[p][-1] < 2**14
        ends[p].append(2**14)
    lanes = min(32, -(-count // 1024))
    x, at, m = [words[2 * i] << 16 | words[2 * i + 1] for i in range(lanes)], 2 * lanes, [0] * count
    assert min(x) >= 2**16
    for group in range(0, count, 2**15):
        s = [0] * lanes
        for t in range(1024):
            for lane in range(lanes):
                if (i := group + 1024 * lane + t) >= count:
                    break
                p, slot = s[lane] % 2, x[lane] % 2**14
                u = bisect(ends[p], slot)
                start = ends[p][u - 1] if u else 0
                x[lane] = (ends[p][u] - start) * (x[lane] >> 14) + slot - start
                if u == len(ends[p]) - 1:
                    u, at = u + words[at], at + 1
                if x[lane] < 2**16:
                    x[lane], at = x[lane] << 16 | words[at], at + 1
                k = -(u + 1 >> 1) if u % 2 else u >> 1
                m[i], s[lane] = 2 * k + p, s[lane] >> 1 ^ p * g0 ^ k % 2 * g1
    assert x == [2**16] * lanes and at == len(words)
    return m


@np.errstate(all="ignore")
def decode_trellis(t: dict[str, Any], sign: Any, scales: bytes, frequencies: bytes, symbols: bytes) -> bytes:
    """A trellis tensor in its dtype (6.7)."""
    n = math.prod(t["shape"])
    padded, q, m = -(-n // 128) * 128, np.frombuffer(frequencies, "<u2").tolist(), list[int]()
    for start, end in pairwise(accumulate(t["sections"][2]["chunks"], initial=0)):
        words = np.frombuffer(symbols[start:end], "<u2").tolist()
        m += integers(words, min(2**18, padded - len(m)), t["states"], q)
    assert n % t["row"] == 0 and max(scales) < 248
    unit = np.float32(t["step"]) * np.float32(2.0 ** t["exponent"])
    s = unit * np.array([c << 7 for c in scales], "<u2").view("<f2").astype(np.float32)
    rows = np.minimum(np.arange(padded) // t["row"], len(scales) - 1)
    return narrow(t, sign * (s[rows] * fwht(np.array(m, np.float32)).ravel()).reshape(-1, 128))


def read(data: bytes) -> dict[str, Any]:
    """Verify a whole file and decode all of it; one of REFUSALS when it breaks the document."""
    head = struct.unpack("<8sHHIQQQQQQQ32s20sI", data[:128])  # 3
    magic, major, _, length, incompat, _, meta_off, meta_len, data_off, data_len, size, digest, zeros, crc = head
    assert (magic, major, length, data_off) == (b"HLWQ\r\n\x1a\n", 1, 128, 128)
    assert (crc, zeros, size) == (zlib.crc32(data[:124]), bytes(20), len(data))
    assert (meta_off, meta_off + meta_len) == (-(-(128 + data_len) // 64) * 64, size) and meta_len <= 2**26
    assert hashlib.sha256(data[meta_off:]).digest() == digest
    meta = json.loads(text := data[meta_off:].decode())  # 5.1
    assert JSON.encode(meta) == text and fits(meta, DOCUMENT)
    assert not (part := meta["split"]) or (part["index"] < part["count"] and not (part["index"] and meta["assets"]))
    signs, tensors, assets = [meta["signs"]] if meta["signs"] else [], meta["tensors"], meta["assets"]
    assert all((s["kind"], s["length"]) == ("signs", 16) for s in signs)
    check_entries(tensors, assets)
    sections = [*signs, *(s for entry in tensors + assets for s in entry.get("sections", []))]  # 4
    features = (any("zstd_codes" in s for s in sections), any("row" in t for t in tensors), bool(meta["split"]))
    assert incompat == sum(has << bit for bit, has in enumerate(features))  # 10
    ends = list(accumulate((s["length"] for s in sections), lambda end, n: -(-end // 64) * 64 + n, initial=128))
    assert ends[-1] == 128 + data_len and not any(data[ends[-1] : meta_off])
    spans = ((s, before, end - s["length"], end) for s, (before, end) in zip(sections, pairwise(ends), strict=True))
    stored = [unpack(s, data[before:start], data[start:end]) for s, before, start, end in spans]
    held = [[s["kind"], len(raw), hashlib.sha256(raw).hexdigest()] for s, raw in zip(sections, stored, strict=True)]
    pairs = iter(zip(held, stored, strict=True))
    flips = np.frombuffer(next(pairs)[1] if signs else bytes(16), np.uint8)  # 6.2
    sign = 1 - 2 * np.unpackbits(flips, bitorder="little").astype(np.float32)
    rows, found = [held[: len(signs)]], {}  # 7
    for t in tensors:
        mine = [next(pairs) for _ in t.get("sections", [])]
        raws = [raw for _, raw in mine] or [found[t["of"]][2]]
        decoders = {"scalar": decode, "trellis": decode_trellis}
        value = decoders[t["encoding"]](t, sign, *raws) if t["encoding"] in decoders else raws[0]
        assert t["dtype"] != "BOOL" or not value.strip(b"\0\1")  # 6.5
        found[t["name"]] = (t["dtype"], t["shape"], value)
        code = [t["states"], t["row"], t["step"]] if "row" in t else t.get("bits")
        rows.append(
            [*(code if key == "bits" else t.get(key) for key in KEYS), [row for row, _ in mine] if mine else t["of"]]
        )
    files = {a["name"]: next(pairs)[1] for a in assets}
    ids = [hashlib.sha256(value).hexdigest() for value in (data[:128], JSON.encode(rows).encode())]
    return {"tensors": found, "assets": files, "file_id": ids[0], "content_id": ids[1], "rows": rows, "meta": meta}
