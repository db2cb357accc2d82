import os

import pytest
from helpers import run_script

CONFIG = ("--config", "configs/demo_dit.yaml", "--check")


@pytest.mark.parametrize("given, settings", [
    ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
], ids=["unset", "set", "set by the older name"])
def test_gpu_memory_grows_unless_the_user_has_chosen(monkeypatch, given, settings):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_script("train", *CONFIG).returncode == 0
    assert {name: os.environ[name] for name in names if name in os.environ} == settings
