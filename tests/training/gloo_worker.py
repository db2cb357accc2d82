"""A training run's process: writes its final parameters and masks. Arguments: config, output, double or float."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from alter import load_config
from alter.training.search.elastic import remeasure
from alter.training.setup.parts import build
from alter.training.trainer import Trainer


def main(config_file: str | Path, output: str | Path, dtype: str) -> None:
    config = load_config(config_file)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    parts = build(config, accelerator.num_processes)
    for module in filter(None, (parts.backbone, parts.teacher, parts.hypernetwork)):
        getattr(module, dtype)()
    run_dir = Path(output).with_suffix(".run")
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(config, parts, accelerator, run_dir)
    assert trainer.search is not None
    trainer.search.begin()
    experts = trainer.run()
    if experts.measured is not None:
        experts = remeasure(config, parts, experts)
    torch.save({
        "parameters": {name: p.detach() for name, p in parts.backbone.named_parameters()},
        "hypernetwork": parts.hypernetwork.state_dict() if parts.hypernetwork else {},
        "mask_EL": torch.from_numpy(experts.mask_EL), "expert_T": torch.from_numpy(experts.expert_T),
        "measured": {} if experts.measured is None else {
            "error": torch.from_numpy(experts.measured.error_MB),
            **{space: torch.from_numpy(value) for space, value in experts.measured.response.items()}},
    }, f"{output}-{accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
