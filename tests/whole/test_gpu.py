"""The same road on a CUDA device: each parameter is read to the device and processed there."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.support import environments, reference
from tests.support import zoo as zoo_module
from tl_fastload import LeanHookedTransformer

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
