"""How far weights go astray with 8-bit states: against the same steps with fp32 states.

    python benchmarks/optim_accuracy.py

AdamW in both state formats where gradients inside a block span some decades; AdEMAMix's slow
momentum over many steps, beside bitsandbytes'. Writes results/<machine>/optim_accuracy.json.
"""

import harness
import torch
from torch.nn import Parameter

from fastssl import optim
from fastssl.bench.baselines import library

N = 1 << 15
SEEDS = (0, 1, 2)


def off(got, expected) -> float:
    """The difference as a share of what was expected, in percent."""
    return 100 * float((got - expected).norm() / expected.norm())


def way(optimizer, p, gradients) -> torch.Tensor:
    for p.grad in gradients:
        optimizer.step()
    return p.detach().clone()


def blocks(state_format: str, decades: float, seed: int) -> dict:
    torch.manual_seed(seed)
    sizes = 1e-3 * 10 ** (-decades * torch.rand(N))
    gradients = [(0.3 + torch.randn(N)) * sizes for _ in range(100)]
    ways = []
    for make, more in ((torch.optim.AdamW, {}), (optim.AdamW8bit, {"state_format": state_format})):
        p = Parameter(torch.zeros(N))
        ways.append(way(make([p], lr=1e-3, weight_decay=0.0, **more), p, gradients))
    return {"what": "adamw", "state_format": state_format, "decades": decades, "seed": seed,
            "way_off_percent": off(ways[1], ways[0])}  # fmt: skip


def slow_momentum(provider: str, steps: tuple[int, ...], seed: int) -> list[dict]:
    """The momentum is read from the full-precision state_dict, bitsandbytes' by way of ours."""
    forms = {
        "fp32": (optim.AdEMAMix8bit, {"optim_bits": 32}),
        "fastssl": (optim.AdEMAMix8bit, {}),
    }
    if provider == "bitsandbytes":
        forms[provider] = (library("bitsandbytes").optim.AdEMAMix8bit, {})
    found = {}
    for name in ("fp32", provider):
        torch.manual_seed(seed)
        make, more = forms[name]
        p = Parameter(torch.zeros(N))
        optimizer = make([p], lr=1e-4, betas=(0.9, 0.999, 0.9999), weight_decay=0.0, **more)
        reader = optimizer
        if name == "bitsandbytes":
            reader = optim.AdEMAMix8bit([Parameter(p.detach().clone())], betas=(0.9, 0.999, 0.9999))
        for step in range(1, max(steps) + 1):
            p.grad = torch.randn(N)
            optimizer.step()
            if step in steps:
                if reader is not optimizer:
                    reader.load_state_dict(optimizer.state_dict())
                state = reader.full_precision_state_dict()["state"][0]
                found[name, step] = p.detach().clone(), state["exp_avg_slow"].clone()
    return [
        {"what": "ademamix", "provider": provider, "steps": step, "seed": seed,
         "way_off_percent": off(found[provider, step][0], found["fp32", step][0]),
         "slow_momentum_off_percent": off(found[provider, step][1], found["fp32", step][1])}
        for step in steps
    ]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        blocks(form, decades, seed)
        for form in ("bnb", "sqrt") for decades in (0, 2, 3) for seed in SEEDS
    ]  # fmt: skip
    for provider in ("fastssl", "bitsandbytes"):
        for seed in SEEDS:
            rows += slow_momentum(provider, (100, 1000, 4000), seed)
    for row in rows:
        print(*row.values())
    print(harness.write("optim_accuracy", rows))


if __name__ == "__main__":
    main()
