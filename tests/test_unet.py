"""The U-Net equals diffusers' UNet2DModel wherever that network exists; elsewhere (odd sizes, no label) laws hold."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tiny_diffusion.config.network_shape import norm_groups
from tiny_diffusion.config.option import specs
from tiny_diffusion.config.training import Config
from tiny_diffusion.errors import OptionError
from tiny_diffusion.models.layers import ACTIVATIONS, Attention, ResidualBlock
from tiny_diffusion.models.norm import GroupNorm
from tiny_diffusion.models.unet import UNet

# Small networks that together use every option, with the (height, width) of an image, which patch_size divides.
CONFIGS = {
    "one level": (dict(base_channels=8, channel_mult=(1,), attention_levels=(), layers_per_block=1), (4, 4)),
    "one level with attention": (dict(base_channels=8, channel_mult=(1,), attention_levels=(0,)), (4, 4)),
    "the defaults": (dict(), (8, 8)),
    "no attention": (dict(base_channels=8, channel_mult=(1, 2), attention_levels=()), (8, 8)),
    "two layers": (dict(base_channels=8, channel_mult=(1, 2), layers_per_block=2, attention_heads=2), (8, 8)),
    "attention at the top only": (dict(base_channels=8, attention_levels=(0,), attention_heads=4), (4, 6)),
    "attention everywhere": (
        dict(base_channels=8, channel_mult=(1, 2, 3), attention_levels=(2, 0, 1), attention_heads=6),
        (8, 12),
    ),
    "three levels of two layers": (
        dict(base_channels=8, channel_mult=(1, 2, 2), layers_per_block=2, attention_levels=(1,), attention_heads=2),
        (8, 8),
    ),
    "three levels": (dict(base_channels=12, channel_mult=(1, 2, 2), attention_levels=(2,), attention_heads=3), (8, 4)),
    "equal widths": (dict(base_channels=8, channel_mult=(1, 1), attention_heads=1), (4, 4)),
    "a wide top": (dict(base_channels=6, channel_mult=(3, 1), attention_heads=2), (4, 4)),
    "six groups": (dict(base_channels=6, channel_mult=(1, 2), time_emb_dim=20, attention_heads=3), (4, 4)),
    "classes": (dict(base_channels=8, num_classes=3), (4, 4)),
    "classes and a custom width": (dict(base_channels=8, num_classes=10, time_emb_dim=24, dropout=0.5), (4, 4)),
    "patches": (dict(base_channels=8, patch_size=2), (8, 12)),
    **{
        f"{name} and classes": (dict(base_channels=8, activation=name, num_classes=2), (4, 4))
        for name in ("relu", "gelu", "mish")
    },
    "patches of three and classes": (dict(base_channels=8, patch_size=3, num_classes=2), (12, 6)),
}


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@torch.no_grad()
def trained(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64 and evaluation mode, with noise added to all weights, so that no part outputs zero."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def inputs(size, channels=3, num_classes=0, batch=3):
    """(x, time, label) for a network in float64: images, fractional times over the whole range, labels or None."""
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    time = torch.tensor([0.25, 999.0, 431.7] * batch, dtype=torch.float64)[:batch]
    return x, time, torch.arange(batch) % num_classes if num_classes else None


def diffusers_twin(
    diffusers,
    channels=3,
    base_channels=32,
    channel_mult=(1, 2),
    layers_per_block=1,
    time_emb_dim=None,
    attention_levels=(1,),
    attention_heads=2,
    patch_size=1,
    activation="silu",
    dropout=0.0,
    num_classes=0,
):
    """diffusers' UNet2DModel for the options of a UNet, with the same defaults."""
    widths = [base_channels * multiplier for multiplier in channel_mult]
    groups = norm_groups(base_channels)
    attends = [level in attention_levels for level in range(len(widths))]
    return diffusers.UNet2DModel(
        in_channels=channels * patch_size**2,
        out_channels=channels * patch_size**2,
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        add_attention=any(attends),
        attention_head_dim=widths[-1] // attention_heads,
        layers_per_block=layers_per_block,
        time_embedding_dim=4 * base_channels if time_emb_dim is None else time_emb_dim,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift",
        act_fn=activation,
        dropout=dropout,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_output_equals_diffusers_with_the_same_weights(name, diffusers):
    options, size = CONFIGS[name]
    ours = trained(UNet(3, **options))
    theirs = diffusers_twin(diffusers, **options).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, time, label = inputs(size, num_classes=ours.num_classes)

    patch = options.get("patch_size", 1)
    expected = theirs(F.pixel_unshuffle(x, patch), time, class_labels=label).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, time, label), F.pixel_shuffle(expected, patch))


@torch.no_grad()
def test_dropout_acts_where_that_of_diffusers_does(diffusers):
    # Without attention: after it the two differ in memory layout, and dropout's masks follow the order of memory.
    options = dict(base_channels=8, layers_per_block=2, attention_levels=(), dropout=0.5)
    ours = trained(UNet(3, **options)).train()
    theirs = diffusers_twin(diffusers, **options).double().train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, time, _ = inputs((8, 8))

    torch.manual_seed(1)
    expected = theirs(x, time).sample
    torch.manual_seed(1)
    torch.testing.assert_close(ours(x, time), expected)


def test_the_small_patch_network_has_as_many_parameters_as_diffusers(diffusers):
    options = dict(base_channels=32, channel_mult=(1, 2), patch_size=2)
    ours, theirs = UNet(1, **options), diffusers_twin(diffusers, channels=1, **options)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 756_740


@pytest.mark.parametrize("size", [(7, 7), (28, 28), (9, 5), (1, 1)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("channel_mult", [(1,), (1, 2), (1, 2, 2), (1, 1, 2, 2)])
@torch.no_grad()
def test_any_size_comes_back_in_its_own_shape(size, channel_mult):
    model = trained(UNet(2, base_channels=8, channel_mult=channel_mult, attention_levels=(len(channel_mult) - 1,)))
    x, time, _ = inputs(size, channels=2)
    output = model(x, time)
    assert output.shape == x.shape
    assert output.isfinite().all() and output.std() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_network_outputs_exactly_zero(name):
    options, size = CONFIGS[name]
    model = UNet(3, **options).double()
    output = model(*inputs(size, num_classes=model.num_classes))
    assert output.shape == (3, 3, *size) and not output.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_residual_block_and_attention_starts_by_adding_nothing(name):
    options, size = CONFIGS[name]
    model = UNet(3, **options)
    last = [k for k in model.state_dict() if ".conv2." in k or ".to_out.0." in k or k.startswith("conv_out.")]
    zero = [k for k, v in model.state_dict().items() if v.dim() > 0 and not v.any() and "norm" not in k]
    assert zero == last and len(last) >= 2 + 2 * 4


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_has_a_part_in_the_output(name):
    options, size = CONFIGS[name]
    model = trained(UNet(3, **options))
    model(*inputs(size, num_classes=model.num_classes)).square().sum().backward()
    # Weights only: some biases are cancelled by what follows (keys' by the softmax, others by a norm of one channel).
    reached = [k for k, p in model.named_parameters() if k.endswith("weight") and p.grad.abs().max() > 1e-6]
    assert reached == [k for k in model.state_dict() if k.endswith("weight")]


@torch.no_grad()
def test_no_label_is_the_null_class_and_the_label_matters():
    model = trained(UNet(3, base_channels=8, num_classes=4))
    x, time, label = inputs((8, 8), num_classes=4)
    output, null = model(x, time, label), model(x, time, torch.full_like(label, 4))
    assert torch.equal(model(x, time), null)
    assert (output - null).abs().amin(dim=0).max() > 1e-3
    assert (output - model(x, time, (label + 1) % 4)).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@torch.no_grad()
def test_time_is_read_as_a_real_number():
    model = trained(UNet(3, base_channels=8))
    x, _, _ = inputs((8, 8), batch=1)
    at = {time: model(x, torch.tensor([time])) for time in (0.0, 0.5, 1.0, 998.0, 998.5, 999.0)}
    for earlier, later in [(0.0, 0.5), (0.5, 1.0), (998.0, 998.5), (998.5, 999.0)]:
        assert (at[earlier] - at[later]).abs().max() > 1e-3
    torch.testing.assert_close(model(x, torch.tensor([999])), at[999.0], rtol=0, atol=0)


@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch():
    model = trained(UNet(3, base_channels=8, num_classes=3)).float()
    x, time, label = inputs((8, 8), num_classes=3, batch=6)
    x, time = x.float(), time.float()
    together = model(x, time, label)
    for i in range(6):
        alone = model(x[i : i + 1], time[i : i + 1], label[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[3]).abs().max() > 1e-2  # same time and label, another image


@torch.no_grad()
def test_the_memory_format_changes_nothing_but_the_layout():
    model = trained(UNet(3, base_channels=8, patch_size=2))
    x, time, _ = inputs((8, 12))
    expected = model(x, time)
    output = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), time)
    assert output.is_contiguous(memory_format=torch.channels_last) and expected.is_contiguous()
    torch.testing.assert_close(output, expected)


def test_dropout_acts_in_training_only():
    model = trained(UNet(3, base_channels=8, dropout=0.5))
    batch = inputs((8, 8))
    assert torch.equal(model(*batch), model(*batch))
    model.train()
    assert not torch.equal(model(*batch), model(*batch))


def test_only_building_uses_random_numbers():
    torch.manual_seed(5)
    first = UNet(1, base_channels=8)
    before = torch.get_rng_state()
    first(torch.ones(2, 1, 4, 4), torch.tensor([1.0, 2.0]))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    again, other = UNet(1, base_channels=8).state_dict(), UNet(1, base_channels=8).state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(value, again[key])
    assert not torch.equal(first.conv_in.weight, other["conv_in.weight"])


def test_a_bfloat16_network_runs_under_autocast():
    model = trained(UNet(3, base_channels=8, num_classes=2)).float()
    x, time, label = inputs((8, 8), num_classes=2)
    expected = model(x.float(), time, label)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x.float(), time, label)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_under_autocast_group_norm_is_that_of_float32_on_the_same_input(layout):
    """Its output is the result of float32, rounded to bfloat16 once; so are the gradients, within such roundings."""
    norm = GroupNorm(4, 16)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    half = (3 + 50 * torch.randn(2, 16, 5, 7)).bfloat16().to(memory_format=layout)  # squares lose their digits
    got, wanted = half.clone().requires_grad_(), half.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(got)
    expected = norm(wanted)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected.bfloat16())
    slope = torch.randn_like(expected).bfloat16()
    output.backward(slope)
    expected.backward(slope.float())
    assert (got.grad.float() - wanted.grad).norm() < 2**-8 * wanted.grad.norm()


# Attention


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("head_width", [1, 4, 32])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
@torch.no_grad()
def test_attention_is_its_formula(size, head_width, layout):
    """Vaswani et al. (2017), eq. 1, for each image and head."""
    part = trained(Attention(32, head_width=head_width, groups=8))
    x = torch.randn(3, 32, *size, dtype=torch.float64)
    h = part.group_norm(x).flatten(2).mT  # (B, H*W, C)
    attended = torch.empty_like(h)
    for image in range(3):
        for first in range(0, 32, head_width):
            channels = slice(first, first + head_width)
            q, k, v = (linear(h[image])[:, channels] for linear in (part.to_q, part.to_k, part.to_v))
            attended[image, :, channels] = (q @ k.T / head_width**0.5).softmax(1) @ v
    expected = x + part.to_out[0](attended).mT.unflatten(2, size)
    torch.testing.assert_close(part(x.to(memory_format=layout)), expected)


# Recomputed activations


def checkpointed(model, options):
    """The same network with the same weights and checkpoint_activations."""
    again = UNet(3, **options, checkpoint_activations=True).to(model.conv_in.weight.dtype).train(model.training)
    again.load_state_dict(model.state_dict(), strict=True)
    return again


def output_and_gradients(model, batch, precision=None):
    """The output, and the gradients of its sum of squares by the images and all weights.  Dropout has a fixed seed."""
    torch.manual_seed(3)
    x = batch[0].clone().requires_grad_()
    with torch.autocast("cpu", precision, precision is not None):
        output = model(x, *batch[1:])
    output.float().square().sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def count_calls(model, kind):
    """A list to which every call of a part of this kind adds that part."""
    calls = []
    for part in model.modules():
        if isinstance(part, kind):
            part.register_forward_pre_hook(lambda module, arguments: calls.append(module))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_activations_changes_no_bit_of_output_and_gradients(name):
    options, size = CONFIGS[name]
    options = {**options, "dropout": 0.4}
    model = trained(UNet(3, **options)).train()
    again = checkpointed(model, options)
    batch = inputs(size, num_classes=model.num_classes)
    expected = output_and_gradients(model, batch)
    assert expected[0].std() > 0.1
    for one, other in zip(output_and_gradients(again, batch), expected, strict=True):
        assert torch.equal(one, other)


def test_recomputing_activations_changes_no_bit_under_autocast():
    """The backward pass runs outside autocast, and has to restore it."""
    options = dict(base_channels=8, num_classes=3, layers_per_block=2, dropout=0.4)
    model = trained(UNet(3, **options)).float().train()
    x, time, label = inputs((8, 8), num_classes=3)
    batch = x.float(), time, label
    expected = output_and_gradients(model, batch, torch.bfloat16)
    got = output_and_gradients(checkpointed(model, options), batch, torch.bfloat16)
    assert expected[0].dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", [ResidualBlock, Attention])
def test_in_training_every_residual_block_and_its_attention_run_twice(kind):
    options = dict(base_channels=8, layers_per_block=2)
    model = UNet(3, **options).double()
    again = checkpointed(model, options)
    blocks = [part for part in again.modules() if isinstance(part, kind)]
    once, twice = count_calls(model, kind), count_calls(again, kind)
    output_and_gradients(model, inputs((8, 8)))
    output_and_gradients(again, inputs((8, 8)))
    assert len(once) == len(blocks) > 2
    assert sorted(map(id, twice)) == sorted(2 * [id(block) for block in blocks])


@pytest.mark.parametrize("training, gradients", [(False, True), (True, False), (False, False)])
def test_nothing_is_recomputed_outside_of_training(training, gradients):
    options = dict(base_channels=8, dropout=0.4)
    model = trained(UNet(3, **options)).train(training)
    again = checkpointed(model, options)
    calls = count_calls(again, ResidualBlock)
    outputs = []
    for each in (model, again):
        torch.manual_seed(3)
        x, time, _ = inputs((8, 8))
        with torch.set_grad_enabled(gradients):
            outputs.append(each(x, time))
        if gradients:
            outputs[-1].sum().backward()
    assert torch.equal(*outputs)
    assert len(calls) == len(set(calls)) == sum(isinstance(part, ResidualBlock) for part in again.modules())


def bytes_kept(model, batch):
    """Bytes kept for the backward pass, without the weights; each piece of memory counts once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*batch)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("options", [dict(layers_per_block=2), dict(channel_mult=(1, 2, 2), attention_levels=(1, 2))])
def test_less_than_half_as_much_is_kept_for_the_backward_pass(options):
    options = dict(base_channels=16, **options)
    model = UNet(3, **options).double()
    batch = inputs((16, 16))
    assert 0 < bytes_kept(checkpointed(model, options), batch) < 0.5 * bytes_kept(model, batch)


def test_the_state_dict_does_not_depend_on_recomputing():
    options = dict(base_channels=8, num_classes=2)
    plain, again = UNet(3, **options), UNet(3, **options, checkpoint_activations=True)
    assert again.checkpoint_activations and not plain.checkpoint_activations
    assert list(plain.state_dict()) == list(again.state_dict())


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(base_channels=9), "--base_channels 9 is odd"),
        (dict(channel_mult=()), "--channel_mult needs at least one value"),
        (dict(attention_levels=(2,)), "--attention_levels 2: --channel_mult makes levels 0 to 1 only"),
        (dict(attention_levels=(-1,)), "--attention_levels -1: --channel_mult makes levels 0 to 1 only"),
        (dict(attention_heads=5), r"--attention_heads 5 .* 64 channels .* Use one of 1, 2, 4, 8, 16, 32, 64\."),
        (dict(attention_heads=0), "--attention_heads 0 does not split"),
        # 24 channels in 2 heads of 12, of which the 8 channels of level 0 are no multiple.
        (dict(base_channels=8, channel_mult=(1, 3), attention_levels=(0, 1)), r"Use one of 3, 6, 12, 24\."),
    ],
)
def test_options_that_do_not_fit_together_are_refused_by_name(options, message):
    with pytest.raises(OptionError, match=message):
        UNet(3, **options)


def test_the_defaults_are_those_of_the_options():
    defaults = {name: parameter.default for name, parameter in inspect.signature(UNet).parameters.items()}
    same = ("base_channels", "layers_per_block", "attention_heads", "activation", "dropout", "checkpoint_activations")
    for name in same:
        assert defaults[name] == getattr(Config, name)
    assert specs(Config)["activation"].type.choices == tuple(ACTIVATIONS)


def test_heads_are_free_where_there_is_no_attention():
    UNet(3, attention_levels=(), attention_heads=5)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (7, 7)])
def test_an_image_that_the_patches_do_not_tile_is_refused(size):
    x, time, _ = inputs(size)
    with pytest.raises(OptionError, match=f"--patch_size 2 does not divide the {size[0]}x{size[1]} image. Use 1."):
        UNet(3, base_channels=8, patch_size=2).double()(x, time)


def test_a_label_for_a_network_without_classes_is_refused():
    x, time, label = inputs((4, 4), num_classes=2)
    with pytest.raises(ValueError, match="label given to a UNet without classes"):
        UNet(3, base_channels=8).double()(x, time, label)
