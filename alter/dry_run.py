"""What a configuration means, before anything is loaded: sites, MACs, budget, memory."""

from .build import check_batch, describe
from .config import Config

_GIB = 2**30


def describe_run(config: Config, processes: int = 1) -> str:
    """The text of `scripts/train.py --dry-run`; needs no weights and no network."""
    check_batch(config, processes)
    backbone, cost, budget = describe(config)
    kept = (budget.keep_ratio - budget.fixed) * budget.scale / cost.prunable_share
    total = budget.keep_ratio if budget.over == "total" else 1 - cost.prunable_share * (1 - budget.keep_ratio)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    scale, unit = cost.unit
    memory = {
        "weights (fp32)": 4, "teacher (fp32)": 4, "gradients (fp32)": 4, "optimizer (AdamW)": 8,
        **({"weights' average (EMA)": 4} if config.train.ema_decay else {}),
    }
    lines = [
        cost.table(), "",
        f"{type(backbone).__name__}: {len(cost.sites)} sites, {cost.macs_total / scale:.1f} {unit} a forward "
        "(batch 1; convolutions, matrix and attention products)",
        f"prunable: {cost.prunable_share:.1%} of the MACs",
        f"budget: keep {budget.keep_ratio:.3f} of the {budget.over} MACs, which is {total:.3f} of all MACs and "
        f"{kept:.3f} of the prunable ones; {config.experts.count} experts",
        f"updates: {config.train.t_end} of {config.train.steps} steps search, "
        f"{config.train.batch_size} samples each",
        f"memory a process, without activations ({parameters / 1e6:.1f}M trained parameters):",
    ]
    lines += [f"  {name:22} {parameters * size / _GIB:7.2f} GiB" for name, size in memory.items()]
    lines.append(f"  {'total':22} {parameters * sum(memory.values()) / _GIB:7.2f} GiB")
    return "\n".join(lines)
