"""Writes reports: a self-contained HTML page about one run, or about several side by side.

`data.py` reads a run folder into plain values, `texts.py` measures the texts of the answers,
`summary.py` describes numbers and findings in words, `plots.py` draws single plots, `curves.py` and
`run_plots.py` choose the plots of a run, and `page.py` lays out the page. The page loads nothing:
it contains its styles, script and plots, and every answer as text.

    from selm_jax.report.page import write
    write([Path("runs/quickstart")], Path("runs/quickstart/report.html"))
"""
