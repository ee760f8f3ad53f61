"""The tables of the benchmark."""

from __future__ import annotations

from typing import Any


def solvers(found: dict[str, Any]) -> None:
    """Print what every solver took on one problem."""
    radius = found["radius"]
    print(
        f"\ncell {found['problem']}: spectral radius {radius['median']:.3f} in the median, "
        f"{radius['largest']:.3f} at most"
    )
    print(
        f"{'':20}{'to':>7}{'evaluations':>13}{'mean':>8}{'converged':>11}{'seconds':>9}"
        f"{'of forward':>12}{'of torchdeq':>13}"
    )
    for name, row in found["solvers"].items():
        for tol, to in row["to"].items():
            ratios = (to["of_forward"], to.get("of_torchdeq"))
            print(
                f"{name:20}{tol:>7}{shown(to['evaluations']):>13}{shown(to['mean'], 1):>8}"
                f"{to['converged']:11}{shown(to['seconds'], 2):>9}{shown(ratios[0], 2):>12}"
                f"{shown(ratios[1], 2):>13}"
            )
    print(
        f"{'':20}{'residual':>10}{'largest':>10}{'penalty':>9}{'crossover s':>13}"
        f"{'at equal time':>15}"
    )
    for name, row in found["solvers"].items():
        residual = row["residual"]
        print(
            f"{name:20}{residual['typical']:10.1e}{residual['largest']:10.1e}{row['penalty']:9.2f}"
            f"{shown(row.get('crossover'), 2):>13}{shown(row.get('equal_time'), 2):>15}",
            flush=True,
        )


def mixing(found: dict[str, Any]) -> None:
    """Print what the mixing of one iteration takes."""
    print(
        f"\nmixing of one iteration, window {found['window']}, state "
        f"{found['state_bytes'] / 1e6:.1f} MB, copies at "
        f"{found['copied_per_second'] / 1e9:.1f} GB/s"
    )
    print(f"{'':20}{'seconds':>10}{'of its bytes':>14}{'of textbook':>13}")
    for name, row in found["ways"].items():
        print(f"{name:20}{row['seconds']:10.4f}{row['of_bytes']:14.2f}{row['of_textbook']:13.2f}")


def shown(value: float | None, digits: int = 0) -> str:
    """Return a number for a table, a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"
