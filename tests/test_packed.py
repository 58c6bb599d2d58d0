"""Matrices that stay packed: the bits of the loader where weights are decoded, its logits where they are not."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import write_model
from msgspec import UnsetType
from test_load_model import DECODER, MODELS, convert, logits, source_model

import hlwq_convert as h
from hlwq_formats import metadata as md
from hlwq_formats.errors import BadData, BadFrames, NotAvailable
from hlwq_formats.reader import Reader

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hlwq_convert.runtime.modules import HlwqEmbedding, HlwqExperts, HlwqLinear, Rotation  # noqa: E402
from hlwq_convert.runtime.packed import Packed, PackedMatrix, decode_blocks, read_packed  # noqa: E402
from hlwq_convert.runtime.packed_trellis import PackedTrellis  # noqa: E402

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def packed_and_dense(
    folder: Path, shape: tuple[int, int], bits: int | None, dtype: str = "F32"
) -> tuple[Any, torch.Tensor]:
    """A random matrix both ways; without `bits` at a variable rate."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32).tobytes()
    rate = {"bpw": 8, "effort": "fast"} if bits is None else {"bits": bits}
    h.convert(write_model(folder / "m", {"w": ("F32", shape, values)}), folder / "o.hlwq", **rate)  # type: ignore[arg-type]
    with Reader(folder / "o.hlwq") as reader:
        matrix = read_packed(reader, reader.tensors["w"], DTYPES[dtype], torch.device("cpu"))
    return matrix, h.load_state_dict(folder / "o.hlwq", dtype=DTYPES[dtype])["w"]


def assert_rows_are_the_loaders(matrix: Packed, dense: torch.Tensor) -> None:
    rows, columns = dense.shape
    for start, stop in [(0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 2), (2, 2)]:
        assert torch.equal(matrix.rows(start, stop, dense.dtype), dense[start:stop])
    index = torch.tensor([0, rows - 1, 1, 1, rows // 2])
    assert torch.equal(matrix.take(index), dense[index])
    assert matrix.take(index[:0]).shape == (0, columns)
    assert torch.equal(matrix.rows(1, 5, torch.float64), matrix.rows(1, 5, torch.float32).double())


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("shape", [(70, 96), (40, 128), (33, 200), (9, 640), (5000, 3)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_any_rows_have_the_bits_of_the_loader(tmp_path: Path, shape: tuple[int, int], bits: int, dtype: str) -> None:
    assert_rows_are_the_loaders(*packed_and_dense(tmp_path, shape, bits, dtype))


@pytest.mark.parametrize("shape", [(70, 96), (700, 1000), (512, 1024), (9000, 33)])  # one chunk, or rows across some
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_any_rows_of_a_trellis_have_the_bits_of_the_loader(tmp_path: Path, shape: tuple[int, int], dtype: str) -> None:
    matrix, dense = packed_and_dense(tmp_path, shape, None, dtype)
    assert isinstance(matrix, PackedTrellis)
    assert_rows_are_the_loaders(matrix, dense)


def test_rows_are_asked_for_in_whole_chunks(tmp_path: Path) -> None:
    matrix, _ = packed_and_dense(tmp_path, (70, 96), None)
    for columns, step in ((96, 40960), (576, 4096), (4096, 1024), (11008, 381), (1 << 23, 1)):
        matrix.shape = (1, columns)
        assert matrix.step == step and (step * columns % (1 << 18) == 0 or columns == 11008)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
@pytest.mark.parametrize("rotated", [False, True])
def test_kernels_and_torch_operations_give_equal_bits(tmp_path: Path, dtype: torch.dtype, rotated: bool) -> None:
    # a GPU runs the second; more blocks than one thread takes
    matrix, _ = packed_and_dense(tmp_path, (700, 1000), 4)
    plain = decode_blocks(
        matrix.codes, matrix.scales, matrix.levels, matrix.signs, matrix.exponent, dtype, rotated
    )  # fmt: skip
    assert torch.equal(matrix._decode(matrix.codes, matrix.scales, dtype, rotated), plain)


def test_the_rotated_domain_gives_the_same_products(tmp_path: Path) -> None:
    matrix, dense = packed_and_dense(tmp_path, (300, 384), 5)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((7, 384)).astype(np.float32))
    exact = x.double() @ dense.double().T
    found = matrix.rotate(x) @ matrix.rotated_rows(0, 300, torch.float32).T
    # each of 384 products and 7 butterfly passes rounds by at most 2**-24 of its size: about 1e-6 of the whole
    assert (found - exact).norm() / exact.norm() < 2e-6
    assert (x @ dense.T - exact).norm() / exact.norm() < 2e-6


def test_the_rotated_domain_stays_within_fp16(tmp_path: Path) -> None:
    # weights of .02 and large activations: both must neither vanish nor overflow
    values = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32) / 50
    h.convert(write_model(tmp_path / "m", {"w": ("F32", (64, 128), values.tobytes())}), tmp_path / "o.hlwq")
    with Reader(tmp_path / "o.hlwq") as reader:
        matrix = read_packed(reader, reader.tensors["w"], torch.float16, torch.device("cpu"))
    x = torch.full((1, 128), 3000.0, dtype=torch.float16) * matrix.signs
    assert matrix.rotate(x).isfinite().all()
    rows = matrix.rotated_rows(0, 64, torch.float16).double()
    exact = matrix.rotated_rows(0, 64, torch.float32).double()
    assert (rows - exact).norm() / exact.norm() < 2**-11


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("name", ["llama, tied", "llama", "qwen2", "gemma3", "bert", "mixtral", "qwen3 moe"])
def test_packed_logits_are_the_dense_ones(
    tmp_path: Path, name: str, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sizes = MODELS[name]
    monkeypatch.setitem(MODELS, name, (config, sizes | {"hidden_size": hidden}))
    path = convert(source_model(name, torch.float32), tmp_path)
    (dense, _), (packed, _) = h.load_model(path), h.load_model(path, weights="packed")
    kinds = {type(m).__mro__[1] if "Scaled" in type(m).__name__ else type(m) for m in packed.modules()}
    assert HlwqLinear in kinds and any(isinstance(m, HlwqEmbedding) for m in packed.modules())
    # float32 throughout: what differs is the order of sums, and a rotation there and back, each some 1e-7
    assert relative(logits(packed), logits(dense)) < 3e-6
    assert {key for key, _ in packed.named_parameters()} < {key for key, _ in dense.named_parameters()}


def test_packed_in_bfloat16_is_no_further_from_the_exact_logits_than_dense(tmp_path: Path) -> None:
    path = convert(source_model("llama"), tmp_path)
    exact = logits(h.load_model(path, dtype=torch.float32)[0])
    dense, packed = (relative(logits(h.load_model(path, weights=w)[0]), exact) for w in ("dense", "packed"))
    # both round weights and activations to 8 bits of precision, only other ones: the errors are alike, not equal
    assert packed < 1.5 * dense


@pytest.mark.parametrize("name", ["llama, tied", "gemma3", "bert", "qwen3 moe"])
def test_packed_logits_of_a_variable_rate_are_the_dense_ones(tmp_path: Path, name: str) -> None:
    path = convert(source_model(name, torch.float32), tmp_path, bpw=8, effort="fast")
    (dense, _), (packed, _) = h.load_model(path), h.load_model(path, weights="packed")
    assert sum(isinstance(m, PackedTrellis) for m in packed.modules()) == len(trellis_names(path))
    # equal weights in equal products: only experts may come in another order
    assert relative(logits(packed), logits(dense)) < 1e-6
    with torch.inference_mode():
        assert relative(packed(torch.arange(3, 23).reshape(2, 10))[0], logits(dense)) < 1e-6


def trellis_names(path: Path) -> list[str]:
    return [tensor.name for tensor in h.inspect(path).tensors if tensor.encoding == "trellis"]


@pytest.mark.parametrize("rate", [{"bits": 5}, {"bpw": 8, "effort": "fast"}])
@pytest.mark.parametrize("fused", [False, True])
def test_experts_stay_packed_and_only_those_in_use_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool, rate: dict[str, Any]
) -> None:
    source = source_model("mixtral", torch.float32)
    source.save_pretrained(tmp_path / "source", save_original_format=not fused)
    h.convert(tmp_path / "source", tmp_path / "o.hlwq", **rate)
    with Reader(tmp_path / "o.hlwq") as reader:
        assert ("model.layers.0.mlp.experts.down_proj" in reader.tensors) is fused
    needed: list[int] = []
    monkeypatch.setattr("hlwq_convert.runtime.model.check_memory", lambda size, *_: needed.append(size))
    (dense, _), (packed, _) = (h.load_model(tmp_path / "o.hlwq", weights=w) for w in ("dense", "packed"))
    experts = [m for m in packed.modules() if isinstance(m, HlwqExperts)]
    assert len(experts) == 4 and not any("experts" in name for name, _ in packed.named_parameters())
    layer = packed.model.layers[1].mlp.experts
    for expert in range(12):
        assert torch.equal(layer.gate_up_proj[expert], dense.model.layers[1].mlp.experts.gate_up_proj[expert])
    used: list[int] = []
    decode = HlwqExperts.__getitem__
    monkeypatch.setattr(HlwqExperts, "__getitem__", lambda self, e: used.append(int(e)) or decode(self, e))
    with torch.no_grad():
        found = packed(torch.tensor([[5]]))[0]
        assert relative(found, dense(torch.tensor([[5]]))[0]) < 1e-6
    assert len(used) == 2 * 2 * 2  # two layers, two experts for a token, two weights of each
    # what was asked for before loading is what lies there, and the largest dense weight in the making
    rest = max(p.nbytes for name, p in packed.named_parameters())
    assert needed[1] == memory_of(packed) + rest


def memory_of(model: torch.nn.Module) -> int:
    """Bytes of all parameters and of the buffers that lie in a file."""
    buffers = [buffer for name, buffer in model.named_buffers() if "inv_freq" not in name]
    return sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *buffers]}.values())


def test_a_variable_rate_stays_as_small_as_in_the_file(tmp_path: Path) -> None:
    path = convert(source_model("llama, tied"), tmp_path, bpw=8, effort="fast")
    model, _ = h.load_model(path, weights="packed")
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    with Reader(path) as reader:
        tensors = reader.metadata.tensors
        stored = sum(
            s.length if isinstance(s.zstd, UnsetType) else s.zstd.raw_length for t in tensors for s in t.sections
        )
        chunks = sum(len(t.sections[-1].chunks) for t in tensors if isinstance(t, md.TrellisTensor))
        ends = sum(-sum(t.sections[-1].chunks) % 4 for t in tensors if isinstance(t, md.TrellisTensor))
    # beside what is stored, a matrix has the 128 signs, a byte each, where its chunks begin and the last ends, and
    # zeros up to a multiple of four
    assert memory_of(model) == stored + 8 * chunks + (128 + 8) * len(trellis_names(path)) + ends
    assert torch.equal(model.lm_head.weight, h.load_state_dict(path)["model.embed_tokens.weight"])


@pytest.mark.parametrize("rate", [{"bits": 5}, {"bpw": 8, "effort": "fast"}])
def test_a_token_that_is_not_in_the_vocabulary(tmp_path: Path, rate: dict[str, Any]) -> None:
    model, _ = h.load_model(convert(source_model("llama"), tmp_path, **rate), weights="packed")
    for tokens, message in (([0, 160], "tokens 0 to 160, expected 0 to 159"), ([-1, 3], "tokens -1 to 3")):
        with pytest.raises(IndexError, match=message):
            model(torch.tensor([tokens]))


def test_a_chunk_that_no_encoder_writes_is_found_when_it_is_used(tmp_path: Path) -> None:
    matrix, _ = packed_and_dense(tmp_path, (700, 1000), None)
    matrix.symbols[int(matrix.offsets[1]) + 5000] ^= 1
    assert len(matrix.rows(0, 100, torch.float32)) == 100
    with pytest.raises(BadFrames, match=r'o\.hlwq: tensor "w": symbols: chunk 1 of the symbols is none'):
        matrix.rows(100, 400, torch.float32)


def test_a_device_on_which_a_variable_rate_cannot_stay_packed(tmp_path: Path) -> None:
    path = convert(source_model("llama"), tmp_path, bpw=8, effort="fast")
    message = r'can stay packed on the CPU and on NVIDIA GPUs with Triton, not on meta; use weights="dense" there'
    with pytest.raises(NotAvailable, match=message):
        h.load_model(path, "meta", weights="packed")
    model, _ = h.load_model(path, weights="packed")
    with pytest.raises(NotAvailable, match=message):
        logits(model.to("meta"))


def test_codes_stay_as_small_as_in_the_file_and_tied_weights_are_one(tmp_path: Path) -> None:
    path = convert(source_model("llama, tied"), tmp_path)
    model, _ = h.load_model(path, weights="packed")
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    with Reader(path) as reader:
        stored = sum(s.length for t in reader.metadata.tensors for s in t.sections)
        quantized = sum(t.encoding == "scalar" for t in h.inspect(path).tensors)
    buffers = sum(b.nbytes for name, b in model.named_buffers() if "inv_freq" not in name)
    vectors = sum(p.nbytes for p in model.parameters())
    # beside what is stored, a matrix has its own copy of the 128 signs, a byte each
    assert buffers + vectors == stored + 128 * quantized
    assert torch.equal(model.lm_head.weight, h.load_state_dict(path)["model.embed_tokens.weight"])


def test_siblings_share_one_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, sizes = MODELS["llama"]
    monkeypatch.setitem(MODELS, "llama", (config, sizes | {"hidden_size": 128, "intermediate_size": 256}))
    model, _ = h.load_model(convert(source_model("llama"), tmp_path), weights="packed")
    calls = []
    rotate = PackedMatrix.rotate
    monkeypatch.setattr(PackedMatrix, "rotate", lambda self, x: calls.append(self) or rotate(self, x))
    logits(model)
    # a layer rotates for q, k and v; for gate and up; for down (o has 64 inputs); then once for the head
    assert len(calls) == 3 * 2 + 1


def test_inference_mode_rotates_each_time(tmp_path: Path) -> None:
    matrix, _ = packed_and_dense(tmp_path, (32, 128), 4)
    rotation = Rotation()
    with torch.inference_mode():
        x = torch.randn(2, 128)
        first = rotation(x, matrix)
        x += 1  # which such a tensor does not say
        assert torch.equal(rotation(x, matrix), matrix.rotate(x)) and not torch.equal(first, matrix.rotate(x))


def test_a_rotation_is_not_taken_for_another(tmp_path: Path) -> None:
    matrix, _ = packed_and_dense(tmp_path, (32, 128), 4)
    rotation, x = Rotation(), torch.randn(2, 128)
    first = rotation(x, matrix)
    assert rotation(x, matrix) is first
    x += 1  # in place: the same tensor with other values
    assert torch.equal(rotation(x, matrix), matrix.rotate(x))
    y = x.clone()
    assert rotation(y, matrix) is not first
    assert copy.deepcopy(rotation)._last is None


def test_a_packed_model_can_be_copied_and_cast(tmp_path: Path) -> None:
    path = convert(source_model("llama, tied"), tmp_path)
    model, _ = h.load_model(path, weights="packed")
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    wide = logits(model.float())
    assert wide.dtype is torch.float32
    assert relative(wide, logits(h.load_model(path, dtype=torch.float32)[0])) < 3e-6


@pytest.mark.parametrize("rate", [{"bits": 5}, {"bpw": 8, "effort": "fast"}])
def test_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: dict[str, Any]) -> None:
    config, sizes = MODELS["llama"]
    monkeypatch.setitem(MODELS, "llama", (config, sizes | {"hidden_size": 128, "num_hidden_layers": 1}))
    path = convert(source_model("llama", torch.float32), tmp_path, **rate)
    model, _ = h.load_model(path, weights="packed")
    # every operation in one graph; "aot_eager" traces all that inductor would, in a tenth of its time
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ids = torch.arange(3, 23).reshape(2, 10)
        assert relative(compiled(ids, use_cache=False)[0], model(ids, use_cache=False)[0]) < 3e-6


def test_damage_in_codes_is_found(tmp_path: Path) -> None:
    path = convert(source_model("llama"), tmp_path)
    data = bytearray(path.read_bytes())
    with Reader(path) as reader:
        offset = reader._offsets[reader._index["tensor", "lm_head.weight", "codes"]]
    data[offset + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadData, match=r'tensor "lm_head\.weight": codes@'):
        h.load_model(path, weights="packed")


def test_int4_without_torchao_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    path = convert(source_model("llama"), tmp_path)
    with pytest.raises(NotAvailable, match=r'weights="int4" needs torchao, with kernels for cpu .*weights="packed"'):
        h.load_model(path, weights="int4")


def test_int4_keeps_each_linear_layer_of_whole_groups_at_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**DECODER | {"hidden_size": 256, "intermediate_size": 192, "tie_word_embeddings": True})
    path = convert(transformers.LlamaForCausalLM(config), tmp_path, bits=8)
    (dense, _), (int4, _) = h.load_model(path), h.load_model(path, weights="int4")
    kinds: dict[str, Any] = {name: type(p.data).__name__ for name, p in int4.named_parameters()}
    assert kinds["model.layers.0.mlp.gate_proj.weight"].startswith("Int4")
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "Tensor"  # rows of 192: no whole groups
    assert int4.lm_head.weight is int4.model.embed_tokens.weight
    # 4 bits with a scale for 128 cost a tenth of the output in a random model: present, and no more
    assert 0.01 < relative(logits(int4), logits(dense)) < 0.3
