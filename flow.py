"""Conditional flow matching on patches of a slice: velocity network, loss and ODE sampler.

Flow matching (arXiv:2210.02747) turns noise e ~ N(0, 1) into data x along straight lines,
x_t = (1 - t) e + t x, t from 0 to 1. A network v(x_t, t, c) learns the velocity x - e of these
lines by least squares; its minimum is the mean velocity at (x_t, t), and integrating

    dx/dt = v(x, t, c),    x(0) = e ~ N(0, 1)

from t = 0 to 1 draws x(1) from p(x | c). Here x is one patch of a slice and the condition c comes
from a transformer that has read everything before that patch (arXiv:2506.14757; connectors.py).

    net = VelocityCNN()                                   # 494,465 parameters
    loss = cfm_loss(net, x, cond).mean()                  # x (N, 1, h, w), cond (N, 2, h, w)
    x, evaluations = sample(net, cond, noise=torch.randn(N, 1, h, w))

`cfm_loss` and `sample` take any `net` with two parts: net.condition(cond) -> c, computed once, and
net(x, t, c) -> velocity, of x's shape.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------- network


class VelocityCNN(nn.Module):
    """v(x, t, c): convolutions over the channels (condition, t, x), so a patch may have any size.

    The first convolution is linear in its input channels, conv(cond, t, x) = conv(cond) +
    conv(t, x): the first term, `condition`, does not change along the ODE and is computed once for
    all its steps. Activations are kept with the channels last in memory: on a CPU 10 to 20% less
    time for 14 x 14 patches."""

    def __init__(self, channels=2, width=64, inner=128, blocks=6):
        super().__init__()
        self.channels = channels
        self.first = nn.Conv2d(channels + 2, width, 3, padding=1)
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            widen = nn.Conv2d(width, inner, 3, padding=1, bias=False)
            narrow = nn.Conv2d(inner, width, 1, bias=False)
            self.blocks.append(nn.ModuleList([widen, narrow]))
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def condition(self, cond):
        """The condition's part of the first convolution, with its bias:
        (N, channels, h, w) -> (N, width, h, w)."""
        cond = cond.contiguous(memory_format=torch.channels_last)
        return F.conv2d(cond, self.first.weight[:, :self.channels], self.first.bias, padding=1)

    def forward(self, x, t, c):
        """x (N, 1, h, w) at times t (N,), with c = condition(cond) -> velocity (N, 1, h, w)."""
        tx = torch.cat((wide(t, x).expand_as(x), x), dim=1)           # (N, 2, h, w)
        tx = tx.contiguous(memory_format=torch.channels_last)
        h = F.conv2d(tx, self.first.weight[:, self.channels:], padding=1) + c
        for widen, narrow in self.blocks:
            y = F.silu(widen(F.silu(h))).permute(0, 2, 3, 1)          # (N, h, w, 128)
            y = F.linear(y, narrow.weight[:, :, 0, 0])                # conv 1x1; as such it is slow
            h = h + y.permute(0, 3, 1, 2)                             # in small batches
        return self.last(F.silu(h))


# -------------------------------------------------------------------------------------------- loss


def cfm_loss(net, x, cond, noise=None, t=None):
    """Mean squared error of the velocity against x - e at x_t = (1 - t) e + t x, of each sample:
    (N,) (arXiv:2210.02747, eq. 23 with sigma_min = 0).

    x (N, ...), cond (N, ...). noise, like x, ~ N(0, 1), and t (N,), ~ U(0, 1), are drawn from
    torch's global generator unless given: a validation loss is comparable from epoch to epoch only
    with the same draws."""
    noise = torch.randn_like(x) if noise is None else noise
    t = torch.rand(len(x), device=x.device) if t is None else t
    x_t = (1 - wide(t, x)) * noise + wide(t, x) * x
    velocity = net(x_t, t, net.condition(cond))
    return (velocity - (x - noise)).square().flatten(1).mean(1)


# ----------------------------------------------------------------------------------------- sampler


# Dormand and Prince (1980), J. Comput. Appl. Math. 6, 19: stage i is at t + NODES[i] h and
# x + h sum_j STAGES[i][j] k_j. The last stage is the 5th-order solution itself, so its velocity is
# the first of the next step. ERROR: that solution minus the embedded 4th-order one of Shampine
# (1986), Math. Comput. 46, 135, the pair of torchdiffeq's dopri5: 2/3 of Dormand and Prince's own
# estimate.
NODES = [1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1]
STAGES = [[1 / 5],
          [3 / 40, 9 / 40],
          [44 / 45, -56 / 15, 32 / 9],
          [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
          [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
          [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]]
ERROR = [71 / 86400, 0, -142 / 50085, 71 / 2880, -5751 / 169600, 44 / 1575, -1 / 60]


@torch.no_grad()
def sample(net, cond, method="dopri5", *, noise, steps=20, rtol=1e-3, atol=1e-3):
    """Integrate dx/dt = v(x, t, cond) from t = 0 to 1 -> (x, evaluations): x, like `noise`, and the
    number of evaluations of the network that each sample took, (N,) int64.

    cond (N, ...), noise (N, ...): x(0). "dopri5" chooses the step of each sample by its own error,
    within rtol and atol: a sample does not depend on what else is in the batch but through the
    rounding of the kernels. "midpoint" takes `steps` equal steps of two evaluations. Raises
    ValueError for another method and where a velocity is not finite."""
    if method == "dopri5":
        return dopri5(net, net.condition(cond), noise, rtol, atol)
    if method == "midpoint":
        return midpoint(net, net.condition(cond), noise, steps)
    raise ValueError(f"the sampler is dopri5 or midpoint, not {method!r}")


def midpoint(net, c, x, steps):
    """Second order: a step of half the length finds the velocity for the whole one."""
    h = 1 / steps
    for i in range(steps):
        t = x.new_full((len(x),), i * h)
        half = x + h / 2 * net(x, t, c)
        x = x + h * net(half, t + h / 2, c)
    if not x.isfinite().all():
        raise ValueError("the velocity network returned values that are not finite: the model has "
                         "diverged or is damaged")
    return x, torch.full((len(x),), 2 * steps, device=x.device)


def dopri5(net, c, x, rtol, atol):
    """Fifth order with adaptive steps (Hairer, Norsett, Wanner, Solving Ordinary Differential
    Equations I, section II.4), a step size for each sample.

    All samples take a step at the same time, accepted or repeated each on its own; those at t = 1
    leave the batch. A step waits for the device once, and again where a sample leaves."""
    done = torch.empty_like(x)
    evaluations = torch.full((len(x),), 2, device=x.device)           # of the first step's length
    rows = torch.arange(len(x), device=x.device)                      # of the samples under way
    t = x.new_zeros(len(x))
    k = net(x, t, c)
    h = first_step(net, c, x, k, rtol, atol)
    while len(rows):
        left = 1 - t
        h = torch.minimum(h, left)
        stuck = ~(t + h > t)                                          # also where h is no number
        ks = [k]
        for node, weights in zip(NODES, STAGES):
            y = x + wide(h, x) * sum(a * k for a, k in zip(weights, ks))
            ks.append(net(y, t + node * h, c))
        evaluations[rows] += 6
        error = wide(h, x) * sum(b * k for b, k in zip(ERROR, ks))
        ratio = rms(error / (atol + rtol * torch.maximum(x.abs(), y.abs())))       # (n,)
        accept = ratio <= 1
        x = torch.where(wide(accept, x), y, x)
        k = torch.where(wide(accept, x), ks[-1], ks[0])
        t = torch.where(accept, torch.where(h < left, t + h, 1.0), t)
        # The error goes as h^5. A new step is 0.2 to 10 times the old one, and not shorter after
        # success.
        shrink = torch.where(accept, 1.0, 0.2)
        h = h * torch.maximum((0.9 * ratio ** -0.2).clamp(max=10), shrink)
        going, failed = torch.stack([t < 1, stuck]).tolist()
        if any(failed):
            raise ValueError(f"the step of the sampler fell to nothing at t = {t.min():.3g}: the "
                             "velocity is not finite (the model has diverged or is damaged), or "
                             f"rtol and atol are too small for {x.dtype}")
        if not all(going):
            done[rows] = x
            under_way = (t < 1).nonzero()[:, 0]
            rows, t, h, x, k, c = (v[under_way] for v in (rows, t, h, x, k, c))
    return done, evaluations


def first_step(net, c, x, k, rtol, atol):
    """A step at whose end an Euler step would be wrong by about 1% of the tolerance (the same book,
    section II.4) -> (N,)."""
    scale = atol + rtol * x.abs()
    d0 = rms(x / scale)
    d1 = rms(k / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    d2 = rms((net(x + wide(h0, x) * k, h0, c) - k) / scale) / h0      # second derivative
    steepest = torch.maximum(d1, d2)
    h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * h0, h1)


def rms(v):
    """Root mean square of each sample: (N, ...) -> (N,)."""
    return v.flatten(1).square().mean(1).sqrt()


def wide(v, x):
    """(N,) -> (N, 1, ...), to multiply x."""
    return v.view(-1, *[1] * (x.dim() - 1))
