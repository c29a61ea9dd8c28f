"""Writes the table of docs/models.md: runs the parity tests and takes what they measured.

    python docs/models.py

Needs the extras `test` and `parity`.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- measured: python docs/models.py -->", "<!-- end of what is measured -->"
FORMS = {
    "golden": "against stored logits",
    "live": "against transformers, live",
    "padded": "left and right padding",
    "packed": "packed trees",
    "cached": "prefill + cached decode",
    "trained": "trained here, loaded there",
}


class Collect:
    """A pytest plugin: {checkpoint: {form: largest difference}}."""

    def __init__(self):
        self.worst: dict[str, dict[str, float]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        for key, value in report.user_properties if report.when == "call" else ():
            if key == "parity":
                name, form, difference = value
                forms = self.worst.setdefault(name, {})
                forms[form] = max(difference, forms.get(form, 0.0))


def main() -> None:
    found = Collect()
    files = ("models/test_families.py", "weights/test_trained.py")
    every = ("-q", "-m", "not long and not gpu and not servers")  # the slow ones, too
    status = pytest.main([*(str(ROOT / "tests" / file) for file in files), *every], [found])
    if status != 0:
        sys.exit(int(status))
    lines = [
        "| checkpoint | " + " | ".join(FORMS.values()) + " |",
        "| --- |" + " --- |" * len(FORMS),
        *(
            f"| {name} | " + " | ".join(f"{forms[form]:.1e}" for form in FORMS) + " |"
            for name, forms in sorted(found.worst.items())  # several processes finish in any order
        ),
        "",
        "Measured on CPU with "
        + ", ".join(f"{p} {version(p)}" for p in ("jax", "flax", "transformers", "torch"))
        + ".",
    ]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


if __name__ == "__main__":
    main()
