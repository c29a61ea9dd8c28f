"""The answer of an experiment says what differs from which baseline, where and by how much."""

from selm_jax.lab.findings import answer, finding


def record(relative, p_holm, base=10.0, half=0.5):
    ends = {"low": relative * base - half, "high": relative * base + half}
    values = {"difference": relative * base, "relative": relative, "base": base}
    return values | ends | {"p": p_holm / 4, "p_holm": p_holm}


def found(*cells):
    """Findings of (method, place, relative difference, corrected p)."""
    return [
        finding(record(relative, p), method, "DPO", place, seeds=16)
        for method, place, relative, p in cells
    ]


def test_it_says_where_a_method_is_better_and_where_it_is_worse():
    first, selm, none = answer(
        found(
            ("selm", "needle", -0.4, 0.001), ("selm", "smooth", 0.2, 0.01),
            ("selm", "random", 0.1, 0.06), ("mine", "needle", -0.4, 0.06),
            ("mine", "smooth", 0.0, 1.0), ("mine", "random", 0.0, 1.0),
        ),
        seeds=16,
    )  # fmt: skip
    assert first.startswith(
        "6 comparisons with DPO, each over 16 worlds: 1 with clearly less regret"
    )
    assert "1 with clearly more, 4 undecided" in first
    assert selm == (
        "selm, compared with DPO: less regret in needle (−40 %, 95 % interval −45 to −35); "
        "more regret in smooth (+20 %, 95 % interval 15 to 25)."
    )
    assert none == "Nowhere clearly different from DPO: mine."


def test_of_many_places_it_counts_and_names_the_largest_effect():
    many = [("selm", f"place {i}", -0.1 * i, 0.001) for i in range(1, 7)]
    _, sentence = answer(found(*many), seeds=16)
    assert "less regret in 6 of 6 places, most in place 6 (−60 %, 95 % interval" in sentence
    assert "place 5" not in sentence


def test_a_single_comparison_keeps_its_interval_if_it_is_not_clear():
    _, sentence = answer(found(("selm", "this world", 0.12, 0.5)), seeds=8)
    assert sentence == (
        "selm does not clearly differ from DPO in this world (+12 %, 95 % interval 7.00 to 17)."
    )


def test_a_finding_without_an_interval_has_none():
    cell = record(0.1, 1.0) | {"low": None, "high": None}
    assert str(finding(cell, "selm", "DPO", "needle", 2)) == "needle (+10 %)"
