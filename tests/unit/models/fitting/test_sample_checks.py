"""What is refused before a fit, and with which words."""

import numpy as np
import pytest

from pals_ray.models.fitting.sample_checks import SampleError, samples_from_columns

GOOD = {
    "power_cap_w": ["200", "200", "300", "300"],
    "batch_limit": ["8", "16", "8", "16"],
    "throughput_tokens_per_s": ["100", "180", "120", "220"],
    "power_w": ["190", "195", "240", "280"],
}


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        ("power_w", 2, "-5", "row 4: power_w is -5, must be finite and above 0"),
        ("power_w", 0, "nan", "row 2: power_w is nan"),
        ("power_w", 3, "inf", "row 5: power_w is inf"),
        ("throughput_tokens_per_s", 1, "0", "row 3: throughput_tokens_per_s is 0"),
        ("throughput_tokens_per_s", 1, "fast", "row 3: throughput_tokens_per_s is 'fast', must be a number"),
        ("power_cap_w", 1, "", "row 3: power_cap_w is ''"),
        ("batch_limit", 2, "8.5", "row 4: batch_limit is 8.5, must be a whole number"),
        ("batch_limit", 0, "0", "row 2: batch_limit is 0"),
    ],
)
def test_nonsense_is_refused_naming_row_column_and_value(column, row, value, words):
    columns = {name: list(values) for name, values in GOOD.items()}
    columns[column][row] = value
    with pytest.raises(SampleError) as refused:
        samples_from_columns(columns, range(2, 2 + len(GOOD["power_w"])))
    assert words in str(refused.value)


def test_a_missing_column_is_refused_with_those_needed():
    with pytest.raises(SampleError, match=r"column power_w missing.*power_cap_w"):
        samples_from_columns({name: values for name, values in GOOD.items() if name != "power_w"})


def test_two_replica_sizes_in_one_file_are_refused_naming_the_row():
    with pytest.raises(SampleError, match="row 5: num_gpus is 2, most others have 4"):
        samples_from_columns({**GOOD, "num_gpus": ["4", "4", "4", "2"]}, [2, 3, 4, 5])


def test_optional_columns_may_be_absent_or_have_empty_cells():
    table = samples_from_columns({**GOOD, "num_gpus": ["2", "", "2", "2"], "itl_p50_s": ["0.1", "", "nan", "0.2"]})
    assert table.num_gpus == 2
    assert np.isnan(table.latency["itl_p50_s"]).tolist() == [False, True, True, False]
    assert "ttft_p50_s" not in table.latency


def test_a_latency_of_zero_is_refused():
    with pytest.raises(SampleError, match="row 1: itl_p50_s is 0"):
        samples_from_columns({**GOOD, "itl_p50_s": ["0", "", "", ""]})


def test_repeated_cells_are_averaged_and_missing_latencies_ignored():
    columns = {name: [*values, values[0]] for name, values in GOOD.items()}
    columns["power_w"][4] = "210"
    table = samples_from_columns({**columns, "itl_p50_s": ["0.1", "", "", "", ""]}).merged()
    assert len(table) == 4
    assert table.power_w[0] == 200
    assert table.latency["itl_p50_s"][0] == 0.1
