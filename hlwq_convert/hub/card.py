"""The model card: what a repository of converted files says of them, every number read from the files themselves."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml
from msgspec import UNSET

from hlwq_formats.errors import escape

from ..inspection import Inspection
from ..recipe import builtin_recipes, make_recipe
from ..report import human_bytes
from .client import parse_id
from .evaluation import Evaluation

LIBRARY = "hlwq"
_MAX_FRONT_MATTER = 1 << 16
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Container:
    """A converted file as it is published: its name, what is in it and, where it was measured, its output. A split set
    has the name that it would have in one file."""

    name: str
    inspection: Inspection
    evaluation: Evaluation | None = None

    @property
    def files(self) -> list[str]:
        """The names of its files: its own, or those of its parts."""
        split = self.inspection.split
        return [self.name] if split is None else [part.name for part in split.parts]


def front_matter(text: bytes) -> dict[str, Any]:
    """The YAML at the start of a card, empty where there is none that is plain data."""
    match = _FRONT_MATTER.match(text[:_MAX_FRONT_MATTER].decode("utf-8", "replace").removeprefix("\ufeff"))
    if match is None:
        return {}
    try:
        found = yaml.load(match[1], Loader=yaml.BaseLoader)  # texts, lists and objects alone: "no" is a language
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def make_card(repo: str, containers: list[Container], base: dict[str, Any]) -> str:
    """The README.md of `repo`; `base` is the front matter of the source's card."""
    first = containers[0].inspection
    source = first.metadata.source
    known = source.repo is not None and source.revision is not None and parse_id(source.repo) is not None
    title = repo.split("/")[-1]
    origin = (
        f"[{source.repo}](https://huggingface.co/{source.repo}) at commit `{plain(str(source.revision))}`"
        if known
        else "a local model"
    )
    parts = [
        _header(base, source.repo if known else None),
        f"# {title}",
        f"{_sentence(origin)}, quantized by {plain(first.metadata.tool.name)} {plain(first.metadata.tool.version)} "
        "into HLWQ files: blocks of 128 weights are rotated by a Walsh-Hadamard transform and coded with a codebook "
        "fitted to each tensor. Norms, biases and other delicate tensors are as in the source, bit for bit. "
        "report.json has the error of every tensor.",
        file_table(containers),
        "Cosine and SQNR compare each quantized tensor with the source; they were measured on the decoded weights "
        "while converting. They are an alarm for bugs more than a measure of quality.",
    ]
    if any(container.evaluation for container in containers):
        parts += ["## Output against the source", evaluation_table(containers)]
    parts += [
        "## Loading",
        _snippet(repo, containers),
        "Needs `pip install \"hlwq-convert[torch,hub]\"`. Every byte is verified before it is used.",
        "## How it was made",
        "\n".join(["```", *[_command(container) for container in containers], "```"]),
        "The same command and version give the same bytes on any machine. Content ids: "
        + ", ".join(f"{container.name} `{container.inspection.content_id}`" for container in containers)
        + ".",
        "## Credit",
        "HLWQ (Hadamard-Lloyd Weight Quantization) was published as PolarQuant in "
        "[arXiv:2603.29078](https://arxiv.org/abs/2603.29078) and renamed by its author. It is the scalar case of "
        "HIGGS, [arXiv:2411.17525](https://arxiv.org/abs/2411.17525).",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def license_warning(base: dict[str, Any]) -> str | None:
    """What the owner of a repository should look at before publishing, by the licence that the source's card names."""
    name = base.get("license")
    if not isinstance(name, str) or not name:
        return "the source's card names no licence: make sure that you may publish what is made from it"
    if re.search(r"(^|-)nd(-|$)", name):
        return f"the source's licence, {escape(name, 80)}, does not allow works made from it to be published"
    if name in ("other", "unknown"):
        full = base.get("license_name")
        called = f" ({escape(full, 80)})" if isinstance(full, str) else ""
        return f"the source has a licence of its own{called}: read whether you may publish what is made from it"
    return None


def plain(text: str, limit: int = 120) -> str:
    """A text of a file inside Markdown: one line, and no mark-up, mention or command of a CI system."""
    shown = re.sub(r"[\\`*_{}\[\]<>()#|!&~@]", lambda found: f"&#{ord(found[0])};", escape(text, limit))
    return shown.replace("::", ":&#58;")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _header(base: dict[str, Any], base_model: str | None) -> str:
    data: dict[str, Any] = {key: base[key] for key in _INHERITED if _is_plain(base.get(key))}
    if base_model is not None:
        data |= {"base_model": base_model, "base_model_relation": "quantized"}
    data |= {"library_name": LIBRARY, "tags": [LIBRARY, "quantized"]}
    text = yaml.safe_dump(data, sort_keys=True, allow_unicode=False, default_flow_style=False, width=1000)
    return f"---\n{text}---"


def _is_plain(value: object) -> bool:
    """A text or a list of texts, as the Hub takes them."""
    if isinstance(value, list):
        return 0 < len(value) <= 200 and all(isinstance(item, str) and len(item) <= 200 for item in value)
    return isinstance(value, str) and 0 < len(value) <= 500


def file_table(containers: list[Container]) -> str:
    """Size and closeness to the source of each file, in Markdown."""
    rows = [
        [
            c.name if len(c.files) == 1 else f"{c.name}, in {len(c.files)} parts",
            human_bytes(c.inspection.file_bytes),
            _number(c.inspection.bpw, ".3f"),
            _number(c.inspection.summary.cosine_min, ".5f"),
            _number(c.inspection.summary.sqnr_db_mean, ".2f"),
        ]
        for c in containers
    ]
    return table(["file", "size", "bits a weight, whole file", "lowest cosine", "mean SQNR, dB"], rows)


def evaluation_table(containers: list[Container]) -> str:
    """The output of each file that was measured, in Markdown."""
    rows = [
        [
            c.name,
            plain(e.text),
            str(e.ctx),
            f"{e.perplexity:.4f}",
            f"{e.perplexity_ratio:.5f}",
            f"{e.kl_mean:.6f}",
            f"{e.kl_p99:.6f}",
        ]
        for c in containers
        if (e := c.evaluation) is not None
    ]
    columns = ["file", "text", "context, tokens", "perplexity", "ratio to the source"]
    return table([*columns, "KL divergence, mean, nats", "99th percentile"], rows)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the cells are taken as they are."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _snippet(repo: str, containers: list[Container]) -> str:
    name, count = containers[0].files[0], len(containers[0].files)
    fetch = ["from huggingface_hub import hf_hub_download", "", f'path = hf_hub_download("{repo}", "{name}")']
    if count > 1:
        pattern = name.replace("-00001-of-", "-*-of-")
        fetch = [
            "from huggingface_hub import snapshot_download",
            "",
            f'folder = snapshot_download("{repo}", allow_patterns="{pattern}")',
            f'path = f"{{folder}}/{name}"  # or any other part',
        ]
    return "\n".join(
        [
            "```python",
            "import hlwq_convert",
            *fetch,
            "state_dict = hlwq_convert.load_state_dict(path)  # torch tensors by their source names",
            "```",
        ]
    )


def _command(container: Container) -> str:
    """The command line that makes the file, from the recipe that it carries."""
    source, recipe = container.inspection.metadata.source, container.inspection.metadata.recipe
    origin = f"{source.repo}@{source.revision}" if source.repo and source.revision else "MODEL_DIR"
    words, rules = ["hlwq-convert", origin, container.name], recipe.rules
    if recipe.target is not UNSET:
        words += _split(recipe.target)
    elif recipe.bits is None:
        words.append("--passthrough")
    elif recipe.name is None:
        words += ["--bits", str(recipe.bits)]
    else:
        words += ["--recipe", recipe.name]
        # a file of the user is known by its name alone; what is built in tells its rules from those of --set
        named = make_recipe(recipe=recipe.name).rules if recipe.name in builtin_recipes() else rules
        rules = rules[len(named) :]
    for rule in rules:
        words += ["--set", f"{rule.match}={'raw' if rule.bits is None else rule.bits}"]
    if container.inspection.split is not None:
        words += ["--split-size", str(container.inspection.split.size)]
    if recipe.effort != "default":
        words += ["--effort", recipe.effort]
    return "".join(char if char.isprintable() else escape(char) for char in shlex.join(words))


def _split(options: str) -> list[str]:
    """Words of a command line; a text that is none, from a file of others, is one word."""
    try:
        return shlex.split(options)
    except ValueError:
        return [options]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
