"""DPM-Solver's formulas (Lu et al. 2022), written out as in the paper, with k-diffusion's noise and step sizes.

`seen(x, sigma)` returns the noise in x at a level beside a signal of 1; `draw()` a step's new noise.
"""

import itertools
import math

import torch


def first(x, s, t, noise):
    """DPM-Solver-1 (eq. 3.7) between levels at alpha 1: lambda is -log sigma."""
    h = math.log(s / t)
    return x - t * math.expm1(h) * noise


def second(x, s, t, r, seen):
    """DPM-Solver-2, its evaluation in between anywhere (appendix B)."""
    h = math.log(s / t)
    middle = s * math.exp(-r * h)
    one = seen(x, s)
    two = seen(first(x, s, middle, one), middle)
    return x - t * math.expm1(h) * one - t / (2 * r) * math.expm1(h) * (two - one)


def third(x, s, t, seen, r1=1 / 3, r2=2 / 3):
    """DPM-Solver-3 (algorithm 2)."""
    h = math.log(s / t)
    s1, s2 = s * math.exp(-r1 * h), s * math.exp(-r2 * h)
    one = seen(x, s)
    difference = seen(first(x, s, s1, one), s1) - one
    u = x - s2 * math.expm1(r2 * h) * one - s2 * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * difference
    difference = seen(u, s2) - one
    return x - t * math.expm1(h) * one - t / r2 * (math.expm1(h) / h - 1) * difference


def leading(s, t, low, eta):
    """Return where a step's solver leads to, and how much noise leads back: the ancestral step of k-diffusion."""
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    down = max(math.sqrt(t**2 - up**2), low)
    return down, math.sqrt(t**2 - down**2)


def fast(x, high, low, evaluations, eta, seen, draw):
    """DPM-Solver-fast (section 3.4): third order as long as three evaluations and one more are left."""
    steps = evaluations // 3 + 1
    orders = [3] * (steps - 2) + [2, 1] if evaluations % 3 == 0 else [3] * (steps - 1) + [evaluations % 3]
    assert sum(orders) == evaluations
    levels = [high * (low / high) ** (number / steps) for number in range(steps + 1)]
    for order, (s, t) in zip(orders, itertools.pairwise(levels), strict=True):
        down, up = leading(s, t, low, eta)
        if order == 1:
            x = first(x, s, down, seen(x, s))
        elif order == 2:
            x = second(x, s, down, 1 / 2, seen)
        else:
            x = third(x, s, down, seen)
        if up > 1e-6:
            x = x + up * draw()
    return x


def adaptive(x, high, low, eta, seen, draw):
    """DPM-Solver-23 (appendix C), its step sizes those of k-diffusion; every attempt evaluates anew.

    Return the result, and how many attempts there were and failed.
    """
    s, h, before, tries, failed = high, 0.05, x, 0, 0
    while math.log(s / low) > 1e-5:
        t = max(s * math.exp(-h), low)
        down, up = leading(s, t, low, eta)
        lower, higher = second(x, s, down, 1 / 3, seen), third(x, s, down, seen)
        allowed = torch.maximum(torch.tensor(0.0078), 0.05 * torch.maximum(lower.abs(), before.abs()))
        error = torch.linalg.norm((lower - higher) / allowed).item() / math.sqrt(x.numel())
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / (1.5 if eta else 3)) - 1)
        h *= factor
        tries += 1
        if factor >= 0.81:
            x, before, s = higher + (up * draw() if up > 1e-6 else 0), lower, t
        else:
            failed += 1
    return x, tries, failed
