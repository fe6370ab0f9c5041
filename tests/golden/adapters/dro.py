"""Adapters of the distributionally robust reweighters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from counterpoise.samplers import (
    ChiSquareDRO,
    CVaR,
    balancing_up_weight,
    chi_square_dual,
    chi_square_value,
    cvar_dual,
    cvar_value,
    just_train_twice_weights,
    kl_ball_temperature,
    kl_ball_value,
    kl_ball_weights,
    multilevel_estimate,
    tilted_value,
    tilted_weights,
)
from tests.golden.runner import Case

Outputs = dict[str, Any]


def geometry(case: Case) -> str:
    name = case.param("geometry")
    assert name in ("cvar", "chi-square")
    return name


def value_of(name: str, size: float, penalty: float = 0.0) -> Callable[[Tensor], Tensor]:
    if name == "cvar":
        return partial(cvar_value, alpha=size, penalty=penalty)
    return partial(chi_square_value, radius=size, penalty=penalty)


def dro_cvar_chi2(case: Case) -> Outputs:
    name, size, penalty, losses = geometry(case), case.param("size"), case.param("reg"), case.input("losses")
    part = CVaR(size, penalty) if name == "cvar" else ChiSquareDRO(size, penalty)
    return {"loss": value_of(name, size, penalty)(losses), "weights": part(losses)}


def dro_dual(case: Case) -> Outputs:
    name, size, penalty = geometry(case), case.param("size"), case.param("reg")
    dual = partial(cvar_dual, alpha=size) if name == "cvar" else partial(chi_square_dual, radius=size)
    return {"loss": dual(case.input("losses"), case.input("eta").squeeze(), penalty=penalty)}


def dro_kl_ball(case: Case) -> Outputs:
    losses, radius = case.input("losses"), case.param("rho")
    return {
        "loss": kl_ball_value(losses, radius),
        "weights": kl_ball_weights(losses, radius),
        "temperature": kl_ball_temperature(losses, radius),
    }


def dro_mlmc(case: Case) -> Outputs:
    value = value_of(geometry(case), case.param("size"))
    base = max(case.param("batch_size_min") // 2, 1)  # the released code names the smallest batch, not its half
    probability = case.param("pmf_of_this_batch_size")
    return {"loss": multilevel_estimate(case.input("losses"), value, base=base, probability=probability)}


def jtt(case: Case) -> Outputs:
    copies = case.param("up_weight")
    error = case.input("predictions") != case.input("labels")
    found = error.nonzero().flatten().tolist()
    factor = balancing_up_weight(error) - 1 if copies == -1 else copies  # extra copies: the original counts once
    up_weight = "auto" if copies == -1 else copies + 1
    return {
        "error_set": found,
        "factor": factor,
        "index_list": [*range(len(error)), *found * factor],
        "equivalent_sample_weight": just_train_twice_weights(error, up_weight),
    }


def tilted_erm(case: Case) -> Outputs:
    losses, tilt = case.input("losses"), case.param("t")
    return {"loss": tilted_value(losses, tilt), "weights": tilted_weights(losses, tilt)}


ADAPTERS: dict[str, Callable[[Case], Outputs]] = {
    "dro_cvar_chi2": dro_cvar_chi2,
    "dro_dual": dro_dual,
    "dro_kl_ball": dro_kl_ball,
    "dro_mlmc": dro_mlmc,
    "jtt": jtt,
    "tilted_erm": tilted_erm,
}
