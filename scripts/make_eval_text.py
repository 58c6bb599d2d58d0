"""Make the text that hlwq-eval uses by default from the Debian package jargon-text.

    apt-get download jargon-text && dpkg-deb -x jargon-text_*.deb DIR
    python scripts/make_eval_text.py DIR/usr/share/doc/jargon-text/jargon.txt.gz

Prose only: chapters 1, 2 and 4 to 11, then the lexicon from its letter A on, until there are 200,000 bytes.
Paragraphs become one line each; tables and pronunciations in phonetic letters are left out.
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

SIZE = 200_000
TEXT = Path(__file__).parent.parent / "hlwq_convert" / "evaluation" / "text" / "jargon-4.4.7.txt"


def main() -> None:
    """Write the excerpt; the same input gives the same bytes."""
    whole = gzip.decompress(Path(sys.argv[1]).read_bytes()).decode().replace("\u00a0", " ")
    chapters = re.split(r"(?m)^(?=Chapter \d+\. )", whole)
    prose = [chapter for chapter in chapters if re.match(r"Chapter ([1-2]|[4-9]|10|11)\. ", chapter)]
    lexicon = whole[whole.index("\n   :abbrev:") :]
    paragraphs = []
    for block in re.split(r"\n\s*\n", "\n\n".join([*prose, lexicon])):
        paragraph = re.sub(r"\s+", " ", block).strip()
        if paragraph and not re.search(r"[\u2500-\u257f]|^/.*/", paragraph):
            paragraphs.append(paragraph)
    text, size = [], 0
    for paragraph in paragraphs:
        size += len(paragraph.encode()) + 2
        if size > SIZE:
            break
        text.append(paragraph)
    TEXT.write_bytes(("\n\n".join(text) + "\n").encode())
    print(f"{TEXT.name}: {TEXT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
