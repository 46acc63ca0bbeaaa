"""`quantizer.weight_bits=auto` keeps the average, and gives 8 bits to the linears where 4 cost most."""

from __future__ import annotations

import pytest

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.pipeline.bit_pass import choose_bits
from haq_lab.pipeline.record import pass_metrics, pass_tables
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.haq.quantizer import HAQ
from haq_lab.quantizers.rtn import RTN
from haq_lab.result_cache.store import Store
from haq_lab.utils.timer import Stopwatch


def choose(model, quantizer, windows):
    return choose_bits(model, quantizer, windows, CalibrationPolicy(), Store(), Stopwatch())


def test_other_quantizers_choose_nothing(tiny, windows):
    assert choose(tiny, RTN(weight_bits=4), windows) is None
    assert choose(tiny, HAQ(), windows) is None


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_chosen_bits_are_those_of_the_layers_and_the_record(tiny, windows):
    quantizer, layers = HAQ(weight_bits="auto", bits=6, group=32), []
    allocation = choose(tiny, quantizer, windows)
    assert set(allocation.values()) == {4, 8}
    inputs = PassInputs(tiny, quantizer, ReferenceBackend(), windows)
    passed = sequential_pass(inputs, lambda index, layer: layers.append(layer))
    bits = {}
    for (index, names), chosen in allocation.items():
        for name in names:
            linear = layers[index].get_submodule(name)
            assert isinstance(linear, Int8Linear)
            assert (linear.format.bits, linear.format.group) == (chosen, 32 if chosen == 4 else None)
            bits[index, name] = chosen * linear.in_features * linear.out_features
    metrics, table = pass_metrics(passed), pass_tables(passed)["layers"]
    weights = table["weights"].sum()
    assert sum(bits.values()) / weights == metrics["quantizer.bits_per_weight"] <= 6
    assert metrics["quantizer.bits_per_weight"] > 5.5, "the room is used"
    assert metrics["quantizer.share_4bit"] == pytest.approx((8 - metrics["quantizer.bits_per_weight"]) / 4)
    assert {(row.layer, row.linear): row.weight_bits * row.weights for row in table.itertuples()} == bits


class OutputProjectionsMatter(HAQ):
    """Predicts that only output projections lose anything in 4 bits."""

    def weight_error(self, weight, statistics, cost):
        return float(weight.shape[0] == weight.shape[1] and self.weight_bits == 4)


@pytest.mark.parametrize("architecture", ["llama"])
def test_8_bits_go_where_they_save_most(tiny, windows):
    allocation = choose(tiny, OutputProjectionsMatter(weight_bits="auto", bits=4.5, group=32), windows)
    assert {names for (_, names), bits in allocation.items() if bits == 8} == {("self_attn.o_proj",)}
    assert sum(bits == 8 for bits in allocation.values()) == tiny.depth
