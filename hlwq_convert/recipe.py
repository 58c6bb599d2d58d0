"""Which bits a user asked for: --bits, --set and recipe files, as one list of rules."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import msgspec

from hlwq_formats import metadata as md
from hlwq_formats.errors import MissingInput, Usage, escape
from hlwq_formats.files import InputFile

from .scalar import EFFORTS
from .target import Target, compile_pattern

DEFAULT_BITS = 5
_MAX_RECIPE = 1 << 20
_MAX_PATTERN = 4096  # what the metadata can hold


class _RuleFile(msgspec.Struct, forbid_unknown_fields=True):
    match: str
    bits: int | str


class _RecipeFile(msgspec.Struct, forbid_unknown_fields=True):
    default: int = DEFAULT_BITS
    rule: list[_RuleFile] = []


def builtin_recipes() -> list[str]:
    """Names that --recipe takes besides files."""
    folder = resources.files("hlwq_convert") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def make_recipe(
    bits: int | None = None,
    recipe: str | None = None,
    sets: Sequence[str] = (),
    effort: str = "default",
    target: Target | None = None,
) -> md.Recipe:
    """Combine the options into a recipe; rules of `sets` come last, and the last rule that matches wins. With a
    `target` what no rule names is coded at a variable rate.

    Raises Usage for anything that cannot be meant, MissingInput for a recipe that is not there.
    """
    if recipe is not None and bits is not None:
        raise Usage("--bits and --recipe exclude each other", hint="set `default` in the recipe")
    if target is not None and (bits is not None or recipe is not None):
        raise Usage("--bpw and --size exclude --bits and --recipe", hint="bound single tensors with --min-bits")
    if effort not in EFFORTS:
        raise Usage(f"effort is {escape(str(effort))}, expected {' or '.join(EFFORTS)}")
    name, default, rules = None, bits if bits is not None else DEFAULT_BITS, []
    if recipe is not None:
        name, document = _load(recipe)
        default = document.default
        rules = [_rule(r.match, r.bits, f"recipe {name}") for r in document.rule]
    for option in [sets] if isinstance(sets, str) else sets:
        pattern, separator, value = option.rpartition("=")
        if not separator or not pattern:
            raise Usage(f"--set {escape(option)}: expected REGEX=BITS or REGEX=raw")
        rules.append(_rule(pattern, value, f"--set {escape(option)}"))
    if target is not None:
        if len(text := str(target)) > _MAX_PATTERN or any(char < " " or char == "\x7f" for char in text):
            raise Usage(
                f"--min-bits and --max-bits: at most {_MAX_PATTERN} characters in all, and no control characters"
            )
        return md.Recipe(name=None, bits=None, effort=effort, rules=rules, target=text)
    default = _check_bits(default, "--bits" if name is None else f"recipe {name}: default")
    return md.Recipe(name=name, bits=default, effort=effort, rules=rules)


def _load(recipe: str) -> tuple[str, _RecipeFile]:
    if recipe in builtin_recipes():
        name, text = recipe, (resources.files("hlwq_convert") / "recipes" / f"{recipe}.toml").read_text("utf-8")
    else:
        try:
            # only the last part of the path: folders of the user's machine do not belong in a file
            name = escape(Path(recipe).name)
            with InputFile(recipe) as file:
                text = file.read(0, min(file.size, _MAX_RECIPE)).decode("utf-8")
        except MissingInput as error:
            raise MissingInput(
                f"no such recipe: {error.problem}", file=recipe, hint=f"built in: {', '.join(builtin_recipes())}"
            ) from None
        except UnicodeError:
            raise Usage("the recipe is not UTF-8 text", file=recipe) from None
    try:
        return name, msgspec.convert(tomllib.loads(text), _RecipeFile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        raise Usage(f"not a recipe: {escape(str(error))}", file=recipe) from None


def _rule(pattern: str, bits: int | str, where: str) -> md.Rule:
    compile_pattern(pattern, where)
    if len(pattern) > _MAX_PATTERN or any(char < " " or char == "\x7f" for char in pattern):
        raise Usage(f"{where}: an expression has at most {_MAX_PATTERN} characters and no control characters")
    if bits == "raw":
        return md.Rule(match=pattern, bits=None)
    return md.Rule(match=pattern, bits=_check_bits(bits, where))


def _check_bits(bits: int | str, where: str) -> int:
    if str(bits) not in {str(width) for width in range(2, 9)}:
        raise Usage(f"{where}: bits are {escape(str(bits))}, expected 2 to 8 or raw")
    return int(bits)
