"""Lists the makers' data on devices: their peak arithmetic and memory bandwidth."""

from __future__ import annotations

# Peak bfloat16 TFLOP/s of one device, without sparsity, from the makers' data sheets. The first
# entry that occurs in the device's kind counts. A device of TPU v2, v3 and 7x is half a chip.
PEAKS = (
    ("TPU v2", 22.5), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197),
    ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU v6e", 918), ("TPU7x", 2307 / 2),
    ("H100 PCIe", 756), ("H100 NVL", 835),
    ("H100", 989), ("H200", 989), ("GH200", 989), ("B200", 2250),
    ("A100", 312), ("A10G", 70), ("A10", 125), ("L40S", 362), ("L40", 181), ("L4", 121),
)  # fmt: skip

# GB/s of a device's memory, likewise. A100: 40 and 80 GB; GH200: with 96 GB of HBM3.
BANDWIDTHS = (
    ("TPU v4", 1228), ("TPU v5 lite", 819), ("TPU v5e", 819), ("TPU v5", 2765),
    ("TPU v6 lite", 1638), ("TPU v6e", 1638), ("TPU7x", 7380 / 2),
    ("A100-SXM4-40GB", 1555), ("A100-PCIE-40GB", 1555), ("A100-SXM4-80GB", 2039),
    ("A100 80GB PCIe", 1935), ("H100 PCIe", 2000), ("H100 NVL", 3900), ("H100", 3350),
    ("GH200", 4000), ("H200", 4800), ("B200", 8000), ("A10G", 600),
    ("L40S", 864), ("L40", 864), ("L4", 300),
)  # fmt: skip


def known(table: tuple[tuple[str, float], ...], kind: str) -> float | None:
    """Looks up a device kind in `PEAKS` or `BANDWIDTHS`; None if the kind is missing."""
    return next((rate for name, rate in table if name in kind), None)
