"""Optimizers: which parameter whose, what a step does, and that their state travels."""

import math

import pytest
import torch
from torch import nn

from tiny_diffusion.config.training import resolve
from tiny_diffusion.models.build import make_model
from tiny_diffusion.training.optimizers import MUON_LR_FACTOR, MUON_MOMENTUM, OPTIMIZERS, Optimizer, orthogonalise

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
GOOD, BAD = torch.tensor(0.0), torch.tensor(1.0)
NETWORKS = {
    "plain": {"dataset": "digits", "base_channels": 8},
    "classes": {"dataset": "digits", "base_channels": 8, "class_cond": True},
    "three levels": {"base_channels": 8, "channel_mult": (1, 2, 2), "attention_levels": (1, 2), "layers_per_block": 2},
    "no attention": {"dataset": "digits", "base_channels": 8, "attention_levels": ()},
}
every_network = pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)


def network(**options):
    return make_model(resolve(options), 1, 10)


class Small(nn.Module):
    """A hidden convolution, one at either end, and parameters that are no matrices."""

    def __init__(self, hidden=(6, 4, 3, 3)):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 4, 3)
        self.hidden = nn.Conv2d(hidden[1], hidden[0], hidden[2:])
        self.norm = nn.GroupNorm(1, 6)
        self.linear = nn.Linear(5, 3)
        self.conv_out = nn.Conv2d(6, 1, 3)


def random_like(tensor, generator):
    return torch.randn(tensor.shape, generator=generator)


def fill_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * random_like(parameter, generator)


def same_models(seed=0, count=2, **shape):
    models = [Small(**shape) for _ in range(count)]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            value = random_like(parameters[0], generator)
            for parameter in parameters:
                parameter.copy_(value)
    return models


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Orthogonalising


SHAPES = [(8, 8), (8, 72), (72, 8), (16, 64), (1, 9), (9, 1), (2, 3)]


def matrix_with(singular_values, rows, columns, seed=0):
    """(matrix, U, V) with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))[0]
    return (u @ torch.diag(singular_values) @ v.T).float(), u.float(), v.float()


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_singular_values_go_near_one_and_singular_vectors_stay(scale, rows, columns):
    """Over a range of 1 to 30 between the singular values."""
    values = scale * torch.logspace(0, -math.log10(30), min(rows, columns), dtype=torch.float64)
    matrix, u, v = matrix_with(values, rows, columns)
    result = u.T @ orthogonalise(matrix[None])[0] @ v
    diagonal = result.diagonal()
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    torch.testing.assert_close(result, torch.diag(diagonal), rtol=0, atol=1e-4)
    torch.testing.assert_close(u @ result @ v.T, orthogonalise(matrix[None])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_orthogonalising_is_five_published_steps(rows, columns):
    """Jordan et al. (2024): X <- a X + b (X X^T) X + c (X X^T)^2 X, from X of norm 1, one step after the other."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    torch.testing.assert_close(orthogonalise(matrix[None])[0], x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows, columns", [(8, 72), (16, 144), (32, 9), (72, 16)])
def test_matrices_of_random_numbers_become_nearly_orthogonal(rows, columns, seed):
    matrix = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed))
    values = torch.linalg.svdvals(orthogonalise(matrix)[0])
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("rows, columns", [(5, 5), (5, 7), (7, 5)])
def test_a_diagonal_matrix_becomes_its_signs(rows, columns):
    values = torch.tensor([3.0, -2.0, 1.0, -0.5, 0.2])
    matrix = torch.zeros(rows, columns)
    matrix[range(5), range(5)] = values
    result = orthogonalise(matrix[None])[0]
    assert torch.equal(result == 0, matrix == 0)
    assert torch.equal(result.sign(), matrix.sign())
    assert result.diagonal().abs().min() > 0.6 and result.abs().max() < 1.3


def test_a_batch_is_orthogonalised_matrix_by_matrix():
    matrices = (
        torch.randn(5, 6, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None, None]
    )
    together = orthogonalise(matrices)
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(result, orthogonalise(matrix[None])[0], rtol=0, atol=1e-5)


def test_a_tall_matrix_is_treated_as_its_transpose():
    matrices = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalise(matrices), orthogonalise(matrices.mT).mT, rtol=0, atol=1e-5)


def test_nothing_becomes_nothing_and_what_is_given_stays():
    assert not orthogonalise(torch.zeros(2, 3, 4)).any()
    matrices = torch.ones(2, 3, 4)
    orthogonalise(matrices)
    assert torch.equal(matrices, torch.ones(2, 3, 4))


# Whose parameters


@every_network
@every_optimizer
def test_every_parameter_is_optimised_once(name, options):
    model = network(**options)
    optimizer = Optimizer(name, model)
    found = [id(parameter) for parameter in (*optimizer.matrices.values(), *optimizer.others.values())]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


@every_network
def test_muon_takes_the_kernels_of_all_convolutions_but_the_first_and_the_last(options):
    model = network(**options)
    convolutions = {name: part for name, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    wanted = {f"{name}.weight" for name in convolutions} - {"conv_in.weight", "conv_out.weight"}
    assert len(wanted) > 8
    assert set(Optimizer("muon", model).matrices) == wanted


@every_network
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_without_muon_one_optimizer_takes_everything(name, options):
    model = network(**options)
    assert Optimizer(name, model).matrices == {}
    assert set(Optimizer(name, model).others) == {name for name, _ in model.named_parameters()}


def test_every_parameter_of_a_network_moves(make_trainer):
    for name in OPTIMIZERS:
        trainer = make_trainer(optimizer=name, class_cond=True, batch_size=64)
        before = weights_of(trainer.model)
        for _, report in zip(range(3), trainer.run(), strict=False):
            assert report.skipped == 0
        # A key's bias adds the same to all of a query's scores, which softmax does not see: its gradient is zero.
        still = {key for key, value in weights_of(trainer.model).items() if torch.equal(value, before[key])}
        assert not {key for key in still if not key.endswith("to_k.bias")}


# A step


@every_optimizer
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_adamws_first_step_is_the_learning_rate_against_the_gradients_sign(scale, name):
    (model,) = same_models(count=1)
    optimizer, before = Optimizer(name, model), weights_of(model)
    fill_gradients(model, 0, scale)
    optimizer.step(1e-3, GOOD)
    for key in optimizer.others:
        moved, gradient = model.get_parameter(key) - before[key], model.get_parameter(key).grad
        wanted = -1e-3 * gradient / (gradient.abs() + 1e-8)  # nearly the sign
        torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=5e-7)


@pytest.mark.parametrize("name, betas", [("muon", (0.9, 0.99)), ("adamw", (0.9, 0.99)), ("adam", (0.9, 0.999))])
def test_what_is_not_muons_moves_as_by_torchs_adamw(name, betas):
    """With betas of our own for AdamW, and those of Kingma & Ba (2015) for Adam."""
    model, reference = same_models()
    optimizer = Optimizer(name, model)
    torchs = torch.optim.AdamW(reference.parameters(), betas=betas, weight_decay=0, foreach=False, fused=False)
    for step in range(6):
        lr = 1e-2 / (step + 1)
        for each in (model, reference):
            fill_gradients(each, step, 10.0**-step)
        torchs.param_groups[0]["lr"] = lr
        optimizer.step(lr, GOOD)
        torchs.step()
    for key in optimizer.others:
        torch.testing.assert_close(model.get_parameter(key), reference.get_parameter(key), rtol=1e-5, atol=1e-6)


def test_adam_is_torchs_with_nothing_but_a_rate():
    """Whose defaults are those of Kingma & Ba (2015)."""
    model, reference = same_models()
    optimizer, torchs = Optimizer("adam", model), torch.optim.Adam(reference.parameters(), lr=1e-2)
    for step in range(5):
        for each in (model, reference):
            fill_gradients(each, step, 10.0**-step)
        optimizer.step(1e-2, GOOD)
        torchs.step()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(key), rtol=1e-6, atol=1e-7)


def test_adam_follows_the_published_algorithm():
    """Kingma & Ba (2015), algorithm 1, in float64: moments, their bias corrected, and nothing pulls weights to zero."""
    (model,) = same_models(count=1)
    optimizer, weights = Optimizer("adam", model), model.linear.weight.detach().double()
    m = v = torch.zeros_like(weights)
    for t in range(1, 6):
        fill_gradients(model, t, 10.0**-t)
        gradient = model.linear.weight.grad.double()
        optimizer.step(1e-2, GOOD)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        weights = weights - 1e-2 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(model.linear.weight.double(), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", [(6, 4, 3, 3), (4, 6, 1, 1), (20, 2, 1, 1), (64, 4, 3, 3)])
def test_muons_first_step_goes_along_the_orthogonalised_gradient(hidden):
    """A tall matrix goes sqrt(rows / columns) times as far, so that outputs change as much as those of a square one."""
    (model,) = same_models(count=1, hidden=hidden)
    optimizer, before = Optimizer("muon", model), weights_of(model)
    fill_gradients(model, 0)
    gradient = model.hidden.weight.grad.flatten(1)
    optimizer.step(1e-3, GOOD)
    moved = (model.hidden.weight - before["hidden.weight"]).flatten(1)
    rows, columns = gradient.shape
    wanted = -MUON_LR_FACTOR * 1e-3 * max(1.0, rows / columns) ** 0.5 * orthogonalise(gradient[None])[0]
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-5)


def test_muon_follows_nesterovs_momentum():
    """m' = 0.95 m + 0.05 g, and the step goes along 0.95 m' + 0.05 g."""
    (model,) = same_models(count=1)
    optimizer = Optimizer("muon", model)
    momentum = torch.zeros(6, 36)
    for step in range(4):
        fill_gradients(model, step)
        gradient, before = model.hidden.weight.grad.flatten(1), model.hidden.weight.detach().clone().flatten(1)
        optimizer.step(1e-3, GOOD)
        momentum = MUON_MOMENTUM * momentum + (1 - MUON_MOMENTUM) * gradient
        ahead = MUON_MOMENTUM * momentum + (1 - MUON_MOMENTUM) * gradient
        wanted = before - MUON_LR_FACTOR * 1e-3 * orthogonalise(ahead[None])[0]
        torch.testing.assert_close(model.hidden.weight.flatten(1), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(optimizer.momenta["hidden.weight"].flatten(1), momentum, rtol=0, atol=1e-6)


def test_matrices_of_one_shape_do_not_mix():
    """Muon stacks them to save time."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    alone, together = Two(), Two()
    together.load_state_dict(alone.state_dict())
    optimizers = Optimizer("muon", alone), Optimizer("muon", together)
    for step in range(3):
        fill_gradients(alone, step), fill_gradients(together, step)
        for parameter in alone.b.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step(1e-2, GOOD)
    torch.testing.assert_close(alone.a.weight, together.a.weight, rtol=0, atol=1e-6)


def test_muons_step_does_not_depend_on_the_gradients_size():
    models = same_models(count=3)
    for model, scale in zip(models, (1e-2, 1.0, 1e4), strict=True):
        optimizer = Optimizer("muon", model)
        for step in range(3):
            fill_gradients(model, step, scale)
            optimizer.step(1e-2, GOOD)
    for model in models[1:]:
        torch.testing.assert_close(model.hidden.weight, models[0].hidden.weight, rtol=0, atol=1e-4)


# A bad step


@every_optimizer
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.0])
@pytest.mark.parametrize("after", [0, 3])
def test_a_bad_step_changes_nothing_whatever_the_gradients_hold(after, value, name):
    model, other = same_models()
    optimizer, undisturbed = Optimizer(name, model), Optimizer(name, other)
    for step in range(after):
        fill_gradients(model, step), fill_gradients(other, step)
        optimizer.step(1e-2, GOOD), undisturbed.step(1e-2, GOOD)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step(1e-2, BAD)
    assert equal(weights_of(model), weights_of(other))
    fill_gradients(model, 9), fill_gradients(other, 9)
    optimizer.step(1e-2, GOOD), undisturbed.step(1e-2, GOOD)
    assert equal(weights_of(model), weights_of(other))
    assert equal(optimizer.tensors(), undisturbed.tensors())


# State


def trained(name, steps):
    model, other = same_models()
    optimizer = Optimizer(name, model)
    for step in range(steps):
        fill_gradients(model, step)
        optimizer.step(1e-2, GOOD)
    other.load_state_dict(model.state_dict())
    return model, optimizer, other


@every_optimizer
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_an_optimizer_that_is_given_anothers_state_makes_bitwise_the_same_steps(steps, name):
    model, optimizer, other = trained(name, steps)
    second = Optimizer(name, other)
    second.load({key: tensor.clone() for key, tensor in optimizer.tensors().items()})
    assert equal(second.tensors(), optimizer.tensors())
    for step in range(5, 8):
        fill_gradients(model, step), fill_gradients(other, step)
        optimizer.step(1e-3, GOOD), second.step(1e-3, GOOD)
    assert equal(weights_of(model), weights_of(other))
    assert equal(second.tensors(), optimizer.tensors())


@every_optimizer
def test_without_the_state_the_steps_differ(name):
    model, optimizer, other = trained(name, 5)
    second = Optimizer(name, other)
    fill_gradients(model, 9), fill_gradients(other, 9)
    optimizer.step(1e-3, GOOD), second.step(1e-3, GOOD)
    moved = {key for key, value in weights_of(model).items() if not torch.equal(value, weights_of(other)[key])}
    assert moved == set(weights_of(model))


@every_optimizer
def test_the_state_that_is_loaded_stays_the_callers(name):
    _, optimizer, other = trained(name, 2)
    state = {key: tensor.clone() for key, tensor in optimizer.tensors().items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    second = Optimizer(name, other)
    second.load(state)
    fill_gradients(other, 9)
    second.step(1e-2, GOOD)
    assert equal(state, before)


@every_optimizer
def test_a_state_that_lacks_a_tensor_is_refused_by_name(name):
    _, optimizer, other = trained(name, 2)
    for missing in [*optimizer.tensors(), "adamw/norm.weight/"]:
        state = {key: tensor for key, tensor in optimizer.tensors().items() if not key.startswith(missing)}
        with pytest.raises(KeyError, match=missing):
            Optimizer(name, other).load(state)


@every_optimizer
def test_the_state_of_another_network_is_refused(name):
    _, optimizer, _ = trained(name, 2)
    (other,) = same_models(count=1, hidden=(6, 8, 3, 3))
    with pytest.raises(RuntimeError, match=r"hidden\.weight.* is \(6, 4, 3, 3\), not \(6, 8, 3, 3\)"):
        Optimizer(name, other).load(optimizer.tensors())


def test_the_state_has_flat_names_that_say_whose_it_is():
    _, optimizer, _ = trained("muon", 1)
    wanted = {"muon/hidden.weight"}
    wanted |= {f"adamw/{key}/{part}" for key in optimizer.others for part in ("step", "exp_avg", "exp_avg_sq")}
    assert set(optimizer.tensors()) == wanted


def test_an_unknown_optimizer_is_an_error():
    with pytest.raises(KeyError):
        Optimizer("luck", Small())
