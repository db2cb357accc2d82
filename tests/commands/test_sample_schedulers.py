"""`alter sample --scheduler`: a scheduler of another noise than the pipeline's own is refused."""


import pytest
from conftest import make_dit
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from helpers import experts_for

from alter import ClassConditionalPipeline
from alter.commands import main


@pytest.mark.parametrize("own, other", [
    (FlowMatchEulerDiscreteScheduler, "DDIMScheduler"), (FlowMatchEulerDiscreteScheduler, "EDMEulerScheduler"),
    (EDMEulerScheduler, "DDIMScheduler"), (EDMEulerScheduler, "FlowMatchEulerDiscreteScheduler"),
    (DDPMScheduler, "FlowMatchEulerDiscreteScheduler"), (DDPMScheduler, "EDMEulerScheduler")])
def test_a_scheduler_of_another_noise_is_refused_in_one_line(tmp_path, capsys, own, other):
    pipe = ClassConditionalPipeline(make_dit(), own())
    pipe.save_pretrained(tmp_path / "final")
    experts_for(pipe.transformer, 8).save_pretrained(tmp_path / "final")
    assert main(["sample", "--run", str(tmp_path), "--labels", "1", "--steps", "2", "--scheduler", other,
                 "--out", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "nois" in line and not (tmp_path / "out").exists()
