"""The widths that a device multiplies, and what a plan recommends there."""

import choosing
import pytest
import torch

from s2q.common import processor
from s2q.planning import device_products, gpus, plan, planned_widths
from s2q.planning.widths import RECOMMENDED, WITHOUT_CALIBRATION, recommended_recipe
from s2q.recipes.load import load_recipe, recipe_names

BEST, ON_AVX2 = RECOMMENDED  # the first has levels of 8 bits
ALL = ("w8a8", "w4a8", "w4a6", "w4a4")
NVFP4 = tuple(
    f"{side}={{num_bits: 4, granularity: per_group, group_size: 16, levels: nvfp4}}"
    for side in ("weights", "activations")
)


def on_gpu(recipe, *overrides, capability=(9, 0)):
    return planned_widths(load_recipe(recipe, overrides=overrides), device_products("cuda", capability=capability))


def cpu_with(features, monkeypatch):
    monkeypatch.setattr(processor, "_detected", lambda: frozenset(features))
    for cap in processor.CAPS:
        monkeypatch.delenv(cap, raising=False)
    processor.features.cache_clear()
    return device_products("cpu")


@pytest.fixture(autouse=True)
def features_of_this_machine():
    yield
    processor.features.cache_clear()


@pytest.mark.parametrize(
    ("features", "integer"),
    [
        ({"avx2", "avx512", "avx512_vnni"}, ALL),
        ({"avx2"}, ALL[1:]),  # 8-bit weights by 8-bit inputs saturate
        ({"avx2", "avx_vnni"}, ALL[1:]),
        (set(), ()),
    ],
)
def test_a_cpu_has_the_widths_that_its_product_is_fast_for(features, integer, monkeypatch):
    assert cpu_with(features, monkeypatch).integer == integer


@pytest.mark.parametrize(
    ("device", "features"),
    [
        ("CPU with AVX-512 VNNI", {"avx2", "avx512", "avx512_vnni"}),
        ("CPU with AVX2 alone", {"avx2"}),
        ("other CPUs", ()),
    ],
)
def test_the_table_of_the_docs_has_the_products_of_cpus(device, features, monkeypatch):
    narrow, wide, _ = choosing.CPUS[device]
    integer = cpu_with(features, monkeypatch).integer
    assert (narrow, wide) == tuple("int8" if width in integer else "fp32" for width in ("w4a8", "w8a8"))


def test_linears_without_a_product_are_named(monkeypatch):
    avx2 = cpu_with({"avx2"}, monkeypatch)
    for recipe, native in (("table-w4a8", False), ("s2q-w8a8", False), ("s2q-w4a8", True), ("rtn-w4a16", None)):
        assert planned_widths(load_recipe(recipe), avx2).native is native, recipe


@pytest.mark.parametrize(
    ("recipe", "same_cost", "recommended"),
    [
        ("s2q-w4a6", "s2q-w4a8", ON_AVX2),
        ("rtn-w4a6", "rtn-w4a8", ON_AVX2),
        ("rtn-w4a8", None, ON_AVX2),
        (WITHOUT_CALIBRATION, None, ON_AVX2),  # its levels are of 8 bits
        (ON_AVX2, None, None),
        (BEST, None, ON_AVX2),
    ],
)
def test_a_cpu_is_recommended_what_it_multiplies(recipe, same_cost, recommended, monkeypatch):
    widths = planned_widths(load_recipe(recipe), cpu_with({"avx2"}, monkeypatch))
    assert (widths.same_cost, widths.recommended) == (same_cost, recommended)


@pytest.mark.parametrize(
    ("features", "recipe"), [({"avx2"}, ON_AVX2), ({"avx2", "avx512", "avx512_vnni"}, BEST), (set(), BEST)]
)
def test_the_next_command_has_the_recipe_that_a_plan_recommends(features, recipe, monkeypatch):
    cpu_with(features, monkeypatch)
    assert recommended_recipe("cpu") == recipe


GROUPS = "weights={num_bits: 4, granularity: per_group, group_size: 32}"


def test_products_of_groups_of_weights_are_not_fast(monkeypatch):
    for products in (cpu_with({"avx2"}, monkeypatch), device_products("cuda", capability=(9, 0))):
        widths = planned_widths(load_recipe("rtn-w4a6", overrides=[GROUPS]), products)
        assert (widths.native, widths.same_cost) == (False, None)
    assert on_gpu("table-w4a8").native, "its groups are in the levels"


def test_a_changed_recipe_is_told_the_setting_and_no_other_recipe():
    assert on_gpu("s2q-w4a6", "rounding.allow_fallback=false").same_cost == "activations.num_bits=8"


@pytest.mark.parametrize(
    ("capability", "integer", "fp4"),
    [
        ((0, 0), (), False),  # ROCm
        ((7, 5), (), False),
        *(((major, minor), ALL, False) for major, minor in ((8, 0), (8, 6), (8, 9), (9, 0))),
        *(((major, minor), ALL, True) for major, minor in ((10, 0), (12, 0))),
        ((11, 0), (), True),  # no tiles are known
    ],
)
def test_a_gpu_has_the_widths_of_its_capability(capability, integer, fp4):
    products = device_products("cuda", capability=capability)
    assert (products.integer, products.fp4) == (integer, fp4)


@pytest.mark.parametrize(
    ("recipe", "same_cost", "recommended"),
    [
        ("s2q-w4a6", "s2q-w4a8", BEST),
        ("s2q-plus-w4a4", ON_AVX2, BEST),
        ("s2q-w3a6", "activations.num_bits=8", BEST),
        (BEST, None, None),
        (ON_AVX2, None, BEST),
        ("rtn-w4a4", "rtn-w4a8", WITHOUT_CALIBRATION),
        ("rtn-w4a16", None, WITHOUT_CALIBRATION),
        (WITHOUT_CALIBRATION, None, None),
        ("s2q-w8a8", None, None),
        ("q-dit-w4a4", None, BEST),  # simulated
        ("s2q-export-w4a4", None, None),
        ("convrot-w4a4", None, None),
    ],
)
def test_eight_bit_inputs_cost_the_same(recipe, same_cost, recommended):
    widths = on_gpu(recipe)
    assert (widths.same_cost, widths.recommended) == (same_cost, recommended)


def test_nothing_is_recommended_where_nothing_is_multiplied():
    widths = on_gpu("s2q-w4a6", capability=(7, 5))
    assert (widths.native, widths.same_cost, widths.recommended) == (False, None, None)


def test_nvfp4_is_native_on_blackwell_alone():
    assert on_gpu("rtn-w4a4", *NVFP4, capability=(12, 0)).native
    assert on_gpu("rtn-w4a4", *NVFP4, capability=(12, 0)).recommended is None
    assert on_gpu("rtn-w4a4", *NVFP4, capability=(9, 0)).native is False


@pytest.mark.parametrize("name", recipe_names())
def test_what_costs_the_same_takes_the_same_bytes(name):
    other = on_gpu(name).same_cost
    if other in recipe_names():
        sizes = [plan("synthetic:wan-1.3b", recipe=recipe).storage["quantized_bytes"] for recipe in (name, other)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)  # clip ratios of some are for narrow inputs alone


def test_gpus_by_name_have_a_capability():
    for name, rates in gpus().items():
        assert plan("synthetic:wan-1.3b", recipe="rtn-w4a6", device=name).widths.products.fp4 == (
            rates.capability >= (10, 0)
        )


def test_a_gpu_that_is_not_here_has_no_known_products(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_products("cuda") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert device_products("cuda:1") is None
    assert device_products("cuda").integer == ALL
