"""The same road on a CUDA device: each parameter is read to the device and processed there."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
import transformers

from tests.support import environments, reference
from tests.support import zoo as zoo_module
from tl_fastload import LeanHookedTransformer, load_weights_
from tl_fastload.errors import ArgumentError, NotEnoughMemory
from tl_fastload.quantized import quantize as quantize_matrix
from tl_fastload.report.memory import stored_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CASES = [case for case in zoo_module.CASES if environments.why_not_case(case) is None]
MIB = 1 << 20


def load(folder, **arguments):
    return LeanHookedTransformer.from_pretrained_lean(folder, progress=False, **arguments)


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory):
    """A Llama of some 0.5 GB in float32: big enough that fixed costs do not count."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=16000,
    )
    folder = tmp_path_factory.mktemp("big")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case_id", CASES)
def test_unprocessed_parameters_are_bit_equal_to_those_on_the_cpu(zoo, case_id):
    folder = zoo(case_id)
    on_cpu = load(folder, device="cpu", **reference.NO_PROCESSING).state_dict()
    on_device = load(folder, device="cuda", **reference.NO_PROCESSING).state_dict()
    for name, tensor in on_cpu.items():
        assert on_device[name].device.type == "cuda", name
        assert torch.equal(on_device[name].cpu(), tensor), name


@pytest.mark.parametrize("case_id", CASES)
def test_processed_model_agrees_with_the_one_on_the_cpu(zoo, case_id):
    folder = zoo(case_id)
    on_cpu, on_device = load(folder, device="cpu"), load(folder, device="cuda")
    for name, tensor in on_cpu.state_dict().items():
        torch.testing.assert_close(
            on_device.state_dict()[name].cpu(), tensor, rtol=1e-5, atol=1e-5, msg=name
        )
    tokens = zoo_module.tokens(case_id)
    expected = reference.log_probs(on_cpu(tokens))
    found = reference.log_probs(on_device(tokens.cuda())).cpu()
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", ["assign", "copy"])
def test_memory_on_the_device_and_on_the_host(big_folder, dtype, strategy):
    load(big_folder, device="cuda")  # CUDA's own context and kernels come first
    model = load(big_folder, device="cuda", dtype=dtype, strategy=strategy)
    report = model.load_report
    largest = max(p.numel() for p in model.parameters()) * 4  # processing is in float32
    assert report.peak_device_bytes <= 1.05 * report.parameter_bytes + largest
    assert report.peak_anonymous_bytes <= 96 * MIB
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    print(
        f"{dtype} {strategy}: device {report.peak_device_bytes / report.parameter_bytes:.3f}x, "
        f"host {report.peak_anonymous_bytes / report.parameter_bytes:.3f}x, {report.seconds:.2f} s"
    )


def test_a_device_with_an_index(zoo):
    model = load(zoo("gpt2"), device="cuda:0")
    assert {str(parameter.device) for parameter in model.parameters()} == {"cuda:0"}
    assert model.cfg.device == "cuda:0"


def test_hf_model_on_the_device_is_left_alone(zoo):
    hf_model = reference.hf_model("llama-gqa", zoo("llama-gqa")).to("cuda")
    before = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    model = load(zoo("llama-gqa"), hf_model=hf_model, device="cuda")
    for name, tensor in hf_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    theirs = {tensor.data_ptr() for tensor in hf_model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("kind", ["8bit", "nf4"])
def test_quantizing_while_loading_onto_the_device(big_folder, kind):
    load(big_folder, device="cuda", quantize=kind)
    model = load(big_folder, device="cuda", quantize=kind)
    report = model.load_report
    largest = max(p.numel() for p in model.parameters()) * 4
    print(
        f"{kind}: device {report.peak_device_bytes / report.parameter_bytes:.3f}x of "
        f"{report.parameter_bytes} bytes, host {report.peak_anonymous_bytes} bytes"
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    # The mean over a vocabulary takes two of its matrices as workspace in torch's CUDA kernel.
    assert report.peak_device_bytes <= 1.05 * report.parameter_bytes + 3 * largest
    dense = load(big_folder, device="cuda")
    tokens = torch.arange(32, device="cuda")[None]
    with torch.no_grad():
        expected, found = (reference.log_probs(m(tokens)) for m in (dense, model))
    assert (found - expected).abs().mean() < 0.5


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_hf_model_on_the_device(zoo, kind):
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    folder = zoo("llama-gqa", hidden_size=192, intermediate_size=256, **heads)
    eight = kind == "int8"
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": 0}, dtype=torch.float32
    )
    tokens = zoo_module.tokens("llama-gqa").cuda()
    with torch.no_grad():
        expected = reference.log_probs(hf_model(tokens).logits)
        for flags in ({}, reference.NO_PROCESSING):
            model = load(folder, hf_model=hf_model, device="cuda", **flags)
            found = reference.log_probs(model(tokens))
            assert (found - expected).abs().max() < (2e-3 if eight else 1e-4)
    theirs = {p.data_ptr() for p in hf_model.parameters() if p.dtype in (torch.int8, torch.uint8)}
    contents = [p.content for p in model.parameters() if hasattr(p, "content")]
    ours = {t.data_ptr() for content in contents for t in content.tensors().values()}
    assert len(theirs & ours) == len(theirs)


def state(model):
    torch.cuda.synchronize()
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def bytes_of(model):
    """The tensors that hold a model's parameters, of a quantized one its bytes, on the CPU."""
    torch.cuda.synchronize()
    named = model.named_parameters()
    return {name: [part.detach().cpu() for part in stored_parts(p)] for name, p in named}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, parts in expected.items():
        assert all(map(torch.equal, found[name], parts)), name


def test_without_device_the_model_goes_to_the_current_one(zoo):
    model = load(zoo("gpt2"))
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda", 0)}


@pytest.mark.parametrize("quantize", [None, "8bit", "nf4", "fp4"])
def test_a_load_in_a_busy_side_stream(big_folder, quantize):
    expected = bytes_of(load(big_folder, device="cuda", quantize=quantize))
    for _ in range(2):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            model = load(big_folder, device="cuda", quantize=quantize)
            assert torch.cuda.current_stream() == side
            found = bytes_of(model)
        assert_equal(found, expected)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_matrices_are_quantized_to_the_bytes_of_bitsandbytes_layers(kind):
    import bitsandbytes as bnb

    dense = torch.randn(768, 512)
    if kind == "int8":
        layer = bnb.nn.Int8Params(dense.clone(), requires_grad=False).to("cuda")
        expected = [layer.data, layer.SCB]
    else:
        layer = bnb.nn.Params4bit(
            dense.clone(), requires_grad=False, quant_type=kind, compress_statistics=False
        ).to("cuda")
        expected = [layer.data, layer.quant_state.absmax]
    found = stored_parts(quantize_matrix(dense.cuda(), kind))
    for one, other in zip(found, expected, strict=False):
        assert torch.equal(one.reshape(-1), other.detach().reshape(-1))


def test_what_the_caller_has_set_changes_no_number(zoo):
    expected = state(load(zoo("gpt2"), device="cuda"))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.device("cuda"), torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
            model = load(zoo("gpt2"), device="cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    found = state(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_weights_into_a_model_that_is_there(zoo):
    expected = state(load(zoo("gpt2"), device="cuda", **reference.NO_PROCESSING))
    model = load(zoo("gpt2"), device="cuda", **reference.NO_PROCESSING)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights_(model, zoo("gpt2"))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    found = state(model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_processed_copy_of_the_cpu_on_the_device(zoo, tmp_path, quantize):
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
    folder = zoo("llama-gqa", hidden_size=192, intermediate_size=256, **heads)
    on_cpu = load(folder, device="cpu", quantize=quantize)
    on_cpu.save_lean(tmp_path / "copy", progress=False)
    model = load(tmp_path / "copy", device="cuda")
    assert {part.device.type for p in model.parameters() for part in stored_parts(p)} == {"cuda"}
    assert_equal(bytes_of(model), bytes_of(on_cpu))


@pytest.mark.parametrize("check_memory", [True, False])
def test_without_room_nothing_is_held(big_folder, check_memory):
    load(big_folder, device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 128 * MIB
    torch.cuda.set_per_process_memory_fraction(room / total, 0)
    try:
        with pytest.raises(NotEnoughMemory) as caught:
            load(big_folder, device="cuda", check_memory=check_memory)
        assert torch.cuda.memory_allocated() - before < MIB
        assert "cuda" in str(caught.value).lower()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    load(big_folder, device="cuda")


def test_a_forked_process_loads_onto_the_cpu_and_is_told_of_cuda(zoo):
    folder = zoo("gpt2")
    torch.zeros(1, device="cuda")
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(120)
        torch.set_num_threads(1)  # OpenMP's threads have not come along
        try:
            load(folder, device="cpu")
            with pytest.raises(ArgumentError, match="fork"):
                load(folder, device="cuda")
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_peak_statistics_are_the_callers(zoo):
    torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    before = torch.cuda.max_memory_allocated()
    load(zoo("gpt2"), device="cpu")
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("quantize", [None, "8bit", "nf4"])
def test_a_second_device(big_folder, quantize):
    first = load(big_folder, device="cuda:0", quantize=quantize)
    second = load(big_folder, device="cuda:1", quantize=quantize)
    assert {str(p.device) for p in second.parameters()} == {"cuda:1"}
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    assert_equal(bytes_of(second), bytes_of(first))
    tokens = torch.arange(8)[None]
    assert torch.equal(first(tokens.to("cuda:0")).cpu(), second(tokens.to("cuda:1")).cpu())
