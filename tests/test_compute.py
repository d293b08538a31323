"""However the transformer computes, it is the plain float32 step up to rounding."""

import shutil
import sys
import types

import pytest
import step as benchmark
import torch
import torch.nn.functional as F
from conftest import transformer_inputs
from peft.tuners.lora import Linear as LoraLinear
from test_step_benchmark import check_same_step
from torch.utils._python_dispatch import TorchDispatchMode

from clips.order import Item
from cogvideox import compute, lora
from cogvideox.base_model import download_weights, read_base_model
from cogvideox.lora import FusedLora, Lora
from cogvideox.objective import _rotary_tables, generator_for, rotary_embedding, training_loss

LORA = Lora(rank=4, lora_alpha=4, lora_target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def with_lora(checkpoint, dtype=torch.float32, **changes):
    """A transformer whose LoRA does something, always the same."""
    torch.manual_seed(0)
    transformer, _ = lora.with_lora(checkpoint, dtype, LORA._replace(**changes), None)
    for name, weight in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return transformer.train()


def in_dtype(inputs, dtype):
    floats = ("hidden_states", "encoder_hidden_states", "ofs")
    return {name: value.to(dtype) if name in floats and value is not None else value for name, value in inputs.items()}


def step(transformer, inputs, dtype=torch.float32, autocast=False):
    """Output and gradients of what is trained, for a loss like that of training."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = transformer(**in_dtype(inputs, dtype))[0]
    generator = torch.Generator().manual_seed(1)
    F.mse_loss(output.float(), torch.randn(output.shape, generator=generator)).backward()
    gradients = {name: weight.grad for name, weight in transformer.named_parameters() if weight.requires_grad}
    transformer.zero_grad()
    return output.detach(), gradients


def error(result, expected):
    """Of all gradients together, relative."""
    difference = torch.cat([(result[name].float() - expected[name]).flatten() for name in expected])
    return (difference.norm() / torch.cat([gradient.flatten() for gradient in expected.values()]).norm()).item()


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5B-I2V"])
def test_bf16_without_autocast_is_as_near_to_float32_as_with_it(checkpoint_of, variant):
    checkpoint = download_weights(read_base_model(checkpoint_of(variant)))
    torch.manual_seed(2)
    inputs = transformer_inputs(checkpoint_of(variant))
    _, exact = step(with_lora(checkpoint), inputs)
    _, plain = step(with_lora(checkpoint, torch.bfloat16), inputs, torch.bfloat16)
    _, cast = step(with_lora(checkpoint, torch.bfloat16), inputs, torch.bfloat16, autocast=True)
    assert {gradient.dtype for gradient in plain.values()} == {torch.float32}
    assert error(plain, exact) < 0.05
    assert error(plain, exact) < 1.5 * error(cast, exact)


def test_no_product_runs_in_float32_over_a_bf16_base(tiny_checkpoint):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    with Recorded() as ran:
        step(with_lora(checkpoint, torch.bfloat16), transformer_inputs(tiny_checkpoint), torch.bfloat16)
    products = [dtype for name, dtype in ran.calls if name in ("aten.mm", "aten.addmm", "aten.bmm")]
    assert len(products) > 50 and set(products) == {torch.bfloat16}


# ---- what is kept for the way back -----------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """The operations that run, and the dtype of their first argument."""

    def __init__(self):
        super().__init__()
        self.calls = []

    @classmethod
    def ignore_compile_internals(cls):
        """Else torch.compile compiles nothing while it records."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = args[0] if args else None
        self.calls.append((str(func.overloadpacket), first.dtype if isinstance(first, torch.Tensor) else None))
        return func(*args, **(kwargs or {}))

    def count(self, name):
        return sum(name in called for called, _ in self.calls)


@pytest.mark.parametrize(("level", "passes"), [("none", 1), ("attention", 1), ("full", 2)])
def test_attention_is_computed_again_only_where_its_outputs_are_not_kept(tiny_checkpoint, level, passes):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    transformer = with_lora(checkpoint)
    compute.prepare(transformer, level)
    with Recorded() as ran:
        step(transformer, transformer_inputs(tiny_checkpoint))
    layers = len(transformer.transformer_blocks)
    assert ran.count("_scaled_dot_product_flash_attention_for_cpu") == layers * (passes + 1)  # and once backward


@pytest.mark.parametrize("level", ["attention", "full"])
def test_dropout_is_the_same_when_computed_again(tiny_checkpoint, level):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    results = []
    for chosen in ("none", level):
        transformer = with_lora(checkpoint, lora_dropout=0.5)
        compute.prepare(transformer, chosen)
        torch.manual_seed(3)
        inputs = transformer_inputs(tiny_checkpoint)
        results.append(step(transformer, inputs)[1])
    assert error(*results) < 1e-6


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["flash", "math"])
def test_the_kernel_of_attention_that_was_asked_for_runs_and_changes_nothing(tiny_checkpoint, backend):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    inputs = transformer_inputs(tiny_checkpoint)
    _, expected = step(with_lora(checkpoint), inputs)
    with compute.attention_kernel(backend), Recorded() as ran:
        _, gradients = step(with_lora(checkpoint), inputs)
    assert bool(ran.count("flash_attention")) == (backend == "flash")
    assert error(gradients, expected) < 1e-6


def test_a_kernel_that_the_device_lacks_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="--attention_backend cudnn: cpu has no such kernel.*pass auto"):
        compute.check_attention("cudnn", torch.device("cpu"), torch.bfloat16, 64)
    compute.check_attention("auto", torch.device("cpu"), torch.bfloat16, 64)


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5B"])
@pytest.mark.parametrize("gives_sums", [False, True])
def test_flash3_attends_as_diffusers_does(checkpoint_of, monkeypatch, variant, gives_sums):
    """With a stand-in of its package, of the layout that its documentation states: [B, S, heads, head size]."""

    def flash_attn_func(query, key, value):
        out = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
        return (out.transpose(1, 2), None) if gives_sums else out.transpose(1, 2)

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    checkpoint = download_weights(read_base_model(checkpoint_of(variant)))
    inputs = transformer_inputs(checkpoint_of(variant))
    _, expected = step(with_lora(checkpoint), inputs)
    transformer = with_lora(checkpoint)
    compute.prepare(transformer, "none", compute.Options(attention_backend="flash3"))
    _, gradients = step(transformer, inputs)
    assert error(gradients, expected) < 1e-5


def test_a_kernel_for_16_bits_gets_queries_in_them_though_norms_give_float32(monkeypatch):
    """As CUDA's autocast has it; and a kernel that cannot do what is asked for is refused before anything is loaded."""

    def flash_attn_func(query, key, value):
        if {query.dtype, key.dtype, value.dtype} != {torch.bfloat16}:
            raise RuntimeError("FlashAttention only supports fp16 and bf16")
        return query + key + value

    tensor = torch.ones(1, 4, 2, 8)
    attended = compute.AttentionByTokens(flash_attn_func).attend(tensor, tensor, tensor.bfloat16())
    assert attended.dtype == torch.bfloat16
    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    compute.check_attention("flash3", torch.device("cpu"), torch.bfloat16, 64)
    with pytest.raises(ValueError, match="--attention_backend flash3: cpu has no such kernel for torch.float32"):
        compute.check_attention("flash3", torch.device("cpu"), torch.float32, 64)


def test_fp8_in_compiled_kernels_is_refused_on_gpus_that_have_none():
    compute.check_fp8_kernels((8, 9)), compute.check_fp8_kernels((9, 0))
    with pytest.raises(ValueError, match="compute capability 8.6.*pass int8, or leave --compile out"):
        compute.check_fp8_kernels((8, 6))


def test_flash3_without_its_package_is_refused_with_the_line_to_install_it():
    with pytest.raises(ValueError, match="pip install flash_attn_3"):
        compute.check_attention("flash3", torch.device("cpu"), torch.bfloat16, 64)


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5B"])
def test_attention_by_tokens_is_that_of_diffusers_bit_for_bit(checkpoint_of, variant):
    checkpoint = download_weights(read_base_model(checkpoint_of(variant)))
    inputs = transformer_inputs(checkpoint_of(variant))
    expected, expected_gradients = step(with_lora(checkpoint), inputs)
    transformer = with_lora(checkpoint)
    compute.prepare(transformer, "none")
    output, gradients = step(transformer, inputs)
    assert torch.equal(output, expected)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected_gradients.items())


def test_attention_by_tokens_copies_less_between_the_projections(tiny_checkpoint):
    """But the two streams of tokens into one, and apart again."""
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    copies = []
    for by_tokens in (False, True):
        transformer = with_lora(checkpoint)
        if by_tokens:
            compute.prepare(transformer, "none")
        with Recorded() as ran:
            step(transformer, transformer_inputs(tiny_checkpoint))
        copies.append(ran.count("aten.clone") + ran.count("aten.copy_"))
    # Of each of two blocks: what comes out of attention, and its gradient; LayerNorm's own do not show here.
    assert copies[0] - copies[1] >= 4


# ---- the LoRA's products ---------------------------------------------------------------------------------------------


def as_peft_computes(transformer):
    for layer in transformer.modules():
        if isinstance(layer, FusedLora):
            layer.__class__ = LoraLinear
    return transformer


KINDS = [{"lora_alpha": 2}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"lora_target_modules": ["ff.net.2", "to_k"]}]


@pytest.mark.parametrize("changes", KINDS, ids=lambda changes: next(iter(changes)))
def test_a_fused_lora_is_that_of_peft_up_to_rounding(tiny_checkpoint, changes):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    torch.manual_seed(2)
    inputs, results = transformer_inputs(tiny_checkpoint), []
    for change in (as_peft_computes, lambda transformer: transformer):
        transformer = change(with_lora(checkpoint, **changes))
        torch.manual_seed(3)  # of dropout
        results.append(step(transformer, inputs))
    (expected, expected_gradients), (output, gradients) = results
    assert torch.allclose(output, expected, atol=1e-5)
    assert error(gradients, expected_gradients) < 1e-5


def test_a_fused_lora_is_no_further_from_float32_and_passes_over_the_outputs_fewer_times(tiny_checkpoint):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    torch.manual_seed(2)
    inputs = transformer_inputs(tiny_checkpoint)
    _, exact = step(with_lora(checkpoint), inputs)
    errors, passes = [], []
    for change in (as_peft_computes, lambda transformer: transformer):
        with Recorded() as ran:
            _, gradients = step(change(with_lora(checkpoint, torch.bfloat16)), inputs, torch.bfloat16)
        errors.append(error(gradients, exact))
        passes.append(sum(name in ("aten.mul", "aten.add") for name, _ in ran.calls))
    assert errors[1] < 1.1 * errors[0]
    layers = 2 * len(LORA.lora_target_modules)
    assert passes[0] - passes[1] == 3 * layers  # scaling, adding, and scaling on the way back


def test_samples_are_those_of_peft_bit_for_bit(tiny_checkpoint):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    inputs = transformer_inputs(tiny_checkpoint)
    with torch.no_grad():
        expected = as_peft_computes(with_lora(checkpoint))(**inputs)[0]
        assert torch.equal(with_lora(checkpoint)(**inputs)[0], expected)


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["none", "attention", "full"])
def test_compiled_blocks_change_neither_loss_nor_gradients(compiled_without_a_compiler, level):
    calls = 1 if level == "none" else 2
    check_same_step("--model", "tiny", "--rank", "4", tolerance=1e-5, calls=calls, level=level, compile=True)


@pytest.mark.parametrize(("level", "passes"), [("none", 1), ("attention", 1), ("full", 2)])
def test_compiled_blocks_compute_attention_again_only_where_it_is_not_kept(
    compiled_without_a_compiler, tiny_checkpoint, level, passes
):
    transformer = with_lora(download_weights(read_base_model(tiny_checkpoint)))
    compute.prepare(transformer, level, compute.Options(compile=True))
    inputs = transformer_inputs(tiny_checkpoint)
    counters = torch._dynamo.utils.counters
    counters.clear()
    step(transformer, inputs)  # compiles
    compilations = counters["stats"]["unique_graphs"]
    with Recorded() as ran:
        step(transformer, inputs)
    layers = len(transformer.transformer_blocks)
    assert compilations == counters["stats"]["unique_graphs"] == 2
    assert ran.count("_scaled_dot_product_flash_attention_for_cpu") == layers * (passes + 1)  # and once backward


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor writes C++ for a CPU")
def test_what_a_compiled_block_keeps_of_attention_is_not_written_over(tiny_checkpoint):
    """By Inductor itself, which reuses memory, where no target makes the first block's attention need a gradient."""
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    inputs, ff = transformer_inputs(tiny_checkpoint), {"lora_target_modules": ["ff.net.2"]}
    _, expected = step(with_lora(checkpoint, **ff), inputs)
    transformer = with_lora(checkpoint, **ff)
    compute.prepare(transformer, "attention", compute.Options(compile=True))
    try:
        _, gradients = step(transformer, inputs)
    finally:
        torch._dynamo.reset()
    assert error(gradients, expected) < 1e-5


@pytest.mark.parametrize("level", ["attention", "full"])
def test_compiled_blocks_run_under_ddp(compiled_without_a_compiler, tiny_checkpoint, level):
    checkpoint = download_weights(read_base_model(tiny_checkpoint))
    inputs = transformer_inputs(tiny_checkpoint)
    _, expected = step(with_lora(checkpoint), inputs)
    transformer = with_lora(checkpoint)
    compute.prepare(transformer, level, compute.Options(compile=True))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        _, gradients = step(torch.nn.parallel.DistributedDataParallel(transformer), inputs)
    finally:
        torch.distributed.destroy_process_group()
    assert error({name.removeprefix("module."): value for name, value in gradients.items()}, expected) < 1e-5


def test_two_compilations_serve_all_blocks_for_each_shape(compiled_without_a_compiler):
    """One for the first block, whose input needs no gradient, and one for all others."""
    run = benchmark.prepare(benchmark.parse_args(["--model", "tiny", "--rank", "4", "--num_layers", "4", "--compile"]))
    batch = {name: tensor[None] for name, tensor in run.data.clips[Item(0)].items()}
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = []
    for num_latent_frames in (3, 2, 3, 2):
        shorter = batch | {"parameters": batch["parameters"][:, :, :num_latent_frames]}
        for number in range(2):
            generator = generator_for(torch.device("cpu"), number)
            training_loss(run.base, run.state.transformer, shorter, generator, run.dtype).backward()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled == [2, 4, 4, 4]
    assert not counters["graph_break"]


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_the_table_of_positions_is_made_once_for_each_shape(checkpoint_of, monkeypatch, variant):
    made = []
    maker = "get_3d_sincos_pos_embed" if variant == "2b" else "get_3d_rotary_pos_embed"
    module = "diffusers.models.embeddings" if variant == "2b" else "cogvideox.objective"
    module = sys.modules[module]
    original = getattr(module, maker)
    monkeypatch.setattr(module, maker, lambda *args, **options: made.append(1) or original(*args, **options))
    _rotary_tables.cache_clear()
    checkpoint = download_weights(read_base_model(checkpoint_of(variant)))
    transformer = with_lora(checkpoint)
    compute.prepare(transformer, "none")
    inputs = transformer_inputs(checkpoint_of(variant))
    made.clear()  # those of the checkpoint's own size
    for width in (12, 8, 10, 8, 10):  # the first is the checkpoint's own
        rotary = rotary_embedding(checkpoint, 3, 8, width, "cpu")
        step(transformer, inputs | {"hidden_states": torch.randn(1, 3, 4, 8, width), "image_rotary_emb": rotary})
    assert len(made) == 2


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_run_says_what_memory_it_will_need_and_auto_needs_no_gpu(tiny_checkpoint, tmp_path, train, capsys):
    rows = train(tiny_checkpoint, tmp_path / "auto", max_train_steps=1, gradient_checkpointing="auto")
    assert rows[0]["loss"] == train(tiny_checkpoint, tmp_path / "plain", max_train_steps=1)[0]["loss"]
    printed = capsys.readouterr().out
    assert "memory, predicted: text 0.0, clips" in printed and "auto: none needs 1.0" in printed
    assert "validation" not in printed  # there is no prompt


def test_a_run_says_how_it_computes_and_that_swapping_saves_nothing_on_a_cpu(tiny_checkpoint, tmp_path, train, capsys):
    options = {"blocks_to_swap": 2, "gradient_checkpointing": "full", "attention_backend": "math"}
    train(tiny_checkpoint, tmp_path, max_train_steps=1, **options)
    printed = capsys.readouterr().out
    assert "computed in float32, every block recomputed in the backward pass, 2 blocks swapped (which saves" in printed
    assert "nothing without a GPU), math attention" in printed
