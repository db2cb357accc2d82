import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alter import TemporalExperts
from alter.evaluation.report.records import describe_masks, read_history
from alter.training.run import train


def test_routes_and_masks_survive(tmp_path):
    import json

    random = np.random.default_rng(0)
    for _ in range(20):
        masks, routes = random.random((3, 7)) < 0.5, np.sort(random.integers(3, size=50))[random.permutation(50)]
        (tmp_path / "h").write_text(json.dumps({"step": 1, "keep_ratio": 0.5, **describe_masks(masks, routes)}) + "\n")
        (record,) = read_history(tmp_path / "h", 50)
        assert np.array_equal(record["mask_EL"], masks) and np.array_equal(record["expert_T"], routes)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_keeps_the_history_of_its_search(small_config, tmp_path, resumed):
    changes = {"log": {"masks_every": 2, "tracker": "tensorboard"}, "train": {"steps": 7, "search_steps": 5},
               "checkpoint": {"every": 3}}
    run = train(small_config("dit", **changes)).run_dir
    if resumed:  # lines of steps that are run again are not doubled
        train(small_config("dit", resume=str(run / "checkpoints/step-000003"), **changes))
    records = read_history(run / "history.jsonl", 1000)
    assert [record["step"] for record in records] == [2, 4, 5]
    experts = TemporalExperts.from_pretrained(run / "final")
    assert np.array_equal(records[-1]["mask_EL"], experts.mask_EL)
    assert np.array_equal(records[-1]["expert_T"], experts.expert_T)
    assert records[-1]["keep_ratio"] == pytest.approx(experts.keep_ratio)
    assert (run / "experts.png").is_file()
    folder = next(file.parent for file in run.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert {event.step for event in events.Images("experts")} == {2, 4, 5}
