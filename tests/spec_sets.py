"""Split sets for the second reader, written from section 8.1 of the specification alone."""

import hashlib
from typing import Any

from spec_reader import JSON, read

SAME = ("signs", "recipe", "source", "tool")


def read_set(files: list[bytes]) -> dict[str, Any]:
    """All of a set, given in the order that the names of its files say; one of REFUSALS when they are none."""
    parts = [read(data) for data in files]
    documents = [part["meta"] for part in parts]
    splits = [document["split"] for document in documents]
    assert all(splits)
    assert [(split["index"], split["count"]) for split in splits] == [(i, len(files)) for i in range(len(files))]
    assert all(document[key] == documents[0][key] for document in documents for key in SAME)
    texts = [
        JSON.encode(document | {"split": document["split"] | {"set": "0" * 64}}).encode() for document in documents
    ]
    assert {split["set"] for split in splits} == {hashlib.sha256(b"".join(texts)).hexdigest()}
    assert sum(map(len, texts)) <= 2**26
    tensors = {name: tensor for part in parts for name, tensor in part["tensors"].items()}
    assert len(tensors) == sum(len(part["tensors"]) for part in parts) <= 200_000
    rows = sorted((row for part in parts for row in part["rows"][1:]), key=lambda row: str(row[0]).encode())
    content = hashlib.sha256(JSON.encode([parts[0]["rows"][0], *rows]).encode()).hexdigest()
    found = {row[0]: tensors[row[0]] for row in rows}
    return {"tensors": found, "assets": parts[0]["assets"], "file_id": splits[0]["set"], "content_id": content}
