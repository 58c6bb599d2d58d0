"""A whole model through a GPU: the same file and the same weights as by the CPU. Without a GPU: one clear line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import small_model, write_model

import hlwq_convert as h
from hlwq_formats import metadata as md
from hlwq_formats.dtypes import narrow
from hlwq_formats.errors import BadDigest, HlwqError, NoDevice, Usage
from hlwq_formats.reader import Reader

torch = pytest.importorskip("torch")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: scripts/test_gpu runs these on one")


def odd_model(folder: Path) -> Path:
    """Every dtype, blocks that straddle rows, ends of tensors that are no whole block, more than one chunk."""
    rng = np.random.default_rng(0)
    tensors = {}
    for number, (dtype, shape) in enumerate(
        [("BF16", (576, 160)), ("F16", (65, 67)), ("F32", (4097, 1)), ("BF16", (1030, 1100)), ("F32", (3, 1400))]
    ):
        values = rng.standard_normal(shape).astype(np.float32) * 0.02
        tensors[f"layers.{number}.weight"] = (dtype, shape, narrow(values.reshape(-1), dtype).tobytes())
    tensors["layers.9.weight"] = tensors["layers.0.weight"]
    tensors["norm.weight"] = ("BF16", (96,), bytes(range(192)))
    return write_model(folder, tensors)


@gpu
@pytest.mark.parametrize("effort", ["default", "fast", "best"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_gpu_writes_the_file_that_the_cpu_writes(tmp_path: Path, bits: int, effort: str) -> None:
    model = odd_model(tmp_path / "model")
    h.convert(model, tmp_path / "cpu.hlwq", bits, effort=effort)
    h.convert(model, tmp_path / "gpu.hlwq", bits, effort=effort, device="cuda")
    assert (tmp_path / "gpu.hlwq").read_bytes() == (tmp_path / "cpu.hlwq").read_bytes()


@gpu
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_a_gpu_loads_what_the_cpu_loads(tmp_path: Path, bits: int, dtype: torch.dtype | None) -> None:
    h.convert(odd_model(tmp_path / "model"), tmp_path / "m.hlwq", bits)
    expected = h.load_state_dict(tmp_path / "m.hlwq", dtype=dtype)
    found = h.load_state_dict(tmp_path / "m.hlwq", device="cuda", dtype=dtype)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cuda", expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].view(torch.uint8)), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert found["layers.0.weight"].data_ptr() == found["layers.9.weight"].data_ptr()


@gpu
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_a_gpu_writes_and_loads_trellises_as_the_cpu_does(tmp_path: Path, effort: str) -> None:
    model, cpu, on_gpu = odd_model(tmp_path / "model"), tmp_path / "cpu.hlwq", tmp_path / "gpu.hlwq"
    h.convert(model, cpu, bpw=6.0, effort=effort)
    h.convert(model, on_gpu, bpw=6.0, effort=effort, device="cuda")
    assert on_gpu.read_bytes() == cpu.read_bytes()
    for dtype in (None, torch.float32, torch.float16):
        expected, found = h.load_state_dict(cpu, dtype=dtype), h.load_state_dict(cpu, device="cuda", dtype=dtype)
        for name, tensor in found.items():
            assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here: scripts/test_gpu runs these on two")
@pytest.mark.parametrize("options", [{"bits": 5}, {"bpw": 6.0}], ids=["scalar", "trellis"])
def test_two_gpus_write_and_load_what_the_cpu_does(tmp_path: Path, options: dict[str, Any]) -> None:
    """Together, and the second one alone."""
    model, cpu, on_gpu = odd_model(tmp_path / "model"), tmp_path / "cpu.hlwq", tmp_path / "gpu.hlwq"
    h.convert(model, cpu, effort="fast", **options)
    for device in ("cuda", "cuda:1"):
        h.convert(model, on_gpu, effort="fast", device=device, overwrite=True, **options)
        assert on_gpu.read_bytes() == cpu.read_bytes()
    expected, found = h.load_state_dict(cpu), h.load_state_dict(cpu, device="cuda:1")
    assert {str(tensor.device) for tensor in found.values()} == {"cuda:1"}
    for name, tensor in found.items():
        assert torch.equal(tensor.cpu().view(torch.uint8), expected[name].view(torch.uint8)), name


VECTORS = Path(__file__).parents[1] / "spec" / "vectors"
each_vector = pytest.mark.parametrize(  # a test each: most compile a kernel of their own
    "path",
    sorted([*VECTORS.glob("bad/trellis-*.hlwq"), *VECTORS.glob("good/*.hlwq")]),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)


@gpu
@each_vector
def test_a_gpu_refuses_the_vectors_that_the_cpu_refuses(path: Path) -> None:
    """With the same error where the file is bad; the others load to the same bytes."""
    found: list[str | list[tuple[str, bytes]]] = []
    for device in ("cpu", "cuda"):
        try:
            loaded = h.load_state_dict(path, device=device)
        except HlwqError as error:
            found.append(str(error))
        else:
            found.append(
                sorted((name, bytes(t.cpu().reshape(-1).view(torch.uint8).numpy())) for name, t in loaded.items())
            )
    assert found[0] == found[1]
    if path.parent.name == "bad":
        assert isinstance(found[0], str)


@gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("n", [1, 3, 40])
def test_a_packed_layer_compiles_and_stays_close_to_the_dense_one(n: int) -> None:
    from hlwq_convert.normal_levels import normal_levels
    from hlwq_convert.quantize import ScalarCode
    from hlwq_convert.rotate import sign_vector
    from hlwq_convert.runtime.modules import Rotation, pack
    from hlwq_convert.runtime.packed import PackedMatrix

    torch.manual_seed(n)
    code = ScalarCode("BF16", 5, -2, normal_levels(5), sign_vector())
    matrix = PackedMatrix((384, 256), code, torch.bfloat16, torch.device("cuda"))
    matrix.codes.random_(256)
    matrix.scales.copy_((torch.rand(768, device="cuda") * 0.01).half().view(torch.int16))
    layer = torch.nn.Linear(256, 384, dtype=torch.bfloat16, device="cuda")
    pack(layer, "weight", [[matrix]], Rotation())
    x = torch.randn((n, 1, 256), dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        products = [layer(x), torch.compile(layer, fullgraph=True)(x)]
        expected = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    for found in products:
        assert found.shape == (n, 1, 384) and (found - expected).norm() / expected.norm() < 4e-3


def trellis_file(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """A small model of transformers at 4.25 bits, its matrices large enough to be those of a trellis."""
    transformers = pytest.importorskip("transformers")
    from test_load_model import ARCHITECTURES, MODELS

    config, sizes = MODELS[name]
    larger = {"vocab_size": 1200, "hidden_size": 256, "intermediate_size": 704, "head_dim": 64}
    torch.manual_seed(0)
    model = getattr(transformers, ARCHITECTURES[name])(config(**sizes | larger)).to(dtype)
    model.save_pretrained(folder / "source")
    h.convert(folder / "source", folder / "m.hlwq", bpw=4.25)
    return folder / "m.hlwq"


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(torch.arange(3, 43, device=model.device).reshape(2, 20))[0]
    return logits


@gpu
def test_a_model_of_a_trellis_stays_packed_on_a_gpu(tmp_path: Path) -> None:
    """The logits and the tokens of dense weights, bit for bit: equal weights in equal products. It may be moved."""
    from hlwq_convert.runtime.packed_trellis import PackedTrellis

    path = trellis_file(tmp_path, "llama, tied", torch.bfloat16)
    dense, _ = h.load_model(path, device="cuda")
    expected = outputs(dense)
    packed, _ = h.load_model(path, device="cuda", weights="packed")
    matrices = [module for module in packed.modules() if isinstance(module, PackedTrellis)]
    assert len(matrices) == 2 * 7 + 1 and all(matrix.on_gpu and matrix._is_checked for matrix in matrices)
    assert torch.equal(outputs(packed), expected)
    state = h.load_state_dict(path)
    for name, module in packed.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(module.weight.cpu(), state[f"{name}.weight"])
    prompt = torch.arange(5, 17, device="cuda")[None]
    made = [m.generate(prompt, max_new_tokens=20, do_sample=False) for m in (dense, packed)]
    assert made[0].shape == (1, 32) and torch.equal(*made)
    on_cpu = outputs(packed.to("cpu"))
    assert torch.equal(on_cpu, outputs(h.load_model(path, weights="packed")[0]))
    assert torch.equal(outputs(copy.deepcopy(packed).to("cuda")), expected)
    half = packed.half().to("cuda")
    assert outputs(half).dtype is torch.float16
    assert torch.equal(half.lm_head.weight, h.load_state_dict(path, "cuda", torch.float16)["model.embed_tokens.weight"])


@gpu
def test_experts_of_a_trellis_stay_packed_on_a_gpu(tmp_path: Path) -> None:
    path = trellis_file(tmp_path, "mixtral", torch.float32)
    dense, packed = (outputs(h.load_model(path, "cuda", weights=weights)[0]) for weights in ("dense", "packed"))
    # equal weights in float32; transformers adds dense experts in another order
    assert (packed - dense).norm() / dense.norm() < 1e-5


@gpu
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_layer_of_a_trellis_compiles_and_is_caught_in_a_graph(tmp_path: Path) -> None:
    path = trellis_file(tmp_path, "llama", torch.bfloat16)
    layer = h.load_model(path, "cuda", weights="packed")[0].model.layers[1].mlp.down_proj
    weight = h.load_state_dict(path, "cuda")["model.layers.1.mlp.down_proj.weight"]
    x = torch.randn((5, 704), dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, weight)
        assert torch.equal(layer(x), expected)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.graph(graph):
            found = layer(held)
        held.copy_(x)
        graph.replay()
    assert torch.equal(found, expected)


@gpu
@each_vector
def test_packed_trellises_are_refused_on_a_gpu_as_on_the_cpu(path: Path) -> None:
    """With the same error, before a weight is used; the others have the same weights."""
    from hlwq_convert.runtime.packed import read_packed

    found: list[str | list[bytes]] = []
    for device in ("cpu", "cuda"):
        try:
            with Reader(path) as reader:
                tensors = [t for t in reader.metadata.tensors if isinstance(t, md.TrellisTensor)]
                made = [read_packed(reader, t, torch.float32, torch.device(device)) for t in tensors]
            found.append([matrix.rows(0, matrix.shape[0], torch.float32).cpu().numpy().tobytes() for matrix in made])
        except HlwqError as error:
            found.append(str(error))
    assert found[0] == found[1]
    if path.parent.name == "bad":
        assert isinstance(found[0], str)


@gpu
def test_damage_is_found_when_a_gpu_decodes(tmp_path: Path) -> None:
    path = tmp_path / "m.hlwq"
    h.convert(small_model(tmp_path / "model"), path)
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadDigest, match="the file is damaged"):
        h.load_state_dict(path, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path, model: Path) -> None:
    with pytest.raises(NoDevice, match=r"device cuda: .*; leave out --device to use the CPU") as caught:
        h.convert(model, tmp_path / "out.hlwq", device="cuda")
    assert caught.value.exit_status == 69
    assert list(tmp_path.glob("out*")) == []


def test_other_devices_are_refused(tmp_path: Path, model: Path) -> None:
    for device in ("gpu", "cuda:", "cuda:x", "cuda:1\n", "CPU"):
        with pytest.raises(Usage, match="expected cpu, cuda or cuda:N"):
            h.convert(model, tmp_path / "out.hlwq", device=device)


@gpu
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(NoDevice, match="device cuda:99: the last of the"):
        h.convert(model, tmp_path / "out.hlwq", device="cuda:99")
