"""The sensitivity table, measured on the dense model."""

from itertools import pairwise

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from ..backbones.noising import edges_of
from ..common.config import Config
from ..method.sensitivity import Sensitivity
from .probe import Probe
from .setup.parts import Parts


def measure_sensitivity(config: Config, parts: Parts, bins: int = 10, samples: int = 32, batch_size: int = 16,
                        trials: int = 4, shared: bool = False) -> Sensitivity:
    """Takes L + 1 forwards of `samples` samples a bin and, for the response, about bins + 1 more for each of `trials`
    layers, drawn with the seed. shared: as of `Probe`."""
    probe, sites = Probe(config, parts, samples, batch_size, shared), parts.simulator.sites
    edges = edges_of(parts.noising, bins)
    alone = ~np.eye(len(sites), dtype=bool)
    bins_of = tqdm(list(pairwise(edges)), unit="bin", desc="sensitivity", dynamic_ncols=True,
                   disable=not PartialState().is_main_process)
    columns = [probe.errors(alone, int(low), int(high)) for low, high in bins_of]
    tried = np.random.default_rng([config.seed, 12]).permutation(len(sites))[:trials]
    return Sensitivity(tuple(site.name for site in sites), tuple(map(int, edges)), samples,
                       np.array([errors for errors, _ in columns]).T, np.array([denoise for _, denoise in columns]),
                       probe.amplification(alone[tried], edges))
