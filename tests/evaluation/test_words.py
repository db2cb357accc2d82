"""Numbers and summaries as text."""

import pytest

from alter.evaluation.report.words import duration, macs, number, percent, summary_groups, summary_table

SUMMARY = {
    "keep_ratio_target": 0.65, "budget_over": "total", "keep_ratio": 0.6510799, "prunable_share": 0.9966,
    "macs_dense": 19141632, "macs_experts": 12462732, "experts_count": 4, "experts_used": 3, "experts_unused": [2],
    "skipped_samples": 0, "truncated_prompts": 7, "skipped_updates": 0, "output_error": 0.00642652,
    "denoise_error": None, "output_error_by_timestep": [0.1, 0.2], "sampling_steps": 20, "guidance_scale": 1.5,
    "samples": 1000,
    "fd_dense_50": 5.956896, "fd_halves_dense_50": [9.9, 9.6], "accuracy_dense_50": 0.991, "fd_experts": 484.7943,
    "fd_halves_experts": [1.0, 2.0], "accuracy_experts": 0.9, "seconds_total": 636.44,
}


@pytest.mark.parametrize("form, value, text", [
    (number, 484.7943, "485"), (number, 5.9569, "5.96"), (number, 0.00643, "0.00643"), (number, 12345.6, "12,346"),
    (number, 0.0, "0"), (number, 4.2e-7, "4.20e-07"), (number, 1000, "1,000"), (number, "text", "text"),
    (number, -2.5, "-2.50"), (number, float("nan"), "nan"), (number, float("inf"), "inf"),
    (percent, 0.651, "65.1%"), (percent, 0.65, "65%"), (percent, 1.0, "100%"), (percent, "?", "?"),
    (macs, 402_100_000_000, "402 GMACs"), (macs, 12_462_732.0, "12.5 MMACs"), (macs, 20.1e12, "20.1 TMACs"),
    (macs, 999_950_000, "1.00 GMACs"), (macs, "?", "?"),
    (duration, 0.588, "0.588 s"), (duration, 119.0, "119 s"), (duration, 636.4, "11 min"),
    (duration, 7300, "2 h 2 min"),
])
def test_numbers(form, value, text):
    assert form(value) == text


def test_a_summary_in_groups():
    assert summary_groups(SUMMARY) == {
        "Budget": {"target": "65% of the dense model's MACs", "MACs kept": "65.1% of the dense model's",
                   "MACs per step": "12.5 MMACs; dense: 19.1 MMACs",
                   "MACs of the prunable layers": "99.7% of the dense model's"},
        "Experts": {"number": "4, unused: expert 2"},
        "Quality": {
            "samples": "1,000, guidance scale 1.5",
            "dense, 50 steps": "Fréchet distance 5.96, accuracy 99.1%",
            "experts, 20 steps": "Fréchet distance 485, accuracy 90%"},
        "Mean squared error on held-out data": {"against the dense model's output": "0.00643"},
        "Run": {"duration": "11 min", "truncated prompts": "7"},
    }
    several = summary_groups({**SUMMARY, "experts_used": 2, "experts_unused": [1, 2], "time_ratio": 0.7,
                              "time_measured_on": "a GPU", "budget_over": "prunable", "anything": 3,
                              "anything_none": None})
    assert several["Experts"]["number"] == "4, unused: experts 1, 2" and several["Other"] == {"anything": "3"}
    ladder = summary_groups({**SUMMARY, "experts_count": 21, "experts_used": 4, "experts_unused": [0, *range(8, 18)]})
    assert ladder["Experts"]["number"] == "4, 6 more in other rungs, 11 unused"
    assert several["Budget"]["target"] == "65% of the dense model's time of the prunable layers"
    assert several["Budget"]["time kept"] == "70% of the dense model's, measured on a GPU"


def test_the_table():
    lines = summary_table(SUMMARY).splitlines()
    assert lines[:2] == ["Budget", "  target                            65% of the dense model's MACs"]
    assert [line for line in lines if not line.startswith(" ")] == list(summary_groups(SUMMARY))
    assert "None" not in "".join(lines) and "[" not in "".join(lines) and max(map(len, lines)) <= 100
    assert summary_table({}) == ""
