"""flow.py: the velocity network, the loss, and the sampler against torchdiffeq."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from flow import VelocityCNN, cfm_loss, sample


class Field:
    """A velocity given as a formula of x, t and c, which counts its evaluations and the samples in them."""

    def __init__(self, formula):
        self.formula, self.calls, self.samples = formula, 0, 0

    def condition(self, cond):
        return cond

    def __call__(self, x, t, c):
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        return self.formula(x, t.view(-1, *[1] * (x.dim() - 1)), c)


class MLP(nn.Module):
    """A velocity on the plane."""

    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def condition(self, cond):
        return cond

    def forward(self, x, t, c):
        return self.net(torch.cat((x, t[:, None], c), dim=1))


@pytest.fixture(scope="module")
def net():
    """Weights large enough that the ODE is not a straight line."""
    torch.manual_seed(0)
    net = VelocityCNN()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.7)
    return net


def patches(n, seed=1, size=(14, 14)):
    return torch.randn(n, 2, *size, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 3, n).view(-1, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------- network


def test_parameters():
    assert sum(p.numel() for p in VelocityCNN().parameters()) == 494_465


@pytest.mark.parametrize("size", [(14, 14), (7, 7), (5, 12)])
def test_network_is_the_plain_convolution_of_condition_time_and_sample(net, size):
    cond, x, t = patches(3, size=size), torch.randn(3, 1, *size), torch.rand(3)
    h = F.conv2d(torch.cat((cond, t.view(3, 1, 1, 1).expand(3, 1, *size), x), dim=1), net.first.weight, net.first.bias, padding=1)
    for widen, narrow in net.blocks:
        h = h + narrow(F.silu(widen(F.silu(h))))
    h = net.last(F.silu(h))
    torch.testing.assert_close(net(x, t, net.condition(cond)), h, rtol=1e-4, atol=1e-4 * h.abs().max().item())


def test_every_parameter_gets_a_gradient(net):
    net.zero_grad()
    cfm_loss(net, torch.randn(2, 1, 14, 14), patches(2)).mean().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in net.parameters())
    net.zero_grad()


# ------------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_the_formula():
    x, e, t = torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [2.0]]), torch.tensor([0.25, 0.5])
    net = Field(lambda x, t, c: x + 10 * t + c)
    # x_t = 1.5, 1.5; velocities 1.5 + 2.5 + 1, 1.5 + 5 - 1; targets 2, -1
    assert cfm_loss(net, x, torch.tensor([[1.0], [-1.0]]), e, t).tolist() == pytest.approx([3.0 ** 2, 6.5 ** 2])
    two = Field(lambda x, t, c: 0 * x)
    assert cfm_loss(two, torch.tensor([[[1.0], [2.0]]]), None, torch.zeros(1, 2, 1)).tolist() == [2.5]          # the mean over all but the first dimension


def test_loss_draws_uniform_times_and_normal_noise_from_the_global_generator():
    seen = []
    net = Field(lambda x, t, c: seen.append((x, t)) or x)
    x = torch.full((20_000, 1), 100.0)
    torch.manual_seed(0)
    loss = cfm_loss(net, x, x)
    (x_t, t), = seen
    noise = ((x_t - t * x) / (1 - t))[t < 0.5]
    assert abs(t.mean() - 0.5) < 0.01 and abs(t.std() - 12 ** -0.5) < 0.01 and abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    torch.manual_seed(0)
    assert torch.equal(cfm_loss(net, x, x), loss)


def test_learns_a_known_density():
    """Four Gaussians on a circle or, with the other condition, one displaced broad one."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)

    def draw(n, ring):
        angle = torch.randint(4, (n,), generator=g) * math.pi / 2
        points = 2 * torch.stack((angle.cos(), angle.sin()), dim=1) + 0.3 * torch.randn(n, 2, generator=g)
        broad = torch.tensor([1.0, -0.5]) + torch.tensor([0.8, 0.3]) * torch.randn(n, 2, generator=g)
        return torch.where(ring > 0, points, broad)

    net, steps = MLP(), 1500
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        ring = torch.randint(2, (256, 1), generator=g).float()
        loss = cfm_loss(net, draw(256, ring), ring).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, _ = sample(net, torch.ones(4000, 1), noise=torch.randn(4000, 2, generator=g))
    quadrant = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 2)).round()
    offset = x - 2 * torch.stack(((quadrant * math.pi / 2).cos(), (quadrant * math.pi / 2).sin()), dim=1)
    share = (quadrant.long() % 4).bincount(minlength=4) / 4000
    assert (share - 1 / 4).abs().max() < 0.03 and offset.mean(0).abs().max() < 0.05, (share, offset.mean(0))
    torch.testing.assert_close(offset.std(0), torch.tensor([0.3, 0.3]), atol=0.06, rtol=0)
    x, _ = sample(net, torch.zeros(4000, 1), noise=torch.randn(4000, 2, generator=g))
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, -0.5]), atol=0.07, rtol=0)
    torch.testing.assert_close(x.std(0), torch.tensor([0.8, 0.3]), atol=0.07, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- sampler


def theirs(net, cond, noise, rtol=1e-3, atol=1e-3):
    """torchdiffeq's dopri5 -> (x(1), evaluations)."""
    odeint = pytest.importorskip("torchdiffeq", reason="pip install -r tests/requirements.txt").odeint
    c, calls = net.condition(cond), []
    with torch.no_grad():
        path = odeint(lambda t, x: calls.append(t) or net(x, t.expand(len(x)), c), noise, torch.tensor([0.0, 1.0], dtype=noise.dtype), rtol=rtol, atol=atol, method="dopri5")
    return path[-1], len(calls)


@pytest.mark.parametrize("row", range(4))
def test_dopri5_against_torchdiffeq_network(net, row):
    cond, noise = patches(4)[row:row + 1], torch.randn(1, 1, 14, 14, generator=torch.Generator().manual_seed(row))
    x, evaluations = sample(net, cond, noise=noise)
    expected, calls = theirs(net, cond, noise)
    assert abs(evaluations.item() - calls) <= 0.2 * calls and calls > 8
    exact, _ = theirs(net, cond, noise, 1e-6, 1e-6)
    scale = exact.square().mean().sqrt()
    assert (x - exact).square().mean().sqrt() < 5e-3 * scale and (x - expected).square().mean().sqrt() < 5e-3 * scale


FIELDS = {"stiff": lambda x, t, c: -c * (x - torch.sin(9 * t)), "oscillating": lambda x, t, c: c * torch.cos(c * t) * x.flip(-1),
          "constant": lambda x, t, c: c + 0 * x, "zero": lambda x, t, c: 0 * x}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
def test_dopri5_against_torchdiffeq_formulas(name, tolerance):
    net, cond, noise = Field(FIELDS[name]), torch.tensor([[40.0]]).double(), torch.tensor([[0.5, -1.0, 2.0]]).double()
    x, evaluations = sample(net, cond, noise=noise, rtol=tolerance, atol=tolerance)
    assert evaluations.item() == net.calls
    expected, calls = theirs(net, cond, noise, tolerance, tolerance)
    assert abs(evaluations.item() - calls) <= 0.2 * calls, (evaluations.item(), calls)
    torch.testing.assert_close(x, expected, rtol=20 * tolerance, atol=20 * tolerance)


def test_a_sample_does_not_depend_on_its_batch():
    net, speeds = Field(FIELDS["stiff"]), torch.tensor([[0.1], [300.0], [1.0], [30.0]])
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x, evaluations = sample(net, speeds, noise=noise)
    alone = [sample(net, speeds[i:i + 1], noise=noise[i:i + 1]) for i in range(4)]
    assert torch.equal(x, torch.cat([a for a, _ in alone]))
    assert torch.equal(evaluations, torch.cat([e for _, e in alone])) and evaluations.max() > 3 * evaluations.min()


def test_finished_samples_cost_nothing():
    net, speeds = Field(FIELDS["stiff"]), torch.tensor([[0.1], [300.0], [1.0], [30.0]])
    _, evaluations = sample(net, speeds, noise=torch.ones(4, 1))
    assert net.samples == evaluations.sum() and net.calls == evaluations.max()


def test_network_sample_does_not_depend_on_its_batch(net):
    cond, noise = patches(5), torch.randn(5, 1, 14, 14, generator=torch.Generator().manual_seed(3))
    x, evaluations = sample(net, cond, noise=noise)
    alone, n = sample(net, cond[3:4], noise=noise[3:4])
    assert evaluations[3] == n[0]
    torch.testing.assert_close(x[3:4], alone, rtol=1e-4, atol=1e-4 * x.abs().max().item())


def test_midpoint_is_of_second_order_and_dopri5_agrees():
    net, cond, noise = Field(lambda x, t, c: c * (x + t)), torch.tensor([[2.0], [-1.0]]).double(), torch.ones(2, 1).double()
    exact = (1 + 1 / cond) * cond.exp() - 1 - 1 / cond
    errors = [(sample(net, cond, "midpoint", noise=noise, steps=n)[0] - exact).abs().max().item() for n in (8, 16, 32)]
    assert all(3.4 < a / b < 4.6 for a, b in zip(errors, errors[1:])), errors
    _, evaluations = sample(net, cond, "midpoint", noise=noise, steps=16)
    assert evaluations.tolist() == [32, 32]
    for tol in (1e-2, 1e-3, 1e-5, 1e-7):
        torch.testing.assert_close(sample(net, cond, noise=noise, rtol=tol, atol=tol)[0], exact, rtol=tol, atol=tol)


def test_midpoint_and_dopri5_converge_on_the_network(net):
    cond, noise = patches(2), torch.randn(2, 1, 14, 14, generator=torch.Generator().manual_seed(4))
    exact, _ = sample(net, cond, noise=noise, rtol=1e-6, atol=1e-6)
    errors = [(sample(net, cond, "midpoint", noise=noise, steps=n)[0] - exact).norm().item() for n in (5, 10, 20)]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    adaptive = [(sample(net, cond, noise=noise, rtol=tol, atol=tol)[0] - exact).norm().item() for tol in (1e-2, 1e-4, 1e-5)]
    assert adaptive[0] > 2 * adaptive[1] > 4 * adaptive[2]


def test_the_condition_is_computed_once(net):
    calls = []
    class Counting(VelocityCNN):
        def condition(self, cond):
            calls.append(len(cond))
            return super().condition(cond)
    counting = Counting()
    counting.load_state_dict(net.state_dict())
    sample(counting, patches(3), noise=torch.ones(3, 1, 14, 14))
    assert calls == [3]


@pytest.mark.parametrize("method", ["dopri5", "midpoint"])
def test_a_velocity_that_is_not_finite_is_refused(method):
    net = Field(lambda x, t, c: torch.where(t > 0.4, torch.nan, x))
    with pytest.raises(ValueError, match="not finite"):
        sample(net, torch.ones(2, 1), method, noise=torch.ones(2, 1))


def test_unknown_method():
    with pytest.raises(ValueError, match="dopri5 or midpoint, not 'euler'"):
        sample(Field(FIELDS["zero"]), torch.ones(2, 1), "euler", noise=torch.ones(2, 1))
